"""An adapter as files: its model card, and a first look at files that may be damaged."""

from __future__ import annotations

import functools
import os
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME, TaskType
from safetensors import SafetensorError, safe_open

LOADING_HEADING = "## Loading this adapter"

AUTO_CLASSES: dict[TaskType | str | None, str] = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
}


def _complete_card(path: str, task_type: TaskType | str | None) -> None:
    """Add the tag `trex` and how to load the adapter to a model card."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "trex"})
    if LOADING_HEADING not in card.text:
        base = card.data.get("base_model")
        if isinstance(base, list):
            base = base[0] if base else None
        card.text = card.text.rstrip("\n") + "\n\n" + _loading_section(base, AUTO_CLASSES.get(task_type, "AutoModel"))
    card.save(path)


def _loading_section(base_model: str | None, auto_class: str) -> str:
    return f"""{LOADING_HEADING}

This is a [T-REX](https://arxiv.org/abs/2404.08985) adapter. PEFT learns the method from the package `peft-trex`, which
must be imported before the adapter is loaded:

```python
import peft_trex  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base_model or "the base model"}")
model = PeftModel.from_pretrained(base, "this repository's name, or a folder")
```
"""


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


def mend_peft_model(model_class: Any) -> None:
    """Have PEFT's model class do for T-REX what it has no place for; other methods go their way unchanged."""
    _complete_model_cards(model_class)
    _look_before_loading(model_class)
    _find_offloaded(model_class)


def _complete_model_cards(model_class: Any) -> None:
    """Let the cards of models with a T-REX adapter say what loading them needs.

    PEFT has no place for this. Its `save_pretrained`, and transformers' Trainer, write the card by
    `create_or_update_model_card`. transformers' `push_to_hub`, which PEFT inherits, then writes a card of its own over
    PEFT's, with another library and without the base model; so PEFT's is written once more, just before the upload.
    """
    write, upload = model_class.create_or_update_model_card, model_class._upload_modified_files
    if getattr(write, "knows_trex", False):
        return

    @functools.wraps(write)
    def write_card(self: Any, output_dir: str) -> None:
        write(self, output_dir)
        if (config := _trex_config(self)) is not None:
            _complete_card(os.path.join(output_dir, "README.md"), config.task_type)

    write_card.knows_trex = True  # type: ignore[attr-defined]
    model_class.create_or_update_model_card = write_card

    @functools.wraps(upload)
    def upload_with_card(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if _trex_config(self) is not None:
            self.create_or_update_model_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    model_class._upload_modified_files = upload_with_card


def _look_before_loading(model_class: Any) -> None:
    """Say which file is damaged also where weights are loaded into an adapter that is there: a resumed Trainer does.

    PEFT then reads no configuration, which is where else the file is looked at.
    """
    load = model_class.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        if _trex_config(self) is not None and os.path.isdir(model_id):
            check_adapter_file(model_id)
        return load(self, model_id, *args, **kwargs)

    model_class.load_adapter = load_adapter


def _find_offloaded(model_class: Any) -> None:
    """Let an adapter's tensors be found on the disk, where PEFT puts those of layers that a device map sends there.

    Its index has the adapter's name before the last part of each: right for `lora_A.weight`, and not for `trex_A`.
    """
    update = model_class._update_offload

    @functools.wraps(update)
    def update_offload(self: Any, offload_index: Any, adapters_weights: Any) -> Any:
        result = update(self, offload_index, adapters_weights)
        if _trex_config(self) is not None:
            for key in list(offload_index or ()):
                *layer, adapter_name, tensor = key.split(".")
                if tensor.startswith("trex_") and adapter_name in self.peft_config:
                    offload_index[".".join((*layer, tensor, adapter_name))] = offload_index[key]
        return result

    model_class._update_offload = update_offload


def _trex_config(model: Any) -> Any:
    return next((config for config in model.peft_config.values() if config.peft_type == "TREX"), None)
