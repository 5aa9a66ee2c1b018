"""The modules that a prompt's prior reaches: those of the text model, not the towers beside it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..unsuited import CONVOLUTIONS
from .adapters import Adapters
from .order import Order, turns_rows
from .positions import position_layers


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


def tell_layers(adapters: Adapters, adapter_name: str, outside: set[nn.Module]) -> None:
    """Tell the layers of a new adapter whether its prior reaches them, and what axes their inputs may have.

    Args:
        adapters: the model's.
        adapter_name: the new one.
        outside: the modules that no prior reaches.

    Warns:
        UserWarning: if an adapter that is to be trained has layers without any effect.
    """
    config, base = adapters.configs[adapter_name], adapters.base
    unreached = outside | (encoder_modules(adapters) if config.prior_scope == "answer" else set())
    kinds = {type(module) for module in base.modules()}
    positions_of, turning = {kind: position_layers(kind) for kind in kinds}, set(filter(turns_rows, kinds))
    turned = {inside for module in base.modules() if type(module) in turning for inside in module.modules()}
    idle = []
    for name, layer in adapters.layers():
        if adapter_name not in layer.trex_A:
            continue
        parent, _, attribute = name.rpartition(".")
        positions, both = positions_of[type(base.get_submodule(parent))]
        reached = layer not in unreached and attribute not in positions
        layer.set_reach(adapter_name, config, reached)
        layer.takes_positions = attribute in both
        # The first axis of a convolution's input is its rows in any module.
        if layer in turned and layer.order is None and not isinstance(layer.get_base_layer(), CONVOLUTIONS):
            layer.order = Order()
        if not reached:
            idle.append(name)
    if idle and not (config.use_router or config.shared_core or config.inference_mode):
        names = ", ".join([*idle[:2], "..."][: len(idle)])
        warnings.warn(
            f"{len(idle)} adapted layers, such as {names}, are where the prior has no part (a tower for images or "
            "sound, a layer of relative positions, an encoder with prior_scope='answer'), and with use_router=False "
            "nothing else weighs their experts: they have no effect and never train. Leave them out with "
            "exclude_modules, or set shared_core=True.",
            stacklevel=2,
        )
