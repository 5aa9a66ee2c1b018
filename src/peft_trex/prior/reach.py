"""The modules that a prompt's prior reaches: those of the text model, not the towers beside it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .adapters import Adapters


def modules_outside(adapters: Adapters) -> set[nn.Module]:
    """The modules of a model that a prior does not reach: towers for images or sound, projectors, second text towers.

    A prior reaches the text model, which is the smallest `PreTrainedModel` around the token embedding, its head, and
    both halves of an encoder-decoder; but no other `PreTrainedModel` within it, as GIT has one for images. Without a
    tower, or without a token embedding, it reaches everything.
    """
    base: Any = adapters.base
    embedding = adapters.embedding()
    if embedding is None:
        return set()
    models = [(module, set(module.modules())) for module in base.modules() if isinstance(module, PreTrainedModel)]
    around = [inside for _, inside in models if _holds(inside, embedding)]
    if not around:
        return set()
    halves = [*base.get_encoder().modules(), *base.get_decoder().modules()] if adapters.two_sided else []
    text = min(around, key=lambda inside: len(inside))
    for _, inside in models:
        if inside < text and not _holds(inside, embedding):
            text = text - inside
    text = text | set(halves)
    if all(module in text or text <= inside for module, inside in models):
        return set()
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    containers = {module for module, inside in models if text <= inside}
    return set(base.modules()) - text - containers - {base, head}


def _holds(modules: set[nn.Module], embedding: nn.Module) -> bool:
    """Whether the token embedding is among modules, or another adapter's layer around it is."""
    return embedding in modules or any(embedding is inner for module in modules for inner in module.children())


def encoder_modules(adapters: Adapters) -> set[nn.Module]:
    """The modules of the encoder of an encoder-decoder model; none of other models."""
    base: Any = adapters.base
    return set(base.get_encoder().modules()) if adapters.two_sided else set()
