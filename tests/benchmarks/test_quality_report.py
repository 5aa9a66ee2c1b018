"""The report on the quality benchmark: its statistics, and that it says no more than the rows do."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from quality import report
from quality.report import BASE, EQUAL, LORA, NO_PRIOR, NO_ROUTER, ORACLE, TREX, Interval
from scipy import stats

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


TASKS = ("add", "reverse", "sort", "spell")
PARAMETERS = {TREX: 3_317_970, LORA: 4_884_480, EQUAL: 3_360_000, BASE: 0}
PAPERS_FIRST = next(claim for claim, *pair in report.CLAIMS if pair == [TREX, LORA])


# statistics


def test_mean_and_standard_error():
    assert report.mean_and_error([1.0, 2.0, 4.0, 5.0]) == (3.0, pytest.approx(stats.sem([1, 2, 4, 5])))
    assert report.mean_and_error([2.0]) == (2.0, None)


def test_interval_of_one_task_is_students():
    values = np.array([0.3, 0.1, 0.4, 0.2])
    found = report.crossed_interval(values[:, None])
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert found[:3] == pytest.approx((0.25, *expected))
    # what a two-sided test of this error sees with a power of 0.8, by the noncentral t's usual approximation
    assert found.visible == pytest.approx((stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)) * stats.sem(values))


def test_interval_of_seeds_and_tasks_by_hand():
    # mean 3.5; seeds' means 2.5, 4.5: variance 2 / 2 = 1; tasks' means 1, 3, 6.5: variance 7.75 / 3
    # what is left: [[0, 1, -1], [0, -1, 1]], mean square 4 / 2 = 2 of 6 cells: 1 / 3
    found = report.crossed_interval(np.array([[0.0, 3.0, 4.5], [2.0, 3.0, 8.5]]))
    tasks = 7.75 / 3
    freedom = (1 + tasks) ** 2 / (1 / 1 + tasks**2 / 2)
    half = stats.t.ppf(0.975, freedom) * (1 + tasks - 1 / 3) ** 0.5
    assert found[:3] == pytest.approx((3.5, 3.5 - half, 3.5 + half))


def test_interval_keeps_what_one_side_shows():
    # all that differs are single cells: the seeds' and the tasks' means less the cells' noise would be below zero
    found = report.crossed_interval(np.array([[1.0, -1.0, 0.2], [-1.0, 1.0, 0.2]]))
    assert found.low < found.mean < found.high
    assert report.crossed_interval(np.full((3, 4), 0.5)) == (0.5, 0.5, 0.5, 0)


def _simulated(generator, seeds, tasks, of_seeds, of_tasks, of_cells):
    """Differences whose mean is 1, with noise of seeds, of tasks and of single cells."""
    return (
        1
        + generator.normal(0, of_seeds, (seeds, 1))
        + generator.normal(0, of_tasks, (1, tasks))
        + generator.normal(0, of_cells, (seeds, tasks))
    )


@pytest.mark.parametrize(
    ("noise", "at_least"),
    # With 2000 intervals each bound is three standard errors or more from the share that 20,000 of them have.
    [((0, 0, 1), 0.955), ((0, 1, 0.3), 0.93), ((1, 0, 0.3), 0.92), ((0.3, 0.6, 1), 0.925)],
    ids=["cells", "tasks", "seeds", "all"],
)
@pytest.mark.parametrize(("seeds", "tasks"), [(3, 16), (5, 8)])
def test_the_interval_covers_the_truth(noise, at_least, seeds, tasks):
    generator = np.random.default_rng(0)
    found = [report.crossed_interval(_simulated(generator, seeds, tasks, *noise)) for _ in range(2000)]
    assert at_least <= np.mean([interval.low <= 1 <= interval.high for interval in found]) <= 0.985
    moved = [report.outcome(Interval(i.mean - 1, i.low - 1, i.high - 1, 0)) for i in found]  # the truth is zero
    assert moved.count("cannot be told") >= 2000 * at_least


def test_the_visible_difference_is_seen_four_times_in_five():
    generator = np.random.default_rng(0)
    noise = (0, 1, 0.5)
    many = [report.crossed_interval(_simulated(generator, 5, 16, *noise) - 1) for _ in range(1000)]
    visible = np.mean([interval.visible for interval in many])
    assert 0.75 < np.mean([report.outcome(i._replace(low=i.low + visible)) == "holds here" for i in many]) < 0.85


def _values(generator, seeds=20, tasks=30, examples=40, of_seeds=0.0, of_tasks=0.0, of_examples=0.0):
    shift = generator.normal(0, of_seeds, (seeds, 1))
    own = [
        shift + generator.normal(0, of_tasks) + generator.normal(0, of_examples, (1, examples)) for _ in range(tasks)
    ]
    return [np.stack([values, 10 * values], -1) for values in own]


@pytest.mark.parametrize("kind", ["seeds", "tasks", "examples"])
def test_bootstrap_draws_seeds_tasks_and_examples(kind):
    """Where only one of them differs, the interval is as wide as its standard error says."""
    generator = np.random.default_rng(1)
    values = _values(generator, tasks=30 if kind != "examples" else 1, **{f"of_{kind}": 1.0})
    cells = np.stack([own[:, :, 0].mean(1) for own in values], 1)
    singles = {"seeds": cells.mean(1), "tasks": cells.mean(0), "examples": values[0][0, :, 0]}[kind]
    found = report.bootstrap_interval(values)
    half = 1.96 * singles.std() / len(singles) ** 0.5
    assert found[0] == pytest.approx([cells.mean() - half, cells.mean() + half], abs=0.15 * half)
    assert found[1] == pytest.approx(10 * found[0])  # one draw for all measures
    assert np.array_equal(found, report.bootstrap_interval(values))


def test_bootstrap_covers_the_truth_of_many_seeds_and_tasks():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        values = _values(generator, 10, 12, 10, of_seeds=0.5, of_tasks=0.5)
        low, high = report.bootstrap_interval(values, draws=400)[0]
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_examples_weigh_as_their_tasks_do():
    values = [np.full((2, 90, 1), 1.0), np.full((2, 10, 1), 3.0)]
    generator = np.random.default_rng(3)
    noisy = [own + generator.normal(0, 0.01, own.shape) for own in values * 50]
    assert report.bootstrap_interval(noisy).mean() == pytest.approx(2, abs=0.1)


def test_wilcoxon():
    values = np.array([[0.2, -0.1, 0.4, 0.35], [0.3, 0.05, 0.15, -0.25]])
    assert report.wilcoxon(values) == pytest.approx(stats.wilcoxon(values.ravel(), method="asymptotic").pvalue)
    assert report.wilcoxon(np.zeros((2, 3))) == 1


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0.01, 0.5), "holds here"),
        ((-0.5, -0.01), "does not hold here"),
        ((-0.1, 0.5), "cannot be told"),
        ((0.0, 0.5), "cannot be told"),
        ((-0.5, 0.0), "cannot be told"),
        ((float("nan"), float("nan")), "cannot be told"),
    ],
)
def test_outcome_is_what_the_interval_says(bounds, said):
    assert report.outcome(Interval(sum(bounds) / 2, *bounds, 0)) == said


def test_one_seed_tells_nothing():
    assert report.crossed_interval(np.ones((1, 8))) is None
    assert report.outcome(None) == "cannot be told"


def test_smoothing():
    assert report.smooth([1.0, 2.0, 6.0, 4.0]) == [1.5, 3.0, 4.0, 5.0]


# rows


def _row(method=TREX, seed=1, gain=0.0, phase="final", examples=25, spread=0.02, **changes):
    """A run whose accuracy is 0.5 + gain, but for noise of the seed's examples; log-likelihoods four times that."""
    generator = np.random.default_rng([seed, *method.encode()])
    names, correct = [], []
    for number, task in enumerate(TASKS):
        right = 0.5 + gain + generator.normal(0, spread) + 0.05 * number
        names += [task] * examples
        correct += (np.arange(examples) < round(right * examples)).astype(int).tolist()
    single = [4 * value - 5 for value in correct]
    own = {task: [i for i, name in enumerate(names) if name == task] for task in TASKS}
    tasks = {
        task: {
            "rows": examples,
            "accuracy": float(np.mean([correct[i] for i in index])),
            "log_likelihood": float(np.mean([single[i] for i in index])),
        }
        for task, index in own.items()
    }
    steps = 0 if method == BASE else 100
    row = {
        "experiment": "generated-small",
        "tier": "small",
        "method": method,
        "phase": phase,
        "learning_rate": 0.001 * bool(steps),
        "seed": seed,
        "steps": steps,
        "fingerprint": method,
        "rows_per_step": 16,
        "train_rows": 1600,
        "base": "a model",
        "precision": "fp32",
        "data": "generated",
        "data_settings": {"tasks": len(TASKS), "conflict": 0.5},
        "settings": "as it is",
        "trainable": PARAMETERS.get(method, 3_000_000),
        "tasks": tasks,
        "accuracy": float(np.mean([task["accuracy"] for task in tasks.values()])),
        "log_likelihood": float(np.mean([task["log_likelihood"] for task in tasks.values()])),
        "examples": {"task": names, "correct": correct, "log_likelihood": single},
        "curve": [[step, 3 - gain - 0.01 * step + generator.normal(0, 0.001)] for step in range(4, steps + 1, 4)],
        "peak_memory": 123_000_000 if steps else None,
        "total_memory": 456_000_000 if steps else None,
        "train_seconds": 512.3 if steps else None,
        "score_seconds": 60.1,
        "diagnosis": None,
        "test_digest": "of the test rows",
        "device": "cpu",
        "device_name": "A CPU",
        "threads": 1,
        "date": "2026-11-23T12:00:00+00:00",
        "torch": "2.13",
        "peft": "0.21",
        "transformers": "5.23",
        "peft_trex": "0.1.0",
        "commit": "0123456789ab",
        "dirty": False,
    }
    return {**row, **changes}


def _runs(gains, seeds=(1, 2, 3), **changes):
    return [_row(method, seed, gain, **changes) for method, gain in gains.items() for seed in seeds]


@pytest.fixture
def written(tmp_path):
    """Writes rows and the report on them: its text, and its exit status."""

    def write(rows):
        results, page = tmp_path / "results" / "quality", tmp_path / "results" / "quality.md"
        results.mkdir(parents=True, exist_ok=True)
        (results / "generated-small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page.write_text("old tables")
        code = report.main(["--results", str(results)])
        return page.read_text(), code

    return write


def _line(text, start):
    """The cells of the table's only line that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def _said(text, claim):
    """What is said to a claim."""
    return text[text.index(f"- {claim}") :].split("\n- ")[0].split("\n\n")[0]


def test_comparison_pairs_seeds_and_tasks():
    own = {row["seed"]: row for row in _runs({TREX: 0.2}, seeds=(1, 2, 4))}
    other = {row["seed"]: row for row in _runs({LORA: 0.1}, seeds=(2, 3, 4))}
    found = report.compare(own, other)
    for measure, differences in found.differences.items():
        expected = [
            [own[seed]["tasks"][task][measure] - other[seed]["tasks"][task][measure] for task in TASKS]
            for seed in (2, 4)
        ]
        assert differences == pytest.approx(np.array(expected))
        assert found.intervals[measure] == report.crossed_interval(differences)
        assert found.p[measure] == report.wilcoxon(differences)
    assert report.compare(own, {3: other[3]}) is None


def test_comparison_pairs_examples():
    """Where each example differs by as much, nothing is uncertain; without examples, the tasks' means count."""
    own, other = ({1: _row(seed=1), 2: _row(seed=2)} for _ in range(2))
    for row in own.values():
        row["examples"] = {**row["examples"], "log_likelihood": [v + 1 for v in row["examples"]["log_likelihood"]]}
    assert report.compare(own, other).bootstraps["log_likelihood"] == pytest.approx([1, 1])
    for row in own.values():  # tasks that differ by 1, 2, 3 and 4
        row["examples"]["log_likelihood"] = [
            value + TASKS.index(task)
            for value, task in zip(row["examples"]["log_likelihood"], row["examples"]["task"], strict=True)
        ]
    low, high = report.compare(own, other).bootstraps["log_likelihood"]
    assert 1 <= low < 2 and 3 < high <= 4
    for row in own.values():
        row["examples"] = None
    assert report.compare(own, other).bootstraps["log_likelihood"] == pytest.approx([0, 0])


def test_lead_is_how_much_lower_the_loss_is():
    def runs(*curves):
        return {seed: {"curve": curve} for seed, curve in enumerate(curves)}

    own = runs([[5, 1.0], [10, 0.5]], [[5, 1.0], [10, 0.8], [15, 9.0]])
    other = runs([[5, 1.2], [10, 0.6]], [[5, 1.1], [10, 0.8]])
    seeds, interval = report.lead(own, other)
    expected = stats.t.interval(0.95, 1, 0.1, stats.sem([0.15, 0.05]))
    assert seeds == 2 and interval[:3] == pytest.approx((0.1, *expected))
    assert report.lead(own, {}) == (0, None) == report.lead(own, runs([]))
    assert report.lead(own, runs([[5, 1.2]])) == (1, None)


# the report


def test_report_has_verdict_tables_and_plots(written, tmp_path, capsys):
    gains = {TREX: 0.1, LORA: 0.0, EQUAL: 0.0, NO_PRIOR: 0.1, NO_ROUTER: 0.0, "DoRA r=32": 0.0}
    text, code = written([*_runs(gains), _row(BASE), *_runs({TREX: 0.0}, (0,), phase="tune", steps=50)])
    assert code == 0
    assert text.startswith("# Quality\n") and "old tables" not in text
    assert "## generated-small" in text and "4 tasks" in text and "100 test rows" in text and "100 steps of 16" in text
    for baseline in (LORA, EQUAL, TREX):
        assert f"**Against {baseline}**" in text
    assert "training seconds" not in text and "| 512" not in text  # of a CPU
    assert "20 rows reported" in capsys.readouterr().out
    for name in ("parameters", "curves", "tasks"):
        picture = tmp_path / "results" / "quality" / f"generated-small-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000
        assert f"(quality/{picture.name})" in text


def test_table_of_methods(written):
    rows = [*_runs({TREX: 0.1}), _row(BASE), _row(LORA)]
    line = _line(written(rows)[0], f"**{TREX}**")
    mean, error = report.mean_and_error([100 * row["accuracy"] for row in rows[:3]])
    assert line[1:5] == ["as it is", "3.32 M", "0.001", "3"]
    assert line[5] == f"{mean:.2f} ± {error:.2f}" and line[7] == "123 MB"
    text = written(rows)[0].split("**Against")[0]
    assert _line(text, BASE)[2:5] == ["", "", "1"] and _line(text, LORA)[5] == f"{100 * rows[-1]['accuracy']:.2f}"


def test_training_seconds_of_a_gpu(written):
    text, _ = written(_runs({TREX: 0.1, LORA: 0}, device="cuda", device_name="A GPU"))
    assert _line(text, f"**{TREX}**")[-1] == "512" and "training seconds" in text


def test_table_of_differences(written):
    rows = _runs({TREX: 0.1, LORA: 0.0})
    line = _line(written(rows)[0].split("**Against LoRA r=32**")[1].split("**Against")[0], TREX)
    found = report.compare({row["seed"]: row for row in rows[:3]}, {row["seed"]: row for row in rows[3:]})
    interval = found.intervals["accuracy"]
    assert line[1] == "3"
    assert line[2] == f"{100 * interval.mean:+.2f} ({100 * interval.low:.2f} to {100 * interval.high:.2f})"
    assert line[3] == "{:.2f} to {:.2f}".format(*100 * found.bootstraps["accuracy"])
    assert line[4] == (f"{found.p['accuracy']:.3f}" if found.p["accuracy"] >= 0.001 else "< 0.001")
    differences = found.differences["accuracy"]
    assert line[5] == f"{(differences > 0).sum()}, {(differences == 0).sum()}, {(differences < 0).sum()}"
    assert sum(map(int, line[5].split(", "))) == 12


@pytest.mark.parametrize(
    ("gain", "said"), [(0.2, "holds here"), (-0.2, "does not hold here"), (0.0, "cannot be told")]
)
def test_verdict_is_what_the_numbers_say(written, gain, said):
    gains = (gain, gain, gain) if gain else (0.1, -0.1, 0.0)
    for claim, better, than in report.CLAIMS:
        rows = [_row(better, seed, own) for seed, own in zip((1, 2, 3), gains, strict=True)]
        text, _ = written([*rows, *_runs({than: 0.0})])
        found = _said(text, claim)
        assert f"accuracy **{said}**" in found and f"log-likelihood **{said}**" in found
        assert "3 seeds, 4 tasks" in found and ("would have been seen" in found) == (gain == 0)
        assert ("the paper's 1.78 points" in found) == ((better, than) == (TREX, LORA))
        if (better, than) == (TREX, LORA):
            assert "3.32 M against 4.88 M trainable parameters, -32%" in found
            assert f"the paper's 1.78 points lie {'outside' if gain else 'inside'}" in found
        if than == NO_PRIOR:
            assert f"training loss lower at equal steps: **{said}**" in text


def test_verdict_of_one_seed_is_none(written):
    text, _ = written(_runs({TREX: 0.4, LORA: 0.0, NO_PRIOR: 0.0}, seeds=(1,)))
    assert "holds here**" not in text and "does not hold here**" not in text
    assert "**cannot be told** from one seed" in _said(text, PAPERS_FIRST)
    assert "**cannot be told** from one seed" in _said(text, report.FASTER)
    line = _line(text.split("**Against LoRA r=32**")[1].split("**Against")[0], TREX)
    assert line[1] == "1" and " to " not in line[2] and line[3:5] == line[7:9] == ["", ""]


def test_what_is_not_measured_is_said(written):
    text, _ = written(_runs({TREX: 0.1, LORA: 0.0}))
    assert "**not measured**" not in _said(text, PAPERS_FIRST)
    for claim in [report.FASTER, *(claim for claim, *pair in report.CLAIMS if pair != [TREX, LORA])]:
        assert _said(text, claim).strip().endswith("**not measured**.")
    assert "**Against LoRA, equal" not in text and "**Learning rates" not in text and "**Inside" not in text


def test_runs_scored_on_other_rows_are_not_compared(written):
    text, _ = written([*_runs({TREX: 0.1}), *_runs({LORA: 0.0}, test_digest="of others")])
    assert text.count("**not measured**") == len(report.CLAIMS) + 1 and "**Against" not in text
    assert "## generated-small\n" in text and "## generated-small~2" in text


@pytest.mark.parametrize("change", [{"steps": 200}, {"train_rows": 800}, {"data_settings": {"tasks": 4}}])
def test_runs_of_other_settings_are_not_compared(written, change):
    text, _ = written([*_runs({TREX: 0.1}), *_runs({LORA: 0.0}, **change)])
    assert text.count("**not measured**") == len(report.CLAIMS) + 1


@pytest.mark.parametrize("first", [True, False])
def test_the_base_model_belongs_to_any_number_of_steps(written, first):
    rows = _runs({TREX: 0.1})
    text, _ = written([_row(BASE), *rows] if first else [*rows, _row(BASE)])
    assert text.count("## generated-small") == 1 and _line(text, BASE)
    text, _ = written([_row(BASE)])
    assert _line(text, BASE) and "**not measured**" in text


def test_report_takes_the_latest_row_and_the_latest_rate(written):
    rows = [*_runs({TREX: 0.1}), *_runs({LORA: 0.0})]
    again = _row(TREX, 2, 0.3)
    text, _ = written([*rows, again])
    mean = np.mean([100 * row["accuracy"] for row in (rows[0], again, rows[2])])
    assert _line(text, f"**{TREX}**")[5].startswith(f"{mean:.2f} ")
    tuned = [_row(TREX, seed, 0.2, learning_rate=0.003) for seed in (1, 2)]
    text, _ = written([*rows, *tuned])
    assert _line(text, f"**{TREX}**")[3:5] == ["0.003", "2"]
    assert _line(text.split("**Against LoRA r=32**")[1].split("**Against")[0], TREX)[1] == "2"


def test_table_of_learning_rates(written):
    scores = {TREX: {0.001: -2.0, 0.003: -1.0, 0.01: -1.5}, LORA: {0.001: -2.0, 0.003: -1.6, 0.01: float("nan")}}
    scores[EQUAL] = {0.001: -2.0, 0.003: -1.0}  # the edge of its own grid
    tune = [
        _row(method, 0, phase="tune", steps=50, learning_rate=rate, log_likelihood=score, test_digest="of validation")
        for method, own in scores.items()
        for rate, score in own.items()
    ]
    text, _ = written([*_runs({TREX: 0.1}), _row(TREX, 0, phase="tune", steps=20, learning_rate=0.1), *tune])
    text = text.split("**Learning rates**")[1]
    assert "after 50 steps" in text and "0.1 |" not in text
    assert _line(text, TREX)[1:] == ["-2.000", "**-1.000**", "-1.500"]
    assert _line(text, LORA)[1:] == ["-2.000", "**-1.600**", "nan"]
    assert _line(text, EQUAL)[1:] == ["-2.000", "**-1.000** (!)", ""]
    assert f"a better one may lie beyond: {EQUAL}." in text


def test_table_of_what_is_inside(written):
    rows = _runs({TREX: 0.1, NO_PRIOR: 0.0, LORA: 0.0}, seeds=(1, 2))
    for row, shift in zip(rows[:2], (0.0, 0.2), strict=True):
        layers = [0.1 + shift, 0.2 + shift, 0.6 + shift]
        row["diagnosis"] = {
            "omega": layers,
            "gate": layers,
            "token_entropy": [float("nan")] * 3,
            "core_rank": None,
            "purity": 0.5 + shift,
        }
    rows[2]["diagnosis"] = {"omega": [1.0], "gate": [1.0], "purity": None, "nmi": None}
    text = written(rows)[0].split("**Inside T-REX**")[1]
    assert _line(text, TREX)[1:] == ["0.30 (0.20 to 0.70)"] * 2 + ["", "", "", "", "", "0.60", "", ""]
    assert _line(text, NO_PRIOR)[1:3] == ["1.00 (1.00 to 1.00)"] * 2
    assert f"| {LORA} |" not in text


@pytest.mark.parametrize("rows", [[], [_row(tier="smoke")], [_row(phase="tune")]], ids=["none", "smoke", "tuning"])
def test_nothing_to_report(written, tmp_path, capsys, rows):
    text, code = written(rows)
    assert code == 1 and "old tables" in text and "no final rows" in capsys.readouterr().err
    assert not list((tmp_path / "results" / "quality").glob("*.png"))


@pytest.mark.parametrize("line", ['{"method": "T-R', "3", '{"experiment": "generated-small"}'])
def test_a_damaged_line_is_named(written, line, tmp_path):
    with pytest.raises(ValueError, match=r"generated-small\.jsonl, line 2, is no row"):
        (tmp_path / "results" / "quality").mkdir(parents=True)
        path = tmp_path / "results" / "quality" / "generated-small.jsonl"
        path.write_text(json.dumps(_row()) + "\n" + line + "\n")
        report.load(path.parent)


def test_the_verdict_is_that_of_the_rows_that_are_there():
    folder = BENCHMARKS / "results" / "quality"
    number = re.compile(r"-?\d+\.\d+")
    said = report.verdict(report.parts_of(report.load(folder)))
    written = folder.with_suffix(".md").read_text().split("## ")[1]
    assert number.sub("", written).split() == number.sub("", "What holds" + said.split("What holds")[1]).split()
    # the last digit may hang on the CPU
    numbers = [[float(value) for value in number.findall(text)] for text in (written, said)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011) and len(numbers[0]) > 50


# where there is something to gain, and how soon


def test_the_oracle_tells_whether_a_regime_can_tell(written):
    text, _ = written(_runs({ORACLE: 0.3, LORA: 0.0, TREX: 0.0}))
    assert "**This regime can tell**: the oracle beats LoRA r=32: accuracy **holds here**" in text
    text, _ = written(_runs({ORACLE: 0.0, LORA: 0.0}))
    assert "**This regime cannot tell**: the oracle beats LoRA r=32: accuracy **cannot be told**" in text
    text, _ = written(_runs({ORACLE: -0.3, LORA: 0.0}))
    assert "**This regime cannot tell**" in text
    text, _ = written(_runs({TREX: 0.3, LORA: 0.0}))
    assert "This regime" not in text


def _paced(steps, window=10):
    """Runs with steps to a loss of 0.1, by method and seed."""
    return [
        _row(method, seed, loss_steps={"1": 5, "0.1": own}, loss_window=window)
        for method, by_seed in steps.items()
        for seed, own in enumerate(by_seed, 1)
    ]


def test_table_of_steps_to_a_loss(written):
    rows = [*_paced({TREX: (20, 30, 40), LORA: (80, 60, 80), EQUAL: (None, 60, 80), ORACLE: (None,) * 3}), _row(BASE)]
    text = written(rows)[0].split("**Steps to a training loss**")[1].split("\n\n**")[0]
    assert "the mean of 10 steps" in text and f"| {BASE} |" not in text
    ratios = np.log([0.25, 0.5, 0.5])
    low, high = np.exp(stats.t.interval(0.95, 2, ratios.mean(), stats.sem(ratios)))
    ratio = f"{np.exp(ratios.mean()):.2f} ({low:.2f} to {high:.2f})"
    assert _line(text, TREX)[1:] == ["3", "5 (5 to 5)", "30 (20 to 40)", "1.00 (1.00 to 1.00)", ratio]
    assert _line(text, LORA)[1:] == ["3", "5 (5 to 5)", "80 (60 to 80)", "", ""]
    assert _line(text, EQUAL)[3] == "70 (60 to 80) in 2 of 3 seeds" and _line(text, EQUAL)[5].startswith(
        "at least 1.08"
    )
    assert _line(text, ORACLE)[3] == "not reached" and _line(text, ORACLE)[5].startswith("at least 1.38")
    assert "**Steps to" not in written(_runs({TREX: 0.1}))[0]  # rows of before they were counted


def test_a_loss_that_was_not_reached_bounds_the_ratio():
    def runs(*steps):
        return {seed: {"steps": 100, "loss_steps": {"0.1": own}} for seed, own in enumerate(steps)}

    found = report.pace(runs(20, 50), runs(None, 100), "0.1")
    assert found.bound == "at most" and found.seeds == 2
    assert found.mean == pytest.approx(np.log([0.2, 0.5]).mean())
    assert report.pace(runs(20, None), runs(40, None), "0.1").seeds == 1  # what nobody reached tells nothing
    assert report.pace(runs(20, None), runs(None, 40), "0.1") is None  # bounds to both sides
    assert report.pace(runs(None), runs(None), "0.1") is None
    # These rows are older than the record of steps, which does not say that nobody got there.
    older = {seed: {"steps": 100} for seed in (0, 1)}
    assert report.pace(runs(20, 50), older, "0.1") is None


def test_table_of_scales(written):
    scores = {(1.0, 0.001): -2.0, (1.0, 0.003): -1.5, (2.0, 0.001): -1.0, (2.0, 0.003): -1.2, (4.0, 0.001): -1.4}
    tune = [
        _row(LORA, 0, phase="tune", learning_rate=rate, scale=scale, log_likelihood=score, fingerprint=str(scale))
        for (scale, rate), score in scores.items()
    ]
    text = written([*_runs({LORA: 0.1}), *tune])[0].split("**Learning rates**")[1]
    assert _line(text, LORA)[1:] == ["-2.000", "-1.500"]
    assert _line(text, f"{LORA}, scale x 2")[1:] == ["**-1.000** (!)", "-1.200"]  # its rate is at the edge
    assert _line(text, f"{LORA}, scale x 4")[1:] == ["-1.400", ""]


def test_no_plot_of_more_tasks_than_can_be_read(written, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_BARS", 3)
    text, code = written(_runs({TREX: 0.1, LORA: 0.0}))
    assert code == 0 and "generated-small-curves.png" in text and "generated-small-tasks.png" not in text
