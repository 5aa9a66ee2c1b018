"""Checks of an adapter's files, handed what they need of the model, and the model card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from statistics import mode
from typing import Any

import transformers
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .prior.token_rows import TOKEN_IDS, TOKEN_ROWS

# Every saved tensor of an adapter carries this prefix.
PREFIX = "trex_"
STATIC = f"{PREFIX}static"
FOREIGN = (
    "The file is damaged or was saved for another base model or configuration: restore it, or load it onto the model "
    "that its adapter_config.json names"
)
CARD_HEADING = "## Loading this adapter"


def check_adapter_file(folder: str) -> None:
    """Raise a ValueError if `folder` holds adapter weights that cannot be read, being cut short perhaps."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The adapter file {path} is damaged ({error}; {os.path.getsize(path)} bytes). It was probably cut short "
            "while it was written or copied: restore it from where it came from, or save the adapter again."
        ) from error


def split_static(
    layers: Mapping[str, Any], adapter_name: str, num_clusters: int, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The calibrated static weights of a file by the names of the layers, the adapter's, and its other tensors.

    Raises a ValueError if static weights have a wrong shape, or only some of the layers have them.
    """
    static = {name: tensors[key] for name in layers if (key := f"{name}.{STATIC}") in tensors}
    sets = mode(weights.shape[:1] for weights in static.values()) if static else None
    for name, layer in layers.items() if static else ():
        shape = tuple(static[name].shape) if name in static else None
        (r_a, width), r_b = layer.trex_A[adapter_name].shape, layer.trex_B[adapter_name].shape[1]
        expected = {(count, r_b, columns) for count in (1, 1 + num_clusters) for columns in (r_a, width)}
        if shape not in expected or shape[:1] != sets:
            raise ValueError(
                f"The T-REX tensor {name}.{STATIC} {'has shape ' + str(shape) if shape else 'is not'} in the file; "
                f"expected (1 or {1 + num_clusters}, {r_b}, {r_a} or {width}), and as many sets as the other layers "
                f"have. {FOREIGN}, or remove these of all layers and calibrate the adapter again."
            )
    return static, {key: tensor for key, tensor in tensors.items() if key.removesuffix(f".{STATIC}") not in static}


def check_complete(adapter_name: str, in_model: Iterable[str], in_file: Iterable[str]) -> None:
    """Raise a ValueError if a file lacks tensors of an adapter, or holds some that the model has no place for.

    PEFT loads without strictness, so what a damaged or foreign file lacks would silently keep its start values. Both
    are given by their keys in the model's state dict, without the file's static weights.
    """
    in_model, in_file = set(in_model), set(in_file)
    # An adapter may be called like a part of a module's name, so only its place in a key tells.
    key_of_adapter = re.compile(rf"\.{PREFIX}(?!static\.)\w+\.{re.escape(adapter_name)}(\.\w+)?$")
    expected = {key for key in in_model if key_of_adapter.search(key)}
    # A module of the base model that is trained in full may carry the prefix, too: its keys are in the model.
    unknown = {key for key in in_file - in_model if f".{PREFIX}" in key}
    for what, keys in (("lacks", expected - in_file), ("holds unknown", unknown)):
        if keys:
            raise ValueError(
                f"The adapter file {what} {len(keys)} T-REX tensors, such as {min(keys)}; the adapter has "
                f"{len(expected)}. {FOREIGN}. delete_adapter({adapter_name!r}) removes what was made for it."
            )


def explain_wrong_shapes(module: nn.Module, tensors: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A hook before weights are loaded: say what to do about a tensor that does not fit, besides what torch says."""
    error_messages: list[str] = rest[-1]
    for key, tensor in module.state_dict(prefix=prefix).items():
        # A prior takes over as many rows of its own as there are.
        if key.endswith((f".{TOKEN_IDS}", f".{TOKEN_ROWS}")):
            continue
        if f".{PREFIX}" in key and key in tensors and tensors[key].shape != tensor.shape:
            error_messages.append(
                f"The T-REX tensor {key} has shape {tuple(tensors[key].shape)} in the file and {tuple(tensor.shape)} "
                f"in the model. {FOREIGN}."
            )
            return


def complete_card(path: str, auto_class: str) -> None:
    """Add the tag `trex` and how to load the adapter to a model card."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "trex"})
    if CARD_HEADING not in card.text:
        base = card.data.get("base_model")
        if isinstance(base, list):
            base = base[0] if base else None
        # There is none for some of PEFT's tasks.
        auto_class = auto_class if hasattr(transformers, auto_class) else "AutoModel"
        card.text += f"""

{CARD_HEADING}

This is a [T-REX](https://arxiv.org/abs/2404.08985) adapter. PEFT learns the method from the package `peft-trex`, which
must be imported before the adapter is loaded:

```python
import peft_trex  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base or "the base model"}")
model = PeftModel.from_pretrained(base, "this repository's name, or a folder")
```
"""
    card.save(path)
