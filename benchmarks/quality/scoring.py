"""How a model's answers are scored: log-likelihoods of whole answers, from as few forwards as can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
from quality.corpora import Row, candidates
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

METRIC = Path(__file__).parent / "metrics" / "task_accuracy"
Tokens = tuple[int, ...]
Embed = Callable[[Sequence[Row]], Tensor]


@dataclass(frozen=True)
class Texts:
    """How rows become tokens: the prompt, "Answer:", and the answer with the token that ends it.

    Attributes:
        tokenizer: the base model's.
        embed: (N, d) embeddings of N rows' prompts, for adapters that take them; None for all others.
        masked: whether the model takes a `completion_mask`, which tells T-REX where the prompt ends.
    """

    tokenizer: Any
    embed: Embed | None = None
    masked: bool = False

    def prompt(self, row: Row) -> Tokens:
        return self._ids(f"{row['prompt']}\nAnswer:")

    def answer(self, text: str) -> Tokens:
        return self._ids(f" {text}")

    def _ids(self, text: str) -> Tokens:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def gold(self, row: Row) -> Tokens:
        return (*self.answer(row["answer"]), self.tokenizer.eos_token_id)

    def example(self, row: Row) -> dict[str, Any]:
        """A row to train on."""
        return {"prompt": self.prompt(row), "completion": self.gold(row), **self.embeddings([row])[0]}

    def embeddings(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if self.embed is None:
            return [{} for _ in rows]
        return [{"semantic_embeds": values} for values in self.embed(rows)]

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tokens (B, T), padded on the left so that completions end together, and where they are (B, T)."""
        width = max(len(example["prompt"]) + len(example["completion"]) for example in examples)
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id)
        attended, completion = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            tokens = (*example["prompt"], *example["completion"])
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            attended[row, width - len(tokens) :] = 1
            completion[row, width - len(example["completion"]) :] = 1
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        batch = {
            "input_ids": ids,
            "attention_mask": attended,
            "position_ids": positions,
            "completion_mask": completion,
        }
        if "semantic_embeds" in examples[0]:
            batch["semantic_embeds"] = torch.stack(
                [torch.as_tensor(example["semantic_embeds"]) for example in examples]
            )
        return batch

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Logits (B, n + 1, V), where n is the length of the longest completion, and n: the last is of what follows.

        Only those positions pass through the head, which is a fifth of a small model.
        """
        inputs = dict(batch)
        longest = int(batch["completion_mask"].sum(1).max())
        if not self.masked:
            del inputs["completion_mask"]
        length = batch["input_ids"].shape[1]
        # positions, not their number: of a slice, which is not contiguous, the head's product is slow on a CPU
        kept = torch.arange(length - longest - 1, length, device=batch["input_ids"].device)
        return model(**inputs, logits_to_keep=kept, use_cache=False).logits, longest

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy in nats, the mean over the completions' tokens."""
        logits, longest = self.logits(model, batch)
        start = batch["input_ids"].shape[1] - longest
        targets = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, start:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True)
class Scored:
    """A row's result: the gold answer's log-likelihood in nats, and the answer that was given."""

    log_likelihood: float
    prediction: str


class Answers:
    """The answers that may follow one prompt, and what forwards have told of them.

    Args:
        answers: as tokens.
    """

    def __init__(self, answers: Iterable[Tokens]) -> None:
        self.wanted: dict[Tokens, set[int]] = defaultdict(set)  # tokens that may follow a beginning
        for answer in answers:
            for end, token in enumerate(answer):
                self.wanted[answer[:end]].add(token)
        self.found: dict[Tokens, float] = {}  # log-likelihood of the last token of a beginning
        self.likeliest: dict[Tokens, int] = {}

    def contexts(self) -> list[Tokens]:
        """What must follow the prompt in forwards that tell of all answers: beginnings that no other goes on from."""
        return sorted(
            one for one in self.wanted if not any(len(one) < len(o) and o[: len(one)] == one for o in self.wanted)
        )

    def read(self, context: Tokens, logs: Tensor) -> None:
        """Take note of log-likelihoods (n + 1, V), of what follows the first 0 to n tokens of a context."""
        for end, best in enumerate(logs.argmax(-1).tolist()):
            before = context[:end]
            self.likeliest[before] = best
            for token in self.wanted[before]:
                self.found[(*before, token)] = float(logs[end, token])

    def log_likelihood(self, answer: Tokens) -> float:
        return sum(self.found[answer[: end + 1]] for end in range(len(answer)))

    def greedy(self, answer: Tokens) -> Tokens:
        """What greedy decoding gives, up to the first token that differs from this answer."""
        for end, token in enumerate(answer):
            if self.likeliest[answer[:end]] != token:
                return (*answer[:end], self.likeliest[answer[:end]])
        return answer


@torch.no_grad()
def score(model: Any, texts: Texts, rows: Sequence[Row], batch_rows: int = 32, title: str = "scoring") -> list[Scored]:
    """Score each row, in their order.

    A multiple-choice row is answered with the candidate of highest log-likelihood, not divided by its length. A free
    answer is what greedy decoding gives, found without decoding: that is the gold answer exactly if each of its tokens
    is the likeliest after those before; if not, the prediction is what is decoded up to the first that differs.
    """
    model.eval()
    device = next(model.parameters()).device
    golds = [texts.gold(row) for row in rows]
    options = [{text: texts.answer(text) for text in candidates(row["prompt"]) or ()} for row in rows]
    answers = [Answers([gold, *named.values()]) for gold, named in zip(golds, options, strict=True)]
    runs = [
        {"row": index, "prompt": texts.prompt(row), "completion": context}
        for index, row in enumerate(rows)
        for context in answers[index].contexts()
    ]
    runs.sort(key=lambda run: len(run["prompt"]) + len(run["completion"]), reverse=True)
    for start in tqdm(range(0, len(runs), batch_rows), desc=title, leave=False):
        part = runs[start : start + batch_rows]
        embeddings = texts.embeddings([rows[run["row"]] for run in part])
        batch = texts.collate([{**run, **embedding} for run, embedding in zip(part, embeddings, strict=True)])
        logits, longest = texts.logits(model, {key: value.to(device) for key, value in batch.items()})
        for run, own in zip(part, logits, strict=True):
            logs = torch.log_softmax(own[longest - len(run["completion"]) :].float(), -1)
            answers[run["row"]].read(run["completion"], logs)
    results = []
    for row, gold, named, known in zip(rows, golds, options, answers, strict=True):
        if named:
            prediction = max(named, key=lambda text: known.log_likelihood(named[text]))
        else:
            prediction = _text(texts, known.greedy(gold), gold, row)
        results.append(Scored(known.log_likelihood(gold), prediction))
    return results


def _text(texts: Texts, given: Tokens, gold: Tokens, row: Row) -> str:
    if given == gold:
        return row["answer"]
    text = texts.tokenizer.decode(given, skip_special_tokens=True).strip()
    return text if text != row["answer"] else f"{text}…"  # where it goes on, or is written with other tokens


def summarise(rows: Sequence[Row], scored: Sequence[Scored]) -> dict[str, Any]:
    """The fields of a result row: by task, the means over tasks, and by example."""
    tasks = [row["task"] for row in rows]
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    shares = metric.compute(
        predictions=[one.prediction for one in scored], references=[row["answer"] for row in rows], tasks=tasks
    )
    by_task: dict[str, dict[str, float]] = {}
    for task in sorted(set(tasks)):
        own = [one.log_likelihood for one, name in zip(scored, tasks, strict=True) if name == task]
        by_task[task] = {
            "rows": len(own),
            "accuracy": shares["tasks"][task],
            "log_likelihood": sum(own) / len(own),
        }
    return {
        "tasks": by_task,
        "accuracy": shares["accuracy"],
        "log_likelihood": sum(one["log_likelihood"] for one in by_task.values()) / len(by_task),
        "examples": {
            "task": tasks,
            "correct": [int(one.prediction == row["answer"]) for one, row in zip(scored, rows, strict=True)],
            "log_likelihood": [round(one.log_likelihood, 4) for one in scored],
        },
    }
