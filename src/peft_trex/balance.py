"""Losses of the token router beside the task's: against experts that get no tokens, and logits that grow.

Axis legend: B rows, T tokens of each, N of all, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .mixture import keep_strongest

LOSS = "trex_router_loss"  # what an output carries the sum under, for those who compute their loss from logits


def balance_loss(logits: Tensor, counts: Tensor, top_k: int | None = None) -> Tensor:
    """`E sum_e f_e P_e` of logits (N, E): 1 if all experts get the same, E if one gets everything.

    `counts` (N,) are the tokens' shares in a mean; they sum up to one. P is the mean of the softmax over all experts;
    f, which counts as constant, is the mean share of the router's weight that an expert gets, with `top_k` zero of
    tokens that did not choose it. This is Switch Transformer's loss (arXiv 2101.03961, equation 4), where a token has
    one expert and f counts tokens.
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
    """

    coefficients: Mapping[str, tuple[float, float]]
    attended: Tensor | None = None
    share: Tensor | float = 1.0
    found: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    open: bool = True  # checkpointing runs layers again when the loss is there already

    def add(self, adapter_name: str, x: Tensor, router: Tensor, down: Tensor | None, top_k: int | None) -> None:
        """Take note of a layer's input `x` (..., D_in) and its router (E, D_in), or (E, Q) and (Q, D_in)."""
        if adapter_name not in self.coefficients:
            return
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(router.dtype, torch.float32)
            routed = x.reshape(-1, x.shape[-1]).to(dtype)
            counts = self._counts(routed)
            logits = F.linear(routed if down is None else F.linear(routed, down.to(dtype)), router.to(dtype))
            losses = balance_loss(logits, counts, top_k), z_loss(logits, counts)
        if self.open:
            self.found.setdefault(adapter_name, []).append(losses)

    def _counts(self, tokens: Tensor) -> Tensor:
        """(N,), the share of each of a layer's tokens (N, D_in) in a mean over those that are attended to."""
        if self.attended is None or self.attended.numel() != len(tokens):
            return tokens.new_full((len(tokens),), 1 / max(1, len(tokens)))
        counts = (self.attended.reshape(-1).to(tokens.device) != 0).to(tokens.dtype)
        return counts / counts.sum().clamp(min=1)

    def total(self, device: torch.device | None) -> Tensor | None:
        """What is added to the loss, means over the layers, on this device or any; None if no layer had a part."""
        self.open = False
        parts = []
        for name, found in self.found.items():
            for coefficient, losses in zip(self.coefficients[name], zip(*found, strict=True), strict=True):
                if coefficient:
                    device = device or losses[0].device
                    parts.append(coefficient * torch.stack([loss.to(device) for loss in losses]).mean())
        return torch.stack(parts).sum() * self.share if parts else None


def share_of(inputs: Mapping[str, Any], shifted: bool) -> Tensor | float:
    """What a forward has of the tokens that its loss is normalised by, if that is told: in (0, 1].

    transformers' Trainer gives the number of labelled tokens of all batches of a step as `num_items_in_batch`; the
    model divides by it, and the Trainer by nothing, so a loss that is a mean by itself must be weighed alike.

    Args:
        inputs: the forward's.
        shifted: whether the model predicts the label after each token, so that a row's first one does not count.
    """
    count, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if inputs.get("shift_labels") is not None:
        labels, shifted = inputs["shift_labels"], False
    if count is None or labels is None:
        return 1.0
    return (labels[..., 1:] if shifted else labels).ne(-100).sum() / count
