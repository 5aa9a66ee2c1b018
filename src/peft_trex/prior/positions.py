"""Layers whose input is relative positions, which all rows share and no prompt's prior belongs to."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..source import code_of_forward
from .channel import PriorChannel

# A call on the module itself, and its first argument where that is relative positions (1, L, D), by the names that
# attentions have for them.
CALL = re.compile(
    r"\bself\.(\w+)\((?:(rel_embeddings|relative_position_embeddings|position_embeddings|pos_emb)(?![\w=]))?"
)


def position_layers(kind: type[nn.Module]) -> tuple[set[str], set[str]]:
    """The attributes of a class of modules that its forward calls with relative positions alone, and with both.

    In the second, hidden states come first: DeBERTa's shared keys (`share_att_key`). The source tells it.
    """
    calls = CALL.findall(code_of_forward(kind))
    positions, others = ({name for name, first in calls if bool(first) == wanted} for wanted in (True, False))
    return positions - others, positions & others


class PositionWatch:
    """Keeps what a module is called with, so that its layers tell hidden states from relative positions.

    In a batch of several rows the leading axis tells them apart, in one of a single row nothing else does.
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
