"""The keys of an adapter's tensors: in a model, and in a file, where they are the same however the adapter was made.

A prior stands in the first adapted layer, whichever that is, and in a file beside the base model. In a base model
without a `PeftModel`, which PEFT's low-level functions and transformers make, keys have no prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from .loading import IN_FILE
from .prior.priors import TREX_PRIOR, Priors

PRIOR_IN_FILE = f"{IN_FILE.partition('.')[0]}.{TREX_PRIOR}."
PRIOR_BARE = f"{TREX_PRIOR}."
# Others may put the prefix of the base model before every key, as they do for LoRA.
PRIOR_KEYS = (PRIOR_IN_FILE, f"{IN_FILE}{PRIOR_BARE}", PRIOR_BARE)
T = TypeVar("T")


def _place_of(model: nn.Module) -> str:
    """What the keys of the priors' tensors begin with in a model's state dict."""
    name = next(name for name, module in model.named_modules() if isinstance(module, Priors))
    # State dicts leave out FSDP's own part of a name.
    return f"{name.replace('_fsdp_wrapped_module.', '')}."


def is_prior(key: str) -> bool:
    """Whether a key of a file, or of PEFT's state dict of an adapter, is that of a prior's tensor."""
    return key.startswith(PRIOR_KEYS)


def for_peft(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors of a model by their keys as PEFT saves them, but for the adapter's name in these."""
    place = _place_of(model)
    return _renamed(tensors, (place,), PRIOR_IN_FILE if place.startswith(IN_FILE) else PRIOR_BARE)


def for_file(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of an adapter in a base model without a `PeftModel`, by their keys in a file."""
    in_file = {key if is_prior(key) else f"{IN_FILE}{key}": tensor for key, tensor in tensors.items()}
    return _renamed(in_file, PRIOR_KEYS, PRIOR_IN_FILE)


def for_model(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by their keys in a model, where PEFT adds the adapter's name to those of layers."""
    place = _place_of(model)
    renamed = _renamed(tensors, PRIOR_KEYS, f"{place}{adapter_name}.")
    if place.startswith(IN_FILE):
        return renamed
    return {key.removeprefix(IN_FILE): tensor for key, tensor in renamed.items()}


def _renamed(tensors: Mapping[str, T], starts: tuple[str, ...], start: str) -> dict[str, T]:
    """The same tensors, with what keys begin with changed."""
    renamed = {}
    for key, tensor in tensors.items():
        found = next((each for each in starts if key.startswith(each)), None)
        renamed[key if found is None else start + key.removeprefix(found)] = tensor
    return renamed
