"""The generated family of tasks: right answers, separate parts, and dials that do what they say."""

import json
import re
from collections import Counter, defaultdict
from datetime import datetime
from itertools import pairwise

import pytest
from quality.operations import KINDS, MOST_INPUTS, OPERATIONS, generate, measured_conflict

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def parts():
    """Every task, half of its inputs shared."""
    return generate(150, 40, 30, tasks=len(OPERATIONS), conflict=0.5)


def _of(rows, task):
    return [row for row in rows if row["task"] == task]


def _input(row):
    return row["prompt"].split(": ", 1)[1]


def _marks(row):
    """What tells a group of inputs from the others of the kind: words, years, last digits, letters, names."""
    value, kind = _input(row), OPERATIONS[row["task"]].kind
    if kind == "date":
        return {int(value[-4:]) // 20}
    if kind == "numbers":
        return {int(number) % 5 for number in value.split()}
    return set(re.findall("[A-Z]" if kind == "code" else "[A-Za-z]+", value))


def _day(value):
    return datetime.strptime(value, "%d %B %Y")


def _smallest(numbers):
    return next(number for number in numbers if all(number <= other for other in numbers))


def _is_longest(words, answer):
    return answer in words and all(len(answer) > len(word) for word in words if word != answer)


def _is_sorted(words, answer):
    result = answer.split(" ")
    return Counter(result) == Counter(words) and all(a < b for a, b in pairwise(result))


# Every task a second time, by other means where there are any: whether this answer is right for this input.
RIGHT = {
    "reverse": lambda value, answer: answer.split(" ")[::-1] == value.split(" "),
    "last word": lambda value, answer: value.endswith(f" {answer}") and " " not in answer,
    "longest": lambda value, answer: _is_longest(value.split(" "), answer),
    "alphabetical": lambda value, answer: _is_sorted(value.split(" "), answer),
    "hyphen": lambda value, answer: re.sub(r" .* ", "-", value) == answer,
    "count": lambda value, answer: value.count(" ") == int(answer) - 1,
    "iso date": lambda value, answer: _day(value).date().isoformat() == answer,
    "month": lambda value, answer: _day(value).strftime("%B") == answer,
    "slashes": lambda value, answer: _day(value).strftime("%d/%m/%Y") == answer,
    "next month": lambda value, answer: datetime.strptime(answer, "%B").month == _day(value).month % 12 + 1,
    "american date": lambda value, answer: (
        datetime.strptime(answer, "%B %d, %Y") == _day(value) and not re.search(" 0", answer)
    ),
    "largest": lambda value, answer: -_smallest([-int(number) for number in value.split()]) == int(answer),
    "smallest": lambda value, answer: _smallest([int(number) for number in value.split()]) == int(answer),
    "sum": lambda value, answer: int(answer) - int(value.split()[0]) == int(value.split()[1]),
    "even": lambda value, answer: len(re.findall(r"[02468]\b", value)) == int(answer),
    "surname first": lambda value, answer: answer.split(", ")[::-1] == value.split(",")[0].split(" "),
    "next age": lambda value, answer: value.endswith(f", {int(answer) - 1}"),
    "initials": lambda value, answer: re.match(r"([A-Z])\w+ ([A-Z])", value).groups() == tuple(answer),
    "age in brackets": lambda value, answer: re.sub(r"^(\w+) .*, (\d+)$", r"\1 (\2)", value) == answer,
    "json": lambda value, answer: json.loads(answer) == {"city": value.split(", ")[1]},
    "swap": lambda value, answer: f"{answer[4:]}-{answer[:3]}" == value and answer[3] == "-",
    "lower case": lambda value, answer: answer.upper() == value and answer.islower(),
    "spell": lambda value, answer: re.fullmatch(r"[A-Z]( [A-Z]){2}", answer) and answer.replace(" ", "") == value[:3],
    "digits": lambda value, answer: re.sub(r"[^0-9]", "", value) == answer,
}
FORMS = {
    "words": r"[a-z]{4,8}( [a-z]{4,8}){2,4}",
    "date": r"[1-9]\d? [A-Z][a-z]+ (19|20)\d\d",
    "numbers": r"\d\d( \d\d){2,4}",
    "person": r"[A-Z][a-z]+ [A-Z][a-z]+, [A-Z][a-z]+, \d\d",
    "code": r"[A-Z]{3}-\d{3}",
}


@pytest.mark.parametrize("task", OPERATIONS)
def test_answers_are_right(parts, task):
    rows = [row for part in PARTS for row in _of(parts[part], task)]
    assert len(rows) == 220
    assert {row["prompt"].split(": ", 1)[0] for row in rows} == {OPERATIONS[task].instruction}
    for row in rows:
        assert set(row) == {"task", "prompt", "answer"}
        value = _input(row)
        assert re.fullmatch(FORMS[OPERATIONS[task].kind], value), row
        assert max(Counter(value.split()).values()) == 1, row  # nothing twice in a list
        assert RIGHT[task](value, row["answer"]), row
    assert len({row["answer"] for row in rows}) > 2  # no task is answered by one word


@pytest.mark.parametrize(
    ("task", "value", "answer"),
    [
        ("reverse", ("river", "apple", "stone"), "stone apple river"),
        ("alphabetical", ("river", "apple", "stone"), "apple river stone"),
        ("longest", ("tiger", "mountain", "train"), "mountain"),
        ("hyphen", ("river", "apple", "stone"), "river-stone"),
        ("iso date", (2, 3, 1947), "1947-03-02"),
        ("slashes", (2, 3, 1947), "02/03/1947"),
        ("american date", (2, 3, 1947), "March 2, 1947"),
        ("next month", (2, 12, 1947), "January"),
        ("next month", (2, 11, 1947), "December"),
        ("sum", (55, 90, 15), "145"),
        ("even", (55, 91, 15), "0"),
        ("surname first", ("Karen", "Lewis", "Oslo", 79), "Lewis, Karen"),
        ("next age", ("Karen", "Lewis", "Oslo", 79), "80"),
        ("initials", ("Karen", "Lewis", "Oslo", 79), "KL"),
        ("json", ("Karen", "Lewis", "Oslo", 79), '{"city": "Oslo"}'),
        ("swap", ("HTN", "087"), "087-HTN"),
        ("spell", ("HTN", "087"), "H T N"),
        ("digits", ("HTN", "087"), "087"),
    ],
)
def test_answers_by_hand(task, value, answer):
    assert OPERATIONS[task].answer(value) == answer


def test_instructions_tell_the_tasks_apart():
    assert len(OPERATIONS) == 24 == len({operation.instruction for operation in OPERATIONS.values()})
    assert set(RIGHT) == set(OPERATIONS)
    assert not any(":" in operation.instruction for operation in OPERATIONS.values())


@pytest.mark.parametrize("conflict", [0, 0.3, 1])
def test_parts_are_complete_and_separate(conflict):
    counts = {"train": 60, "validation": 7, "test": 25}
    parts = generate(60, 25, 7, tasks=24, conflict=conflict)
    assert tuple(parts) == PARTS
    for part, rows in parts.items():
        assert Counter(row["task"] for row in rows) == dict.fromkeys(OPERATIONS, counts[part])
        tasks = [row["task"] for row in rows]
        assert sum(a == b for a, b in pairwise(tasks)) < len(tasks) / 4  # shuffled
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(prompts) == len(set(prompts))
    seen = [{_input(row) for row in rows} for rows in parts.values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_validation_may_be_left_out():
    parts = generate(20, 10)
    assert parts["validation"] == []
    assert len(parts["train"]) == 16 * 20 and len(parts["test"]) == 16 * 10


def test_same_arguments_same_rows():
    assert generate(30, 10, 5, seed=3) == generate(30, 10, 5, seed=3)
    parts = generate(30, 10, 5, seed=3), generate(30, 10, 5, seed=4)
    for part in PARTS:
        first, second = ({row["prompt"] for row in other[part]} for other in parts)
        assert len(first & second) < len(first) / 10


def test_rows_stay_when_others_are_asked_for():
    """So that runs of a tuning and of a final phase, or of other sizes, are scored on the same test rows."""
    one, other = generate(30, 10, 5, tasks=6, conflict=0.3), generate(30, 10, 0, tasks=6, conflict=0.3)
    assert one["train"] == other["train"] and one["test"] == other["test"]
    assert generate(90, 10, 5, tasks=6, conflict=0.3)["test"] == one["test"]
    more = generate(30, 10, 5, tasks=24, conflict=0.3)
    for part in PARTS:
        kept = [row for row in more[part] if row["task"] in list(OPERATIONS)[:6]]
        assert sorted(map(str, kept)) == sorted(map(str, one[part]))


@pytest.mark.parametrize("tasks", [2, 4, 6, 8, 10, 11, 16, 24])
def test_conflict_is_what_was_asked_for(tasks):
    measured = []
    for conflict in (0, 0.25, 0.5, 0.75, 1):
        parts = generate(40, 20, 4, tasks=tasks, conflict=conflict)
        assert [measured_conflict(parts[part]) for part in PARTS] == [conflict] * 3
        measured.append(measured_conflict(parts["train"]))
    assert measured == sorted(measured)


@pytest.mark.parametrize("tasks", [3, 5, 7, 9])
def test_a_kind_of_one_task_has_no_conflict(tasks):
    rows = generate(40, 1, tasks=tasks, conflict=1)["train"]
    assert measured_conflict(rows) == (tasks - 1) / tasks


@pytest.mark.parametrize("conflict", [0, 0.5])
def test_own_inputs_tell_the_task(conflict):
    """They have nothing in common with those of other tasks of the kind, nor with the shared ones."""
    parts = generate(80, 20, 10, tasks=24, conflict=conflict)
    rows = [row for part in PARTS for row in parts[part]]
    asked = Counter(_input(row) for row in rows)
    marks = defaultdict(set)
    for row in rows:
        operation = OPERATIONS[row["task"]]
        owner = row["task"] if asked[_input(row)] == 1 else "shared"
        marks[operation.kind, owner] |= _marks(row)
    assert len(marks) == 24 + (len(KINDS) if conflict else 0)
    for kind in KINDS:
        own = [found for (its_kind, _), found in marks.items() if its_kind == kind]
        assert sum(map(len, own)) == len(set.union(*own)), kind


def test_shared_inputs_are_those_of_every_operation_of_the_kind():
    parts = generate(50, 20, 10, tasks=24, conflict=1)
    for part in PARTS:
        for kind in KINDS:
            tasks = [task for task, operation in OPERATIONS.items() if operation.kind == kind]
            first, *others = ({_input(row) for row in _of(parts[part], task)} for task in tasks)
            assert others and all(other == first for other in others)
    orders = {tuple(_input(row) for row in _of(parts["train"], task)) for task in ("reverse", "last word", "longest")}
    assert len(orders) == 3  # in an order of its own


@pytest.mark.parametrize("tasks", range(2, 25))
def test_tasks_are_the_first_of_the_list(tasks):
    rows = generate(2, 1, tasks=tasks)["train"]
    assert {row["task"] for row in rows} == set(list(OPERATIONS)[:tasks])
    kinds = Counter(OPERATIONS[task].kind for task in list(OPERATIONS)[:tasks])
    alone = [kind for kind, count in kinds.items() if count == 1]
    assert len(alone) == (tasks % 2 if tasks < 10 else 0)
    if tasks >= 10:
        assert max(kinds.values()) - min(kinds.values()) <= 2


@pytest.mark.parametrize("conflict", [0, 1])
def test_as_many_rows_as_promised(conflict):
    parts = generate(MOST_INPUTS - 2, 1, 1, tasks=24, conflict=conflict)
    assert len({row["prompt"] for row in parts["train"]}) == 24 * (MOST_INPUTS - 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": 1}, "tasks is 1; there are 24, ask for 2 to 24"),
        ({"tasks": 25}, "tasks is 25; there are 24"),
        ({"conflict": -0.01}, "conflict is -0.01, .* from 0 to 1"),
        ({"conflict": 1.01}, "conflict is 1.01"),
        ({"conflict": float("nan")}, "conflict is nan"),
        ({"train": 0}, "train is 0; .* at least 1"),
        ({"test": 0}, "test is 0; .* at least 1"),
        ({"test": -1}, "test is -1"),
        ({"validation": -1}, "validation is -1; .* at least 0"),
        ({"train": 6000, "conflict": 0}, "needs 6001 different inputs .* there are 6000; ask for fewer"),
        ({"train": 5990, "test": 6, "validation": 5, "conflict": 1}, "needs 6001 different inputs"),
        ({"train": 10**9}, "ask for fewer rows"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"train": 10, "test": 1, **arguments})


def test_measured_conflict_counts_rows():
    rows = [{"task": "", "prompt": prompt, "answer": ""} for prompt in ("a: x", "b: x: y", "b: x", "c: z", "c: z")]
    assert measured_conflict(rows) == 2 / 5
    with pytest.raises(ValueError, match="no rows"):
        measured_conflict([])
    with pytest.raises(ValueError, match="'no input' has no input"):
        measured_conflict([{"task": "", "prompt": "no input", "answer": ""}])
