"""Before training: cluster the prompts' embeddings, and store the centroids with the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from transformers import TrainerCallback

from .batches import check_count, reading
from .config import TRexConfig
from .embeddings import tokenize_prompts
from .layer import TRexLayer
from .model import TRexModel, find_tuner
from .prior import SemanticPrior
from .scoring import EMBEDS

GIVE_EMBEDDINGS = "embeddings=, of shape (N, prior_dim)"


@dataclass(frozen=True)
class TRexPriorReport:
    """What `initialize_trex_prior` found.

    Attributes:
        prompts: number of prompts seen.
        cluster_sizes: prompts in each of the K clusters.
        explained_variance: share, in [0, 1], of the embeddings' variance that lies between the clusters; the
            embeddings centred and normalised.
    """

    prompts: int
    cluster_sizes: tuple[int, ...]
    explained_variance: float


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
    The embeddings are centred by their mean, normalised, and clustered with k-means. Centroids, mean, and the mean
    score of each cluster are stored with the adapter, which saves, loads and pushes them. The adapter is touched only
    when all is done.

    Args:
        model: a model with a T-REX adapter, as `get_peft_model` returns it.
        dataloader: batches as the model's forward takes them, read once. torch's random state is left as it was.
        adapter_name: the adapter to fit.
        max_batches: stop after this many batches; None reads all.
        seed: of the clustering.
        progress: show a progress bar.
        embeddings: (N, d) embeddings of the training prompts instead of a dataloader, for an adapter with
            `prior_encoder="external"`, d being its `prior_dim`: a tensor, an array, a data set's column. A dataloader
            does as well if its batches have `semantic_embeds`, as [`SemanticEmbedsCollator`] adds them.
        tokenizer: for a dataloader whose batches are rows with a `prompt`, as those of TRL's GRPOTrainer.

    Returns:
        A report: prompts seen, cluster sizes, explained variance.

    Raises:
        ValueError, TypeError: if there is no such adapter, it has no prior, the data do not fit its encoder, hold NaN,
            or have fewer distinct prompts than the adapter has clusters.
    """
    tuner, config, prior = _find_prior(model, adapter_name)
    check_count("max_batches", max_batches)
    external = config.prior_encoder == "external"
    if (embeddings is None) == (dataloader is None) or (embeddings is not None and not external):
        wanted = "a dataloader and no embeddings"
        if external:
            wanted = f"either {GIVE_EMBEDDINGS}, or a dataloader whose batches have {EMBEDS}"
        raise ValueError(f"The adapter {adapter_name!r} has prior_encoder={config.prior_encoder!r}; give {wanted}.")
    if embeddings is not None:
        gathered = _check_embeddings(embeddings, prior.dim)
    else:
        assert dataloader is not None
        gathered = _embed_all(tuner, prior.dim if external else None, dataloader, max_batches, progress, tokenizer)
    if external:
        gathered = gathered[gathered.any(1)]  # rows without a prompt are zero
    report = _fit(prior, gathered, seed)
    tuner.forget_static(adapter_name)
    return report


class TRexPriorCallback(TrainerCallback):
    """Fits the semantic prior of the active T-REX adapters when training starts, from the training data.

    An adapter whose prior is fitted already keeps it, and a resumed training fits nothing. For an adapter with
    `prior_encoder="external"` the batches need `semantic_embeds`, as [`SemanticEmbedsCollator`] adds them.

    Args:
        max_batches: read at most this many batches of the training data; None reads all.
        seed: of the clustering.
        progress: show a progress bar.
    """

    def __init__(self, max_batches: int | None = None, seed: int = 0, progress: bool = True) -> None:
        self.max_batches = max_batches
        self.seed = seed
        self.progress = progress

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


def _check_embeddings(embeddings: Tensor | np.ndarray | Sequence[Any], dim: int) -> np.ndarray:
    if isinstance(embeddings, (list, tuple)) and embeddings and isinstance(embeddings[0], Tensor):
        embeddings = torch.stack(list(embeddings))
    if not isinstance(embeddings, (Tensor, np.ndarray)):
        try:  # in parts, because a data set's column would make every number a Python object at once
            parts = [np.asarray(embeddings[i : i + 1000], np.float32) for i in range(0, len(embeddings), 1000)]
            embeddings = np.concatenate(parts)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"embeddings is a {type(embeddings).__name__}; expected numbers of shape (N, {dim}) as a tensor, an "
                "array, a list or a data set's column."
            ) from error
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise ValueError(
            f"embeddings has shape {tuple(embeddings.shape)}; expected (N, prior_dim) with prior_dim={dim}."
        )
    return torch.as_tensor(embeddings).detach().float().cpu().numpy()


def _embed_all(
    tuner: TRexModel,
    external_dim: int | None,
    dataloader: Iterable[Mapping[str, Any]],
    max_batches: int | None,
    progress: bool,
    tokenizer: Any,
) -> np.ndarray:
    """Embeddings (N, d), float32, of all prompts that have any token; external ones as the batches hold them."""
    gathered = []
    with reading(dataloader, max_batches, progress, "T-REX prior") as batches:
        for batch in batches:
            if isinstance(batch, list) and tokenizer is not None and "prompt" in batch[0]:
                batch = tokenize_prompts(batch, tokenizer)
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"The dataloader gave a {type(batch).__name__}; expected a mapping such as {{'input_ids': ...}}, "
                    "or a list of rows with a 'prompt', and a tokenizer."
                )
            gathered.append(_embed_batch(tuner, external_dim, batch))
    if not gathered:
        raise ValueError("The dataloader gave no batch; the prior needs the training prompts.")
    return np.concatenate(gathered)


def _embed_batch(tuner: TRexModel, external_dim: int | None, batch: Mapping[str, Any]) -> np.ndarray:
    if external_dim is None:
        means, prompts = tuner.prompts.scorer.embed(batch)
        return means[prompts.known].cpu().numpy()
    if EMBEDS not in batch:
        raise ValueError(
            f"The adapter has prior_encoder='external', but a batch has no {EMBEDS} (only {sorted(batch)}); give "
            f"{GIVE_EMBEDDINGS}, and no dataloader, or wrap the collator in a SemanticEmbedsCollator."
        )
    return _check_embeddings(batch[EMBEDS], external_dim)


def _fit(prior: SemanticPrior, embeddings: np.ndarray, seed: int) -> TRexPriorReport:
    if not len(embeddings):
        raise ValueError("None of the prompts has a token, or an embedding that is not zero.")
    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings)).any(1).sum())
        raise ValueError(
            f"{bad} of {len(embeddings)} prompt embeddings hold NaN or infinity; the prior was left as it was."
        )
    clusters = prior.centroids.shape[0]
    mean = embeddings.mean(0, dtype=np.float64).astype(np.float32)
    unit = torch.nn.functional.normalize(torch.from_numpy(embeddings - mean), dim=-1).numpy()
    # rounded, because the mean over a prompt's tokens differs in its last bits with the padding of its batch
    distinct = len(np.unique(unit[: 100 * clusters].round(4), axis=0))
    if distinct < clusters:  # seldom; sorting all of a million takes longer than clustering them
        distinct = len(np.unique(unit.round(4), axis=0))
    if distinct < clusters:
        raise ValueError(
            f"num_clusters={clusters} is more than the {distinct} distinct prompts among the {len(unit)} that were "
            "seen. Give more prompts, or build the adapter with fewer clusters."
        )
    if not unit.any():
        raise ValueError(f"All {len(unit)} prompts have the same embedding, so there is nothing to cluster.")
    kmeans = MiniBatchKMeans(clusters, init="k-means++", n_init=3, batch_size=4096, random_state=seed).fit(unit)
    sizes = np.bincount(kmeans.labels_, minlength=clusters)
    between = 1 - ((unit - kmeans.cluster_centers_[kmeans.labels_]) ** 2).sum() / ((unit - unit.mean(0)) ** 2).sum()
    centroids = torch.from_numpy(kmeans.cluster_centers_).float()
    centroids = torch.nn.functional.normalize(centroids, dim=-1)
    mean_scores = torch.from_numpy(unit.mean(0)) @ centroids.T
    prior.set(centroids, torch.from_numpy(mean), mean_scores)
    return TRexPriorReport(len(unit), tuple(int(size) for size in sizes), float(np.clip(between, 0, 1)))
