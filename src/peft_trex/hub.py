"""An adapter as files: its model card, and a first look at files that may be damaged."""

from __future__ import annotations

import os

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


def complete_card(path: str, task_type: TaskType | str | None) -> None:
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
