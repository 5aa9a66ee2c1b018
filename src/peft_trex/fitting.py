"""Before training: cluster the prompts' embeddings, and store the centroids with the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .batches import check_count, reading
from .clustering import Fit, TRexPriorReport, cluster, distance
from .config import TRexConfig
from .embeddings import tokenize_prompts
from .layer import TRexLayer
from .model import TRexModel, find_tuner
from .prior import SemanticPrior
from .sampling import PART, Ranks, Reservoir, describe
from .scoring import EMBEDS

GIVE_EMBEDDINGS = "embeddings=, of shape (N, prior_dim)"
SAMPLE_BYTES = 256 * 10**6  # of embeddings that are held and clustered,
SAMPLE_PER_CLUSTER = 256  # but at least so many for each cluster
SETTLED_FROM = 100  # prompts for each cluster, before a look whether the centroids have settled
MEET = 256  # batches, at most, between two meetings of the ranks


def initialize_trex_prior(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    *,
    adapter_name: str = "default",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
    embeddings: Tensor | np.ndarray | Sequence[Any] | None = None,
    tokenizer: Any = None,
    tolerance: float | None = None,
) -> TRexPriorReport:
    """Fit an adapter's semantic prior: embed the training prompts and cluster them (arXiv 2404.08985).

    A prompt's embedding is the mean of the frozen input embeddings over its tokens: those that are attended to and,
    in a causal language model that is given labels or a `completion_mask`, come before the first that is predicted.
    The embeddings are centred by their mean, whitened where the adapter has `prior_whitening`, normalised, and
    clustered with k-means. Centroids, mean, whitening, and the mean score of each cluster are stored with the adapter,
    which saves, loads and pushes them. The adapter is touched only when all is done.

    Memory does not grow with the data: k-means gets a uniform sample of the prompts, drawn as they come, of at most
    256 MB (62,500 prompts at width 1024), or 256 prompts for each cluster where that is more. Data that come sorted by
    task do no harm. The mean is that of all prompts; the mean scores are the sample's.

    Where torch.distributed is initialised with several processes, all of them must call this, each with its own share
    of the data (or all with the same). Rank 0 clusters a sample of all shares, and all end with the same values, bit
    for bit. An error on one rank is raised on all when they next meet, which is after 1, 2, 4, ... and then every 256
    batches; a rank that is interrupted or killed stops the others there too. Where a data loader itself waits for
    other ranks (accelerate's `dispatch_batches`), that may take until the process group's timeout.

    Args:
        model: a model with a T-REX adapter, as `get_peft_model` returns it.
        dataloader: batches as the model's forward takes them, read once, as they come: any iterable. The global random
            states of torch, NumPy and Python are left as they were.
        adapter_name: the adapter to fit.
        max_batches: stop after this many batches, in each process; None reads all.
        seed: of the sample and the clustering.
        progress: show a progress bar.
        embeddings: (N, d) embeddings of the training prompts instead of a dataloader, for an adapter with
            `prior_encoder="external"`, d being its `prior_dim`: a tensor, an array (memory-mapped too), a data set's
            column, all read in parts. A dataloader does as well if its batches have `semantic_embeds`, as
            [`SemanticEmbedsCollator`] adds them.
        tokenizer: for a dataloader whose batches are rows with a `prompt`, as those of TRL's GRPOTrainer.
        tolerance: stop when the centroids have settled: the prompts so far are clustered each time that their number
            has doubled, from 100 for each cluster on, until the mean of 1 - cos between the centroids and the former
            ones, matched with each other, is below this. Only for shuffled data: what comes later is not looked at.
            k-means ends in another optimum for each sample, so that even 0.1 may never be reached where prompts form
            no clear groups; `max_batches` is the surer way. None reads all.

    Returns:
        A report: prompts seen and clustered, cluster sizes, explained variance.

    Raises:
        ValueError, TypeError: if there is no such adapter, it has no prior, the data do not fit its encoder, hold NaN,
            have fewer distinct prompts than the adapter has clusters, or vary in fewer directions than it whitens.
        RuntimeError: if another rank failed.
    """
    with Ranks() as ranks:  # first of all, so that no error on a single rank leaves the others waiting
        tuner, config, prior = _find_prior(model, adapter_name)
        check_count("max_batches", max_batches)
        check_count("seed", seed, least=0, none=False)
        _check_tolerance(tolerance)
        external = config.prior_encoder == "external"
        if (embeddings is None) == (dataloader is None) or (embeddings is not None and not external):
            wanted = "a dataloader and no embeddings"
            if external:
                wanted = f"either {GIVE_EMBEDDINGS}, or a dataloader whose batches have {EMBEDS}"
            raise ValueError(
                f"The adapter {adapter_name!r} has prior_encoder={config.prior_encoder!r}; give {wanted}."
            )

        def embed(number: int, batch: Any) -> np.ndarray:
            if embeddings is None:
                rows, where = _embed_batch(tuner, prior.dim, external, batch, tokenizer), f"batch {number}"
            else:
                rows, where = batch, f"the {PART} rows from {PART * number} on"
            rows = rows[rows.any(1)] if external else rows  # those without a prompt are zero
            _check_finite(rows, where)
            return rows

        source: AbstractContextManager[Iterable[Any]]
        if dataloader is None:
            assert embeddings is not None
            source = nullcontext(_parts(embeddings, prior.dim))
        else:
            source = reading(dataloader, max_batches, progress and ranks.rank == 0, "T-REX prior")
        held = nullcontext() if external else tuner.prompts.scorer.whole_embedding()
        with held, source as batches:
            fit = _fit_stream(batches, embed, prior, ranks, seed, tolerance)
        prior.set(fit.centroids, fit.mean, fit.mean_scores, fit.whitening)
        tuner.forget_static(adapter_name)
    return fit.report


class TRexPriorCallback(TrainerCallback):
    """Fits the semantic prior of the active T-REX adapters when training starts, from the training data.

    An adapter whose prior is fitted already keeps it, and a resumed training fits nothing. In a distributed training
    each process reads its share of the data, and all get the same prior. For an adapter with
    `prior_encoder="external"` the batches need `semantic_embeds`, as [`SemanticEmbedsCollator`] adds them.

    Args:
        max_batches: read at most this many batches of the training data; None reads all.
        seed: of the clustering.
        progress: show a progress bar.
        tolerance: stop when the centroids have settled, as in [`initialize_trex_prior`]; None reads all.
    """

    def __init__(
        self,
        max_batches: int | None = None,
        seed: int = 0,
        progress: bool = True,
        tolerance: float | None = None,
    ) -> None:
        self.max_batches = max_batches
        self.seed = seed
        self.progress = progress
        self.tolerance = tolerance

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        train_dataloader: Iterable[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step > 0:  # a prior that changes between two steps would change what the adapter has learned
            return
        if model is None or train_dataloader is None:
            raise ValueError(
                "TRexPriorCallback needs the Trainer's model and train_dataloader; it was called without."
            )
        tuner = find_tuner(model)
        for name in tuner.active_adapters:
            prior = tuner.prior_of(name)
            if prior is not None and not prior.fitted:
                initialize_trex_prior(
                    tuner,
                    train_dataloader,
                    adapter_name=name,
                    max_batches=self.max_batches,
                    seed=self.seed,
                    progress=self.progress,
                    tokenizer=kwargs.get("processing_class"),
                    tolerance=self.tolerance,
                )


def _find_prior(model: nn.Module, adapter_name: str) -> tuple[TRexModel, TRexConfig, SemanticPrior]:
    tuner = find_tuner(model)
    config = tuner.config_of(adapter_name)
    prior = tuner.prior_of(adapter_name)
    if not config.use_prior:
        raise ValueError(f"The adapter {adapter_name!r} has use_prior=False, so there is no prior to fit.")
    if prior is None:
        raise ValueError(
            "The base model has no token embedding to compute a prior from; use prior_encoder='external'."
        )
    if any(adapter_name in layer.merged_adapters for layer in tuner.modules() if isinstance(layer, TRexLayer)):
        raise ValueError(f"The adapter {adapter_name!r} is merged; call unmerge_adapter() before its prior changes.")
    return tuner, config, prior


def _check_tolerance(tolerance: Any) -> None:
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < float(tolerance) < math.inf:
        raise ValueError(
            f"tolerance={tolerance!r} must be a positive number, the mean of 1 - cos between old and new centroids at "
            "which reading stops (0.1, say), or None to read all."
        )


def _check_finite(rows: np.ndarray, where: str) -> None:
    bad = int((~np.isfinite(rows)).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of the {len(rows)} prompt embeddings in {where} (counted from 0) hold NaN or infinity; mend "
            "them or leave them out. The prior was left as it was."
        )


def _parts(embeddings: Tensor | np.ndarray | Sequence[Any], dim: int) -> Iterator[np.ndarray]:
    """(n, d), float32: part by part, also because a data set's column makes a Python object of every number."""
    shape = getattr(embeddings, "shape", None)  # of a tensor or an array
    if shape is None:
        shape = (len(embeddings), *_to_array(embeddings, 0, dim).shape[1:])
    if len(shape) != 2 or shape[1] != dim:
        raise ValueError(f"embeddings has shape {tuple(shape)}; expected (N, prior_dim) with prior_dim={dim}.")
    for start in range(0, shape[0], PART):
        yield _to_array(embeddings, start, dim)


def _to_array(embeddings: Any, start: int, dim: int) -> np.ndarray:
    """A part of them, float32."""
    try:
        part = embeddings[start : start + PART]
        if isinstance(part, (list, tuple)) and isinstance(part[0], Tensor):
            part = torch.stack(list(part))
        if isinstance(part, Tensor):
            return part.detach().float().cpu().numpy()
        with np.errstate(over="ignore"):  # infinity is refused elsewhere, by name
            return np.asarray(part, np.float32)
    except (TypeError, ValueError, IndexError) as error:
        raise TypeError(
            f"embeddings is a {type(embeddings).__name__}; expected numbers of shape (N, {dim}) as a tensor, an "
            "array, a list or a data set's column."
        ) from error


def _embed_batch(tuner: TRexModel, dim: int, external: bool, batch: Any, tokenizer: Any) -> np.ndarray:
    """Embeddings (n, d), float32, of a batch's prompts that have any token; external ones as the batch holds them."""
    if isinstance(batch, list) and tokenizer is not None and "prompt" in batch[0]:
        batch = tokenize_prompts(batch, tokenizer)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"The dataloader gave a {type(batch).__name__}; expected a mapping such as {{'input_ids': ...}}, "
            "or a list of rows with a 'prompt', and a tokenizer."
        )
    if external:
        if EMBEDS not in batch:
            raise ValueError(
                f"The adapter has prior_encoder='external', but a batch has no {EMBEDS} (only {sorted(batch)}); give "
                f"{GIVE_EMBEDDINGS}, and no dataloader, or wrap the collator in a SemanticEmbedsCollator."
            )
        parts = list(_parts(batch[EMBEDS], dim))
        return np.concatenate(parts) if parts else np.empty((0, dim), np.float32)
    means, prompts = tuner.prompts.scorer.embed(batch)
    if means.shape[1] != dim:
        raise ValueError(
            f"The prompts' embeddings in a batch have width {means.shape[1]}; expected {dim}, that of the model's."
        )
    return means[prompts.known].cpu().numpy()


def _fit_stream(
    batches: Iterable[Any],
    embed: Callable[[int, Any], np.ndarray],
    prior: SemanticPrior,
    ranks: Ranks,
    seed: int,
    tolerance: float | None,
) -> Fit:
    """Reads, samples and clusters, together with the other ranks."""
    clusters, dim = prior.centroids.shape[0], prior.dim
    whitened = None if prior.whitening is None else prior.whitening.shape[0]
    capacity = max(SAMPLE_BYTES // (4 * dim), SAMPLE_PER_CLUSTER * clusters)
    reservoir = Reservoir(capacity, dim, (seed, ranks.rank))
    former: Fit | None = None
    due = SETTLED_FROM * clusters
    for number, ended, error in _read(batches, lambda *batch: reservoir.add(embed(*batch)), ranks.size == 1):
        told = ranks.exchange((number, ended, reservoir.seen, describe(error)))
        ranks.raise_together(error, [each[3] for each in told])
        seen = [each[2] for each in told]
        last, prompts = all(each[1] for each in told), sum(seen)
        if last and not any(each[0] for each in told):
            raise ValueError("The dataloader gave no batch; the prior needs the training prompts.")
        if not last and (tolerance is None or prompts < due):
            continue
        due = 2 * prompts
        if former is not None and former.report.prompts == prompts:
            return former
        gathered = ranks.gather(reservoir, seen, capacity)
        if gathered is not None and not last and ranks.size == 1:
            gathered = gathered[0].copy(), gathered[1]  # clustering overwrites it, and the reservoir is still needed
        clustered = partial(cluster, clusters=clusters, prompts=prompts, seed=seed, whitened=whitened)
        look = partial(_look, gathered, clustered, prompts, former, None if last else tolerance)
        former = ranks.from_first(look)
        if last or (former is not None and former.report.settled):
            assert former is not None
            return former
    raise AssertionError("reading goes on to the last meeting")


def _look(
    gathered: tuple[np.ndarray, np.ndarray] | None,
    clustered: Callable[[np.ndarray, np.ndarray], Fit],
    prompts: int,
    former: Fit | None,
    tolerance: float | None,
) -> Fit | None:
    """A fit of what has been gathered, and whether it has settled; None if it is too early for one."""
    assert gathered is not None  # on rank 0, where this is called
    rows, total = gathered
    try:
        fit = clustered(rows, (total / max(prompts, 1)).astype(np.float32))
    except ValueError:  # too few distinct prompts, or directions
        if tolerance is None:
            raise
        return None
    if tolerance is None or former is None or distance(former.placed(), fit.placed()) >= tolerance:
        return fit
    return replace(fit, report=replace(fit.report, settled=True))


def _read(
    batches: Iterable[Any], take: Callable[[int, Any], None], alone: bool
) -> Iterator[tuple[int, bool, Exception | None]]:
    """Reads on and gives, whenever the ranks should meet: batches so far, whether these were all, what went wrong.

    After its own last batch it goes on to give, as long as the other ranks have any.
    """
    stream, number, ended = iter(batches), 0, False
    error: Exception | None = None
    while True:
        wanted = 0 if ended else min(max(number, 1), MEET)
        goal = number + wanted
        try:
            for batch in islice(stream, wanted):
                try:
                    if error is None:
                        take(number, batch)
                except Exception as problem:
                    if alone:
                        raise
                    error = problem  # and read on: the loader may need this rank, to give the others their batches
                number += 1
        except Exception as problem:
            if alone:
                raise
            error = error or problem
            goal = number + 1
        ended = ended or number < goal
        yield number, ended, error
