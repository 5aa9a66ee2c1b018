"""A generated family of short tasks, each one operation that an instruction names, on inputs of five kinds.

Operations of a kind can be asked of the same input, so that nothing but the instruction tells what to answer. How
often that happens is one dial (`conflict`), how many tasks there are the other (`tasks`). Every prompt is an
instruction, a colon and the input; every answer is short and the only right one.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, str]

# One line a group of inputs, see Kind. Every line of WORDS has short and long words, so that one is often the longest.
WORDS = [
    line.split()
    for line in (
        "apple river stone cloud tiger music paper house train bread candle garden window silver mountain elephant",
        "light chair water plant glass table horse sugar night field bridge forest pencil rabbit kitchen umbrella",
        "ocean brush winter summer orange lemon chicken hammer sand boat door bell market station blanket triangle",
        "green flower doctor soldier castle island lake tree fish coat button ladder dragon engine sentence computer",
        "king queen farmer teacher school camera basket bottle cheese butter pepper spoon fork road wheel tunnel",
        "snow rain storm desert valley village harbor planet rocket robot signal mirror pillow carpet picture balloon",
        "wolf bear eagle lion turtle spider monkey copper iron gold diamond crystal leather cotton hospital football",
    )
]
FIRST_NAMES = [
    line.split()
    for line in (
        "Anna Ben Clara David Emma Frank",
        "Grace Henry Alice Jack Karen Leo",
        "Maria Noah Oscar Paul Rosa Sam",
        "Tina Victor Laura Peter Julia Simon",
        "Sarah Thomas Helen Martin Nina Robert",
        "Linda George Diana Kevin Susan Mark",
    )
]
SURNAMES = [
    line.split()
    for line in (
        "Smith Brown Miller Davis Wilson Moore",
        "Taylor Clark Lewis Walker Hall Young",
        "Allen King Wright Scott Hill Green",
        "Adams Baker Nelson Carter Turner Parker",
        "Evans Collins Stewart Morris Rogers Reed",
        "Cook Morgan Bell Murphy Cooper Ward",
    )
]
CITIES = [
    line.split()
    for line in (
        "London Paris Rome Berlin Madrid Vienna",
        "Oslo Dublin Prague Athens Lisbon Warsaw",
        "Boston Chicago Dallas Denver Seattle Miami",
        "Tokyo Delhi Cairo Lima Moscow Sydney",
        "Toronto Montreal Munich Milan Geneva Brussels",
        "Austin Phoenix Houston Atlanta Portland Detroit",
    )
]
LETTERS = ["BHNT", "CJPV", "DKQW", "FLRX", "GMSZ"]  # no vowels: a code should not be a word
MOST_INPUTS = 6000  # to be had of every group; there are fewest dates, 28 days a month in 20 years
YEARS = [range(start, start + 20) for start in range(1900, 2020, 20)]
MONTHS = (
    "January February March April May June July August September October November December"
).split()  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Group 0 holds the inputs that all its operations share, group 1 the first operation's own, group 2 the second's,
    and so on. No two groups have a word, a number, a year, a letter or a name in common, so an input tells its group;
    and groups are alike in size and range, so an operation is about as hard on one as on another.

    Attributes:
        draw: an input of a group.
        write: how it stands in the prompt.
    """

    draw: Callable[[random.Random, int], tuple[Any, ...]]
    write: Callable[[tuple[Any, ...]], str]


def _words(rng: random.Random, group: int) -> tuple[str, ...]:
    while True:
        words = tuple(rng.sample(WORDS[group], rng.randint(3, 5)))
        if Counter(map(len, words))[max(map(len, words))] == 1:  # one longest word
            return words


def _numbers(rng: random.Random, group: int) -> tuple[int, ...]:
    # told apart by the last digit, so that the numbers of every group are as large, and half of them even
    numbers = [number for number in range(10, 100) if number % 5 == group]
    return tuple(rng.sample(numbers, rng.randint(3, 5)))


def _date(rng: random.Random, group: int) -> tuple[int, int, int]:
    return rng.randint(1, 28), rng.randint(1, 12), rng.choice(YEARS[group])


def _person(rng: random.Random, group: int) -> tuple[str, str, str, int]:
    return (
        rng.choice(FIRST_NAMES[group]),
        rng.choice(SURNAMES[group]),
        rng.choice(CITIES[group]),
        rng.randint(20, 79),
    )


def _code(rng: random.Random, group: int) -> tuple[str, str]:
    return "".join(rng.sample(LETTERS[group], 3)), f"{rng.randrange(1000):03d}"


def _spaced(items: Iterable[Any]) -> str:
    return " ".join(map(str, items))


KINDS = {
    "words": Kind(_words, _spaced),
    "date": Kind(_date, lambda date: f"{date[0]} {MONTHS[date[1] - 1]} {date[2]}"),
    "numbers": Kind(_numbers, _spaced),
    "person": Kind(_person, lambda person: f"{person[0]} {person[1]}, {person[2]}, {person[3]}"),
    "code": Kind(_code, "-".join),
}


@dataclass(frozen=True)
class Operation:
    """A task: what the prompt asks of a kind of input, and the answer to an input."""

    kind: str
    instruction: str
    answer: Callable[[tuple[Any, ...]], str]


# The order matters, since a run of n tasks takes the first n: kinds come in pairs, so that two tasks have inputs to
# share already, and then take turns.
OPERATIONS: dict[str, Operation] = {
    "reverse": Operation(
        "words", "Write the words of the list in reverse order", lambda words: _spaced(reversed(words))
    ),
    "last word": Operation("words", "Write only the last word of the list", lambda words: words[-1]),
    "iso date": Operation(
        "date", "Write the date as year-month-day", lambda date: f"{date[2]}-{date[1]:02d}-{date[0]:02d}"
    ),
    "month": Operation("date", "Write only the month of the date", lambda date: MONTHS[date[1] - 1]),
    "largest": Operation("numbers", "Write the largest of the numbers", lambda numbers: str(max(numbers))),
    "sum": Operation(
        "numbers", "Write the sum of the first two numbers", lambda numbers: str(numbers[0] + numbers[1])
    ),
    "surname first": Operation(
        "person", "Write the surname, then the first name", lambda person: f"{person[1]}, {person[0]}"
    ),
    "next age": Operation("person", "Write the age of the person in one year", lambda person: str(person[3] + 1)),
    "swap": Operation("code", "Swap the two parts of the code", lambda code: f"{code[1]}-{code[0]}"),
    "lower case": Operation("code", "Write the code in lower case", lambda code: "-".join(code).lower()),
    "longest": Operation("words", "Write the longest word of the list", lambda words: max(words, key=len)),
    "slashes": Operation(
        "date", "Write the date as day/month/year", lambda date: f"{date[0]:02d}/{date[1]:02d}/{date[2]}"
    ),
    "smallest": Operation("numbers", "Write the smallest of the numbers", lambda numbers: str(min(numbers))),
    "initials": Operation(
        "person", "Write the initials of the person", lambda person: f"{person[0][0]}{person[1][0]}"
    ),
    "spell": Operation("code", "Write only the letters of the code, spaced", lambda code: _spaced(code[0])),
    "alphabetical": Operation(
        "words", "Write the words of the list in alphabetical order", lambda words: _spaced(sorted(words))
    ),
    "next month": Operation("date", "Write the month after the date's month", lambda date: MONTHS[date[1] % 12]),
    "even": Operation(
        "numbers",
        "Write how many of the numbers are even",
        lambda numbers: str(sum(number % 2 == 0 for number in numbers)),
    ),
    "age in brackets": Operation(
        "person", "Write the first name and the age in brackets", lambda person: f"{person[0]} ({person[3]})"
    ),
    "digits": Operation("code", "Write only the digits of the code", lambda code: code[1]),
    "hyphen": Operation(
        "words", "Join the first and the last word with a hyphen", lambda words: f"{words[0]}-{words[-1]}"
    ),
    "american date": Operation(
        "date",
        "Write the date as month day, year",
        lambda date: f"{MONTHS[date[1] - 1]} {date[0]}, {date[2]}",
    ),
    "json": Operation("person", "Write the city of the person as JSON", lambda person: f'{{"city": "{person[2]}"}}'),
    "count": Operation("words", "Write how many words the list has", lambda words: str(len(words))),
}


def _draw(kind: str, group: int, count: int, seed: int) -> list[tuple[Any, ...]]:
    """So many different inputs; a larger count begins with the same ones."""
    rng = random.Random(f"{seed} {kind} {group}")
    drawn: dict[tuple[Any, ...], None] = {}
    while len(drawn) < count:
        drawn[KINDS[kind].draw(rng, group)] = None
    return list(drawn)


def generate(
    train: int, test: int, validation: int = 0, *, tasks: int = 16, conflict: float = 0.5, seed: int = 0
) -> dict[str, list[Row]]:
    """Rows of task, prompt and answer for training, validation and test.

    A share `conflict` of a task's rows (rounded to whole rows, in each part) has the inputs that every other operation
    of its kind has, too; the others have inputs of this task's own, made of words, numbers, years, letters or names
    that stand in no other input of the kind. So at 0 the input alone tells the task, and at 1 only the instruction
    does. The kinds come in pairs of operations: where `tasks` is 3, 5, 7 or 9 the last task has nobody to share with.

    No input is in two parts, whatever is asked of it. The test rows are the same whatever `train` and `validation`
    are, the training rows whatever `validation` is; and a task's rows are the same whatever `tasks` is.

    Args:
        train, test, validation: rows of each task; at least 1, 1 and 0, and together up to 6,000 at any
            `conflict`.
        tasks: the first so many of OPERATIONS, from 2 on.
        conflict: between 0 and 1.
        seed: of inputs and order.

    Returns:
        Lists of rows by "train", "validation" and "test", shuffled; no prompt is there twice.

    Raises:
        ValueError: an argument out of its range, or more rows of a task than there are different inputs.
    """
    if not 2 <= tasks <= len(OPERATIONS):
        raise ValueError(f"tasks is {tasks}; there are {len(OPERATIONS)}, ask for 2 to {len(OPERATIONS)}.")
    if not 0 <= conflict <= 1:  # also where it is NaN
        raise ValueError(f"conflict is {conflict}, but is a share of the rows; give a number from 0 to 1.")
    counts = {"test": test, "train": train, "validation": validation}  # in the order they are drawn
    for part, count in counts.items():
        least = 0 if part == "validation" else 1
        if count < least:
            raise ValueError(f"{part} is {count}; give the rows of each task, at least {least}.")

    together = {part: round(conflict * count) for part, count in counts.items()}
    alone = {part: count - together[part] for part, count in counts.items()}
    needed = max(sum(together.values()), sum(alone.values()))
    if needed > MOST_INPUTS:
        raise ValueError(
            f"A task needs {needed} different inputs of one group for {train} training, {validation} validation and "
            f"{test} test rows, and there are {MOST_INPUTS}; ask for fewer rows, or for a conflict nearer to 0.5."
        )
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    used: Counter[str] = Counter()
    shared: dict[str, list[tuple[Any, ...]]] = {}
    for task, operation in list(OPERATIONS.items())[:tasks]:
        kind = operation.kind
        used[kind] += 1
        if kind not in shared:
            shared[kind] = _draw(kind, 0, sum(together.values()), seed)
        for inputs, sizes in (
            (shared[kind], together),
            (_draw(kind, used[kind], sum(alone.values()), seed), alone),
        ):
            start = 0
            for part, size in sizes.items():
                for value in inputs[start : start + size]:
                    prompt = f"{operation.instruction}: {KINDS[kind].write(value)}"
                    parts[part].append({"task": task, "prompt": prompt, "answer": operation.answer(value)})
                start += size
    for part, rows in parts.items():
        random.Random(f"{seed} {part}").shuffle(rows)
    return parts


def measured_conflict(rows: list[Row]) -> float:
    """The share of rows whose input stands in another row under another instruction, between 0 and 1.

    Args:
        rows: with prompts of the form "instruction: input"; at least one.

    Raises:
        ValueError: no rows, or a prompt without a colon.
    """
    if not rows:
        raise ValueError("There are no rows; give at least one.")
    instructions: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        instruction, colon, value = row["prompt"].partition(": ")
        if not colon:
            raise ValueError(f"The prompt {row['prompt']!r} has no input; expected 'instruction: input'.")
        instructions[value].add(instruction)
    return sum(len(instructions[row["prompt"].partition(": ")[2]]) > 1 for row in rows) / len(rows)
