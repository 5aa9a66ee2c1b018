"""Files of the command line: an adapter's folder, its base model, and rows of data as batches."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .card import facts_of
from .config import TRexConfig
from .loading import IN_FILE, check_weights, read_config

CARD = "README.md"
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


def facts_of_files(adapter: str) -> dict[str, str]:
    """The facts of an adapter by its files alone, without its base model.

    Raises:
        ValueError, OSError: if there is no such adapter, or its files are damaged or another method's.
    """
    config_file = _file_of(adapter, CONFIG_NAME)
    config = _config_of(adapter, config_file)
    if os.path.isdir(adapter):
        check_weights(adapter)
    path = _file_of(adapter, SAFETENSORS_WEIGHTS_NAME)
    with safe_open(path, framework="np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        dtypes = {file.get_slice(key).get_dtype() for key in shapes if key.endswith(".trex_A")}
        centroids = [key for key in shapes if key.endswith(".centroids")]
        fitted = any(file.get_tensor(key).any() for key in centroids)
    layers = {key.removeprefix(IN_FILE): shape for key, shape in shapes.items() if ".trex_prior." not in key}
    facts = facts_of(config.to_dict() | {"peft_trex_version": config.peft_trex_version}, layers, fitted)
    size = os.path.getsize(path)
    return {"Adapter": adapter, **facts, "File": f"{size / 1e6:.1f} MB, {', '.join(sorted(dtypes))}"}


def _config_of(adapter: str, path: str) -> TRexConfig:
    method = read_config(path).get("peft_type")
    if method != "TREX":
        raise ValueError(f"{adapter} holds an adapter of the method {method}; expected TREX in {path}.")
    try:
        return TRexConfig.from_pretrained(adapter)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _file_of(adapter: str, name: str) -> str:
    """A file of an adapter: in its folder, or downloaded."""
    if os.path.isdir(adapter):
        path = os.path.join(adapter, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"The folder {adapter} has no {name}; expected what save_pretrained writes.")
        return path
    try:
        return hf_hub_download(adapter, name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"There is no folder {adapter}, and no such repository was found: {error}") from error


def load(adapter: str, options: Any) -> tuple[PeftModel, Any]:
    """An adapter on its base model, in eval mode, and the tokenizer."""
    config = _config_of(adapter, _file_of(adapter, CONFIG_NAME))
    name = options.base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"The adapter {adapter} does not name its base model; give --base NAME.")
    base, tokenizer = load_base(name, options, config.task_type)
    return PeftModel.from_pretrained(base, adapter).eval(), tokenizer


def load_base(name: str, options: Any, task_type: str | None = None) -> tuple[Any, Any]:
    """A base model and its tokenizer; the kind of model follows from the task type, or else from the model."""
    import torch
    import transformers

    if task_type is None:
        encoder_decoder = transformers.AutoConfig.from_pretrained(name).is_encoder_decoder
        task_type = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    if task_type not in CLASSES:
        raise ValueError(f"The adapter's task_type is {task_type!r}; the command line knows {', '.join(CLASSES)}.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = getattr(transformers, CLASSES[task_type]).from_pretrained(name, dtype=dtype)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer


def save(model: PeftModel, folder: str) -> None:
    """Save an adapter where none is or an older one; no half-written file takes the place of a whole one."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".part-") as part:
        if (place / CARD).is_file():
            shutil.copyfile(place / CARD, Path(part, CARD))
        model.save_pretrained(part)
        # The configuration moves last, because without it nothing takes a folder for an adapter.
        for path in sorted(Path(part).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            os.replace(path, place / path.name)
    print(f"saved {folder}")


def check_new(folder: str) -> None:
    """Raise a FileExistsError, before any work is done, if a folder is there that something would be written over."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"There is something at {folder} already; give a new folder as --out, or remove it.")


class Rows(NamedTuple):
    """Batches of a file, and the different values of the rows' "task", in alphabetical order."""

    batches: list[dict[str, Any]]
    tasks: list[str]


def batches_of(options: Any, tokenizer: Any, model: Any, group_by: str | None = None) -> Rows:
    """The rows of `options.data` as batches that the model's forward takes, with labels where there are answers.

    Raises:
        ValueError: naming the line, for a row that is none.
    """
    decoder_only = not model.config.is_encoder_decoder
    rows, encoded, cut = list(_read(options.data)), [], 0
    for place, row in rows:
        prompt, answer, rendered = _texts(row, place, tokenizer, options.chat)
        if group_by is not None and group_by not in row:
            raise ValueError(f"{place}: the row has no {group_by!r}, by which the rows are compared (--group-by).")
        prompt_ids = tokenizer(prompt, add_special_tokens=not rendered)["input_ids"]
        ending = tokenizer.eos_token or ""
        answer_ids = None if answer is None else tokenizer(answer + ending, add_special_tokens=False)["input_ids"]
        if decoder_only and answer_ids is not None:
            labels = [-100] * len(prompt_ids) + answer_ids
            prompt_ids = prompt_ids + answer_ids
        else:
            labels = answer_ids or []
        cut += max(len(prompt_ids), len(labels)) > options.max_length
        encoded.append((prompt_ids[: options.max_length], labels[: options.max_length]))
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} rows were cut to {options.max_length} tokens (--max-length).", stacklevel=2
        )
    if len({bool(labels) for _, labels in encoded}) > 1:
        raise ValueError(f"{options.data}: some rows have an answer and some have none; give it in all or in none.")
    batches = []
    for start in range(0, len(rows), options.batch_size):
        part = slice(start, start + options.batch_size)
        batch = _collate(encoded[part], tokenizer.pad_token_id or 0, model.device)
        if group_by is not None:
            batch[group_by] = [str(row[group_by]) for _, row in rows[part]]
        batches.append(batch)
    return Rows(batches, sorted({str(row["task"]) for _, row in rows if "task" in row}))


def _read(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, each with its place in words."""
    found = False
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place, found = f"{path}, line {number}", True
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{place}: this is no JSON ({error}); expected one object a line.") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: this is a {type(row).__name__}; expected an object with a prompt.")
                yield place, row
    if not found:
        raise ValueError(f"{path} holds no row.")


class Texts(NamedTuple):
    """The prompt of a row as the model reads it, its answer (None without one), and whether a template was used."""

    prompt: str
    answer: str | None
    rendered: bool


def _texts(row: Mapping[str, Any], place: str, tokenizer: Any, chat: bool) -> Texts:
    prompt, answer = row.get("prompt"), row.get("answer", row.get("completion"))
    if "messages" in row:
        prompt, answer = row["messages"], None
        if _is_chat(prompt) and prompt[-1]["role"] == "assistant":
            prompt, answer = prompt[:-1], prompt[-1:]
    elif chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answer = answer[0]["content"] if _is_chat(answer) else answer
    if not isinstance(answer, (str, type(None))) or not (isinstance(prompt, str) or _is_chat(prompt)):
        raise ValueError(
            f'{place}: expected "prompt" and perhaps "answer", each text or a list of messages with "role" and '
            f'"content", or "messages"; got {sorted(row)}.'
        )
    if isinstance(prompt, str):
        return Texts(prompt, answer, False)
    if tokenizer.chat_template is None:
        raise ValueError(f"{place}: the prompt is a chat, but the tokenizer has no chat template; give it as text.")
    return Texts(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), answer, True)


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in value)
    )


def _collate(rows: list[tuple[list[int], list[int]]], pad: int, device: Any) -> dict[str, Any]:
    """Rows of token ids and labels as one batch, padded on the right."""
    import torch

    def padded(parts: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, parts))
        return torch.tensor([part + [value] * (width - len(part)) for part in parts], device=device)

    ids = [ids for ids, _ in rows]
    batch = {"input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    if any(labels for _, labels in rows):
        batch["labels"] = padded([labels for _, labels in rows], -100)
    return batch
