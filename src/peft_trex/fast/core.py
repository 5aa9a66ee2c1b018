"""The mix without a token router: the weights G are one small core for each row of the prior, `m = a G`.

Axis legend: N tokens, P rows of the prior, each for N / P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from ..mixture import Experts, Layout, Settings, weigh_experts


@dataclass
class Folded:
    """The experts' weights of a layer without a router, and what they were computed from.

    Attributes:
        weights: G (P, ..., E), float32 or wider, with omega and the gate.
        settings: those of a mixture that takes the weights for its prior.
        sources: the scores and the parameters, which are held so that nothing else can take their places in memory.
        versions: how often each of the parameters had been changed in place.
    """

    weights: Tensor | None
    settings: Settings
    sources: Sequence[Tensor | None] = ()
    versions: Sequence[int] = ()

    def stamp(self, scores: Tensor | None, parameters: Sequence[Tensor | None]) -> bool:
        """Note the sources; False if the parameters do not tell when they change, as inference mode makes them."""
        if any(parameter is not None and parameter.is_inference() for parameter in parameters):
            return False
        self.sources, self.versions = (scores, *parameters), _versions(parameters)
        return True

    def is_of(self, scores: Tensor | None, parameters: Sequence[Tensor | None]) -> bool:
        """Whether the weights would be the same if they were computed anew from these."""
        return all(map(is_, self.sources, (scores, *parameters))) and self.versions == _versions(parameters)


def _versions(parameters: Sequence[Tensor | None]) -> list[int]:
    return [parameter._version for parameter in parameters if parameter is not None]


def fold(experts: Experts, prior: Tensor | None, settings: Settings) -> Folded:
    """The weights of a mixture without a router, for which the experts' A and B are all that is left."""
    G = weigh_experts(experts.A, None, prior, experts.omega, settings)
    if experts.gate is not None:
        G = torch.sigmoid(settings.temperature * experts.gate.to(G.dtype)) * G
    return Folded(G, settings._replace(prior_scale=1.0))


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
