"""Before training: cluster the prompts' embeddings, and store the centroids with the adapter.

Axis legend: N prompts, n prompts of a batch or a chunk, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..config import TRexConfig
from ..data_pass import Data, Reading, check_count
from ..layer import TRexLayer
from ..model import REFERENCE, TRexModel, find_tuner
from ..notes import describe_trex
from ..prior.chat import ChatMarkers
from ..prior.inputs import EMBEDS, Inputs
from ..prior.semantic_prior import SemanticPrior
from ..undo import Snapshot, Undone, copies
from .clustering import TRexPriorReport, cluster
from .external import as_array, as_mapping
from .messages import Counts, MarkerSearch, report_markers, search_template
from .ranks import Ranks
from .reservoir import PART, Reservoir
from .stream import Stream, is_stream

GIVE_EMBEDDINGS = "embeddings=, of shape (N, prior_dim)"
# So many bytes of embeddings are held and clustered, but at least so many prompts for each cluster.
SAMPLE_BYTES = 256 * 10**6
SAMPLE_PER_CLUSTER = 256
# The ranks meet after so many batches, or earlier.
MEET = 256


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
) -> TRexPriorReport:
    """Fit an adapter's semantic prior: embed the training prompts and cluster them (arXiv 2404.08985).

    A prompt's embedding is the mean of the frozen input embeddings over its tokens: those that are attended to and,
    in a causal language model that is given labels or a `completion_mask`, come before the first that is predicted.
    The embeddings are centred by their mean, whitened where the adapter has `prior_whitening`, normalised, and
    clustered with k-means. What comes out is stored with the adapter, all at once when all is done.

    With a tokenizer that has a chat template, the adapter's `chat_markers` are found too, unless its configuration has
    some or says False: if more than half of the first rows hold a user's message between the template's markers, each
    such message alone is a prompt, in the fit and from then on. The markers are then kept in the adapter's
    configuration, which is saved with it, and stand in the report; the logger of this package says so at the level
    INFO. If the template has no markers that would do, a logged warning gives the reason, and the fit goes on without.

    Memory does not grow with the data: the mean is that of all prompts, and the rest comes from a uniform sample of at
    most 256 MB (62,500 prompts at width 1024), or of 256 prompts for each cluster where that is more.

    Where torch.distributed is initialised with several processes, all of them must call this, each with its own share
    of the data (or all with the same). All end with the same values, bit for bit. When a rank fails, is interrupted or
    killed, all raise when they next meet: after 1, 2, 4, ... and then every 256 batches. Where a data loader itself
    waits for other ranks (accelerate's `dispatch_batches`), that may take until the process group's timeout.

    Args:
        model: a model with a T-REX adapter, as `get_peft_model` returns it.
        dataloader: batches as the model's forward takes them, read once, as they come: any iterable. The global random
            states of torch, NumPy and Python are left as they were.
        adapter_name: the adapter to fit.
        max_batches: stop after this many batches, in each process; None reads all.
        seed: of the sample and the clustering.
        progress: show a progress bar.
        embeddings: (N, d) embeddings of the training prompts instead of a dataloader, for an adapter with
            `prior_encoder="external"` and `prior_dim=d`: a tensor, an array (memory-mapped too) or a data set's
            column, read in chunks. A dataloader does as well if its batches have `semantic_embeds`, as
            [`SemanticEmbedsCollator`] adds them.
        tokenizer: the one (or the processor) that made the prompts, for its chat template. Batches that are rows with
            a `prompt`, as those of TRL's GRPOTrainer, are tokenised with it.

    Raises:
        ValueError, TypeError: if there is no such adapter, it has no prior, the data do not fit its encoder, hold NaN,
            have fewer distinct prompts than the adapter has clusters, or vary in fewer directions than it whitens.
        RuntimeError: if another rank failed.
    """
    # The ranks come first, so that no error on a single rank leaves the others waiting.
    with closing(Ranks()) as ranks:
        tuner, config, prior = _find_prior(model, adapter_name)
        check_count("max_batches", max_batches)
        check_count("seed", seed, least=0, none=False)
        external = config.prior_encoder == "external"
        if (embeddings is None) == (dataloader is None) or (embeddings is not None and not external):
            either = f"either {GIVE_EMBEDDINGS}, or a dataloader whose batches have {EMBEDS}"
            wanted = either if external else "a dataloader and no embeddings"
            encoder = f"prior_encoder={config.prior_encoder!r}"
            raise ValueError(f"The adapter {adapter_name!r} has {encoder}; give {wanted}.")

        markers, remark = search_template(tuner, config, tokenizer, ranks)
        search = MarkerSearch(markers, tokenizer)

        def embed(number: int, batch: Any) -> np.ndarray:
            if dataloader is None:
                rows, place = batch, f"the {PART} rows from {PART * number} on"
            else:
                batch = as_mapping(batch, tokenizer)
                place = f"batch {number}"
                if external:
                    rows = _external_rows(batch, prior.dim)
                else:
                    rows = _embed_batch(tuner, adapter_name, prior.dim, batch, search.markers)
            # The rows of a batch that have no prompt are zero.
            rows = rows[rows.any(1)] if external else rows
            bad = int((~np.isfinite(rows)).any(1).sum())
            if bad:
                raise ValueError(
                    f"{bad} of the {len(rows)} prompt embeddings in {place} (counted from 0) hold NaN or infinity; "
                    "mend them or leave them out. The prior was left as it was."
                )
            return rows

        if dataloader is None:
            data = Data(_chunks(embeddings, prior.dim, least=1))
        else:
            data = Data(dataloader, max_batches, "T-REX prior" if progress and ranks.rank == 0 else None)
        whole = nullcontext() if external else tuner.prompts.scorer.whole_embedding()
        reading = Reading(data)
        with Undone(reading), whole, reading as batches:
            fit, report = _sample_and_cluster(batches, embed, search, prior, ranks, seed)
        names = [adapter_name, *_unfitted_copy(tuner, adapter_name)]
        with Undone(Snapshot(tuner, values=copies(tuner.trex_prior.buffers()))):
            for fitted in filter(None, map(tuner.prior_of, names)):
                fitted.set(**fit)
            tuner.forget_static(adapter_name)
            if search.markers is not None:
                # The user's own object may serve another model too, so a copy takes its place.
                config = copy(config)
                config.chat_markers = search.markers.as_value()
                tuner.peft_config.update(dict.fromkeys(names, config))
        if search.markers is not None and ranks.rank == 0:
            report_markers(adapter_name, remark)
    used = ChatMarkers.of(config.chat_markers)
    return replace(report, chat_markers=used and used.as_value())


@dataclass(eq=False)
class TRexPriorCallback(TrainerCallback):
    """Fits the semantic prior of the active T-REX adapters when training starts, from the training data.

    An adapter whose prior is fitted already keeps it, and a resumed training fits nothing. In a distributed training
    each process reads its share of the data. The arguments, and what is needed of the data, are those of
    [`initialize_trex_prior`], which gets the Trainer's `processing_class` as its tokenizer.

    Of a stream (an `IterableDataset`, or a data loader without a length) at most as many batches are read as the
    training will take. The training then reads it again from its beginning, so a stream must begin anew each time
    that it is iterated.

    Raises:
        ValueError: at the start of the training, if a stream gives nothing more after the fit.

    Warns:
        UserWarning: if a stream gives other rows after the fit than before it.
    """

    max_batches: int | None = None
    seed: int = 0
    progress: bool = True

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        # A prior that changes between two steps would change what the adapter has learned.
        if state.global_step > 0:
            return
        if model is None or train_dataloader is None:
            raise ValueError("TRexPriorCallback needs the Trainer's model and train_dataloader.")
        tuner = find_tuner(model)
        for name in tuner.active_adapters:
            describe_trex(tuner, adapter_name=name, learning_rate=args.learning_rate or None)
        priors = {name: tuner.prior_of(name) for name in tuner.active_adapters}
        names = [name for name, prior in priors.items() if prior is not None and not prior.fitted]
        if not names:
            return
        options = asdict(self)
        stream = Stream(train_dataloader) if is_stream(train_dataloader) else None
        if stream is not None and self.max_batches is None:
            options["max_batches"] = state.max_steps * args.gradient_accumulation_steps
        tokenizer = kwargs.get("processing_class")
        for name in names:
            initialize_trex_prior(tuner, stream or train_dataloader, adapter_name=name, tokenizer=tokenizer, **options)
        if stream is not None:
            stream.check_begins_anew()


def _find_prior(model: nn.Module, adapter_name: str) -> tuple[TRexModel, TRexConfig, SemanticPrior]:
    tuner = find_tuner(model)
    config = tuner.config_of(adapter_name)
    prior = tuner.prior_of(adapter_name)
    if not config.use_prior:
        raise ValueError(f"The adapter {adapter_name!r} has use_prior=False, so there is no prior to fit.")
    if prior is None:
        raise ValueError(
            f"The base model, a {type(tuner.model).__name__}, names no token embedding of its prompts to compute the "
            "prior from; use prior_encoder='external', or use_prior=False."
        )
    if any(adapter_name in layer.merged_adapters for layer in tuner.modules() if isinstance(layer, TRexLayer)):
        raise ValueError(f"The adapter {adapter_name!r} is merged; call unmerge_adapter() before its prior changes.")
    return tuner, config, prior


def _unfitted_copy(tuner: TRexModel, adapter_name: str) -> list[str]:
    """The name of the copy that TRL has made of an adapter as its reference, if that has no prior yet."""
    config, reference = tuner.config_of(adapter_name), tuner.prior_of(REFERENCE)
    shared = adapter_name != REFERENCE and tuner.peft_config.get(REFERENCE) is config
    return [REFERENCE] if shared and reference is not None and not reference.fitted else []


def _chunks(embeddings: Any, dim: int, least: int = 0) -> Iterator[np.ndarray]:
    """Embeddings (N, d), N at least `least`, in chunks (n, d), float32.

    They are not read at once, because a data set's column makes an object of every number.
    """
    wanted = f"expected (N, prior_dim) with prior_dim={dim}"
    shape = getattr(embeddings, "shape", None)
    if shape is not None and (len(shape) != 2 or shape[0] < least or shape[1] != dim):
        raise ValueError(f"embeddings has shape {tuple(shape)}; {wanted}.")
    length = len(embeddings) if shape is None else shape[0]
    # Empty embeddings are one chunk, whose shape is checked too.
    for start in range(0, max(length, 1), PART):
        try:
            chunk = embeddings[start : start + PART]
            if isinstance(chunk, (list, tuple)) and isinstance(chunk[0], Tensor):
                chunk = torch.stack(chunk)
            chunk = as_array(chunk)
        except (TypeError, ValueError, IndexError) as error:
            raise TypeError(
                f"embeddings is a {type(embeddings).__name__}; expected numbers of shape (N, {dim}) as a tensor, an "
                "array, a list or a data set's column."
            ) from error
        if chunk.ndim != 2 or chunk.shape[1] != dim:
            raise ValueError(f"embeddings has shape {(length, *chunk.shape[1:])}; {wanted}.")
        yield chunk


def _external_rows(batch: Mapping[str, Any], dim: int) -> np.ndarray:
    """Embeddings (n, d), float32, as a batch holds them."""
    if EMBEDS not in batch:
        raise ValueError(
            f"The adapter has prior_encoder='external', but a batch has no {EMBEDS} (only {sorted(batch)}); give "
            f"{GIVE_EMBEDDINGS}, and no dataloader, or wrap the collator in a SemanticEmbedsCollator."
        )
    return np.concatenate(list(_chunks(batch[EMBEDS], dim)))


def _embed_batch(
    tuner: TRexModel, adapter_name: str, dim: int, batch: Mapping[str, Any], markers: ChatMarkers | None
) -> np.ndarray:
    """Embeddings (n, d), float32, of a batch's prompts that have any token."""
    means, prompts = tuner.prompts.scorer.embed(Inputs.of(batch), adapter_name, markers)
    if means.shape[1] != dim:
        raise ValueError(
            f"The prompts' embeddings in a batch have width {means.shape[1]}; expected {dim}, that of the model's."
        )
    return means[prompts.known].cpu().numpy()


def _sample_and_cluster(
    batches: Iterable[Any],
    embed: Callable[[int, Any], np.ndarray],
    search: MarkerSearch,
    prior: SemanticPrior,
    ranks: Ranks,
    seed: int,
) -> tuple[dict[str, Any], TRexPriorReport]:
    """Read all batches into a sample and cluster it, together with the other ranks."""
    capacity = max(SAMPLE_BYTES // (4 * prior.dim), SAMPLE_PER_CLUSTER * len(prior.centroids))
    reservoir = Reservoir(capacity, prior.dim, (seed, ranks.rank))

    def take(number: int, batch: Any) -> None:
        if search.settled:
            reservoir.add(embed(number, batch))
        else:
            search.hold(number, batch)

    def take_held() -> None:
        for number, batch in search.release():
            take(number, batch)

    for count, ended, error in _read(batches, take, ranks.size == 1):
        progress = ranks.exchange(Progress(count, ended, search.counts), error)
        all_ended = all(rank.ended for rank in progress)
        if not search.settled and search.settle([rank.counts for rank in progress], all_ended):
            ranks.together(take_held)
        if all_ended:
            break
    if not any(rank.batches for rank in progress):
        raise ValueError("The dataloader gave no batch; the prior needs the training prompts.")
    seen = ranks.exchange(reservoir.seen)
    sample: Any = ranks.gather(reservoir, seen, capacity)
    # Only rank 0 has the sample, and only there it is clustered.
    return ranks.from_first(lambda: cluster(*sample, prior=prior, prompts=sum(seen), seed=seed))


class Progress(NamedTuple):
    """What each rank says when the ranks meet."""

    batches: int
    ended: bool
    counts: Counts


def _read(
    batches: Iterable[Any], take: Callable[[int, Any], None], alone: bool
) -> Iterator[tuple[int, bool, Exception | None]]:
    """Read on and give, whenever the ranks should meet: batches so far, whether these were all, what went wrong.

    After its last batch a rank goes on to meet the others, as long as they have any. A process that is alone meets
    after each batch, so that an error is raised at once.
    """
    stream, count, ended = iter(batches), 0, False
    error: Exception | None = None
    while True:
        goal = count + (1 if alone else min(max(count, 1), MEET))
        while count < goal and not ended:
            try:
                batch = next(stream)
            except StopIteration:
                ended = True
            except Exception as problem:
                ended, error = True, error or problem
            else:
                # After an error a rank reads on: the loader may need it, to give the others their batches.
                try:
                    if error is None:
                        take(count, batch)
                except Exception as problem:
                    error = problem
                count += 1
        yield count, ended, error
