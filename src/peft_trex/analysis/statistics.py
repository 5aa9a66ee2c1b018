"""Entropies, energies and overlaps as pure functions on tensors, and the sums that a routing report is made from.

Axis legend: N tokens, E experts, r_a input and r_b output vectors, K clusters, U prompts of a batch.

A layer adds `gate * B m` with `m_j = sum_i p_ij` and `p_ij = a_i G_ij`, one number for each expert and token. The
second moments of these E numbers say what any of the experts add, so memory does not grow with the data.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .figures import ALIKE, DEAD, LayerRouting


def entropy_of(p: Tensor) -> Tensor:
    """Entropy (...), in nats, of probabilities (..., E)."""
    return -torch.xlogy(p, p).sum(-1)


def used_experts(load: Tensor) -> Tensor:
    """Number of experts, from 1 to E, that share a load (E,): exp of its entropy."""
    return entropy_of(load / load.sum().clamp(min=1e-30)).exp()


def shares_of(weights: Tensor) -> Tensor:
    """The share (..., E) of each expert in weights (..., E), by absolute values."""
    return weights.abs() / weights.abs().sum(-1, keepdim=True).clamp(min=1e-30)


def energy_of_experts(moments: Tensor, BB: Tensor, grid: bool) -> Tensor:
    """(E, E): the mean product of what two experts add, from the moments (E, E) and `gate^2 B^T B` (r_b, r_b)."""
    if not grid:
        return moments * BB
    r_a = len(moments) // len(BB)
    return moments * BB.repeat(r_a, r_a)


def mutual_information(joint: Tensor) -> float:
    """Mutual information, in nats, of two axes whose joint sums (groups, E) need not add up to 1."""
    joint = joint / joint.sum().clamp(min=1e-30)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return max(0.0, float(torch.xlogy(joint, joint / independent.clamp(min=1e-300)).sum()))


def agreement(joint: Tensor) -> tuple[float, float]:
    """Purity, and normalised mutual information, of numbers of prompts (groups, clusters)."""
    entropies = [float(entropy_of(joint.sum(axis) / joint.sum())) for axis in (0, 1)]
    # A single cluster and a single group agree.
    nmi = mutual_information(joint) / (sum(entropies) / 2) if any(entropies) else 1.0
    return float(joint.max(0).values.sum() / joint.sum()), nmi


def overlaps(scores: Mapping[str, Tensor]) -> Tensor:
    """|cos| between the scores (K,) of each two groups, which may be sums or means."""
    directions = F.normalize(torch.stack(list(scores.values())), dim=-1)
    return (directions @ directions.T).abs()[tuple(torch.triu_indices(len(directions), len(directions), 1))]


class RoutingParts(NamedTuple):
    """The router's probabilities (..., E), None without a router, and its and the prior's part of the weights."""

    p: Tensor | None
    by_token: Tensor
    by_prior: Tensor

    def at(self, kept: Tensor) -> RoutingParts:
        """The routing (N, E) of the tokens that a mask (...) keeps."""
        return RoutingParts(None if self.p is None else self.p[kept], self.by_token[kept], self.by_prior[kept])


class _Group(NamedTuple):
    """The sums over the prompts of one group: the load and the mean weights (E,), the tokens and the prompts."""

    load: Tensor
    weights: Tensor
    tokens: int
    prompts: int


class LayerSums:
    """The sums over the tokens of one layer with vectors A (r_a, D_in) and B (D_out, r_b), on their device."""

    def __init__(self, A: Tensor, B: Tensor, grid: bool) -> None:
        self.grid, self.r_a, self.r_b = grid, A.shape[0], B.shape[1]
        self.experts = self.r_a * self.r_b if grid else self.r_a
        # MPS has no float64.
        self.device = torch.device("cpu") if A.device.type == "mps" else A.device
        self.tokens = 0
        # The four means are the router's entropy, its exp, the router's share and the rank of the core.
        self.means = self._zeros(4)
        self.router_load, self.load = self._zeros(self.experts), self._zeros(self.experts)
        self.moments = self._zeros(self.experts, self.experts)
        self.base, self.prompt_squares = self._zeros(), self._zeros()
        self.groups: dict[str, _Group] = {}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _double(self, values: Tensor) -> Tensor:
        return values.to(self.device).double()

    def add_base(self, output: Tensor) -> None:
        """Add the output (N, D_out) of the layer without the adapter."""
        self.base += output.float().square().sum().to(self.base)

    def add(self, a: Tensor, parts: RoutingParts, prompts: Tensor | None, labels: Sequence[str] | None) -> None:
        """Add tokens by their features `a = A x` (N, r_a) and their routing (N, E).

        Prompts are compared if the number (N,) of each token's prompt and the labels of all U prompts are given.
        """
        G = parts.by_token + parts.by_prior
        if len(G) == 0:
            return
        self.tokens += len(G)
        token_size, prior_size = parts.by_token.abs().sum(-1), parts.by_prior.abs().sum(-1)
        share = token_size / (token_size + prior_size).clamp(min=1e-30)
        entropy, rank = torch.zeros_like(share), torch.ones_like(share)
        if parts.p is not None:
            entropy = entropy_of(parts.p)
            self.router_load += self._double(parts.p).sum(0)
        if self.grid:
            core = G.unflatten(-1, (self.r_a, self.r_b))
            gram = core @ core.mT if self.r_a <= self.r_b else core.mT @ core
            rank = gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum((-2, -1)).clamp(min=1e-30)
            added = (a.to(G.dtype)[..., None] * core).flatten(-2)
        else:
            added = a.to(G.dtype) * G
        self.means += self._double(torch.stack((entropy, entropy.exp(), share, rank), -1)).sum(0)
        load = self._double(shares_of(G))
        self.load += load.sum(0)
        added = self._double(added)
        self.moments += added.T @ added
        if prompts is not None and labels is not None:
            self._add_groups(self._double(G), load, prompts.to(self.device), labels)

    def _add_groups(self, G: Tensor, load: Tensor, prompts: Tensor, labels: Sequence[str]) -> None:
        loads, weights = (
            self._zeros(len(labels), self.experts).index_add_(0, prompts, values) for values in (load, G)
        )
        counts = self._zeros(len(labels)).index_add_(0, prompts, load.new_ones(len(load)))
        weights = weights / counts.clamp(min=1)[:, None]
        self.prompt_squares += weights.square().sum()
        for number, (label, count) in enumerate(zip(labels, counts.tolist(), strict=True)):
            if count:
                group, sums = self.groups.get(label), _Group(loads[number], weights[number], int(count), 1)
                self.groups[label] = sums if group is None else _Group(*map(operator.add, group, sums))

    def is_finite(self) -> bool:
        """Whether no NaN and no infinity came up."""
        return all(bool(torch.isfinite(total).all()) for total in (self.moments, self.load, self.base))

    def figures(self, omega: float, gate: float, BB: Tensor, routed: bool) -> LayerRouting:
        """The figures of the layer, from its two sigmoids, `B^T B` (r_b, r_b) and whether it has a router."""
        moments = self.moments / self.tokens
        shared = energy_of_experts(moments, gate**2 * BB, self.grid)  # (E, E)
        total = float(shared.sum())
        relative = shared / total if total > 0 else torch.zeros_like(shared)
        inputs = outputs = alone = relative.diagonal()
        if self.grid:
            blocks = relative.reshape(self.r_a, self.r_b, self.r_a, self.r_b)
            inputs, outputs = torch.einsum("ijik->i", blocks), torch.einsum("ijkj->j", blocks)
        lengths = shared.diagonal().clamp(min=0).sqrt()
        cosines = (shared / (lengths[:, None] * lengths).clamp(min=1e-300)).abs()
        dead = alone < DEAD * alone.mean()
        pairs = torch.nonzero(torch.triu((cosines > ALIKE) & ~dead[:, None] & ~dead, diagonal=1)).tolist()
        load = self.load / self.tokens
        entropy, effective, share, rank = (self.means / self.tokens).tolist()
        groups = {label: self.groups[label] for label in sorted(self.groups)}
        joint = torch.stack([group.load for group in groups.values()] or [load])  # (groups, E)
        return LayerRouting(
            omega=omega,
            gate=gate,
            router_entropy=(entropy / math.log(self.experts) if self.experts > 1 else 0.0) if routed else None,
            effective_experts=effective if routed else None,
            router_load=_tuple(self.router_load / self.tokens) if routed else None,
            load=_tuple(load),
            used_experts=float(used_experts(load)),
            token_share=share,
            core_rank=rank if self.grid else None,
            energy=total / max(float(self.base) / self.tokens, 1e-30),
            input_contribution=_tuple(inputs),
            output_contribution=_tuple(outputs),
            expert_contribution=_tuple(alone),
            dead=_tuple(torch.nonzero(dead).flatten()),
            duplicates=tuple((first, second) for first, second in pairs),
            group_load={label: _tuple(group.load / group.tokens) for label, group in groups.items()},
            mutual_information=mutual_information(joint) if groups else None,
            group_share=self._between_groups() if groups else None,
            tokens=self.tokens,
            moments=moments.cpu().numpy(),
        )

    def _between_groups(self) -> float:
        """Share of the variance of the prompts' mean weights that lies between the groups."""
        groups = self.groups.values()
        prompts = sum(group.prompts for group in groups)
        mean = sum((group.weights for group in groups), self._zeros(self.experts)).square().sum() / prompts
        between = sum(float(group.weights.square().sum()) / group.prompts for group in groups)
        variance = float(self.prompt_squares - mean)
        return min(1.0, max(0.0, between - float(mean)) / variance) if variance > 1e-12 * between else 0.0


@dataclass
class ClusterSums:
    """The prompts of each cluster by group (K + 1,), where the last place counts those that have no scores."""

    counts: dict[str | None, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    spread: float = 0.0
    scored: float = 0.0

    def add(self, scores: Tensor, present: Tensor, labels: Sequence[str] | None) -> None:
        """Add prompts by their scores (U, K), which are zero without any; `present` (U,) says which have tokens."""
        clusters = scores.shape[-1]
        scored = scores.any(-1)
        self.spread += scores[scored].std(-1, correction=0).sum().item()
        self.scored += scored.sum().item()
        places, scores = torch.where(scored, scores.argmax(-1), clusters).tolist(), scores.cpu()
        for number in torch.nonzero(present).flatten().tolist():
            label = None if labels is None else labels[number]
            self.counts.setdefault(label, torch.zeros(clusters + 1, dtype=torch.long))[places[number]] += 1
            if label is not None:
                self.scores[label] = self.scores.get(label, 0) + scores[number]

    def figures(self, groups: Sequence[str]) -> dict[str, Any]:
        """The fields of a report that are about clusters, for these groups."""
        table = {label: counts[:-1] for label, counts in self.counts.items()}
        named = [counts for label, counts in table.items() if label is not None]
        purity = nmi = overlap = None
        if named and self.scored:
            purity, nmi = agreement(torch.stack(named).double())
            overlap = float(overlaps(self.scores).mean()) if len(named) > 1 else None
        return {
            "clusters": _tuple(torch.stack(list(table.values())).sum(0)) if table else (),
            "group_clusters": {label: _tuple(table[label]) for label in groups if label in table},
            "prior_spread": self.spread / self.scored if self.scored else None,
            "purity": purity,
            "nmi": nmi,
            "group_overlap": overlap,
        }


def _tuple(values: Tensor) -> tuple[Any, ...]:
    return tuple(values.tolist())
