"""Layers that an adapter cannot be put into: it would be passed by in silence, or break the forward."""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .quantized import scheme_of
from .source import CALLED, code_of_forward

READ = "its weight is read by the {} around it, which passes an adapter by in silence"
WIDE = "it is a {}, whose forward does not turn (tokens, {}) into one tensor (tokens, {})"
# What a forward does with `self.name.weight`: it reads the weight, hands it to a function, or multiplies with it.
WEIGHT_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|requires_grad|is_meta)\b)(?! = )")
WEIGHT_HANDED = re.compile(r"(?:[(=]|, )self\.(\w+)\.weight(?=[,)])")
WEIGHT_MULTIPLIED = re.compile(r"(?<=@ )self\.(\w+)\.weight\b(?!\.)|\bself\.(\w+)\.weight(?= @)")
# These functions take a weight, but compute nothing with it.
QUESTION = re.compile(r"\b(?:isinstance|hasattr|getattr|type|id|len)\(self\.\w+\.weight\b")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A layer is tried with so many tokens. A prime number is no multiple of the groups that a grouped layer expects.
TOKENS = 7


class Reason(NamedTuple):
    """Why an adapter should not go into a layer, and whether it never has an effect there."""

    text: str
    always: bool


def unsuited_layers(model: nn.Module) -> dict[str, Reason]:
    """The linear layers and convolutions of a model that no adapter should go into, by their names."""
    reasons: dict[str, Reason] = {}
    read = {kind: bypassed(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        for name, always in read[type(module)].items():
            layer = getattr(module, name, None)
            if isinstance(layer, (nn.Linear, *CONVOLUTIONS, BaseTunerLayer)):
                reasons[f"{path}.{name}".removeprefix(".")] = Reason(READ.format(type(module).__name__), always)
        if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer) and not _is_linear(module):
            reasons[path] = Reason(WIDE.format(type(module).__name__, module.in_features, module.out_features), True)
    return reasons


def _is_linear(layer: nn.Linear) -> bool:
    """Whether a layer's forward returns what that of `nn.Linear` would, as far as shapes tell."""
    if type(layer).forward is nn.Linear.forward or scheme_of(layer) is not None:
        return True
    # The layer is tried without memory, values, or the hooks of those who have wrapped it.
    double: Any = copy.copy(layer)
    double._parameters = {name: _emptied(tensor) for name, tensor in layer._parameters.items()}
    double._buffers = {name: _emptied(tensor) for name, tensor in layer._buffers.items()}
    for shape in ((TOKENS,), (1, TOKENS)):
        x = torch.empty(*shape, layer.in_features, dtype=layer.weight.dtype, device="meta")
        try:
            with torch.no_grad():
                output = type(layer).forward(double, x)
        except NotImplementedError:  # a kernel that needs values
            return True
        except Exception:
            continue
        if isinstance(output, torch.Tensor) and tuple(output.shape) == (*shape, layer.out_features):
            return True
    return False


def _emptied(tensor: Any) -> Any:
    if tensor is None:
        return None
    # DeepSpeed's ZeRO-3 keeps the shape of a parameter here.
    return torch.empty(tuple(getattr(tensor, "ds_shape", tensor.shape)), dtype=tensor.dtype, device="meta")


def bypassed(kind: type[nn.Module]) -> dict[str, bool]:
    """The attributes of a class of modules whose weight a forward reads, and whether it never calls them.

    Either it never calls the module, or there is a road on which it hands the whole weight to an operation such as a
    fused kernel. The source tells it; of a class without source nothing is known.
    """
    # PyTorch's encoder layer does so in evaluation, but not where a hook is: see `keep_called`.
    if kind.__module__.startswith("torch.") and issubclass(kind, nn.TransformerEncoderLayer):
        return {}
    code = QUESTION.sub("", code_of_forward(kind))
    called, read, handed = (set(pattern.findall(code)) for pattern in (CALLED, WEIGHT_READ, WEIGHT_HANDED))
    multiplied = {left or right for left, right in WEIGHT_MULTIPLIED.findall(code)}
    # A product stands in plain code, which runs everywhere; a call may be that of a kernel for some machines.
    return {name: name not in called or name in multiplied for name in handed | multiplied | (read - called)}


def keep_called(layer: nn.Module, parent: nn.Module) -> None:
    """Have PyTorch's encoder layer call an adapted layer in evaluation too: a hook switches its fast path off."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_hook(_nothing)


def _nothing(*_: Any) -> None:
    """A hook that changes nothing."""
