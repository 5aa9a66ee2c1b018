"""What the way of a prior knows of a model: its base model, and each adapter's configuration, prior and layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .chat import ChatMarkers
from .semantic_prior import SemanticPrior


@dataclass(eq=False)
class Adapters:
    """A view of the adapters of one model, which stays true when adapters come and go.

    Attributes:
        base: the base model, with the adapted layers in it.
        configs: the configuration of each adapter, those of other methods included.
        priors: the prior of each adapter that has one.
        now: what runs now, as the channel knows it; a call may name the adapters of its rows.
    """

    base: nn.Module
    configs: dict[str, Any]
    priors: nn.ModuleDict
    now: Any = None

    def config_of(self, name: str) -> Any:
        """The configuration of an adapter; a ValueError if it is none of T-REX."""
        if name not in self.configs:
            raise ValueError(f"There is no adapter {name!r}; the model has {sorted(self.configs)}.")
        config = self.configs[name]
        # PEFT warns of a second method on a model, but lets it take the name.
        if not is_trex(config):
            raise ValueError(
                f"The adapter {name!r} was a T-REX adapter, and another method has taken its name: its "
                f"configuration is a {type(config).__name__} now. Give the second adapter_name to get_peft_model."
            )
        return config

    def layers(self) -> Iterator[tuple[str, Any]]:
        """The adapted layers of the base model, by their names in it."""
        for name, module in self.base.named_modules():
            if is_layer(module):
                yield name, module

    def layers_of(self, adapter_name: str) -> dict[str, Any]:
        """The layers that an adapter is in, by their names in the base model."""
        return {name: layer for name, layer in self.layers() if adapter_name in layer.trex_A}

    def active(self) -> list[str]:
        """The active adapters. Every layer knows them, whoever has set them, and whether or not it has them.

        In a call that names one for each row, they are those.
        """
        if self.now is not None and self.now.rows is not None:
            return self.now.rows.adapters
        for _, layer in self.layers():
            return [name for name in layer.active_adapters if self._is_trex(name, layer)]
        return []

    def _is_trex(self, name: str, layer: Any) -> bool:
        """Whether an active adapter is one of T-REX; another method's may be active beside it."""
        if name in self.configs and not is_trex(self.configs[name]) and name not in layer.trex_A:
            return False
        self.config_of(name)
        return True

    def prior_of(self, name: str) -> SemanticPrior | None:
        """The semantic prior of an adapter, or None if it has none."""
        prior = self.priors[name] if name in self.priors else None
        assert prior is None or isinstance(prior, SemanticPrior)
        return prior

    def encoder_of(self, name: str) -> str:
        """What computes the prompts' embeddings of an adapter: "input_embeddings" or "external"."""
        return self.configs[name].prior_encoder

    def markers_of(self, name: str) -> ChatMarkers | None:
        """The chat markers of an adapter, or None if it has none."""
        return ChatMarkers.of(self.configs[name].chat_markers)

    def acts_on_answers(self, name: str) -> bool:
        """Whether an adapter's prior acts on answers alone."""
        return self.configs[name].prior_scope == "answer"

    def with_prior(self) -> list[str]:
        """The active adapters that use a prior."""
        return [name for name in self.active() if self.configs[name].use_prior]

    def running(self) -> list[str]:
        """The active adapters that use a prior, while adapters are enabled and not merged."""
        if all(layer.disable_adapters or layer.merged for _, layer in self.layers()):
            return []
        return self.with_prior()

    @property
    def two_sided(self) -> bool:
        """Whether the base model has an encoder and a decoder."""
        return bool(getattr(getattr(self.base, "config", None), "is_encoder_decoder", False))

    def is_causal(self) -> bool:
        """Whether labels that stand beside the input mark an answer; in an encoder they mark something else."""
        if self.two_sided:
            return False
        tasks = {self.configs[name].task_type for name in self.active()} - {None}
        return any(map(self.is_causal_task, tasks or {None}))

    def is_causal_task(self, task: Any) -> bool:
        """Whether the base model is a causal language model for an adapter of this task, None for an unnamed one."""
        if task is not None:
            return task == TaskType.CAUSAL_LM
        return isinstance(self.base, PreTrainedModel) and self.base.can_generate()

    def check(self, config: Any) -> None:
        """Raise a ValueError if an adapter's configuration asks for answers or chats, and the model has none."""
        causal = not self.two_sided and self.is_causal_task(config.task_type)
        found = f"This is a {type(self.base).__name__}, task_type={config.task_type!r}"
        if config.prior_scope == "answer" and not (causal or self.two_sided):
            raise ValueError(
                "prior_scope='answer' needs a model that writes answers: a causal language model or an "
                f"encoder-decoder. {found}; leave prior_scope='prompt'."
            )
        if config.chat_markers and not causal:
            raise ValueError(
                f"chat_markers need a causal language model, whose rows are chats. {found}; leave them out: the prior "
                "is then that of all tokens of a row."
            )

    def embedding(self) -> nn.Embedding | None:
        """The base model's frozen token embedding, or None for a model without one."""
        return find_embedding(self.base)

    def pad_token(self) -> Any:
        """The pad token, where it marks padding in ids without a mask: one that ends nothing, as transformers says."""
        configs = [getattr(self.base, name, None) for name in ("generation_config", "config")]
        return find_pad_token({}, *configs)

    def home(self) -> torch.device:
        """The device that a batch belongs on."""
        embedding = self.embedding()
        return next(self.base.parameters()).device if embedding is None else embedding.weight.device


def is_trex(config: Any) -> bool:
    """Whether an adapter's configuration is one of T-REX."""
    return getattr(config, "peft_type", None) == "TREX"


def is_layer(module: nn.Module) -> bool:
    """Whether a module is an adapted layer."""
    return isinstance(module, BaseTunerLayer) and "trex_A" in module._modules


def find_embedding(base: Any) -> nn.Embedding | None:
    """The frozen token embedding of a base model, or None for one without.

    Where an encoder-decoder hears or sees, the embedding is the decoder's, and no prompt is made of its tokens. A
    model of several towers may name none, as CLIP does; then it is that of the only part that names one.
    """
    two_sided = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    reads = {"input_ids", "inputs_embeds"} & set(inspect.signature(type(base).forward).parameters)
    if two_sided and not reads:
        return None
    try:
        return _frozen(base.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        parts = [part for part in base.modules() if isinstance(part, PreTrainedModel) and part is not base]
    found = set()
    for part in parts if reads and not two_sided and isinstance(base, PreTrainedModel) else ():
        with suppress(AttributeError, NotImplementedError):
            found.add(_frozen(part.get_input_embeddings()))
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def _frozen(embedding: Any) -> nn.Embedding | None:
    """The frozen embedding in what a model names as its embedding; None for another kind of module."""
    if isinstance(embedding, AuxiliaryTrainingWrapper):  # trained beside the adapter; the frozen one is kept in it
        embedding = embedding.original_module
    if isinstance(embedding, BaseTunerLayer):
        embedding = embedding.get_base_layer()
    return embedding if isinstance(embedding, nn.Embedding) else None


def find_pad_token(arguments: Mapping[str, Any], *configs: Any) -> Any:
    """The pad token of a call, from its arguments or the first configuration that has one; None if it ends texts."""

    def value(name: str) -> Any:
        sources = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return next((source for source in sources if source is not None), None)

    pad, end = value("pad_token_id"), value("eos_token_id")
    return None if pad in (end if isinstance(end, (list, tuple)) else [end]) else pad
