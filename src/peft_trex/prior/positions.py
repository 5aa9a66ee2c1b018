"""Layers whose input is relative positions, which all rows share and no prompt's prior belongs to."""

from __future__ import annotations

import ast
from typing import Any

from torch import Tensor, nn

from ..source import called_on_self, methods_of_forward
from .channel import PriorChannel

# The names that attentions have for relative positions (1, L, D).
NAMES = {"rel_embeddings", "relative_position_embeddings", "position_embeddings", "pos_emb"}


def position_layers(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """The attributes of a class of modules that its forward calls with relative positions alone, and with both.

    In the second, hidden states come first: DeBERTa's shared keys (`share_att_key`). The source tells it.
    """
    positions: set[str] = set()
    others: set[str] = set()
    for function in methods_of_forward(kind):
        for node in ast.walk(function):
            name = called_on_self(node)
            if isinstance(node, ast.Call) and name and node.args:
                (positions if _root(node.args[0]) in NAMES else others).add(name)
    return frozenset(positions - others), frozenset(positions & others)


def _root(node: ast.AST) -> str | None:
    """The variable that an expression such as `name[0].unsqueeze(1)` begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


class PositionWatch:
    """Keeps what a module is called with, so that its layers tell hidden states from relative positions.

    In a batch of several rows the leading axis tells them apart, in one of a single row nothing else does.

    Args:
        channel: what the layers read.
    """

    def __init__(self, channel: PriorChannel) -> None:
        self.channel = channel

    def attach(self, model: nn.Module) -> list[Any]:
        """The handles of hooks on the modules of a model whose layers need this."""
        kinds = {type(module) for module in model.modules()}
        watched = {kind for kind in kinds if position_layers(kind)[1]}
        handles: list[Any] = []
        for module in model.modules():
            if type(module) in watched:
                handles.append(module.register_forward_pre_hook(self.open, with_kwargs=True))
                handles.append(module.register_forward_hook(self.close, always_call=True))
        return handles

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the module's forward."""
        self.channel.running.hidden = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def close(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After it, also if it failed."""
        self.channel.running.hidden = ()
