"""The priors of a model's adapters as a module of their first layer, with the watch that computes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters import Adapters, is_trex
from .channel import PriorChannel
from .hooks import PromptWatch
from .semantic_prior import SemanticPrior

# The name under which they stand in a layer.
TREX_PRIOR = "trex_prior"


class Priors(nn.ModuleDict):
    """The [`SemanticPrior`] of each adapter that has one, and what is common to the adapters of a base model.

    PEFT's low-level functions, and transformers' `add_adapter` and `load_adapter`, keep the base model and no tuner,
    and take for an adapter's what is in its layers. So the priors stand in the first of these, and only there.

    Args:
        base: the base model.
        configs: the configuration of each adapter, which the base model has as `peft_config`.

    Attributes:
        prompts: the [`PromptWatch`], which finds the prior of each forward.
        card_notes: what the model card of each adapter says besides.
    """

    def __init__(self, base: nn.Module, configs: dict[str, Any]) -> None:
        super().__init__()
        channel = PriorChannel(self)
        self.prompts = PromptWatch(Adapters(base, configs, self, channel.running), channel)
        self.card_notes: dict[str, dict[str, Any]] = {}

    @staticmethod
    def within(model: nn.Module) -> Priors | None:
        """Those of a model, wherever in it its base model is; None where nothing has adapters of T-REX."""
        return next((module for module in model.modules() if isinstance(module, Priors)), None)

    def put(self, adapter_name: str, prior: SemanticPrior | None) -> None:
        """Have an adapter use this prior from now on, or none."""
        self.card_notes.pop(adapter_name, None)
        if adapter_name in self:
            del self[adapter_name]
        if prior is not None:
            self[adapter_name] = prior

    def others(self, adapter_name: str) -> list[str]:
        """The names of the model's other adapters of T-REX."""
        configs = self.prompts.adapters.configs
        return [name for name, config in configs.items() if name != adapter_name and is_trex(config)]

    def settle(self) -> None:
        """Stand in the first layer, unless they stand in one."""
        layers = [layer for _, layer in self.prompts.adapters.layers()]
        if layers and not any(TREX_PRIOR in layer._modules for layer in layers):
            layers[0].add_module(TREX_PRIOR, self)

    def leave(self) -> None:
        """Leave the base model without the priors and without the hooks."""
        self.prompts.detach()
        for _, layer in self.prompts.adapters.layers():
            layer._modules.pop(TREX_PRIOR, None)
