"""Clusters whose static weights are close are joined, so that fewer LoRA serve them.

Axis legend: K clusters, L layers, G groups of clusters.

What a cluster's static weights add to a layer is taken for a vector, whose squared length is the energy that they add
to a token of the calibration data on average. The best common weights of several clusters are then the mean by their
tokens, and what these miss is the sum of squares around it. Ward's method joins the two groups for which that grows
least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layer import TRexLayer
from ..parameters import Kinship

OVERALL = "overall"


@dataclass(frozen=True)
class TRexExportReport:
    """What [`save_trex_as_lora`] has saved.

    Attributes:
        adapters: the LoRA, by the clusters of prompts that each of them serves. "overall" serves all prompts without a
            cluster, and the clusters that had no tokens in the calibration, whose weights are the same.
        joining_error: what joining clusters misses beside what [`calibrate_trex_merge`] reports, as a share of the
            energy that the adapter adds; 0 where none are joined. It counts the calibration's tokens by their
            clusters, as if those of all clusters were alike.
    """

    adapters: dict[str, tuple[int, ...]]
    joining_error: float

    def __str__(self) -> str:
        served = sum(map(len, self.adapters.values()))
        text = f"T-REX export: {len(self.adapters)} LoRA"
        return f"{text}, {served} clusters; joining them misses {self.joining_error:.2%}" if served else text


def group_clusters(
    layers: Mapping[str, TRexLayer], adapter_name: str, number: int, most: int | None
) -> tuple[dict[str, tuple[int, ...]], float]:
    """The names of the LoRA, each with the clusters that it serves of so many, and what joining these misses.

    Args:
        most: of LoRA for clusters; None for one for each.

    Raises:
        ValueError: if `most` is no such number, or what it goes by is not known.
    """
    found: list[list[int]] = [[index] for index in range(number)]
    error = 0.0
    if most is not None:
        kinships = [layer.trex_kinship.get(adapter_name) for layer in layers.values()]
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_adapters={most!r} must be a whole number of at least 1, or None.")
        if not number:
            raise ValueError(f"max_adapters={most} joins adapters of clusters, which per_cluster=False leaves out.")
        known = [kinship for kinship in kinships if kinship is not None]
        if len(known) < len(kinships):
            raise ValueError(
                f"max_adapters={most} goes by the calibration's data, which the adapter {adapter_name!r} does not "
                "carry in its file; call calibrate_trex_merge(model, dataloader, per_cluster=True) in this process, "
                "or give `peft-trex export` the data, too (--data)."
            )
        found, error = join(known, most)
    names = {f"cluster_{group[0]:02d}": tuple(group) for group in found}
    # The weights of clusters without tokens are those of all tokens.
    empty = tuple(sorted(set(range(number)).difference(*found)))
    return {OVERALL: empty, **names}, error


def shares(layer: TRexLayer, adapter_name: str, clusters: tuple[int, ...] | None) -> dict[int, float] | None:
    """The share that each cluster has in the common weights of several: that of its tokens, where there are some."""
    if clusters is None:
        return None
    if len(clusters) == 1:
        return {clusters[0]: 1.0}
    tokens = layer.trex_kinship[adapter_name].tokens
    counts = {index: tokens[index].item() for index in clusters}
    total = sum(counts.values())
    return {index: count / total if total else 1 / len(clusters) for index, count in counts.items()}


def join(kinships: Sequence[Kinship], most: int) -> tuple[list[list[int]], float]:
    """Join the clusters into at most so many groups, the closest first.

    Args:
        kinships: of all layers.
        most: at least 1.

    Returns:
        The groups, with their clusters in ascending order, without those that had no tokens in any layer; and what
        joining misses, as a share of the energy that the adapter adds.
    """
    products = torch.stack([kinship.products for kinship in kinships])  # (L, K, K)
    tokens = torch.stack([kinship.tokens for kinship in kinships])  # (L, K)
    kept = tokens.any(0).nonzero()[:, 0]
    groups = [[index] for index in kept.tolist()]
    weights = tokens[:, kept]  # (L, G)
    sums = products[:, kept][:, :, kept] * weights[:, :, None] * weights[:, None]  # (L, G, G)
    missed = 0.0
    while len(groups) > max(1, most):
        growth = _growth(sums, weights)
        growth.fill_diagonal_(torch.inf)
        first, second = sorted(divmod(int(growth.argmin()), len(groups)))
        missed += max(0.0, growth[first, second].item())
        left = torch.arange(len(groups)) != second
        sums[:, first] += sums[:, second]
        sums[:, :, first] += sums[:, :, second]
        weights[:, first] += weights[:, second]
        sums, weights = sums[:, left][:, :, left], weights[:, left]
        groups[first] = sorted(groups[first] + groups.pop(second))
    energy = sum(kinship.energy for kinship in kinships)
    return groups, missed / (energy or 1.0)


def _growth(sums: Tensor, weights: Tensor) -> Tensor:
    """What is missed more when two groups are joined (G, G), from their summed vectors' products and their weights.

    A group misses the sum of its squares, which joining leaves alone, less `|sum of its vectors|^2 / weight`.
    """
    alone = sums.diagonal(dim1=1, dim2=2)  # (L, G)
    saved = alone / weights.clamp(min=1.0)
    pairs = alone[:, :, None] + alone[:, None] + sums + sums.mT
    together = pairs / (weights[:, :, None] + weights[:, None]).clamp(min=1.0)
    return (saved[:, :, None] + saved[:, None] - together).sum(0)
