"""A made-up language for a tiny model: six symbols, an order and a value map; and tasks that edit the maps.

A prompt is four instruction words, shuffled, and six of sixteen symbols. One word names an order, one a value map, two
are fillers, which say nothing to the base model. The answer is the input in that order, each symbol replaced by what
the map makes of it. A task has an order and a map of its own, of which some symbols are mapped anew. Where several
tasks share an order and a map, the two filler words alone tell them apart, and the same input has another answer in
each: the family "conflict". Where each has a pair of its own, the base model reads which one is asked for: "easy".
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

Row = dict[str, str]

LENGTH = 6
SYMBOLS = list("abcdefghijklmnop")
# Which of the six symbols stands at each place of the answer. These are orders that the base model learns soon: of the
# reverse it had nothing right when it knew all turns.
ORDERS = {
    "straight": (0, 1, 2, 3, 4, 5),
    "left": (1, 2, 3, 4, 5, 0),
    "left2": (2, 3, 4, 5, 0, 1),
    "halves": (3, 4, 5, 0, 1, 2),
    "right2": (4, 5, 0, 1, 2, 3),
    "right": (5, 0, 1, 2, 3, 4),
    "front": (1, 0, 2, 3, 4, 5),
    "back": (0, 1, 2, 3, 5, 4),
}
MAPS = "amber blue coral dusk ebony fawn gold hazel".split()
FILLERS = "and but for nor or so then thus yet".split()
PAIRS = [(order, name) for order in ORDERS for name in MAPS]


def value_map(name: str) -> list[int]:
    """The symbol that each symbol is replaced by, as numbers; the first map leaves all as they are."""
    images = list(range(len(SYMBOLS)))
    if name != MAPS[0]:
        random.Random(MAPS.index(name)).shuffle(images)
    return images


@dataclass(frozen=True)
class Task:
    """An order and a value map (16 numbers), some of whose images are new; fillers that always tell it, if any."""

    name: str
    order: str
    map: str
    images: list[int]
    fillers: tuple[str, str] | None

    def row(self, symbols: list[int], rng: random.Random) -> Row:
        words = [self.order, self.map, *(self.fillers or rng.choices(FILLERS, k=2))]
        rng.shuffle(words)
        answer = [SYMBOLS[self.images[symbols[place]]] for place in ORDERS[self.order]]
        prompt = " ".join((*words, *(SYMBOLS[number] for number in symbols)))
        return {"task": self.name, "prompt": prompt, "answer": " ".join(answer)}


def make_tasks(tasks: int, pairs: int, edits: int, orders: list[str], rng: random.Random) -> list[Task]:
    """Tasks that share so many pairs of an order and a map as evenly as can be.

    Raises:
        ValueError: naming the dial that cannot be.
    """
    known = [pair for pair in PAIRS if pair[0] in orders]
    told = list(itertools.combinations(FILLERS, 2))
    if unknown := set(orders) - set(ORDERS):
        raise ValueError(f"data: the orders {', '.join(sorted(unknown))} are unknown; known are {', '.join(ORDERS)}.")
    if not 1 <= pairs <= min(tasks, len(known)):
        raise ValueError(
            f"data: pairs={pairs} must be at least 1, and at most tasks={tasks} and the {len(known)} pairs there are."
        )
    if tasks > pairs * len(told):
        raise ValueError(f"data: tasks={tasks} must be at most {len(told)} for each of {pairs} pairs.")
    if not 2 <= edits <= len(SYMBOLS):
        raise ValueError(f"data: edits={edits} must be from 2 to {len(SYMBOLS)}, of the symbols that a map replaces.")
    found = []
    for place, (order, name) in enumerate(rng.sample(known, pairs)):
        count = len(range(place, tasks, pairs))
        for number, fillers in enumerate(rng.sample(told, count)):
            images = _edited(value_map(name), edits, rng)
            own = fillers if pairs < tasks else None
            found.append(Task(f"{order} {name} {number + 1}", order, name, images, own))
    return found


def _edited(images: list[int], edits: int, rng: random.Random) -> list[int]:
    """A map in which some symbols pass their images on to each other, so that none of them keeps its own."""
    chosen = rng.sample(range(len(images)), edits)
    edited = list(images)
    for symbol, giver in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        edited[symbol] = images[giver]
    return edited


def generate(
    family: str,
    *,
    tasks: int = 32,
    pairs: int | None = None,
    edits: int = 8,
    orders: list[str] | None = None,
    train: int = 1000,
    validation: int = 8,
    test: int = 32,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """Rows by part. All tasks are tested on the same inputs, none of which stands in another part.

    Args:
        family: "conflict" or "easy".
        tasks: how many.
        pairs: of an order and a map; None for a pair to each four tasks ("conflict") or to each task ("easy").
        edits: how many of a map's 16 symbols a task maps anew.
        orders: that pairs are made of; None for all.
        train, validation, test: rows of each task.
        seed: of tasks and inputs.
    """
    if pairs is None:
        pairs = tasks if family == "easy" else max(1, tasks // 4)
    rng = random.Random(seed)
    made = make_tasks(tasks, pairs, edits, list(ORDERS) if orders is None else orders, rng)
    parts: dict[str, list[Row]] = {}
    used: set[tuple[int, ...]] = set()
    for name, count in (("test", test), ("validation", validation)):
        shared = [_fresh(used, rng) for _ in range(count)]
        used |= set(map(tuple, shared))
        parts[name] = [task.row(symbols, rng) for task in made for symbols in shared]
    parts["train"] = [task.row(_fresh(used, rng), rng) for task in made for _ in range(train)]
    for rows in parts.values():
        rng.shuffle(rows)
    return parts


def _fresh(used: set[tuple[int, ...]], rng: random.Random) -> list[int]:
    while tuple(drawn := rng.choices(range(len(SYMBOLS)), k=LENGTH)) in used:
        pass
    return drawn
