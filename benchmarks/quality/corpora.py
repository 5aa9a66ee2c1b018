"""The multi-task data of the quality benchmark: a folder of JSONL, the same public sets from the hub, or generated."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from quality import micro_tasks, operations, tenants

Row = dict[str, str]
COLUMNS = ("task", "prompt", "answer")
FORMAT = "Answer format:"
COMMON = {"train", "validation", "test", "seed", "tasks"}
# What the families take besides; the last two are in the language of the micro tier's base model.
DIALS: dict[str, set[str]] = {
    "generated": {"conflict"},
    "tenants": {"groups"},
    "folder": set(),
    "hub": set(),
    "conflict": {"pairs", "edits", "orders"},
    "easy": {"edits", "orders"},
}
MICRO = ("conflict", "easy")


@dataclass(frozen=True)
class Corpus:
    """Rows of task, prompt and answer; `settings` describes them in a result row."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    settings: dict[str, Any]


def candidates(prompt: str) -> list[str] | None:
    """The answers that a prompt names in its last line, "Answer format: a/b/c"; None where the answer is free."""
    _, found, named = prompt.rpartition(FORMAT)
    choices = named.strip().split("/")
    return choices if found and len(choices) > 1 else None


def digest(rows: list[Row]) -> str:
    """Of rows in their order: results with the same one can be paired by example."""
    return hashlib.sha256(json.dumps([[row[name] for name in COLUMNS] for row in rows]).encode()).hexdigest()[:12]


def load(settings: Mapping[str, Any], folder: Path | None = None) -> Corpus:
    """The corpus that an experiment's `data` names.

    Args:
        settings: `family` (one of `DIALS`) and what that family takes: `train`, `validation` and `test`, rows of each
            task (None takes all of a folder's or the hub's, `validation` being taken from the training rows); `seed`;
            `tasks` (folder and hub: their names, None for all; else: how many) and the family's own `DIALS`.
        folder: where the family "folder" finds train.jsonl and test.jsonl, or the same with .gz.

    Raises:
        ValueError: for settings that are unknown or missing, or data that do not fit them.
    """
    options = dict(settings)
    family = options.pop("family", None)
    if family not in DIALS:
        raise ValueError(f"data: family={family!r} is unknown; it must be one of {', '.join(DIALS)}.")
    if unknown := set(options) - COMMON - DIALS[family]:
        raise ValueError(
            f"data: {', '.join(sorted(unknown))} is unknown in the family {family!r}; known are "
            f"{', '.join(sorted(COMMON | DIALS[family]))}."
        )
    if family in MICRO:
        return Corpus(**micro_tasks.generate(family, **options), settings=dict(settings))
    if family == "tenants":
        return Corpus(**tenants.generate(**options), settings=dict(settings))
    if family == "generated":
        counts = {name: options.pop(name) for name in ("train", "test", "validation") if name in options}
        parts = operations.generate(**counts, **options)
        measured = {"conflict_measured": round(operations.measured_conflict(parts["train"]), 4)}
        return Corpus(**parts, settings={**settings, **measured})
    if family == "folder":
        if folder is None:
            raise ValueError(
                "data: the family 'folder' needs --data, a folder with train.jsonl[.gz] and test.jsonl[.gz]."
            )
        parts = {name: _read(folder, name) for name in ("train", "test")}
    else:
        parts = {name: _from_hub(name, options.get("tasks")) for name in ("train", "test")}
    return _pick(parts, options, dict(settings))


def _read(folder: Path, name: str) -> list[Row]:
    files = [path for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if path.is_file()]
    if not files:
        raise ValueError(f"{folder} has no {name}.jsonl and no {name}.jsonl.gz; --data names a folder that has.")
    data = load_dataset("json", data_files=str(files[0]), split="train")
    if missing := set(COLUMNS) - set(data.column_names):
        raise ValueError(f"{files[0]} lacks {', '.join(sorted(missing))}; each line holds task, prompt and answer.")
    return [{key: str(row[key]) for key in COLUMNS} for row in data]


def _pick(parts: dict[str, list[Row]], options: Mapping[str, Any], settings: dict[str, Any]) -> Corpus:
    """Some rows of each task, the validation rows from the training set; no prompt is in two parts."""
    rng = random.Random(options.get("seed", 0))
    wanted, validation = options.get("tasks"), options.get("validation", 0)
    by_task: dict[str, dict[str, list[Row]]] = {name: defaultdict(list) for name in parts}
    for name, rows in parts.items():
        for row in rows:
            by_task[name][row["task"]].append(row)
    tasks = sorted(by_task["test"]) if wanted is None else list(wanted)
    if missing := set(tasks) - (set(by_task["train"]) & set(by_task["test"])):
        raise ValueError(
            f"data: no rows of {', '.join(sorted(missing))}; there are {', '.join(sorted(by_task['test']))}."
        )
    picked: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for task in tasks:
        tested = _some(by_task["test"][task], options.get("test"), rng)
        prompts = {row["prompt"] for row in by_task["test"][task]}
        learnt = list({row["prompt"]: row for row in by_task["train"][task] if row["prompt"] not in prompts}.values())
        learnt = _some(learnt, None, rng)
        if len(learnt) <= validation:
            raise ValueError(
                f"data: {task} has {len(learnt)} training rows, too few for {validation} validation rows."
            )
        picked["validation"] += learnt[:validation]
        picked["train"] += learnt[validation:][: options.get("train")]
        picked["test"] += tested
    for rows in picked.values():
        rng.shuffle(rows)
    return Corpus(**picked, settings=settings)


def _some(rows: list[Row], count: int | None, rng: random.Random) -> list[Row]:
    rows = list(rows)
    rng.shuffle(rows)
    return rows[:count]


def _choose(question: str, choices: list[str], right: int, name: str = "Answer", ask: str = "") -> Row:
    """A prompt in the form of the LLM-Adapters evaluation: the choices numbered, and named as the answer's format."""
    listed = " ".join(f"{name}{number}: {choice}" for number, choice in enumerate(choices, 1))
    named = "/".join(f"{name.lower()}{number}" for number in range(1, len(choices) + 1))
    ask = ask or "Please choose the correct answer to the question:"
    return {"prompt": f"{ask} {question}\n\n{listed}\n\n{FORMAT} {named}", "answer": f"{name.lower()}{right + 1}"}


def _by_label(question: str, choices: Mapping[str, list[str]], key: str) -> Row:
    return _choose(question, list(choices["text"]), list(choices["label"]).index(key))


def _boolq(row: Any) -> Row:
    ask = "Please answer the following question with true or false, question:"
    prompt = f"{ask} {row['question']}?\n\n{FORMAT} true/false"
    return {"prompt": prompt, "answer": str(row["answer"]).lower()}


def _piqa(row: Any) -> Row:
    ask = "Please choose the correct solution to the question:"
    return _choose(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), "Solution", ask)


def _social_iqa(row: Any) -> Row:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _choose(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _winogrande(row: Any) -> Row:
    ask = "Please choose the correct answer to fill in the blank to complete the given sentence:"
    return _choose(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1, "Option", ask)


def _arc(row: Any) -> Row:
    return _by_label(row["question"], row["choices"], row["answerKey"])


def _openbookqa(row: Any) -> Row:
    return _by_label(row["question_stem"], row["choices"], row["answerKey"])


def _gsm8k(row: Any) -> Row:
    return {"prompt": row["question"], "answer": row["answer"].rpartition("####")[2].strip().replace(",", "")}


# name on the hub, configuration, split that is tested on (public labels), and how a row is written as a prompt
HUB: dict[str, tuple[str, str | None, str, Callable[[Any], Row]]] = {
    "boolq": ("google/boolq", None, "validation", _boolq),
    "piqa": ("ybisk/piqa", None, "validation", _piqa),
    "social_iqa": ("allenai/social_i_qa", None, "validation", _social_iqa),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "openbookqa": ("allenai/openbookqa", "main", "test", _openbookqa),
    "gsm8k": ("openai/gsm8k", "main", "test", _gsm8k),
}


def _from_hub(part: str, tasks: list[str] | None) -> list[Row]:
    rows: list[Row] = []
    for task in HUB if tasks is None else tasks:
        if task not in HUB:
            raise ValueError(f"data: {task!r} is not among the sets of the hub that are known: {', '.join(HUB)}.")
        name, configuration, split, write = HUB[task]
        for row in load_dataset(name, configuration, split="train" if part == "train" else split):
            rows.append({"task": task, **write(row)})
    return rows
