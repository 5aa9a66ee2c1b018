"""Checks of an adapter's files, handed what they need of the model, and the model card."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME, TaskType
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Every saved tensor of an adapter carries this prefix.
PREFIX = "trex_"
CARD_HEADING = "## Loading this adapter"
AUTO_CLASSES: dict[TaskType | str | None, str] = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
}


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


@contextmanager
def room_for_static(
    layers: Mapping[str, Any], adapter_name: str, num_clusters: int, tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let the layers hold the calibrated static weights of a file, or none if it has none, unless the block fails.

    `layers` are the adapter's, by their names in the file, whose `tensors` these are. Raises a ValueError if static
    weights have a wrong shape, or only some of the layers have them.
    """
    static = {name: tensors[key] for name in layers if (key := f"{name}.{PREFIX}static") in tensors}
    counts = Counter(weights.shape[:1] for weights in static.values()).most_common(1)
    for name, weights in static.items():
        A, B, width = layers[name].trex_A[adapter_name], layers[name].trex_B[adapter_name], layers[name].in_features
        r_a, r_b = len(A), B.shape[1]
        expected = {(sets, r_b, columns) for sets in (1, 1 + num_clusters) for columns in (r_a, width)}
        if tuple(weights.shape) not in expected or weights.shape[:1] != counts[0][0]:
            raise ValueError(
                f"The T-REX tensor {name}.{PREFIX}static has shape {tuple(weights.shape)} in the file; expected (1 or "
                f"{1 + num_clusters}, {r_b}, {r_a} or {width}), and as many sets as the other layers have. The file "
                "is damaged or was saved for another base model or configuration."
            )
    missing = [name for name in layers if name not in static]
    if static and missing:
        raise ValueError(
            f"The adapter file lacks {len(missing)} of {len(layers)} calibrated static weights, such as "
            f"{missing[0]}.{PREFIX}static; it is damaged: restore it, or remove all of them and calibrate the adapter "
            "again."
        )
    former = {name: dict(layer.trex_static.items()).get(adapter_name) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.keep_static(adapter_name, torch.zeros_like(static[name]) if name in static else None)
        yield
    except BaseException:
        for name, layer in layers.items():
            layer.keep_static(adapter_name, former[name])
        raise


def check_complete(adapter_name: str, in_model: Iterable[str], in_file: Iterable[str]) -> None:
    """Raise a ValueError if a file lacks tensors of an adapter, or holds some that the model has no place for.

    PEFT loads without strictness, so what a damaged or foreign file lacks would silently keep its start values. Both
    are given by their keys in the model's state dict.
    """
    in_model, in_file = set(in_model), set(in_file)
    # An adapter may be called like a part of a module's name, so only its place in a key tells.
    key_of_adapter = re.compile(rf"\.{PREFIX}\w+\.{re.escape(adapter_name)}(\.\w+)?$")
    expected = {key for key in in_model if key_of_adapter.search(key)}
    # A module of the base model that is trained in full may carry the prefix, too: its keys are in the model.
    unknown = {key for key in in_file - in_model if f".{PREFIX}" in key}
    for what, keys in (("lacks", expected - in_file), ("holds unknown", unknown)):
        if keys:
            raise ValueError(
                f"The adapter file {what} {len(keys)} T-REX tensors, such as {min(keys)}; the adapter has "
                f"{len(expected)}. The file is damaged or was saved for another base model or configuration: restore "
                "it, or load it onto the model that its adapter_config.json names. delete_adapter"
                f"({adapter_name!r}) removes what was made for it."
            )


def explain_wrong_shapes(module: nn.Module, tensors: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A hook before weights are loaded: say what to do about a tensor that does not fit, besides what torch says."""
    error_messages: list[str] = rest[-1]
    for key, tensor in module.state_dict(prefix=prefix).items():
        if f".{PREFIX}" in key and key in tensors and tensors[key].shape != tensor.shape:
            error_messages.append(
                f"The T-REX tensor {key} has shape {tuple(tensors[key].shape)} in the file and {tuple(tensor.shape)} "
                "in the model: the adapter was saved for another base model or configuration. Load it onto the model "
                "that its adapter_config.json names."
            )
            return


def complete_card(path: str, task_type: TaskType | str | None) -> None:
    """Add the tag `trex` and how to load the adapter to a model card."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "trex"})
    if CARD_HEADING not in card.text:
        base = card.data.get("base_model")
        if isinstance(base, list):
            base = base[0] if base else None
        auto_class = AUTO_CLASSES.get(task_type, "AutoModel")
        text = card.text.rstrip("\n")
        card.text = f"""{text}

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
