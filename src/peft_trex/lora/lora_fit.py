"""The mathematics of `trex_from_lora`: experts from LoRA factors, the prior's map, and the errors.

Axis legend: n LoRA adapters, D_in and D_out a layer's widths, r_a input and r_b output vectors, E experts, K clusters,
R the rank of all adapters of a layer together, P prompts. All tensors are float64 on the CPU.

At the start the router R is zero. Each expert then has the weight `u = omega c_token / E` for the tokens, and a prompt
with the scores s adds `(1 - omega) c_prior M s`. What such weights can express differs by layout:

- paired: any sum of the experts b_e a_e^T. The experts are the largest singular parts of the adapters, scaled so that
  the weight u makes the mean of all adapters. Then n u on its own experts, and 0 on the others, makes one adapter.
- grid: B G^T A for any matrix G between shared bases, which are fitted to all adapters (Tucker-2). But equal weights
  make a matrix of rank one. The bases are turned so that it is the best one for the mean of all adapters, and the
  prior must add everything else.

A shared core adds `(1 - omega) c_prior C`, which together with u makes the mean of all adapters in both layouts; the
prior adds what a single adapter has more. The experts are scaled so that C starts at its usual size: for one adapter
it is the usual start itself, half of the identity. The bases of a grid are turned to the singular parts of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import TRexConfig
from ..layer import TRexLayer
from ..parameters import CORE_START

# The ridge of the prior map's regression is this share of the scores' mean square.
RIDGE = 1e-4
# The fit of a grid improves its two bases in turn, this many times.
SWEEPS = 30
# Equal weights in a grid are at least this share as strong as an adapter, also where the adapters' mean is weaker.
LEAST_MEAN = 0.1
# Omega and the gate are sigmoids of zero at the start.
HALF = 0.5
# The energies (n,) of the adapters at one layer, what the best weights miss of them, and what the start misses.
LayerErrors = tuple[Tensor, Tensor, Tensor]


class Factors(NamedTuple):
    """The weight `up @ down` that a LoRA adapter adds to a layer; of rank 0 where it changes nothing."""

    up: Tensor  # (D_out, r), scaled
    down: Tensor  # (r, D_in)


class Experts(NamedTuple):
    """Experts for one layer that are still to be scaled."""

    A: Tensor  # (r_a, D_in)
    B: Tensor  # (D_out, r_b)
    pairs: tuple[Tensor, Tensor]  # (E,) each, the row of A and the column of B of each expert
    weights: Tensor  # (n, E), the best ones for each adapter
    equal_weight: float  # the weight of all experts that makes the adapters' mean
    missed: Tensor  # (n,), energies that the best weights miss


class PromptScores(NamedTuple):
    """How the prior scores the prompts of each adapter."""

    means: Tensor  # (n, K)
    squares: Tensor  # (n, K, K), second moments
    indicators: Tensor  # (K, n): scores @ indicators is nearly 1 for the prompt's adapter, and 0 for the others


def _paired_experts(loras: Sequence[Factors], energies: Tensor, unused: Tensor) -> Experts:
    """Make experts of the singular parts with the largest shares of their adapters.

    Where there are more experts than singular parts, the others keep their rows of `unused` (E, D_in) in A.
    """
    experts, adapters = len(unused), len(loras)
    singular = []
    for up, down in loras:
        (left, core_left), (right, core_right) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        u, s, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        singular.append(((left @ u).T, s, v @ right.T))
    U, S, V = (torch.cat(parts) for parts in zip(*singular, strict=True))
    owner = torch.cat([torch.full(s.shape, number) for number, (_, s, _) in enumerate(singular)])
    shares = S.square() / energies[owner]
    kept = shares.argsort(descending=True, stable=True)[:experts].sort()[0]
    root = S[kept].sqrt()[:, None]
    A, B = unused.clone(), S.new_zeros(U.shape[1], experts)
    A[: len(kept)], B[:, : len(kept)] = root * V[kept], (root * U[kept]).T
    weights = S.new_zeros(adapters, experts)
    weights[owner[kept], torch.arange(len(kept))] = 1.0
    dropped = torch.ones_like(owner, dtype=torch.bool).index_fill(0, kept, False)
    missed = torch.stack([S[dropped & (owner == number)].square().sum() for number in range(adapters)])
    return Experts(A, B, (torch.arange(experts),) * 2, weights, 1 / adapters, missed)


def _grid_experts(
    loras: Sequence[Factors], energies: Tensor, r_a: int, r_b: int, shared_core: bool = False
) -> Experts:
    """Fit shared bases to all adapters, and turn them so that equal weights make the best of rank one for the mean.

    With a shared core, the identity makes the mean, as far as that is not much weaker than the adapters.
    """
    left, core_left = torch.linalg.qr(torch.cat([lora.up for lora in loras], 1))
    right, core_right = torch.linalg.qr(torch.cat([lora.down for lora in loras]).T)
    ranks = [len(lora.down) for lora in loras]
    cores = zip(core_left.split(ranks, 1), core_right.split(ranks, 1), strict=True)
    S = torch.stack([up @ down.T for up, down in cores])  # (n, R, R)
    # In the fit each adapter counts the same.
    unit = S / energies.clamp(min=torch.finfo(S.dtype).tiny).sqrt()[:, None, None]
    a, b = min(r_a, S.shape[2]), min(r_b, S.shape[1])
    L, R = _leading(unit, b), _leading(unit.mT, a)
    for _ in range(SWEEPS):
        L = _leading(unit @ R, b)
        R = _leading((L.T @ unit).mT, a)
    C = L.T @ S @ R  # (n, b, a)
    u, s, v = torch.linalg.svd(C.mean(0))
    typical = C.square().sum((1, 2))[energies > 0].mean().sqrt()
    if shared_core:
        least = LEAST_MEAN * typical / math.sqrt(len(s))
        size_left, size_right = (F.pad(s, (0, size - len(s))).maximum(least).sqrt() for size in (b, a))
        turn_left, turn_right, equal_weight = u * size_left, v.T * size_right, 1.0
        C = (u / size_left).T @ C @ (v.T / size_right)
    else:
        turn_left, turn_right = _reflection(u[:, 0]), _reflection(v[0])
        C = turn_left.T @ C @ turn_right
        equal_weight = float(torch.maximum(s[0], LEAST_MEAN * typical)) / math.sqrt(a * b)
    # B is multiplied by the equal weight later, and with this root A becomes as large as B.
    root = math.sqrt(equal_weight)
    A, B, weights = S.new_zeros(r_a, len(right)), S.new_zeros(len(left), r_b), S.new_zeros(len(S), r_a, r_b)
    A[:a], B[:, :b], weights[:, :a, :b] = (right @ R @ turn_right).T, left @ L @ turn_left, C.mT
    missed = (S - L @ (L.T @ S @ R) @ R.T).square().sum((1, 2))
    pairs = torch.arange(r_a).repeat_interleave(r_b), torch.arange(r_b).repeat(r_a)
    return Experts(root * A, B / root, pairs, weights.flatten(1), equal_weight, missed)


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (a, rank) of the matrices (n, a, b) side by side."""
    return torch.linalg.svd(matrices.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank]


def _reflection(vector: Tensor) -> Tensor:
    """The reflection (a, a) that exchanges a unit vector (a,) and the one of equal entries."""
    difference = torch.full_like(vector, 1 / math.sqrt(len(vector))) - vector
    length = difference.square().sum()
    identity = torch.eye(len(vector), dtype=vector.dtype)
    return identity if length < 1e-30 else identity - 2 * torch.outer(difference, difference) / length


def prompt_scores(scores: Sequence[Tensor]) -> PromptScores:
    """Regress each prompt's adapter on its scores: (P, K) for each adapter, all of which count the same."""
    means = torch.stack([prompts.mean(0) for prompts in scores])
    squares = torch.stack([prompts.T @ prompts / len(prompts) for prompts in scores])
    total = squares.sum(0)
    total += RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
    return PromptScores(means, squares, indicators=torch.linalg.solve(total, means.T))


@torch.no_grad()
def start_layer(
    layer: TRexLayer, name: str, config: TRexConfig, loras: Sequence[Factors], scores: PromptScores | None
) -> LayerErrors:
    """Set the experts, map and core that the adapter of this name has in a layer, and tell what they miss.

    With the experts' Gram matrix H, and their inner products h with an adapter's weight dW, the weights g make a
    matrix W with `|dW - W|^2 = |dW|^2 - 2 h g + g H g`. Its mean over the adapter's prompts needs only the mean and
    the second moment of g. Without `scores` the map is zero.
    """
    cores = [torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T for up, down in loras]
    energies = torch.stack([core.square().sum() for core in cores])
    if not energies.any():
        return energies, energies, energies
    if config.expert_layout == "paired":
        experts = _paired_experts(loras, energies, layer.trex_A[name].double().cpu())
    else:
        r_a, r_b = len(layer.trex_A[name]), layer.trex_B[name].shape[1]
        experts = _grid_experts(loras, energies, r_a, r_b, config.shared_core)
    count = experts.weights.shape[1]
    uniform = HALF * layer.trex_settings[name].token_scale / count if config.use_router else 0.0
    prior_scale = HALF * config.prior_scale
    start = torch.full_like(experts.weights[0], uniform)  # (E,), the weights without a prompt
    scale = experts.equal_weight / (HALF * (uniform + CORE_START * prior_scale if config.shared_core else uniform))
    weights = experts.weights / (HALF * scale)  # (n, E)
    if config.shared_core:
        layer.trex_core[name].copy_((weights.mean(0) - uniform) / prior_scale)
        start = weights.mean(0)
    B, prior_map = scale * experts.B, torch.zeros(())
    if scores is not None:
        # The prior has to add what these weights lack.
        prior_map = (weights - start).T @ scores.indicators.T / prior_scale
    layer.trex_A[name].copy_(experts.A)
    layer.trex_B[name].copy_(B)
    if name in layer.trex_map:
        layer.trex_map[name].copy_(prior_map)
    rows, columns = experts.pairs
    a, b = experts.A[rows], HALF * B[:, columns]  # (E, D_in), (D_out, E)
    H = (a @ a.T) * (b.T @ b)
    missed = energies.clone()
    for number, (up, down) in enumerate(loras):
        mean, square = start, start[:, None] * start
        if scores is not None:
            more = prior_scale * prior_map @ scores.means[number]
            spread = prior_scale**2 * prior_map @ scores.squares[number] @ prior_map.T
            across = start[:, None] * more
            mean, square = mean + more, square + across + across.T + spread
        h = ((b.T @ up) * (a @ down.T)).sum(1)
        missed[number] -= 2 * h @ mean
        missed[number] += (H * square).sum()
    return energies, experts.missed, missed.clamp(min=0)
