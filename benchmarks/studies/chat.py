"""Whether an adapter of the demo answers as well in a chat as in single turns.

    python benchmarks/studies/chat.py runs/quickstart/adapter [--test 40]

Takes an adapter that `make demo ARGS=--full` trained, on single turns alone, and asks prompts that it was not trained
on: by themselves, under another system prompt of some 90 tokens, and after an earlier turn, a question of another task
with its right answer. Prints the share of exact answers, and the change from single turns with its 95 % interval.
Adapters without chat_markers, and PEFT's other kinds, can be asked as well.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from reporting import table
from small_model import DEVICE, Rows, load_model
from tasks import generate

Chat = list[dict[str, str]]
SYSTEM = (
    "You work at the front desk of a small hotel by the sea. Guests write to you about their rooms, their meals, the "
    "weather and the boats that leave for the islands. Be friendly and patient with them, never mention prices or "
    "names of other guests, and speak of the garden whenever it fits. If somebody asks for something that the hotel "
    "does not have, say so politely and suggest what comes closest. Breakfast is served from seven to ten."
)


def held_out(count: int) -> tuple[Rows, Rows]:
    """The demo's training rows, and prompts of its tasks that are not among them."""
    train, test = generate()
    seen = {row["prompt"] for row in (*train, *test)}
    more = [row for row in generate(test=count, seed=1)[1] if row["prompt"] not in seen] if count else []
    return train, test + more


def conversations(train: Rows, test: Rows, seed: int = 0) -> dict[str, list[Chat]]:
    """Each test prompt in a chat of each kind."""
    rng = random.Random(seed)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in test]
    former = [rng.choice([other for other in train if other["task"] != row["task"]]) for row in test]
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in former
    ]
    return {
        "single turn": asked,
        "another system prompt": [[{"role": "system", "content": SYSTEM}, *chat] for chat in asked],
        "after another task": [[*turn, *chat] for turn, chat in zip(turns, asked, strict=True)],
    }


@torch.no_grad()
def right(model: Any, tokenizer: Any, chats: list[Chat], rows: Rows, batch_size: int = 16) -> torch.Tensor:
    """Whether each chat's greedy answer is exactly that of its row, as floats."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    result = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda number: len(texts[number]))
    for start in tqdm(range(0, len(rows), batch_size)):
        numbers = order[start : start + batch_size]
        options = {"return_tensors": "pt", "padding": True, "return_token_type_ids": False}
        inputs = tokenizer([texts[i] for i in numbers], add_special_tokens=False, **options)
        inputs = inputs.to(model.device)
        new = model.generate(**inputs, max_new_tokens=14, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, answer in zip(numbers, answers, strict=True):
            result[number] = answer.strip().split("\n")[0].rstrip(".") == rows[number]["answer"]
    return result


def compare(found: dict[str, torch.Tensor], rows: Rows) -> str:
    """A table of the shares of right answers, in all and by task."""
    tasks = sorted({row["task"] for row in rows})
    reference, lines = next(iter(found.values())), []
    for name, hits in found.items():
        change = 100 * (hits - reference)
        mean, half = float(change.mean()), 1.96 * float(change.std()) / len(rows) ** 0.5
        points = f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
        of_tasks = [hits[torch.tensor([row["task"] == task for row in rows])].mean() for task in tasks]
        lines.append([name, f"{100 * hits.mean():.1f} %", points, *(f"{share:.2f}" for share in of_tasks)])
    return table(["", "right", "change in points", *tasks], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--model", help="the base model (default: the demo's)")
    parser.add_argument("--test", type=int, default=40, help="prompts of each task besides the demo's own")
    args = parser.parse_args(argv)
    train, test = held_out(args.test)
    base, tokenizer = load_model(args.model)
    model = PeftModel.from_pretrained(base.to(DEVICE), args.adapter).eval()
    found = {}
    for name, chats in conversations(train, test).items():
        found[name] = right(model, tokenizer, chats, test)
        print(f"{name}: {100 * found[name].mean():.1f} % of {len(test)} prompts", flush=True)
    print(f"\n{compare(found, test)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
