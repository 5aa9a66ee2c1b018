"""The adapter in a convolution: A and the router are convolutions of the kernel's shape, B is one of size 1."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .expert_block import ExpertBlock
from .fast.base import Base
from .fused import width_of
from .layer import Linear
from .mixture import Experts, is_narrow, mixture_of, no_autocast, product
from .unsuited import CONVOLUTIONS


class Convolution(Linear):
    """T-REX in an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`: (B, C_out, ...) for x (B, C_in, ...).

    Each place of the output is a token. Its input x is what lies under the kernel, D_in = C_in times the kernel's
    size, its output has D_out = C_out numbers, and [`mixture`] has the formula. Stride, padding and dilation are those
    of the base layer. The parameters are stored as those of a linear layer, (r_a, D_in) for A.
    """

    def tokens_of(self, x: Tensor) -> Tensor:
        """What lies under the kernel at each place of the output, (B, ..., D_in)."""
        return self._product(x, torch.eye(self.in_features, dtype=x.dtype, device=x.device))

    def outputs_of(self, y: Tensor) -> Tensor:
        """The output (B, ..., C_out) at each place."""
        return y.movedim(1, -1)

    def as_lora(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Static factors in the shapes of PEFT's LoRA on the layer; a ValueError for what that does not know."""
        layer: Any = self.get_base_layer()
        if layer.padding_mode != "zeros" or any(step != 1 for step in layer.dilation):
            raise ValueError(
                f"PEFT's LoRA on a convolution knows no dilation and pads by zeros; this one has "
                f"dilation={layer.dilation} and padding_mode={layer.padding_mode!r}. Merge the adapter, or leave such "
                "layers out of it."
            )
        return down.reshape(len(down), layer.in_channels, *layer.kernel_size), up[
            (..., *[None] * len(layer.kernel_size))
        ]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT makes a LoRA of two axes from `get_delta_weight`, which is none for a convolution."""
        return False

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`weight` (r, D_in) times the tokens of an input, (B, ..., r), in float32 where it would be float16."""
        layer: Any = self.get_base_layer()
        if x.dim() != 2 + len(layer.kernel_size):
            raise ValueError(
                f"A T-REX layer in a {type(layer).__name__} got an input of shape {tuple(x.shape)}; expected a batch, "
                "(B, C_in, ...). Give a single one an axis of rows: x[None]."
            )
        kernel = weight.reshape(len(weight), layer.in_channels, *layer.kernel_size)
        if not is_narrow(weight):
            return layer._conv_forward(x, kernel, None).movedim(1, -1)
        with no_autocast(x):
            return layer._conv_forward(x.float(), kernel.float(), None).movedim(1, -1)

    def _delta_weight(self, adapter: str) -> Tensor:
        layer: Any = self.get_base_layer()
        return super()._delta_weight(adapter).reshape(-1, layer.in_channels, *layer.kernel_size)

    def _add(self, adapter_name: str, base: Base, experts: Experts) -> Tensor:
        settings, output = self.trex_settings[adapter_name], base.compute()
        x = self.trex_dropout[adapter_name](self._cast_input_dtype(base.x, experts.A.dtype))
        a, logits = self._product(x, experts.A), None
        if experts.router is not None:
            down = experts.router_down
            logits = self._product(x, experts.router if down is None else down)
            logits = logits if down is None else product(logits, experts.router)
        state = self._channel.running.state
        if state is not None and state.losses is not None and adapter_name in state.losses.coefficients:
            state.losses.add(adapter_name, self.tokens_of(x), experts, settings.top_k)
        y = mixture_of(a, logits, experts, self._prior_for(adapter_name, a, experts), settings)
        return output + y.movedim(-1, 1).to(output.dtype)


def layer_for(target: nn.Module) -> type[Linear]:
    """The class of the layer that takes the place of a module, which may be another adapter's."""
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(layer, CONVOLUTIONS):
        return Convolution
    return Linear if width_of(layer) is None else ExpertBlock
