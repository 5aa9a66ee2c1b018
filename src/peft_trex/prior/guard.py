"""Sees the calls of a module that its hooks do not see."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Protocol

from torch import nn

from .channel import PriorChannel


class Watch(Protocol):
    """What opens and closes the forwards of a module."""

    channel: PriorChannel

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: the arguments that are left for it."""

    def close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a forward: another output, or None."""

    def leave(self, module: nn.Module) -> None:
        """After a forward that failed."""


class Guard:
    """Stands for a module's forward, to see what hooks do not: calls of `.forward`, and ends such as Ctrl-C.

    Where accelerate keeps the forward that it has wrapped, the guard stands there, and so outlives accelerate's hooks.
    """

    def __init__(self, watch: Watch, module: Any) -> None:
        self._watch, self._module = watch, module
        self._place = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self._in_object = self._place in vars(module)
        self._forward: Callable[..., Any] = getattr(module, self._place)
        update_wrapper(self, self._forward)
        setattr(module, self._place, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch, module = self._watch, self._module
        frame = watch.channel.running.frame
        # A hook has opened this very call.
        hooked = frame is not None and frame.module is module and not frame.entered
        try:
            if not hooked:
                args, kwargs = watch.open(module, args, kwargs)
                frame = watch.channel.running.frame
            if frame is not None and frame.module is module:
                frame.entered = True
            output = self._forward(*args, **kwargs)
        except Exception:
            # PyTorch calls the hooks then.
            if not hooked:
                watch.leave(module)
            raise
        except BaseException:
            watch.leave(module)
            raise
        if hooked:
            return output
        changed = watch.close(module, args, output)
        return output if changed is None else changed

    def remove(self) -> None:
        """Put the forward back, wherever the guard stands now."""
        for place in ("forward", "_old_forward"):
            if vars(self._module).get(place) is self:
                if self._in_object or place != self._place:
                    setattr(self._module, place, self._forward)
                else:
                    delattr(self._module, place)
