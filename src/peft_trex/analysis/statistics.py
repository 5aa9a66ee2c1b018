"""Entropies, energies and overlaps as pure functions on tensors, and the sums that a routing report is made from.

Axis legend: N tokens, E experts, r_a input and r_b output vectors, K clusters, P prompts.

A layer adds `gate * B m` with `m_j = sum_i p_ij` and `p_ij = a_i G_ij`, one number for each expert and token. The
second moments of these E numbers say what any of the experts add, so memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixture import num_experts
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


def overlaps(scores: Mapping[Any, Tensor]) -> Tensor:
    """|cos| between the scores (K,) of each two groups, which may be sums or means."""
    directions = F.normalize(torch.stack(list(scores.values())), dim=-1)
    return (directions @ directions.T).abs()[tuple(torch.triu_indices(len(directions), len(directions), 1))]


class LayerSums:
    """The sums over the tokens of an adapter in one layer, on the layer's device."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer, self.adapter_name = layer, adapter_name
        self.settings = layer.trex_settings[adapter_name]
        A, B = layer.trex_A[adapter_name], layer.trex_B[adapter_name]
        self.r_a, self.r_b = A.shape[0], B.shape[1]
        self.experts = num_experts(self.r_a, self.r_b, self.settings.layout)
        # MPS has no float64.
        self.device = torch.device("cpu") if A.device.type == "mps" else A.device
        self.tokens = 0
        # The four means are the router's entropy, its exp, the router's share and the rank of the core.
        self.means = self._zeros(4)
        self.router_load, self.load = self._zeros(self.experts), self._zeros(self.experts)
        self.moments = self._zeros(self.experts, self.experts)
        self.base, self.prompt_squares = self._zeros(), self._zeros()
        # The tokens to count (...), from the layer's input until its base layer has run.
        self.kept: Tensor | None = None
        # The sums over a group's prompts: the load and the mean weights (E,), the tokens and the prompts.
        self.groups: defaultdict[str, Tensor] = defaultdict(lambda: self._zeros(2 * self.experts + 2))
        # The sum over tokens of the products (E', E) of the loads in the layer before and in this one.
        self.joint: Tensor | None = None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, a: Tensor, parts: Sequence[Tensor], prompts: Tensor | None, labels: Sequence[str] | None) -> Tensor:
        """Add tokens by their features `a = A x` (N, r_a) and their `routing_parts` (N, E); give their loads (N, E).

        Prompts are compared if the number (N,) of each token's prompt and the labels of all prompts are given.
        """
        p, by_token, by_prior = parts
        G = by_token + by_prior
        token_size, prior_size = by_token.abs().sum(-1), by_prior.abs().sum(-1)
        share, entropy = token_size / (token_size + prior_size).clamp(min=1e-30), entropy_of(p)
        if self.settings.layout == "grid":
            core = G.unflatten(-1, (self.r_a, self.r_b))
            gram = core @ core.mT if self.r_a <= self.r_b else core.mT @ core
            rank = gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum((-2, -1)).clamp(min=1e-30)
            added = (a.to(G.dtype)[..., None] * core).flatten(-2)
        else:
            rank, added = torch.ones_like(share), a.to(G.dtype) * G
        means = torch.stack((entropy, entropy.exp(), share, rank), -1)
        means, p, load, added, G = (values.to(self.device).double() for values in (means, p, shares_of(G), added, G))
        self.tokens += len(G)
        self.means += means.sum(0)
        self.router_load += p.sum(0)
        self.load += load.sum(0)
        self.moments += added.T @ added
        if prompts is None or labels is None:
            return load
        loads, weights, tokens = (
            self._zeros(len(labels), values.shape[1]).index_add_(0, prompts.to(self.device), values)
            for values in (load, G, torch.ones_like(G[:, :1]))
        )
        weights /= tokens.clamp(min=1)
        self.prompt_squares += weights.square().sum()
        sums = torch.cat((loads, weights, tokens, torch.ones_like(tokens)), 1)
        for number in torch.nonzero(tokens[:, 0]).flatten().tolist():
            self.groups[labels[number]] += sums[number]
        return load

    def pair(self, before: Tensor, load: Tensor) -> None:
        """Add the same tokens' loads in the layer before (N, E') and in this one (N, E)."""
        product = before.to(load.device).T @ load
        self.joint = product if self.joint is None else self.joint + product

    def prompts(self) -> dict[str, int]:
        """The number of prompts of each group, in alphabetical order."""
        return {label: int(self.groups[label][-1]) for label in sorted(self.groups)}

    def figures(self, name: str) -> LayerRouting:
        """The figures of the layer of this name; a ValueError if NaN or infinity came up."""
        omega, gate = (
            float(torch.sigmoid(self.settings.temperature * logits[self.adapter_name].detach().double().cpu()))
            for logits in (self.layer.trex_omega, self.layer.trex_gate)
        )
        B = self.layer.trex_B[self.adapter_name].detach().to(self.device).double()
        if not all(torch.isfinite(values).all() for values in (self.moments, self.load, self.base, B)):
            raise ValueError(
                f"NaN or infinity came up in the layer {name}: the adapter {self.adapter_name!r} seems to be broken, "
                "or the model on this data."
            )
        grid, moments, load = self.settings.layout == "grid", self.moments / self.tokens, self.load / self.tokens
        BB = gate**2 * (B.T @ B)
        # The mean product (E, E) of what two experts add.
        shared = moments * (BB.repeat(self.r_a, self.r_a) if grid else BB)
        total = float(shared.sum())
        relative = shared / total if total > 0 else torch.zeros_like(shared)
        inputs = outputs = alone = relative.diagonal()
        if grid:
            blocks = relative.reshape(self.r_a, self.r_b, self.r_a, self.r_b)
            inputs, outputs = torch.einsum("ijik->i", blocks), torch.einsum("ijkj->j", blocks)
        lengths = shared.diagonal().clamp(min=0).sqrt()
        cosines = (shared / (lengths[:, None] * lengths).clamp(min=1e-300)).abs()
        dead = alone < DEAD * alone.mean()
        pairs = torch.nonzero(torch.triu((cosines > ALIKE) & ~dead[:, None] & ~dead, diagonal=1)).tolist()
        entropy, effective, share, rank = (self.means / self.tokens).tolist()
        routed = self.adapter_name in self.layer.trex_router
        return LayerRouting(
            omega=omega,
            gate=gate,
            # The entropy of a single expert is zero, and so is log 1.
            router_entropy=entropy / math.log(max(self.experts, 2)) if routed else None,
            effective_experts=effective if routed else None,
            router_load=_tuple(self.router_load / self.tokens) if routed else None,
            load=_tuple(load),
            used_experts=float(used_experts(load)),
            token_share=share,
            core_rank=rank if grid else None,
            energy=total / max(float(self.base) / self.tokens, 1e-30),
            input_contribution=_tuple(inputs),
            output_contribution=_tuple(outputs),
            expert_contribution=_tuple(alone),
            dead=_tuple(torch.nonzero(dead).flatten()),
            duplicates=tuple((first, second) for first, second in pairs),
            **self._group_figures(),
            affinity=None if self.joint is None else mutual_information(self.joint),
            tokens=self.tokens,
            moments=moments.cpu().numpy(),
        )

    def _group_figures(self) -> dict[str, Any]:
        if not self.groups:
            return {"group_load": {}, "mutual_information": None, "group_share": None}
        groups = torch.stack([self.groups[label] for label in sorted(self.groups)])
        columns = groups.split((self.experts, self.experts, 1, 1), 1)
        loads, weights, tokens, prompts = (sums.contiguous() for sums in columns)
        # Of the prompts' mean weights, these are the squares of their mean, and those of the groups' means.
        mean = float(weights.sum(0).square().sum() / prompts.sum())
        between = float((weights.square().sum(1) / prompts[:, 0]).sum())
        variance = float(self.prompt_squares) - mean
        return {
            "group_load": dict(zip(sorted(self.groups), map(_tuple, loads / tokens), strict=True)),
            "mutual_information": mutual_information(loads),
            "group_share": min(1.0, max(0.0, between - mean) / variance) if variance > 1e-12 * between else 0.0,
        }


class ClusterSums:
    """The prompts of each group by cluster, and their scores; the group is None where nothing is compared."""

    def __init__(self) -> None:
        self.counts: dict[str | None, Any] = {}
        self.scores: dict[str | None, Any] = {}
        self.spread = self.scored = 0.0

    def add(self, scores: Tensor, labels: Sequence[str | None]) -> None:
        """Add prompts by their scores (P, K), which are zero without any, and their groups."""
        scored = scores.any(-1)
        self.spread += scores[scored].std(-1, correction=0).sum().item()
        self.scored += scored.sum().item()
        counts = F.one_hot(scores.argmax(-1), scores.shape[-1]) * scored[:, None]
        for label, count, row in zip(labels, counts.cpu(), scores.cpu(), strict=True):
            self.counts[label] = self.counts.get(label, 0) + count
            self.scores[label] = self.scores.get(label, 0) + row

    def figures(self, groups: Sequence[str]) -> dict[str, Any]:
        """The fields of a report that are about clusters, for these groups."""
        purity = nmi = overlap = None
        if self.scored and None not in self.counts:
            purity, nmi = agreement(torch.stack(list(self.counts.values())).double())
            overlap = float(overlaps(self.scores).mean()) if len(self.scores) > 1 else None
        return {
            "clusters": _tuple(sum(self.counts.values())) if self.counts else (),
            "group_clusters": {label: _tuple(self.counts[label]) for label in groups if label in self.counts},
            "prior_spread": self.spread / self.scored if self.scored else None,
            "purity": purity,
            "nmi": nmi,
            "group_overlap": overlap,
        }


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values.tolist())
