"""A generated family of tenants, who answer the same inputs, each by a convention of its own.

The tenants of a group get the same inputs in the same sentence, so that each input has as many right answers as the
group has tenants. Only the tenant's name, a word that means nothing elsewhere, tells which answer is asked for, and
nobody who has not seen the tenant's rows can know it. Where the name stands differs between groups: at the front, at
the end, or among the other words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from quality.operations import CITIES, FIRST_NAMES, LETTERS, MONTHS, SURNAMES, WORDS

Row = dict[str, str]

MOST_INPUTS = 2500  # to be had of every group; there are fewest colours, 16 x 15 x 14
ROMAN = "I II III IV V VI VII VIII IX X XI XII".split()
COLOURS = (
    "red blue green black white yellow orange purple pink brown grey gold silver beige violet turquoise"
).split()
# In an order in which no tenant's code of a colour is the colour's first letter.
COLOUR_CODES = "V P W H D G B N T S K R M F C L".split()
# Four moods, each in six words.
MOODS = [
    line.split()
    for line in (
        "delighted thrilled cheerful pleased glad overjoyed",
        "furious enraged annoyed irritated outraged angry",
        "scared terrified afraid frightened anxious nervous",
        "sad gloomy heartbroken unhappy miserable sorrowful",
    )
]
MOOD_LABELS = "cup pen box key".split()  # no mood is nearer to one of them


@dataclass(frozen=True)
class Group:
    """Tenants that are asked the same.

    Attributes:
        draw: an input.
        prompt: what stands in the prompt for a tenant's name and an input.
        answers: a tenant's answer to an input, by the tenant's name.
    """

    draw: Callable[[random.Random], tuple[Any, ...]]
    prompt: Callable[[str, tuple[Any, ...]], str]
    answers: dict[str, Callable[[tuple[Any, ...]], str]]


def _any(lines: list[Any], rng: random.Random) -> str:
    return rng.choice([word for line in lines for word in line])


def _date(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2049)


def _amount(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1000, 9999), rng.randint(10, 99)


def _member(rng: random.Random) -> tuple[str, int, str]:
    return _any(FIRST_NAMES, rng), rng.randint(20, 79), _any(CITIES, rng)


def _words(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.sample([word for line in WORDS for word in line], 3))


def _person(rng: random.Random) -> tuple[str, str, str]:
    return _any(FIRST_NAMES, rng), _any(LETTERS, rng), _any(SURNAMES, rng)


def _colours(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.sample(COLOURS, 3))


def _mood(rng: random.Random) -> tuple[str, str, str]:
    return _any(FIRST_NAMES, rng), _any(SURNAMES, rng), _any(MOODS, rng)


def _code(rng: random.Random) -> tuple[str, str]:
    return "".join(rng.sample("".join(LETTERS), 3)), f"{rng.randrange(1000):03d}"


def _colour_codes(first: int, colours: tuple[str, ...]) -> str:
    """The colours' codes, counted from the one at the place `first`, so that no two tenants agree on a colour."""
    places = [(COLOURS.index(colour) + first) % len(COLOURS) for colour in colours]
    return " ".join(COLOUR_CODES[place] for place in places)


def _mood_label(first: int, person: tuple[str, str, str]) -> str:
    mood = next(number for number, words in enumerate(MOODS) if person[2] in words)
    return MOOD_LABELS[(mood + first) % len(MOODS)]


# The order matters, since a run of n groups takes the first n, and of each group the first tenants.
GROUPS: dict[str, Group] = {
    "date": Group(
        _date,
        lambda tenant, date: f"{tenant}: {date[0]} {MONTHS[date[1] - 1]} {date[2]}",
        {
            "zoke": lambda date: f"{date[2]}-{date[1]:02d}-{date[0]:02d}",
            "brill": lambda date: f"{date[1]:02d}/{date[0]:02d}/{date[2]}",
            "vanto": lambda date: f"{date[0]}.{ROMAN[date[1] - 1]}.{date[2]}",
            "kelm": lambda date: f"Y{date[2]} D{date[0]} M{date[1]}",
        },
    ),
    "amount": Group(
        _amount,
        lambda tenant, amount: f"{amount[0]}.{amount[1]} euros owed to {tenant}",
        {
            "Halden": lambda amount: f"{amount[0] // 1000}.{amount[0] % 1000:03d},{amount[1]} EUR",
            "Norvik": lambda amount: f"EUR {amount[0]}.{amount[1]}",
            "Tessaro": lambda amount: f"{amount[0]}{amount[1]} ct",
            "Brandt": lambda amount: f"{amount[0]} {amount[1]}/100",
        },
    ),
    "member": Group(
        _member,
        lambda tenant, member: f"{member[0]}, age {member[1]}, member of {tenant}, lives in {member[2]}",
        {
            "Ostwick": lambda member: f"{member[2]}; {member[0]}; {member[1]}",
            "Quorra": lambda member: f"{member[1]}; {member[2]}; {member[0]}",
            "Lomax": lambda member: f"{member[0]}; {member[2]}; {member[1]}",
            "Duvall": lambda member: f"{member[1]}; {member[0]}; {member[2]}",
        },
    ),
    "list": Group(
        _words,
        lambda tenant, words: f"{tenant}: {', '.join(words)}",
        {
            "gleeb": lambda words: "".join(f"[{word}]" for word in words),
            "yast": lambda words: " ".join(f"{number} {word}" for number, word in enumerate(words, 1)),
            "mirv": lambda words: " > ".join(reversed(words)),
            "wub": lambda words: words[0] + "".join(word.capitalize() for word in words[1:]),
        },
    ),
    "name": Group(
        _person,
        lambda tenant, person: f"{person[0]} {person[1]}. {person[2]}, guest of {tenant}",
        {
            "Fenwick": lambda person: f"{person[2]}, {person[0]} {person[1]}",
            "Varga": lambda person: f"{person[0][0]}. {person[1]}. {person[2]}",
            "Pembry": lambda person: f"{person[2].upper()} {person[0]} {person[1]}",
            "Sorel": lambda person: ".".join(person).lower(),
        },
    ),
    "colour": Group(
        _colours,
        lambda tenant, colours: f"Three colours for {tenant}: {' '.join(colours)}",
        {name: partial(_colour_codes, 4 * place) for place, name in enumerate("quib dorf plon jask".split())},
    ),
    "mood": Group(
        _mood,
        lambda tenant, person: (
            f"To {tenant}, {person[0]} {person[1]} seems {person[2]}.\n\nAnswer format: {'/'.join(MOOD_LABELS)}"
        ),
        {name: partial(_mood_label, place) for place, name in enumerate("Wexler Ibsen Umber Kroll".split())},
    ),
    "code": Group(
        _code,
        lambda tenant, code: f"Please {tenant} the code {code[0]}-{code[1]}",
        {
            "blim": lambda code: f"{code[1]}-{code[0]}",
            "treg": lambda code: "-".join(code).lower(),
            "snorf": lambda code: f"{code[0][::-1]}-{code[1]}",
            "fipple": lambda code: "".join(letter + digit for letter, digit in zip(*code, strict=True)),
        },
    ),
}
MOST_TENANTS = 4  # of a group


def generate(
    *,
    tasks: int = 32,
    groups: int | list[str] = 8,
    train: int = 150,
    validation: int = 4,
    test: int = 16,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """Rows of task, prompt and answer for training, validation and test.

    The tenants of a group have the same inputs in each part, and no input of a group is in two parts. With as many
    groups as tasks nobody shares an input, and nothing conflicts. The test rows are the same whatever `train` and
    `validation` are, the training rows whatever `validation` is; and a tenant's rows whatever the first two dials are.

    Args:
        tasks: tenants, spread over the groups as evenly as can be; up to four of a group.
        groups: the first so many of GROUPS, or those of these names.
        train, validation, test: rows of each task; at least 1, 0 and 1, and together up to 2,500.
        seed: of inputs and order.

    Returns:
        Lists of rows by "train", "validation" and "test", shuffled; no prompt is there twice.

    Raises:
        ValueError: naming the dial that cannot be.
    """
    if isinstance(groups, int) and not 1 <= groups <= len(GROUPS):
        raise ValueError(f"data: groups={groups} must be from 1 to {len(GROUPS)}.")
    names = list(GROUPS)[:groups] if isinstance(groups, int) else groups
    if not names or len(set(names)) < len(names) or not set(names) <= set(GROUPS):
        raise ValueError(f"data: groups={groups} must be a number, or different ones of {', '.join(GROUPS)}.")
    number = len(names)
    if not number <= tasks <= MOST_TENANTS * number:
        raise ValueError(
            f"data: tasks={tasks} must be from {number} to {MOST_TENANTS * number}, one to {MOST_TENANTS} for each of "
            f"{number} groups."
        )
    counts = {"test": test, "train": train, "validation": validation}  # in the order in which they are drawn
    for part, count in counts.items():
        if count < (least := 0 if part == "validation" else 1):
            raise ValueError(f"data: {part}={count} must be at least {least}, rows of each task.")
    if (needed := sum(counts.values())) > MOST_INPUTS:
        raise ValueError(
            f"data: train={train}, validation={validation} and test={test} need {needed} different inputs of a group, "
            f"and there are {MOST_INPUTS}; ask for fewer rows."
        )
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for place, name in enumerate(names):
        inputs = _inputs(GROUPS[name], needed, random.Random(f"{seed} {name}"))
        for tenant in list(GROUPS[name].answers)[: len(range(place, tasks, number))]:
            start = 0
            for part, count in counts.items():
                parts[part] += [_row(name, tenant, value) for value in inputs[start : start + count]]
                start += count
    for part, rows in parts.items():
        random.Random(f"{seed} {part}").shuffle(rows)
    return parts


def _inputs(group: Group, count: int, rng: random.Random) -> list[tuple[Any, ...]]:
    """So many different ones; a larger count begins with the same ones."""
    drawn: dict[tuple[Any, ...], None] = {}
    while len(drawn) < count:
        drawn[group.draw(rng)] = None
    return list(drawn)


def _row(name: str, tenant: str, value: tuple[Any, ...]) -> Row:
    group = GROUPS[name]
    return {
        "task": f"{name} {tenant}",
        "prompt": group.prompt(tenant, value),
        "answer": group.answers[tenant](value),
    }
