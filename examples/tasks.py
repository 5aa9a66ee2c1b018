"""A small multi-task set, generated here: eight tasks with short prompts and answers that can be checked exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

WORDS = (
    "apple river stone cloud tiger green music paper light house train bread chair water plant glass table horse "
    "sugar night field ocean brush candle garden window silver bridge forest pencil rabbit winter summer orange"
).split()
NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Karen Leo Maria Noah Olga Paul Rosa Sam Tina Victor".split()
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = (
    "January February March April May June July August September October November December"
).split()  # fmt: skip


def _some_words(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def _last_word(rng: random.Random) -> tuple[str, str]:
    words = _some_words(rng, 3, 5)
    return f"What is the last word of this list: {' '.join(words)}?", words[-1]


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = _some_words(rng, 3, 3)
    return f"Write these words in reverse order: {' '.join(words)}.", " ".join(reversed(words))


def _capitals(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f"Write the word {word} in capital letters.", word.upper()


def _count(rng: random.Random) -> tuple[str, str]:
    words = _some_words(rng, 2, 7)
    return f"How many words are in this list: {' '.join(words)}?", str(len(words))


def _larger(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(range(10, 1000), 2)
    return f"Which number is larger, {first} or {second}?", str(max(first, second))


def _add(rng: random.Random) -> tuple[str, str]:
    first, second = rng.randint(1, 20), rng.randint(1, 20)
    return f"What is {first} plus {second}?", str(first + second)


def _weekday(rng: random.Random) -> tuple[str, str]:
    name, day, nights = rng.choice(NAMES), rng.randrange(7), rng.randint(1, 3)
    prompt = f"{name} arrives on {DAYS[day]} and stays for {nights} nights. On which day does {name} leave?"
    return prompt, DAYS[(day + nights) % 7]


def _date(rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2049)
    return f"Write the date {day} {MONTHS[month]} {year} as year-month-day.", f"{year}-{month + 1:02d}-{day:02d}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "last word": _last_word,
    "reverse": _reverse,
    "capitals": _capitals,
    "count": _count,
    "larger": _larger,
    "add": _add,
    "weekday": _weekday,
    "date": _date,
}


def generate(train: int, test: int, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of task, prompt and answer: `train` and `test` of each task, no test prompt among the training prompts.

    A task that has too few different prompts (a few dozen words to write in capitals) gives a quarter of them to the
    test set and repeats the others.
    """
    rng = random.Random(seed)
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for task, make in TASKS.items():
        drawn: dict[str, str] = {}
        for _ in range(50 * (train + test)):
            if len(drawn) == train + test:
                break
            prompt, answer = make(rng)
            drawn[prompt] = answer
        rows = [{"task": task, "prompt": prompt, "answer": answer} for prompt, answer in drawn.items()]
        rng.shuffle(rows)
        held_out = min(test, len(rows) // 4)
        parts[1].extend(rows[:held_out])
        learnt = rows[held_out:]
        parts[0].extend(learnt[index % len(learnt)] for index in range(train))
    for part in parts:
        rng.shuffle(part)
    return parts


def load(path: Path, test_share: float = 0.1, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Read a JSONL of task, prompt and answer and split it; equal prompts land on the same side."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({key: str(row[key]) for key in ("task", "prompt", "answer")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number}: expected a JSON object with task, prompt and answer; {error!r}."
            ) from error
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: round(len(prompts) * test_share)])
    learnt = [row for row in rows if row["prompt"] not in held_out]
    tested = list({row["prompt"]: row for row in rows if row["prompt"] in held_out}.values())
    if not learnt or not tested:
        raise SystemExit(
            f"{path} holds {len(prompts)} different prompts, too few to train on some and test on others."
        )
    return learnt, tested
