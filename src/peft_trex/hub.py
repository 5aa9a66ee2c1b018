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


def complete_model_card(folder: str, task_type: TaskType | str | None = None) -> None:
    """Add the tag `trex` and how to load the adapter to the model card that PEFT wrote, if there is one.

    PEFT writes one card for all adapters of a model; an adapter that is not named "default" lies one folder below it.
    """
    for candidate in (folder, os.path.dirname(os.path.abspath(folder))):
        path = os.path.join(candidate, "README.md")
        if os.path.isfile(path):
            card = ModelCard.load(path, ignore_metadata_errors=True)
            if card.data.get("library_name") == "peft":
                break
    else:
        return
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


def keep_model_card_when_pushed(model_class: Any) -> None:
    """Let `push_to_hub` upload the card that PEFT wrote.

    transformers' `push_to_hub`, which PEFT inherits, saves the model and then writes a card of its own over PEFT's,
    with another library and without the base model. For models with a T-REX adapter the card is completed once more,
    just before the upload; others go their way unchanged.
    """
    upload = getattr(model_class, "_upload_modified_files", None)
    if upload is None or getattr(upload, "keeps_trex_card", False):
        return

    @functools.wraps(upload)
    def upload_with_card(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        config = next((config for config in self.peft_config.values() if config.peft_type == "TREX"), None)
        if config is not None:
            self.create_or_update_model_card(working_dir)
            complete_model_card(working_dir, config.task_type)
        return upload(self, working_dir, *args, **kwargs)

    upload_with_card.keeps_trex_card = True  # type: ignore[attr-defined]
    model_class._upload_modified_files = upload_with_card
