"""The router losses of a forward: from the coefficients of its adapters to the model's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..router_losses import LOSS, RouterLosses
from .inputs import Inputs
from .scorer import PromptScorer


@dataclass
class Backward:
    """What a backward pass has reached of the training forwards before it: any output, and any router losses."""

    output: bool = False
    losses: bool = False

    def watch(self, output: Any, total: Tensor) -> None:
        """Notice gradients of an output's tensors and of the losses."""

        def reached(name: str) -> Any:
            return lambda gradient: setattr(self, name, True)

        tensors = output.values() if isinstance(output, ModelOutput) else [output]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor is not total:
                tensor.register_hook(reached("output"))
        total.register_hook(reached("losses"))


class LossWatch:
    """Collects the router losses of training forwards, adds them to the model's loss, and sees whether that is used.

    Args:
        scorer: knows the adapters, and warns once.
    """

    def __init__(self, scorer: PromptScorer) -> None:
        self.scorer = scorer
        self.adapters = scorer.adapters
        self._backward = Backward()

    def check(self) -> None:
        """After a backward pass: warn if it did not reach the router losses."""
        if not self._backward.output:
            return
        if not self._backward.losses:
            self.scorer.warn_once(
                "losses unused",
                "balance_loss_coef and router_z_loss_coef have no effect: the trainer computes a loss of its own from "
                f"the model's output, and not from output.loss. Add the output's `{LOSS}` to that loss in a "
                "compute_loss of your own; where that does not get the output, as in TRL's trainers, a forward hook "
                "on the model does. Or set both coefficients to 0.",
            )
        self._backward = Backward()

    def start(self, coefficients: dict[str, tuple[float, float]], inputs: Inputs) -> RouterLosses:
        """What the layers of a forward add their losses to."""
        self.check()
        share = inputs.share_of_loss(shifted=self.adapters.is_causal())
        return RouterLosses(coefficients, self._attended(inputs), share)

    def coefficients(self, module: nn.Module) -> dict[str, tuple[float, float]]:
        """The coefficients of the router losses of each active adapter that has some, in training."""
        if not (module.training and torch.is_grad_enabled()):
            return {}
        configs = {name: self.adapters.configs[name] for name in self.adapters.active()}
        pairs = {name: (each.balance_loss_coef, each.router_z_loss_coef) for name, each in configs.items()}
        return {name: pair for name, pair in pairs.items() if any(pair)}

    def _attended(self, inputs: Inputs) -> Tensor | None:
        """The mask (B, T) of tokens that count in all layers; None where layers see different tokens."""
        mask = inputs.mask
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 and not self.adapters.two_sided else None

    def end(self, losses: RouterLosses, output: Any) -> Any:
        """The output with the router losses in its loss; None if they cannot be put there."""
        loss = getattr(output, "loss", None)
        total = losses.total(None if loss is None else loss.device)
        if total is None:
            return None
        # Several forwards may come before a backward pass that reaches one of them.
        if total.requires_grad and not torch.compiler.is_compiling():
            self._backward.watch(output, total)
        if isinstance(output, ModelOutput):
            setattr(output, LOSS, total)
        if loss is not None:
            output.loss = loss + total.to(loss.dtype)
            return output
        self.scorer.warn_once(
            "losses",
            "balance_loss_coef and router_z_loss_coef have no effect on a loss that is not computed by the model's "
            f"forward: it needs labels and return_dict=True. Add the output's `{LOSS}` to your own loss.",
        )
        return None
