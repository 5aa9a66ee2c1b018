"""Linear layers that an adapter cannot be put into: it would be passed by in silence, or break the forward."""

from __future__ import annotations

import ast
import copy
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .quantized import scheme_of
from .source import called_on_self, methods_of_forward, weight_of

READ = "its weight is read by the {} around it, which passes an adapter by in silence"
WIDE = "it is a {}, whose forward does not turn (tokens, {}) into one tensor (tokens, {})"
# These functions take a weight, but compute nothing with it.
QUESTIONS = {"isinstance", "hasattr", "getattr", "type", "id", "len"}
# A layer is tried with so many tokens. A prime number is no multiple of the groups that a grouped layer expects.
TOKENS = 7


class Reason(NamedTuple):
    """Why an adapter should not go into a layer, and whether it never has an effect there."""

    text: str
    always: bool


def unsuited_layers(model: nn.Module) -> dict[str, Reason]:
    """The linear layers of a model that no adapter should go into, by their names."""
    reasons: dict[str, Reason] = {}
    read = {kind: bypassed(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        for name, always in read[type(module)].items():
            layer = getattr(module, name, None)
            if isinstance(layer, (nn.Linear, BaseTunerLayer)):
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
    called, read, handed, multiplied = set(), set(), set(), set()
    for function in methods_of_forward(kind):
        for node in ast.walk(function):
            called |= {name for name in [called_on_self(node)] if name}
            operands = {name for operand in _operands(node) if (name := weight_of(operand))}
            handed |= operands
            multiplied |= operands if isinstance(node, ast.BinOp) else set()
        asked = {id(inner) for node in ast.walk(function) for inner in _asked(node)}
        read |= {name for node in ast.walk(function) if id(node) not in asked and (name := weight_of(node))}
    # A product stands in plain code, which runs everywhere; a call may be that of a kernel for some machines.
    return {name: name not in called or name in multiplied for name in handed | (read - called)}


def _operands(node: ast.AST) -> list[ast.AST]:
    """What a call or a matrix product computes with."""
    if isinstance(node, ast.Call) and not _is_question(node):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) else []


def _is_question(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in QUESTIONS


def _asked(node: ast.AST) -> list[ast.AST]:
    """The weights of which a node asks a property only: `weight.dtype`, `isinstance(weight, ...)`."""
    if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device", "shape", "requires_grad", "is_meta"):
        return [node.value]
    return list(node.args) if isinstance(node, ast.Call) and _is_question(node) else []


def keep_called(layer: nn.Module, parent: nn.Module) -> None:
    """Have PyTorch's encoder layer call an adapted layer in evaluation too: a hook switches its fast path off."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_hook(_nothing)


def _nothing(*_: Any) -> None:
    """A hook that changes nothing."""
