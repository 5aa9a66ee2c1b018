"""Losses of the token router beside the task's: against experts that get no tokens, and logits that grow.

Axis legend: B rows, T tokens of each, N tokens of all rows, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .mixture import Experts, keep_strongest, router_logits

# This attribute of an output holds the sum.
LOSS = "trex_router_loss"


def balance_loss(logits: Tensor, counts: Tensor, top_k: int | None = None) -> Tensor:
    """Switch Transformer's loss `E sum_e f_e P_e` of logits (N, E): 1 if all experts get the same, E if one gets all.

    P is the mean of the softmax over all experts, weighted by `counts` (N,), which sum up to one. f is that over each
    token's `top_k` experts, None for all, and counts as constant; in the original (arXiv 2101.03961, equation 4) a
    token has one expert, and f counts tokens.
    """
    p = counts @ logits.softmax(-1)
    load = p if top_k is None else counts @ keep_strongest(logits, top_k).softmax(-1)
    return logits.shape[-1] * (load.detach() * p).sum()


def z_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean over tokens of `logsumexp(logits)^2`, logits (N, E): ST-MoE's (arXiv 2202.08906, equation 5)."""
    return counts @ logits.logsumexp(-1).square()


@dataclass
class RouterLosses:
    """The router losses of one forward in training; each layer adds its own while the forward runs.

    Attributes:
        coefficients: of the balance loss and the z-loss, of each adapter that has them.
        attended: (B, T), not zero where a token counts; None if all do.
        share: of the forward in the loss that is normalised over several.
        by_adapter: both losses of each layer.
        open: whether layers still add.
    """

    coefficients: Mapping[str, tuple[float, float]]
    attended: Tensor | None = None
    share: Tensor | float = 1.0
    by_adapter: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    open: bool = True

    def add(self, adapter_name: str, x: Tensor, experts: Experts, top_k: int | None) -> None:
        """Add the losses of a layer with the input `x` (..., D_in)."""
        router, down = experts.router, experts.router_down
        if adapter_name not in self.coefficients or router is None:
            return
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(router.dtype, torch.float32)
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            counts = self._counts(tokens)
            logits = router_logits(tokens, router.to(dtype), None if down is None else down.to(dtype))
            losses = balance_loss(logits, counts, top_k), z_loss(logits, counts)
        # Checkpointing runs the layers again, with the same operations, when the loss is complete.
        if self.open:
            self.by_adapter.setdefault(adapter_name, []).append(losses)

    def _counts(self, tokens: Tensor) -> Tensor:
        """The weight (N,) of each of a layer's tokens (N, D_in) in a mean over those that are attended to."""
        if self.attended is None or self.attended.numel() != len(tokens):
            return tokens.new_full((len(tokens),), 1 / max(1, len(tokens)))
        counts = (self.attended.reshape(-1).to(tokens.device) != 0).to(tokens.dtype)
        return counts / counts.sum().clamp(min=1)

    def total(self, device: torch.device | None) -> Tensor | None:
        """The sum of all coefficients times the mean over layers, on this device or any; None if no layer added."""
        self.open = False
        terms = []
        for name, losses in self.by_adapter.items():
            for coefficient, values in zip(self.coefficients[name], zip(*losses, strict=True), strict=True):
                if coefficient:
                    device = device or values[0].device
                    terms.append(coefficient * torch.stack([value.to(device) for value in values]).mean())
        return torch.stack(terms).sum() * self.share if terms else None
