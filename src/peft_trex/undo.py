"""All or nothing: a block that fails or is interrupted leaves a model as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

PACKAGE = __name__.partition(".")[0]
# These attributes of a module say how it runs, and these hold its hooks.
MODES = ("training", "active_adapter", "_active_adapter", "_disable_adapters")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Undoable(Protocol):
    """What can be put back as it was."""

    def undo(self) -> None:
        """Put it back; a second time changes nothing."""


class Undone:
    """A block, after which these parts are put back if an exception of any kind ends it.

    What a block puts back itself at its end can be interrupted there, so such a block stands within one of these. This
    is a class, because a generator that is interrupted at the wrong moment would put things back only when it is
    collected, which may be much later.
    """

    def __init__(self, *parts: Undoable) -> None:
        self._parts = parts

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            for part in self._parts:
                part.undo()


class Snapshot:
    """What modules, containers and objects of this package hold, with all that is in them.

    Tensors are held by reference, which takes no memory, and what is written into one is not seen. Around a forward of
    the model, use `Modes`: what shards or offloads parameters then changes modules, too, and must not be undone.

    Args:
        holders: modules, dicts, lists, sets or objects of this package.
        values: tensors that are written into, each with a tensor of its former values.
    """

    def __init__(self, *holders: Any, values: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._flags: dict[int, tuple[nn.Parameter, bool]] = {}
        self._values = list(values)
        for holder in holders:
            self._hold(holder)

    def _hold(self, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self._flags[id(value)] = (value, value.requires_grad)
        contents = value
        if isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] == PACKAGE:
            contents = getattr(value, "__dict__", None)
        if id(contents) in self._contents or not isinstance(contents, (dict, list, set)):
            return
        kind = next(kind for kind in (dict, list, set) if isinstance(contents, kind))
        self._contents[id(contents)] = (contents, kind(contents))
        for part in list(contents.values() if isinstance(contents, dict) else contents):
            self._hold(part)

    def undo(self) -> None:
        for contents, before in self._contents.values():
            if isinstance(contents, list):
                contents[:] = before
            else:
                # Another thread may read them, so they are emptied only where that is needed.
                if list(contents) != list(before):
                    contents.clear()
                contents.update(before)
        for parameter, trained in self._flags.values():
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        for tensor, value in self._values:
            tensor.data.copy_(value)


class Modes:
    """How the modules of a model run: in training or not, with which adapters, and which parameters are trained."""

    def __init__(self, model: nn.Module) -> None:
        attributes = [vars(module) for module in model.modules()]
        self._modes = [(each, {name: each[name] for name in MODES if name in each}) for each in attributes]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._hooks = Snapshot(*(each[name] for each in attributes for name in HOOKS))

    def restore(self) -> None:
        """Have the modules run as before. Hooks stay, since other code may have added some."""
        for attributes, modes in self._modes:
            attributes.update(modes)
        for parameter, trained in self._flags:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)

    def undo(self) -> None:
        self._hooks.undo()
        self.restore()


def copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors that a block writes into, with copies, as `Snapshot` takes them."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]
