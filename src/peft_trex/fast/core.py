"""The mix without a token router: the weights G are one small core for each row of the prior, `m = a G`.

Axis legend: N tokens, P rows of the prior, each for N / P tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..mixture import Experts, Layout, Settings, weigh_experts
from .cpu import Scales


class Folded(NamedTuple):
    """The experts' weights of a layer without a router.

    Attributes:
        weights: G (P, ..., E), float32 or wider, with omega and the gate.
        settings: those of a mixture that takes the weights for its prior.
    """

    weights: Tensor
    settings: Settings


def fold(experts: Experts, prior: Tensor | None, settings: Settings) -> Folded:
    """The weights of a mixture without a router, for which the experts' A and B are all that is left.

    On a CPU without gradients they round as those of [`weigh`], which makes them in training: a checkpointed forward
    runs in both ways.
    """
    if prior is not None and takes_numbers(prior, experts) and not torch.is_grad_enabled():
        G = weigh(prior, experts.A, Scales.of(experts, prior, settings))
    else:
        G = weigh_experts(experts.A, None, prior, experts.omega, settings)
        if experts.gate is not None:
            G = torch.sigmoid(settings.temperature * experts.gate.to(G.dtype)) * G
    return Folded(G, settings._replace(prior_scale=1.0))


def takes_numbers(x: Tensor, experts: Experts) -> bool:
    """Whether omega and gate can be taken as Python numbers: they are there, on a CPU, and nothing records a graph."""
    if type(x) is not Tensor or not x.is_cpu or experts.omega is None or experts.gate is None:
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def weigh(prior: Tensor, A: Tensor, scales: Scales) -> Tensor:
    """The experts' weights G (P, ..., E) from a prior of that shape, in the dtype of A or float32, the wider."""
    return prior.to(torch.promote_types(A.dtype, torch.float32)) * scales.larger


def weigh_backward(G: Tensor, dG: Tensor, scales: Scales, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the prior (P, E), and of the logits of omega and gate (1,), for `dG` (P, E)."""
    by_factor = settings.temperature * float(torch.dot(G.reshape(-1), dG.reshape(-1)))
    d_omega, d_gate = -scales.omega * by_factor, (1 - scales.gate) * by_factor
    return dG * scales.larger, G.new_full((1,), d_omega), G.new_full((1,), d_gate)


def mix(a: Tensor, G: Tensor, layout: Layout) -> Tensor:
    """The mixed features m (N, r_b), in the dtype of G, from the features a (N, r_a) and cores G (P, E)."""
    a, core = _by_prompt(a, G, layout)
    return (a * core if layout == "paired" else torch.bmm(a, core)).flatten(0, 1)


def mix_backward(a: Tensor, G: Tensor, dm: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The gradients (N, r_a) and (P, E) of [`mix`] for `dm` (N, r_b), in the dtype of G."""
    a, core = _by_prompt(a, G, layout)
    dm = dm.to(G.dtype).view(*a.shape[:2], dm.shape[1])
    if layout == "paired":
        return (dm * core).flatten(0, 1), (a * dm).sum(1)
    return torch.bmm(dm, core.mT).flatten(0, 1), torch.bmm(a.mT, dm).flatten(1)


def _by_prompt(a: Tensor, G: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """a (P, N / P, r_a), and G as (P, r_a, r_b), or as (P, 1, E) in the paired layout."""
    rows, r_a = len(G), a.shape[1]
    core = G.unsqueeze(1) if layout == "paired" else G.view(rows, r_a, G.shape[1] // r_a)
    return a.to(G.dtype).view(rows, len(a) // max(1, rows), r_a), core
