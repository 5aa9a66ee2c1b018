"""Clusters of the prompts' embeddings: k-means on a sample that memory holds, whitened or not.

Axis legend: n prompts of the sample, K clusters, d width of an embedding, p directions if whitened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .sampling import PART

FLAT = 1e-4  # of the largest standard deviation: a direction that varies less is rounding


@dataclass(frozen=True)
class TRexPriorReport:
    """What `initialize_trex_prior` found.

    Attributes:
        prompts: number of prompts seen, by all processes together.
        cluster_sizes: how many of the sampled prompts are in each of the K clusters.
        explained_variance: share, in [0, 1], of the sampled embeddings' variance that lies between the clusters; the
            embeddings centred, whitened if the adapter does so, and normalised.
        sampled: number of prompts that were clustered: all, or as many as memory is kept for.
        settled: whether reading stopped because the centroids had settled (see `tolerance`).
    """

    prompts: int
    cluster_sizes: tuple[int, ...]
    explained_variance: float
    sampled: int
    settled: bool = False


@dataclass(frozen=True)
class Fit:
    """What clustering found."""

    centroids: Tensor  # (K, d), or (K, p) whitened
    mean: Tensor  # (d,)
    mean_scores: Tensor  # (K,)
    whitening: Tensor | None  # (p, d)
    report: TRexPriorReport

    def placed(self) -> Tensor:
        """The centroids (K, d) among the embeddings, of length one: whitened, each fit has directions of its own."""
        if self.whitening is None:
            return self.centroids
        return F.normalize(self.centroids @ self.whitening, dim=-1)


def cluster(
    rows: np.ndarray, mean: np.ndarray, *, clusters: int, prompts: int, seed: int, whitened: int | None
) -> Fit:
    """k-means on a sample (n, d), which is overwritten, of a number of prompts with this mean (d,)."""
    if not len(rows):
        raise ValueError("None of the prompts has a token, or an embedding that is not zero.")
    for part in _slices(rows):
        part -= mean
    whitening = None if whitened is None else _whitening(rows, whitened, seed)
    unit = rows if whitening is None else rows @ whitening.T
    for part in _slices(unit):
        part[:] = F.normalize(torch.from_numpy(part), dim=-1).numpy()
    # rounded, because the mean over a prompt's tokens differs in its last bits with the padding of its batch
    distinct = unit[:0]
    for part in _slices(unit, 100 * clusters):  # as a rule the first is enough
        distinct = np.unique(np.concatenate([distinct, part.round(4)]), axis=0)
        if len(distinct) >= clusters:
            break
    if len(distinct) < clusters:
        among = f"{len(unit)} that were {'seen' if len(unit) == prompts else f'sampled of {prompts}'}"
        raise ValueError(
            f"num_clusters={clusters} is more than the {len(distinct)} distinct prompts among the {among}. Give more "
            "prompts, or build the adapter with fewer clusters."
        )
    if not unit.any():
        raise ValueError(f"All {len(unit)} prompts have the same embedding, so there is nothing to cluster.")
    # scikit-learn and SciPy take seconds to import, so they are imported where a fit uses them
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(clusters, init="k-means++", n_init=3, batch_size=4096, random_state=seed).fit(unit)
    sizes = np.bincount(kmeans.labels_, minlength=clusters)
    middle, within, around = unit.mean(0), 0.0, 0.0
    for part, labels in zip(_slices(unit), _slices(kmeans.labels_), strict=True):
        within += float(((part - kmeans.cluster_centers_[labels]) ** 2).sum())
        around += float(((part - middle) ** 2).sum())
    centroids = F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=-1)
    report = TRexPriorReport(
        prompts=prompts,
        cluster_sizes=tuple(int(size) for size in sizes),
        explained_variance=float(np.clip(1 - within / around, 0, 1)),
        sampled=len(unit),
    )
    mean_scores = torch.from_numpy(middle) @ centroids.T
    return Fit(
        centroids,
        torch.from_numpy(mean),
        mean_scores,
        None if whitening is None else torch.from_numpy(whitening),
        report,
    )


def _whitening(rows: np.ndarray, whitened: int, seed: int) -> np.ndarray:
    """(p, d): the leading principal directions of rows (n, d), each over its standard deviation."""
    from sklearn.decomposition import PCA

    found = PCA(min(whitened, *rows.shape), random_state=seed).fit(rows)
    deviations = np.sqrt(found.explained_variance_)
    varied = int((deviations > FLAT * deviations[0]).sum())
    if varied < whitened:
        raise ValueError(
            f"prior_whitening={whitened}, but the embeddings of the {len(rows)} prompts vary in {varied} directions. "
            "Give more prompts, or build the adapter with a smaller prior_whitening."
        )
    return (found.components_ / deviations[:, None]).astype(np.float32)


def _slices(array: np.ndarray, size: int = PART) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))


def distance(former: Tensor, new: Tensor) -> float:
    """Mean of 1 - cos between centroids (K, d) and the former ones, matched one to one so that it is smallest."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    apart = (1 - new.double() @ former.double().T).numpy()
    return float(apart[linear_sum_assignment(apart)].mean())
