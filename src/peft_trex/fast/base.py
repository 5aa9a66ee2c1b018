"""The base layer's part of an output, which the fast path may compute together with the adapter's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from torch.nn.modules.module import _has_any_global_hook
except ImportError:  # pragma: no cover

    def _has_any_global_hook() -> Any:
        # Without this private name of torch, hooks for all modules cannot be seen. We assume that there are some, so
        # each base layer is called as a module, which costs some time and changes nothing else.
        return True


SHORT = {torch.bfloat16, torch.float16}


class Base(NamedTuple):
    """What an adapter adds its output to: the base layer's output, or the layer while nothing has called it.

    Only a [`separable`] layer may wait: the fast path then makes both products with one cast of the input, one output
    and one gradient of the input.
    """

    x: Tensor  # (..., D_in), the layer's input, before the adapter's cast and dropout
    layer: nn.Linear | None
    output: Tensor | None = None  # (..., D_out)

    def compute(self) -> Tensor:
        """The output (..., D_out)."""
        if self.output is not None:
            return self.output
        assert self.layer is not None
        return F.linear(self.x, self.layer.weight, self.layer.bias)


def separable(layer: nn.Module) -> bool:
    """Whether a layer does nothing but multiply by frozen weights, so that its product may be made elsewhere."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or _has_any_global_hook():
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    # Quantised and sharded weights are tensors of another kind.
    for parameter in layer._parameters.values():
        if parameter is not None and (type(parameter) is not nn.Parameter or parameter.requires_grad):
            return False
    return True
