"""What the first training step of a model tells: which of its adapted layers no forward has called."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .adapters import Adapters


class FirstStep:
    """Watches a model from its first training forward to the next step of an optimizer, and never again.

    A layer is missed if the module that it stands in ran without it. So nothing is said of a tower that a batch does
    not use, nor of experts that got no token: the module around the layer did not run, or is a list, which never runs.

    Args:
        adapters: the model's.
        at_step: is called before that step.
    """

    def __init__(self, adapters: Adapters, at_step: Callable[[], None]) -> None:
        self.adapters = adapters
        self.at_step = at_step
        self.over = False
        # The modules whose calls are watched, and those that were called.
        self._called: set[nn.Module] = set()
        self._layers: list[tuple[str, Any, nn.Module]] = []
        self._handles: list[Any] = []
        # PyTorch's hook on all optimizers must not be taken away while it runs, so the next forward does that.
        self._optimizers: Any = None

    def forward(self, module: nn.Module) -> None:
        """Before a forward: begin to watch, if it is the first one in training."""
        # Hooks would make torch.compile compile its graphs again.
        if torch.compiler.is_compiling():
            return
        if self.over and self._optimizers is not None:
            self._optimizers.remove()
            self._optimizers = None
        if self.over or self._handles:
            return
        if not (module.training and torch.is_grad_enabled()):
            return
        base = self.adapters.base
        self.over = any(map(_is_compiled, base.modules()))
        if self.over:
            return
        for path, layer in self.adapters.layers():
            if self._trained(layer):
                self._layers.append((path, layer, base.get_submodule(path.rpartition(".")[0])))
        # The hooks of this module have run already.
        self._called = {module}
        watched = {each for _, layer, around in self._layers for each in (layer, around)}
        self._handles = [each.register_forward_pre_hook(self._call) for each in watched]
        # The hook must not keep this object alive, and the model with it.
        this = weakref.ref(self)

        def at_step(*_: Any) -> None:
            watch = this()
            if watch is not None:
                watch.step()

        self._optimizers = register_optimizer_step_pre_hook(at_step)

    def step(self) -> None:
        """Before the first step: stop to watch, and say what it will not train."""
        if self.over:
            return
        missed = [
            path
            for path, layer, around in self._layers
            # A layer whose forward was called without its hooks has gradients.
            if around in self._called
            and layer not in self._called
            and all(parameter.grad is None for parameter in self._trained(layer))
        ]
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers, self._called, self.over = [], [], set(), True
        self.at_step()
        if missed:
            names = ", ".join([*missed[:2], "..."][: len(missed)])
            warnings.warn(
                f"{len(missed)} adapted layers have no part in the first training step, such as {names}: what is "
                "around them ran, and did not call them. If it reads their weights itself, as fused kernels do, their "
                "adapters never train and have no effect; leave them out with exclude_modules. If only these batches "
                "had no use for them (no image, for instance), nothing is wrong.",
                stacklevel=2,
            )

    def _trained(self, layer: Any) -> list[nn.Parameter]:
        """The parameters of the active adapters in a layer that are trained."""
        parameters = [each for name in self.adapters.active() for each in layer.parameters_of(name)]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _call(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._called.add(module)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model watches from its own first forward on.
        return {**vars(self), "_handles": [], "_optimizers": None, "_layers": [], "_called": set()}


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has taken a module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
