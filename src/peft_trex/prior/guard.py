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

    def close(self, module: nn.Module, output: Any) -> Any:
        """After a forward: another output, or None."""


class Guard:
    """Stands for a module's forward, to see what hooks do not: calls of `.forward`, and whatever ends them.

    Where accelerate keeps the forward that it has wrapped, the guard stands there, and so outlives accelerate's hooks.

    Args:
        watch: opens and closes the module's forwards.
        module: the module.
    """

    def __init__(self, watch: Watch, module: Any) -> None:
        self._watch, self._module = watch, module
        self._place = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self._in_object = self._place in vars(module)
        self._forward: Callable[..., Any] = getattr(module, self._place)
        update_wrapper(self, self._forward)
        setattr(module, self._place, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch, module, running = self._watch, self._module, self._watch.channel.running
        frame, state = running.frame, running.state
        hooked = frame is not None and frame.module is module and not frame.entered
        # A hook has opened this very call, and that is undone, too.
        if hooked and frame is not None:
            frame = frame.outer
            state = None if frame is None else frame.state
        try:
            if not hooked:
                args, kwargs = watch.open(module, args, kwargs)
            if running.frame is not None and running.frame.module is module:
                running.frame.entered = True
            output = self._forward(*args, **kwargs)
            changed = watch.close(module, output)
            return output if changed is None else changed
        except BaseException:
            running.frame, running.state = frame, state
            raise

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Whether a guard is called when this module is."""
        return any(isinstance(vars(module).get(place), Guard) for place in ("forward", "_old_forward"))

    def remove(self) -> None:
        """Put the forward back, wherever the guard stands now."""
        for place in ("forward", "_old_forward"):
            if vars(self._module).get(place) is self:
                if self._in_object or place != self._place:
                    setattr(self._module, place, self._forward)
                else:
                    delattr(self._module, place)
