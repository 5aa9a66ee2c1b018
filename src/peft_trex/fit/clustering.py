"""Clusters of the prompts' embeddings: k-means on a sample that memory holds, whitened or not.

Axis legend: n prompts of the sample, K clusters, d width of an embedding, p directions if whitened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..prior.semantic_prior import SemanticPrior
from .reservoir import PART

# A direction whose standard deviation is less than this share of the largest one is rounding.
FLAT = 1e-4


@dataclass(frozen=True)
class TRexPriorReport:
    """What `initialize_trex_prior` found.

    Attributes:
        prompts: number of prompts seen, by all processes together.
        cluster_sizes: how many of the sampled prompts are in each of the K clusters.
        explained_variance: share, in [0, 1], of the sampled embeddings' variance that lies between the clusters; the
            embeddings centred, whitened if the adapter does so, and normalised.
        sampled: number of prompts that were clustered: all, or as many as memory is kept for.
        chat_markers: the markers that told the users' messages, those of the configuration or of the tokenizer's chat
            template; None where none did.
    """

    prompts: int
    cluster_sizes: tuple[int, ...]
    explained_variance: float
    sampled: int
    chat_markers: dict[str, list[int]] | None = None


def cluster(
    rows: np.ndarray, total: np.ndarray, *, prior: SemanticPrior, prompts: int, seed: int
) -> tuple[dict[str, Any], TRexPriorReport]:
    """k-means on a sample (n, d), which is overwritten, of prompts whose sum is `total` (d,).

    Returns the arguments of `prior.set`, with the prior still as it was, and the report.
    """
    if not len(rows):
        raise ValueError("None of the prompts has a token, or an embedding that is not zero.")
    mean = (total / prompts).astype(np.float32)
    rows -= mean
    whitening = None if prior.whitening is None else _whitening(rows, prior, seed)
    unit = rows if whitening is None else rows @ whitening.T
    F.normalize(torch.from_numpy(unit), dim=-1, out=torch.from_numpy(unit))
    clusters = len(prior.centroids)
    _check_distinct(unit, clusters, prompts)
    # scikit-learn takes seconds to import, so it is imported where a fit uses it.
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(clusters, init="k-means++", n_init=3, batch_size=4096, random_state=seed).fit(unit)
    middle, within, around = unit.mean(0), 0.0, 0.0
    for start in range(0, len(unit), PART):
        chunk, labels = unit[start : start + PART], kmeans.labels_[start : start + PART]
        within += float(((chunk - kmeans.cluster_centers_[labels]) ** 2).sum())
        around += float(((chunk - middle) ** 2).sum())
    centroids = F.normalize(torch.from_numpy(kmeans.cluster_centers_), dim=-1)
    fit = {
        "centroids": centroids,
        "mean": torch.from_numpy(mean),
        "mean_scores": torch.from_numpy(middle) @ centroids.T,
        "whitening": None if whitening is None else torch.from_numpy(whitening),
    }
    return fit, TRexPriorReport(
        prompts=prompts,
        cluster_sizes=tuple(np.bincount(kmeans.labels_, minlength=clusters).tolist()),
        explained_variance=float(np.clip(1 - within / around, 0, 1)),
        sampled=len(unit),
    )


def _check_distinct(unit: np.ndarray, clusters: int, prompts: int) -> None:
    """Raise a ValueError if the normalised rows (n, d) or (n, p) are too few, or too much alike, to be clustered."""
    distinct, size = unit[:0], 100 * clusters
    for start in range(0, len(unit), size):
        # The mean over a prompt's tokens differs in its last bits with the padding of its batch, so it is rounded.
        distinct = np.unique(np.concatenate([distinct, unit[start : start + size].round(4)]), axis=0)
        # As a rule the first chunk is enough.
        if len(distinct) >= clusters:
            break
    else:
        among = f"{len(unit)} that were {'seen' if len(unit) == prompts else f'sampled of {prompts}'}"
        raise ValueError(
            f"num_clusters={clusters} is more than the {len(distinct)} distinct prompts among the {among}. Give more "
            "prompts, or build the adapter with fewer clusters."
        )
    if not unit.any():
        raise ValueError(f"All {len(unit)} prompts have the same embedding, so there is nothing to cluster.")


def _whitening(rows: np.ndarray, prior: SemanticPrior, seed: int) -> np.ndarray:
    """(p, d): the leading principal directions of rows (n, d), each over its standard deviation.

    The rows after those that the data vary in are zero.
    """
    from sklearn.decomposition import PCA

    assert prior.whitening is not None
    whitening = np.zeros(prior.whitening.shape, np.float32)
    pca = PCA(min(*rows.shape, len(whitening)), random_state=seed).fit(rows)
    deviations = np.sqrt(pca.explained_variance_)
    varied = int((deviations > FLAT * deviations[0]).sum())
    if varied < len(whitening) and not prior.fewer_directions:
        raise ValueError(
            f"prior_whitening={len(whitening)}, but the embeddings of the {len(rows)} prompts vary in {varied} "
            'directions. Give more prompts, or build the adapter with a smaller prior_whitening, or with "auto".'
        )
    whitening[:varied] = pca.components_[:varied] / deviations[:varied, None]
    return whitening
