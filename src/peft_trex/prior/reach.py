"""The modules that a prompt's prior reaches: those of the text model, not the towers beside it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .adapters import Adapters


def modules_outside(adapters: Adapters) -> set[nn.Module]:
    """The modules of a model that a prior does not reach: towers for images or sound, projectors, second text towers.

    A prior reaches the text model, which is the smallest `PreTrainedModel` around the token embedding, its head, and
    both halves of an encoder-decoder. Without a tower, or without a token embedding, it reaches everything.
    """
    base: Any = adapters.base
    embedding = adapters.embedding()
    if embedding is None:
        return set()
    models = [(module, set(module.modules())) for module in base.modules() if isinstance(module, PreTrainedModel)]
    around = [inside for _, inside in models if embedding in inside or _wraps(inside, embedding)]
    if not around:
        return set()
    text = min(around, key=lambda inside: len(inside))
    if adapters.two_sided:
        for half in (base.get_encoder(), base.get_decoder()):
            text |= set(half.modules())
    towers = [module for module, inside in models if module not in text and not text <= inside]
    if not towers:
        return set()
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    containers = {module for module, inside in models if text <= inside}
    return set(base.modules()) - text - containers - {base, head}


def _wraps(modules: set[nn.Module], embedding: nn.Module) -> bool:
    return any(embedding is inner for module in modules for inner in module.children())


def encoder_modules(adapters: Adapters) -> set[nn.Module]:
    """The modules of the encoder of an encoder-decoder model; none of other models."""
    base: Any = adapters.base
    return set(base.get_encoder().modules()) if adapters.two_sided else set()
