"""The family of tenants: right answers, conflict in every input, separate parts, and dials that do what they say."""

import re
from collections import Counter, defaultdict
from datetime import date, datetime
from itertools import combinations, pairwise

import pytest
from quality import corpora
from quality.operations import CITIES, FIRST_NAMES, MONTHS, SURNAMES, WORDS
from quality.tenants import (
    COLOUR_CODES,
    COLOURS,
    GROUPS,
    MOOD_LABELS,
    MOODS,
    MOST_INPUTS,
    MOST_TENANTS,
    generate,
)

PARTS = ("train", "validation", "test")
SIZES = {"train": 150, "validation": 4, "test": 16}
# Where the tenant's name stands among the words of a group's prompts.
PLACES = {
    "date": "front",
    "amount": "end",
    "member": "middle",
    "list": "front",
    "name": "end",
    "colour": "middle",
    "mood": "middle",
    "code": "middle",
}


@pytest.fixture(scope="module")
def parts():
    return generate()


def _of(rows, group):
    return [row for row in rows if row["task"].split()[0] == group]


def _tenant(row):
    return row["task"].split()[1]


def _input(row):
    """The prompt without the tenant's name, which stands in it once."""
    before, name, after = row["prompt"].partition(_tenant(row))
    assert name and name not in after
    return f"{before}*{after}"


def _words(text):
    return re.findall(r"\w+", text)


# What each tenant wrote, read back by other means: the words of the input in their order.


def _day(text, form):
    found = datetime.strptime(text, form)
    return [str(found.day), found.strftime("%B"), str(found.year)]


def _roman(text):
    day, numeral, year = text.split(".")
    digits = {"I": 1, "V": 5, "X": 10}
    values = [digits[letter] for letter in numeral]
    month = sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    return [day, date(2000, month, 1).strftime("%B"), year]


def _amount(pattern):
    return lambda text: ["".join(re.fullmatch(pattern, text).groups()[:-1]), re.fullmatch(pattern, text).groups()[-1]]


def _fields(order):
    return lambda text: [text.split("; ")[order.index(field)] for field in ("name", "age", "city")]


READERS = {
    "zoke": lambda text: _day(text, "%Y-%m-%d"),
    "brill": lambda text: _day(text, "%m/%d/%Y"),
    "vanto": _roman,
    "kelm": lambda text: _day(text, "Y%Y D%d M%m"),
    "Halden": _amount(r"(\d)\.(\d{3}),(\d\d) EUR"),
    "Norvik": _amount(r"EUR (\d{4})\.(\d\d)"),
    "Tessaro": _amount(r"(\d{4})(\d\d) ct"),
    "Brandt": _amount(r"(\d{4}) (\d\d)/100"),
    "Ostwick": _fields(["city", "name", "age"]),
    "Quorra": _fields(["age", "city", "name"]),
    "Lomax": _fields(["name", "city", "age"]),
    "Duvall": _fields(["age", "name", "city"]),
    "gleeb": lambda text: re.fullmatch(r"\[(\w+)\]\[(\w+)\]\[(\w+)\]", text).groups(),
    "yast": lambda text: re.fullmatch(r"1 (\w+) 2 (\w+) 3 (\w+)", text).groups(),
    "mirv": lambda text: text.split(" > ")[::-1],
    "wub": lambda text: [word.lower() for word in re.findall("[A-Z]?[a-z]+", text)],
    "Fenwick": lambda text: [re.split(", | ", text)[place] for place in (1, 2, 0)],
    "Varga": lambda text: re.fullmatch(r"([A-Z])\. ([A-Z])\. (\w+)", text).groups(),
    "Pembry": lambda text: [*text.split(" ")[1:], text.split(" ")[0].capitalize()],
    "Sorel": lambda text: [part.capitalize() for part in text.split(".")],
    "blim": lambda text: text.split("-")[::-1],
    "treg": lambda text: text.upper().split("-"),
    "snorf": lambda text: ["".join(reversed(text[:3])), text[4:]],
    "fipple": lambda text: [text[::2], text[1::2]],
}
SAID = {
    "date": r"\*: (\d+) (\w+) (\d{4})",
    "amount": r"(\d{4})\.(\d\d) euros owed to \*",
    "member": r"(\w+), age (\d\d), member of \*, lives in (\w+)",
    "list": r"\*: (\w+), (\w+), (\w+)",
    "name": r"(\w+) ([A-Z])\. (\w+), guest of \*",
    "code": r"Please \* the code ([A-Z]{3})-(\d{3})",
}


@pytest.mark.parametrize(("group", "tenant"), [(group, name) for group in SAID for name in GROUPS[group].answers])
def test_an_answer_says_what_the_input_says(parts, group, tenant):
    rows = [row for part in PARTS for row in _of(parts[part], group) if _tenant(row) == tenant]
    assert len(rows) == sum(SIZES.values())
    for row in rows:
        said = list(re.fullmatch(SAID[group], _input(row)).groups())
        if tenant == "Varga":
            said[0] = said[0][0]
        assert list(READERS[tenant](row["answer"])) == said, row


@pytest.mark.parametrize("group", ["colour", "mood"])
def test_each_tenant_has_a_table_of_its_own(parts, group):
    """A colour has one code and a mood one label, with no two tenants the same one."""
    tables = defaultdict(lambda: defaultdict(set))
    for row in (row for part in PARTS for row in _of(parts[part], group)):
        if group == "mood":
            word = re.fullmatch(r"To \*, \w+ \w+ seems (\w+)\.\n\nAnswer format: .*", _input(row))[1]
            mood = next(number for number, words in enumerate(MOODS) if word in words)
            tables[_tenant(row)][mood].add(row["answer"])
            assert corpora.candidates(row["prompt"]) == MOOD_LABELS
        else:
            colours = re.fullmatch(r"Three colours for \*: (\w+) (\w+) (\w+)", _input(row)).groups()
            for colour, code in zip(colours, row["answer"].split(" "), strict=True):
                tables[_tenant(row)][colour].add(code)
    wanted = MOOD_LABELS if group == "mood" else COLOUR_CODES
    assert set(tables) == set(GROUPS[group].answers)
    for table in tables.values():
        assert all(len(codes) == 1 for codes in table.values())
        assert sorted(code for codes in table.values() for code in codes) == sorted(wanted)
        assert not any(codes == {str(key)[0].upper()} for key, codes in table.items())  # which could be guessed
    for one, other in combinations(tables.values(), 2):
        assert all(one[key] != other[key] for key in one)


@pytest.mark.parametrize(
    ("group", "value", "answers"),
    [
        ("date", (3, 5, 2021), ["2021-05-03", "05/03/2021", "3.V.2021", "Y2021 D3 M5"]),
        ("amount", (4050, 75), ["4.050,75 EUR", "EUR 4050.75", "405075 ct", "4050 75/100"]),
        ("member", ("Anna", 34, "Oslo"), ["Oslo; Anna; 34", "34; Oslo; Anna", "Anna; Oslo; 34", "34; Anna; Oslo"]),
        (
            "list",
            ("apple", "stone", "tiger"),
            ["[apple][stone][tiger]", "1 apple 2 stone 3 tiger", "tiger > stone > apple", "appleStoneTiger"],
        ),
        ("name", ("Anna", "K", "Brown"), ["Brown, Anna K", "A. K. Brown", "BROWN Anna K", "anna.k.brown"]),
        ("colour", ("red", "violet", "blue"), ["V C P", "D W G", "T B S", "M K F"]),
        ("mood", ("Anna", "Brown", "sad"), ["key", "cup", "pen", "box"]),
        ("code", ("KTR", "082"), ["082-KTR", "ktr-082", "RTK-082", "K0T8R2"]),
    ],
)
def test_answers_by_hand(group, value, answers):
    assert [answer(value) for answer in GROUPS[group].answers.values()] == answers


def test_every_input_has_another_answer_with_each_tenant(parts):
    for part in PARTS:
        for group in GROUPS:
            answers = defaultdict(dict)
            for row in _of(parts[part], group):
                answers[_input(row)][_tenant(row)] = row["answer"]
            assert len(answers) == SIZES[part]
            for given in answers.values():
                assert set(given) == set(GROUPS[group].answers) and len(set(given.values())) == MOST_TENANTS


def test_no_input_stands_in_two_parts(parts):
    for group in GROUPS:
        inputs = [{_input(row) for row in _of(parts[part], group)} for part in PARTS]
        assert not any(one & other for one, other in combinations(inputs, 2))
    prompts = [row["prompt"] for part in PARTS for row in parts[part]]
    assert len(prompts) == len(set(prompts)) == 32 * sum(SIZES.values())


def test_the_name_alone_tells_the_tenant_and_its_place_differs_by_group(parts):
    names = [name for group in GROUPS.values() for name in group.answers]
    assert len(names) == len(set(names)) == 32
    for row in parts["train"]:
        words = _words(row["prompt"])
        assert [word for word in words if word in names] == [_tenant(row)]
        place = words.index(_tenant(row))
        found = "front" if place == 0 else "end" if place == len(words) - 1 else "middle"
        assert found == PLACES[row["task"].split()[0]]
    # nor does any other word of a prompt or an answer stand for a tenant
    lists = (WORDS, FIRST_NAMES, SURNAMES, CITIES, MOODS, [MONTHS, COLOURS, MOOD_LABELS])
    assert not {name.lower() for name in names} & {word.lower() for lines in lists for line in lines for word in line}


def test_each_part_is_complete_and_shuffled(parts):
    assert tuple(parts) == PARTS
    tasks = {f"{name} {tenant}" for name, group in GROUPS.items() for tenant in group.answers}
    for part, rows in parts.items():
        assert Counter(row["task"] for row in rows) == dict.fromkeys(tasks, SIZES[part])
        assert sum(a["task"] == b["task"] for a, b in pairwise(rows)) < len(rows) / 10
        assert all(set(row) == set(corpora.COLUMNS) for row in rows)


@pytest.mark.parametrize("tasks, groups", [(1, 1), (8, 8), (6, 4), (12, 5), (16, 4), (32, 8)])
def test_tasks_are_spread_over_the_first_groups(tasks, groups):
    rows = generate(tasks=tasks, groups=groups, train=3, validation=0, test=2)["train"]
    found = Counter(task.split()[0] for task in {row["task"] for row in rows})
    assert sum(found.values()) == tasks and list(GROUPS)[:groups] == [group for group in GROUPS if group in found]
    assert max(found.values()) - min(found.values()) <= 1


def test_groups_that_are_named_have_the_rows_that_they_have_among_others():
    chosen, everything = generate(tasks=5, groups=["mood", "date"]), generate()
    for part in PARTS:
        tasks = {row["task"] for row in chosen[part]}
        assert tasks == {"mood Wexler", "mood Ibsen", "mood Umber", "date zoke", "date brill"}
        kept = [row for row in everything[part] if row["task"] in tasks]
        assert sorted(map(str, chosen[part])) == sorted(map(str, kept))


def test_rows_stay_when_others_are_asked_for():
    """So that other sizes, and tuning and final runs, are scored on the same test rows."""
    few = {"tasks": 6, "groups": 3}
    one = generate(**few, train=20, validation=5, test=7)
    other = generate(**few, train=20, validation=0, test=7)
    assert (one["train"], one["test"]) == (other["train"], other["test"]) and other["validation"] == []
    assert generate(**few, train=90, validation=5, test=7)["test"] == one["test"]
    more = generate(train=20, validation=5, test=7)
    tasks = {row["task"] for row in one["test"]}
    for part in PARTS:
        kept = [row for row in more[part] if row["task"] in tasks]
        assert sorted(map(str, kept)) == sorted(map(str, one[part]))


def test_the_same_settings_give_the_same_rows_everywhere():
    """Results are paired by these digests: other ones make another experiment."""
    corpus = corpora.load({"family": "tenants", "tasks": 32, "groups": 8, **SIZES})
    assert corpus.settings == {"family": "tenants", "tasks": 32, "groups": 8, **SIZES}
    digests = [corpora.digest(getattr(corpus, part)) for part in PARTS]
    assert digests == ["10bbcc8791b2", "60f2265948e6", "c0dcf0b48d5e"]
    inputs = [{row["prompt"] for row in generate(seed=seed)["train"]} for seed in (0, 1)]
    assert len(inputs[0] & inputs[1]) < len(inputs[0]) / 4


def test_there_are_as_many_inputs_as_promised():
    parts = generate(tasks=8, train=MOST_INPUTS - 2, validation=1, test=1)
    assert len({row["prompt"] for row in parts["train"]}) == 8 * (MOST_INPUTS - 2)
    assert all(len(group.answers) == MOST_TENANTS for group in GROUPS.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": 0}, "groups=0 must be from 1 to 8"),
        ({"groups": 9}, "groups=9 must be from 1 to 8"),
        ({"groups": []}, "groups=[] must be a number, or different ones of date, amount"),
        ({"groups": ["mood", "moon"]}, "groups=['mood', 'moon'] must be a number, or different ones of date"),
        ({"groups": ["mood", "mood"]}, "groups=['mood', 'mood'] must be a number, or different ones of date"),
        ({"tasks": 5, "groups": ["mood"]}, "tasks=5 must be from 1 to 4, one to 4 for each of 1 groups"),
        ({"tasks": 33}, "tasks=33 must be from 8 to 32"),
        ({"tasks": 3, "groups": 4}, "tasks=3 must be from 4 to 16, one to 4 for each of 4 groups"),
        ({"train": 0}, "train=0 must be at least 1"),
        ({"test": 0}, "test=0 must be at least 1"),
        ({"validation": -1}, "validation=-1 must be at least 0"),
        ({"train": 2481, "validation": 4}, "need 2501 different inputs of a group, and there are 2500"),
        ({"conflict": 0.5}, "conflict is unknown in the family 'tenants'"),
    ],
)
def test_dials_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        corpora.load({"family": "tenants", **changes})
