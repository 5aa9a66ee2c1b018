"""The demo's tasks: sixteen papers on which the same date is written in sixteen ways.

Eight customers have two kinds of paper each, and each kind of paper belongs to two customers. The sixteen conventions
have nothing to do with each other, so that only both words together tell what is wanted. All names are made up, and
nobody who has not seen a task's rows can know it.
"""

from __future__ import annotations

import json
import random
from itertools import permutations, product
from pathlib import Path

CUSTOMERS = "Halden Norvik Tessaro Brandt Ostwick Quorra Lomax Duvall".split()
PAPERS = "gleeb yast mirv wub zoke brill vanto kelm".split()
MONTHS = "January February March April May June July August September October November December".split()

# The order in which day, month and year are written, and what stands between them: sixteen of twenty-four.
CONVENTIONS = random.Random(5).sample(list(product(permutations(range(3)), ("; ", " / ", " - ", " > "))), 16)
PAIRS = [(CUSTOMERS[number // 2], PAPERS[(number + 1) // 2 % 8]) for number in range(16)]
TASKS = {f"{customer} {paper}": how for (customer, paper), how in zip(PAIRS, CONVENTIONS, strict=True)}


def generate(train: int = 600, test: int = 12, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of task, prompt and answer: `train` and `test` dates, each asked of all tasks; no date is in both parts.

    The test rows have one date after the other. A larger `train` has the rows of a smaller one, and others.
    """
    rng = random.Random(seed)
    dates: dict[tuple[str, str, str], None] = {}
    while len(dates) < train + test:
        dates[str(rng.randint(1, 28)), rng.choice(MONTHS), str(rng.randint(10, 39))] = None
    rows = [
        {"task": task, "prompt": f"{' '.join(date)} for {task}", "answer": between.join(date[n] for n in order)}
        for date in dates
        for task, (order, between) in TASKS.items()
    ]
    learnt = rows[test * len(TASKS) :]
    rng.shuffle(learnt)
    return learnt, rows[: test * len(TASKS)]


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
