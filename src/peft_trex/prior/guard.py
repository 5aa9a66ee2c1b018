"""Sees the calls of a module that its hooks do not see."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any


class Guard:
    """Stands for a module's forward, to see what hooks do not: calls of `.forward`, and ends such as Ctrl-C.

    Where accelerate keeps the forward that it has wrapped, the guard stands there, and so outlives accelerate's hooks.

    Args:
        watch: the `PromptWatch`, which opens and closes the module's forwards.
        module: the module.
    """

    def __init__(self, watch: Any, module: Any) -> None:
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
        except BaseException as error:
            # PyTorch calls the hooks after an Exception, and after nothing else.
            if not (hooked and isinstance(error, Exception)):
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
