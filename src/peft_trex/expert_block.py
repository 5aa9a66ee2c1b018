"""The adapter of a block of experts: one mixture beside all of them, from the block's input to its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import Linear
from .quantized import PLAIN_DTYPES

OBSTACLE = (
    "a block of experts, which T-REX adapts as a whole: no single weight of it could take up what the adapter adds, "
    "and LoRA has no place for it, so such an adapter is neither merged, calibrated nor exported, and nothing was "
    "changed. Use the adapter unmerged, or train one without the block (exclude_modules)."
)


class ExpertBlock(Linear):
    """T-REX in a block of experts held in three-dimensional parameters: `y = experts(x) + gate * B (a G)`, (N, D).

    The block's own router chooses among its experts, each of which is gated and not linear. T-REX's mixture, of which
    [`mixture`] has the formula, stands beside all of them: one A, B and router for the block, and the prior of the
    prompt that each of the N tokens belongs to.
    """

    def check_static(self, path: str) -> None:
        raise ValueError(f"{path} is {OBSTACLE}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT would make a LoRA of `get_delta_weight`, which there is none of."""
        return False

    def _delta_weight(self, adapter: str) -> Tensor:
        raise ValueError(f"The module is {OBSTACLE}")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT looks for a parameter called weight, and a block has none.
        weight = self.get_base_layer().down_proj
        # Quantised weights have dtypes that nothing can be trained in.
        dtype = weight.dtype if weight.dtype in PLAIN_DTYPES else None
        for name in self.adapter_layer_names:
            parameters: nn.ParameterDict = getattr(self, name)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name] = parameters[adapter_name].to(device=device or weight.device, dtype=dtype)
