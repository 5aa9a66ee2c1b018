"""What an adapter adds for one new token of a prompt, with all that the prompt's tokens have in common made once.

On CPUs decoding costs what its calls cost, not its arithmetic. So this makes few of them: without a router the
experts' weights are folded into A, and a token then takes two products, as in a LoRA of rank r_b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..mixture import Experts, Settings
from .base import SHORT, Base
from .cpu import Scales

# A dict by adapters' names, and what stands in it, with how often that had been changed in place if it is a tensor.
Part = tuple[Mapping[str, Any], Any, int | None]


class Stamp:
    """What something was computed from, which tells whether it would be the same if it were computed anew.

    It holds all of it, so that nothing else can take the place of a part in memory.

    Args:
        scores: the prior's, of the prompt.
        adapter_name: the adapter.
        places: where the parameters and settings of each adapter stand.
    """

    def __init__(self, scores: Tensor, adapter_name: str, places: Iterable[Mapping[str, Any]]) -> None:
        self.scores, self.name = scores, adapter_name
        found = [(place, place.get(adapter_name)) for place in places]
        self.parts: list[Part] = [(place, value, getattr(value, "_version", None)) for place, value in found]

    def holds(self, scores: Tensor | None) -> bool:
        """Whether nothing has changed."""
        if scores is not self.scores:
            return False
        name = self.name
        for place, value, version in self.parts:
            if place.get(name) is not value or getattr(value, "_version", None) != version:
                return False
        return True


class OneToken:
    """Adds one adapter's output for tokens of one prompt, one at a time and without gradients, on a CPU.

    Args:
        experts: with float32 or float64 A and B, and a full router, or none.
        prior: (1, E), or None; without a router the experts' weights themselves.
        settings: without top_k.
    """

    def __init__(self, experts: Experts, prior: Tensor | None, settings: Settings) -> None:
        A, B, self.router, *_ = experts
        self.paired, self.up, self.scale = settings.layout == "paired", B, 1.0
        self.by_prior: Tensor | None = None
        self.down, self.by_token = A, 1.0
        if self.router is None:
            assert prior is not None
            G = prior.view(-1).to(A.dtype)
            self.down = A * G[:, None] if self.paired else G.view(len(A), B.shape[1]).T @ A
            return
        scales = Scales.of(experts, prior, settings)
        self.scale, self.by_token = scales.larger, scales.token
        if prior is not None:
            self.by_prior = prior.view(-1).to(A.dtype) * scales.prior

    @staticmethod
    def suits(experts: Experts, settings: Settings) -> bool:
        """Whether it can be made of these."""
        return experts.A.dtype not in SHORT and experts.router_down is None and settings.top_k is None

    def add(self, base: Base) -> Tensor:
        """The base layer's output plus the adapter's (1, 1, D_out), for an input (1, 1, D_in)."""
        x, output = base.x.view(-1), base.compute()
        if base.layer is None:
            output = output.clone(memory_format=torch.contiguous_format)
        x = x if x.dtype == self.down.dtype else x.to(self.down.dtype)
        m = torch.mv(self.down, x)
        if self.router is not None:
            G = torch.softmax(torch.mv(self.router, x), 0)
            if self.by_token != 1:
                G *= self.by_token
            if self.by_prior is not None:
                G += self.by_prior
            m = m * G if self.paired else torch.mv(G.view(len(m), -1).T, m)
        if output.dtype == m.dtype:
            output.view(-1).addmv_(self.up, m, alpha=self.scale)
            return output
        # A delta in another dtype is rounded once, when it has been scaled.
        output.view(-1).add_(torch.mv(self.up, m), alpha=self.scale)
        return output
