"""HydraLoRA (arXiv 2404.19245): one A, several B, and a router that weighs these for each token; PEFT lacks it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HydraLinear(nn.Module):
    """A frozen linear layer plus `alpha / r sum_j w_j B_j A x`, where `w = softmax(R x)`.

    Args:
        base: (D_out, D_in).
        r: rows of A (r, D_in).
        heads: N, matrices B_j (D_out, r); they stand side by side in one (D_out, N r), that of j first at j r.
        alpha: as LoRA's.
    """

    def __init__(self, base: nn.Linear, r: int, heads: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / r
        made = {"device": base.weight.device, "dtype": torch.float32}
        self.hydra_A = nn.Parameter(torch.empty(r, base.in_features, **made))
        self.hydra_B = nn.Parameter(torch.zeros(base.out_features, heads * r, **made))
        self.hydra_router = nn.Parameter(torch.empty(heads, base.in_features, **made))
        # Both start as a linear layer does; without a drawn router all B would stay equal.
        for drawn in (self.hydra_A, self.hydra_router):
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(F.linear(x, self.hydra_router), -1)
        mixed = (weights.unsqueeze(-1) * F.linear(x, self.hydra_A).unsqueeze(-2)).flatten(-2)
        return self.base(x) + self.scale * F.linear(mixed, self.hydra_B)


@dataclass
class HydraConfig:
    """Which layers get it, by their last names, and its sizes."""

    target_modules: list[str]
    r: int
    heads: int
    alpha: float

    def attach(self, base: nn.Module) -> Any:
        """Put it on a frozen model, in place."""
        names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            parent, _, last = name.rpartition(".")
            if last in self.target_modules:
                layer = HydraLinear(base.get_submodule(name), self.r, self.heads, self.alpha)
                setattr(base.get_submodule(parent), last, layer)
        return base

    @property
    def words(self) -> str:
        return f"r={self.r}, heads={self.heads}, alpha={self.alpha:g}"
