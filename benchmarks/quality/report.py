"""Tables, plots and a verdict from benchmarks/results/quality/*.jsonl, into quality.md beside that folder

    python benchmarks/quality/report.py

The latest row of every run counts, smoke runs left out. A method whose learning rate or settings were changed is
represented by the runs that agree with its latest one. Methods are compared on the same test rows, seed by seed and
task by task, over the seeds that both have. Training seconds are shown for GPUs only: on CPUs they are too noisy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quality.paired import Interval, bootstrap_interval, crossed_interval, mean_and_error, outcome, wilcoxon
from reporting import Row, latest, millions, page, table

FOLDER = Path(__file__).resolve().parents[1]
Runs = dict[int, Row]  # of one method, by seed

TREX, LORA, EQUAL, BASE = "T-REX 4x8", "LoRA r=32", "LoRA, equal parameters", "base model"
NO_PRIOR, NO_ROUTER, PAIRED = "T-REX no prior", "T-REX no router", "T-REX paired"
CONSTANT, RANDOM = "T-REX constant prior", "T-REX 4x8, random router"
RANDOM_ALONE = "T-REX no prior, random router"
RECOMMENDED, ORACLE = "T-REX recommended", "oracle"
IDENTITY = ("experiment", "tier", "phase", "method", "learning_rate", "seed", "steps", "fingerprint", "test_digest")
SETTING = ("experiment", "tier", "base", "precision", "data", "data_settings", "rows_per_step", "train_rows")
MEASURES = {"accuracy": ("points", 100, ".2f"), "log_likelihood": ("nats", 1, ".3f")}  # unit, units, digits
PAPERS_GAIN = 0.0178
MOST_BARS = 40  # tasks whose names can still be read in a plot

# What this project claims, then what the paper does (or what a claim of it comes down to), what is better by it, and
# than what.
CLAIMS = (
    ("The recommended form beats LoRA r = 32", RECOMMENDED, LORA),
    ("The recommended form beats the paper's, 4 x 8 with a token router", RECOMMENDED, TREX),
    ("T-REX beats LoRA r = 32, by up to 1.78 points, with 30 to 40 % fewer parameters", TREX, LORA),
    ("T-REX beats LoRA of equal parameters (the question behind the first)", TREX, EQUAL),
    ("The semantic prior helps", TREX, NO_PRIOR),
    ("What the prior knows of the prompt helps (against random scores, equal for all prompts)", TREX, CONSTANT),
    ("The prior helps a router that is drawn at random (one of zeros needs it, see studies.md)", RANDOM, RANDOM_ALONE),
    ("Mixing and matching 4 and 8 vectors beats paired experts", TREX, PAIRED),
    ("The token router helps", TREX, NO_ROUTER),
)
FASTER = "The semantic prior speeds up convergence"


class Comparison(NamedTuple):
    """One method less another: differences (seeds, tasks), intervals, bootstrap, p value, by measure."""

    differences: dict[str, np.ndarray]
    intervals: dict[str, Interval | None]
    bootstraps: dict[str, np.ndarray]
    p: dict[str, float]


def compare(own: Runs, other: Runs) -> Comparison | None:
    """Pair two methods' runs by seed, task and example; None without a seed in common."""
    seeds = sorted(set(own) & set(other))
    if not seeds:
        return None
    tasks = list(own[seeds[0]]["tasks"])

    def paired(get: Callable[[Row], Any]) -> np.ndarray:
        return np.array([np.subtract(get(own[seed]), get(other[seed])) for seed in seeds])

    cells = {
        measure: paired(lambda row, measure=measure: [row["tasks"][task][measure] for task in tasks])
        for measure in MEASURES
    }
    values = [np.stack([cells[measure][:, [task]] for measure in MEASURES], -1) for task in range(len(tasks))]
    if all(runs[seed].get("examples") for runs in (own, other) for seed in seeds):
        names = np.array(own[seeds[0]]["examples"]["task"])
        single = [paired(lambda row, name=name: row["examples"][name]) for name in ("correct", "log_likelihood")]
        values = [np.stack([differences[:, names == task] for differences in single], -1) for task in tasks]
    found = dict(zip(MEASURES, bootstrap_interval(values), strict=True))
    intervals = {measure: crossed_interval(differences) for measure, differences in cells.items()}
    return Comparison(cells, intervals, found, {measure: wilcoxon(cells[measure]) for measure in MEASURES})


def lead(own: Runs, other: Runs) -> tuple[int, Interval | None]:
    """By how much the training loss of `own` is lower, over the steps that were logged: number of seeds, interval."""
    gains = []
    for seed in sorted(set(own) & set(other)):
        mine, others = (dict(map(tuple, runs[seed]["curve"] or [])) for runs in (own, other))
        if common := sorted(set(mine) & set(others)):
            gains.append(np.mean([others[step] - mine[step] for step in common]))
    return len(gains), crossed_interval(np.array(gains)[:, None]) if gains else None


# rows


class Part(NamedTuple):
    """What was scored on the same test rows after as many steps; `name` serves for files."""

    name: str
    methods: dict[str, Runs]
    tune: list[Row]


def load(folder: Path) -> list[Row]:
    """The latest row of every run, smoke runs left out."""
    return latest(folder, (*IDENTITY, *SETTING), lambda row: row["tier"] != "smoke")


def _setting(row: Row) -> str:
    return json.dumps([row[name] for name in SETTING])


def parts_of(rows: Sequence[Row]) -> list[Part]:
    """Final rows by what must agree for them to be compared, each with the tuning that belongs to it."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["phase"] == "final":
            groups.setdefault((_setting(row), row["test_digest"]), []).append(row)
    parts: list[Part] = []
    for (setting, _), final in groups.items():
        tune = [row for row in rows if row["phase"] == "tune" and _setting(row) == setting]
        tune = [row for row in tune if row["steps"] == tune[-1]["steps"]]
        for steps in dict.fromkeys(row["steps"] for row in final if row["method"] != BASE) or [0]:
            methods: dict[str, list[Row]] = {}
            for row in final:
                if row["steps"] == steps or row["method"] == BASE:  # which makes no steps
                    methods.setdefault(row["method"], []).append(row)
            experiment = json.loads(setting)[0]
            number = sum(part.name.split("~")[0] == experiment for part in parts)
            runs = {method: _alike(own) for method, own in methods.items()}
            parts.append(Part(experiment + f"~{number + 1}" * bool(number), runs, tune))
    return parts


def _alike(rows: Sequence[Row]) -> Runs:
    names = ("learning_rate", "settings", "fingerprint")
    return {row["seed"]: row for row in rows if all(row[name] == rows[-1][name] for name in names)}


# words


def _units(value: float, measure: str, sign: str = "") -> str:
    _, units, digits = MEASURES[measure]
    return f"{value * units:{sign}{digits}}"


def _spread(values: Sequence[float], measure: str) -> str:
    mean, error = mean_and_error(values)
    return _units(mean, measure) + (f" ± {_units(error, measure)}" if error is not None else "")


def _range(bounds: Sequence[float], measure: str) -> str:
    return f"{_units(bounds[0], measure)} to {_units(bounds[1], measure)}"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _finding(measure: str, mean: float, interval: Interval | None, bootstrap: Sequence[float] | None = None) -> str:
    unit = MEASURES[measure][0]
    said = f"**{outcome(interval)}**"
    if interval is None:
        return f"{said} from one seed, {_units(mean, measure, '+')} {unit}"
    said += f", {_units(mean, measure, '+')} {unit} ({_range(interval[1:3], measure)})"
    if bootstrap is not None and outcome(Interval(mean, *bootstrap, 0)) != outcome(interval):
        said += f", though the bootstrap disagrees ({_range(bootstrap, measure)})"
    if outcome(interval) == "cannot be told":
        said += f"; a difference of {_units(interval.visible, measure)} would have been seen four times in five"
    return said


def _claim(part: Part, better: str, than: str) -> str | None:
    """One claim in one experiment, or None if it was not measured there."""
    own, other = part.methods.get(better, {}), part.methods.get(than, {})
    found = compare(own, other)
    if found is None:
        return None
    seeds, tasks = found.differences["accuracy"].shape
    size, others = (next(iter(runs.values())) for runs in (own, other))
    share = size["trainable"] / others["trainable"] - 1
    said = [
        f"{measure.replace('_', '-')} "
        + _finding(measure, float(differences.mean()), found.intervals[measure], found.bootstraps[measure])
        for measure, differences in found.differences.items()
    ]
    interval = found.intervals["accuracy"]
    if (better, than) == (TREX, LORA) and interval is not None:
        within = interval.low <= PAPERS_GAIN <= interval.high
        said.append(f"the paper's 1.78 points lie {'in' if within else 'out'}side this interval of accuracy")
    return (
        f"({_plural(seeds, 'seed')}, {_plural(tasks, 'task')}; {millions(size)} against {millions(others)} trainable "
        f"parameters, {share:+.0%}): {'; '.join(said)}."
    )


def _convergence(part: Part) -> str | None:
    seeds, interval = lead(part.methods.get(TREX, {}), part.methods.get(NO_PRIOR, {}))
    if not seeds:
        return None
    if interval is None:
        return "(1 seed): **cannot be told** from one seed."
    said = _finding("log_likelihood", interval.mean, interval)
    return f"({seeds} seeds, over which the interval is): training loss lower at equal steps: {said}."


def verdict(parts: Sequence[Part]) -> str:
    """Each claim, and what each experiment says to it."""
    claims: list[tuple[str, Callable[[Part], str | None]]] = [
        (claim, lambda part, better=better, than=than: _claim(part, better, than)) for claim, better, than in CLAIMS
    ]
    claims.insert(1 + [than for _, _, than in CLAIMS].index(NO_PRIOR), (FASTER, _convergence))
    said = [
        "## What holds\n\nA claim holds here if the whole 95 % interval of the mean difference is above zero, and "
        "does not hold here if all of it is below; else it cannot be told. The interval is over seeds and tasks, "
        "paired (`crossed_interval`). Nothing is corrected for the number of claims: "
        "of twenty intervals, one misses.\n"
    ]
    for claim, judge in claims:
        lines = [f"    - {part.name} {found}" for part in parts if (found := judge(part)) is not None]
        said.append("\n".join([f"- {claim}: {'' if lines else '**not measured**.'}".rstrip(), *lines]))
    return "\n".join(said) + "\n"


def _methods(part: Part) -> str:
    lines = []
    gpu = any(row["device"] == "cuda" for runs in part.methods.values() for row in runs.values())
    for method, runs in part.methods.items():
        last = list(runs.values())[-1]
        alike = [row for row in runs.values() if row["device_name"] == last["device_name"]]
        peaks = [row["peak_memory"] for row in alike if row["peak_memory"] is not None]
        times = [row["train_seconds"] for row in alike if row["device"] == "cuda" and row["train_seconds"] is not None]
        measured = [_spread([row[measure] for row in runs.values()], measure) for measure in MEASURES]
        rate = f"{last['learning_rate']:g}" if last["learning_rate"] else ""
        memory = f"{np.median(peaks) / 1e6:.0f} MB" if peaks else ""
        time = [f"{np.median(times):.0f}" if times else ""] * gpu
        name = f"**{method}**" if method in (TREX, RECOMMENDED) else method
        lines.append([name, last["settings"], millions(last), rate, str(len(runs)), *measured, memory, *time])
    head = ["", "settings", "trainable", "learning rate", "seeds", "accuracy, %", "log-likelihood, nats"]
    head += ["peak memory of a step", *["training seconds"] * gpu]
    return "**Methods**: means over tasks, ± standard error over seeds\n\n" + table(head, lines)


def _regime(part: Part) -> str:
    """Whether there is anything to gain here: the oracle has a LoRA for each task, and is told the task."""
    found = compare(part.methods.get(ORACLE, {}), part.methods.get(LORA, {}))
    if found is None:
        return ""
    said = []
    for measure, differences in found.differences.items():
        finding = _finding(measure, float(differences.mean()), found.intervals[measure])
        said.append(f"{measure.replace('_', '-')} {finding}")
    gains = [interval is not None and interval.low > 0 for interval in found.intervals.values()]
    verdict = "This regime can tell" if any(gains) else "This regime cannot tell"
    return f"**{verdict}**: the oracle beats {LORA}: {'; '.join(said)}.\n"


class Pace(NamedTuple):
    """How a method's steps to a training loss compare with another's, over the seeds in which either got there."""

    seeds: int
    ratio: Interval | None  # as natural logarithms
    mean: float
    bound: str  # "at most" or "at least" where one of the two did not get there, "" where both did in all seeds


def pace(own: Runs, other: Runs, level: str) -> Pace | None:
    """The ratio of steps to a loss; who did not get there counts as having needed all steps of the run.

    Older rows do not tell their steps, which does not mean that these did not get there.
    """
    ratios, bounds = [], set()
    for seed in sorted(seed for seed in set(own) & set(other) if _loss_steps(own[seed]) and _loss_steps(other[seed])):
        mine, others = (_loss_steps(runs[seed]).get(level) for runs in (own, other))
        if mine is None and others is None:
            continue
        if mine is None or others is None:
            bounds.add("at least" if mine is None else "at most")
        ratios.append(np.log((mine or own[seed]["steps"]) / (others or other[seed]["steps"])))
    if not ratios or len(bounds) > 1:
        return None
    return Pace(len(ratios), crossed_interval(np.array(ratios)[:, None]), float(np.mean(ratios)), "".join(bounds))


def _loss_steps(row: Row) -> dict[str, int | None]:
    return row.get("loss_steps") or {}


def _paces(part: Part) -> str:
    """How many steps each method needed to training losses."""
    all_runs = [row for runs in part.methods.values() for row in runs.values() if _loss_steps(row)]
    if not all_runs:
        return ""
    levels, lines = list(_loss_steps(all_runs[-1])), []
    for method, every in part.methods.items():
        runs = {seed: row for seed, row in every.items() if _loss_steps(row)}
        if not runs:
            continue
        line = [method, str(len(runs))]
        for level in levels:
            steps = [step for row in runs.values() if (step := _loss_steps(row).get(level)) is not None]
            few = f" in {len(steps)} of {len(runs)} seeds" * (len(steps) < len(runs))
            line.append(f"{np.median(steps):.0f} ({min(steps)} to {max(steps)}){few}" if steps else "not reached")
        for level in levels:
            found = pace(runs, part.methods.get(LORA, {}), level) if method != LORA else None
            line.append(_times(found) if found else "")
        lines.append(line)
    head = ["", "seeds", *(f"loss {level}" for level in levels), *(f"loss {level}, x {LORA}" for level in levels)]
    window = all_runs[-1]["loss_window"]
    return (
        f"**Steps to a training loss**, in nats, as the mean of {window} steps: median over seeds (least to most); "
        f"and as a multiple of those of {LORA}, by seed: geometric mean with its 95 % interval. Who did not get there "
        "counts as if it had with its last step, and the multiple is then a bound.\n\n" + table(head, lines)
    )


def _times(found: Pace) -> str:
    said = f"{found.bound} {np.exp(found.mean):.2f}".strip()
    interval = found.ratio
    return said + (f" ({np.exp(interval.low):.2f} to {np.exp(interval.high):.2f})" if interval else "")


def _against(part: Part, baseline: str) -> str:
    lines = []
    for method, runs in part.methods.items():
        if method == baseline or (baseline == TREX and not method.startswith("T-REX")):
            continue
        if (found := compare(runs, part.methods.get(baseline, {}))) is None:
            continue
        line = [method, str(len(found.differences["accuracy"]))]
        for measure, differences in found.differences.items():
            interval = found.intervals[measure]
            spread = f" ({_range(interval[1:3], measure)})" if interval else ""
            counts = ", ".join(str(int((np.sign(differences) == sign).sum())) for sign in (1, 0, -1))
            line += [_units(float(differences.mean()), measure, "+") + spread]
            p = f"{found.p[measure]:.3f}" if found.p[measure] >= 0.001 else "< 0.001"
            line += [_range(found.bootstraps[measure], measure), p] if interval else ["", ""]  # of one seed, nothing
            line += [counts]
        lines.append(line)
    if not lines:
        return ""
    check = ["bootstrap", "Wilcoxon p", "wins, ties, losses"]
    head = ["", "seeds", "accuracy, points", *check, "log-likelihood, nats", *check]
    return (
        f"**Against {baseline}**: paired differences with 95 % intervals. The bootstrap draws seeds, tasks and "
        "examples, and is wider than need be where examples are most of the noise, too narrow where seeds are; "
        "Wilcoxon's test takes each seed's tasks as independent.\n\n" + table(head, lines)
    )


def _tuning(part: Part) -> str:
    if not part.tune:
        return ""
    rates = sorted({row["learning_rate"] for row in part.tune})
    lines, edges = [], []
    for method in dict.fromkeys(row["method"] for row in part.tune):
        rows = [row for row in part.tune if row["method"] == method]
        scores = {
            (scale, rate): float(np.mean(own))
            for scale in sorted({_scale(row) for row in rows})
            for rate in rates
            if (own := [r["log_likelihood"] for r in rows if (_scale(r), r["learning_rate"]) == (scale, rate)])
        }
        best = max(scores, key=lambda choice: -np.inf if np.isnan(scores[choice]) else scores[choice])
        tried = {place: [choice[place] for choice in scores] for place in (0, 1)}
        edge = [best[place] in (min(own), max(own)) for place, own in tried.items() if len(set(own)) > 1 or place]
        edges += [method] * any(edge)
        shown = {choice: _units(score, "log_likelihood") for choice, score in scores.items()}
        shown[best] = f"**{shown[best]}**" + " (!)" * (method in edges)
        for scale in dict.fromkeys(tried[0]):
            name = method + f", scale x {scale:g}" * (scale != 1)
            lines.append([name, *(shown.get((scale, rate), "") for rate in rates)])
    warning = (
        "\n(!) The best rate or scale lies at the edge of the grid, a better one may lie beyond: "
        f"{'; '.join(edges)}.\n"
    )
    head = (
        f"**Learning rates**: log-likelihood on held-out training rows after {part.tune[0]['steps']} steps, nats\n\n"
    )
    return head + table(["", *(f"{rate:g}" for rate in rates)], lines) + warning * bool(edges)


def _scale(row: Row) -> float:
    return float(row.get("scale", 1.0))


BY_LAYER = ("omega", "gate", "token_entropy", "token_share", "task_share", "core_rank")
BY_MODEL = ("prior_spread", "purity", "nmi", "group_overlap")


def _diagnosis(part: Part) -> str:
    lines = []
    for method, runs in part.methods.items():
        seen = [row["diagnosis"] for row in runs.values() if row.get("diagnosis")]
        if not seen:
            continue
        line = [method]
        for name in BY_LAYER:
            layers = [values for one in seen if (values := _numbers(one.get(name)))]
            middle, low, high = (
                np.mean([[np.median(v), min(v), max(v)] for v in layers], 0) if layers else [np.nan] * 3
            )
            line.append(f"{middle:.2f} ({low:.2f} to {high:.2f})" if layers else "")
        for name in BY_MODEL:
            values = _numbers([one.get(name) for one in seen])
            line.append(f"{np.mean(values):.2f}" if values else "")
        lines.append(line)
    if not lines:
        return ""
    head = "**Inside T-REX**: median over layers (smallest to largest), means over seeds\n\n"
    return head + table(["", *(name.replace("_", " ") for name in (*BY_LAYER, *BY_MODEL))], lines)


def _numbers(values: Iterable[float | None] | None) -> list[float]:
    return [value for value in values or [] if value is not None and not np.isnan(value)]


# plots


def _by_parameters(part: Part, axes: Sequence[Any]) -> bool:
    for axis, (measure, (unit, units, _)) in zip(axes, MEASURES.items(), strict=True):
        for number, (method, runs) in enumerate(part.methods.items()):
            mean, error = mean_and_error([row[measure] * units for row in runs.values()])
            style = {"color": f"C{number % 10}", "label": method}
            if trainable := next(iter(runs.values()))["trainable"]:
                marker = "*" if method == TREX else "os^v"[number // 10 % 4]
                axis.errorbar(trainable, mean, error or 0, marker=marker, linestyle="", capsize=3, **style)
            else:
                axis.axhline(mean, linestyle=":", **style)
        axis.set_xscale("log")
        axis.set_xlabel("trainable parameters")
        axis.set_ylabel({"points": "mean accuracy, %", "nats": "mean log-likelihood, nats"}[unit])
    axes[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return True


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours."""
    return [float(np.mean(values[max(0, i - 1) : i + 2])) for i in range(len(values))]


def _curves(part: Part, axes: Sequence[Any]) -> bool:
    for method in (TREX, RECOMMENDED, NO_PRIOR, LORA, ORACLE):
        curves = [dict(map(tuple, row["curve"])) for row in part.methods.get(method, {}).values() if row["curve"]]
        if curves:
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = smooth([float(np.mean([curve[step] for curve in curves])) for step in steps])
            axes[0].plot(steps, means, label=f"{method}, {_plural(len(curves), 'seed')}")
    if not axes[0].lines:
        return False
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("training loss, nats")
    axes[0].legend(fontsize=7)
    return True


def _bars(part: Part, axes: Sequence[Any]) -> bool:
    shown = [m for m in (BASE, LORA, EQUAL, NO_PRIOR, NO_ROUTER, TREX, RECOMMENDED, ORACLE) if m in part.methods]
    tasks = _tasks(part)
    if len(tasks) > MOST_BARS:
        return False
    for number, method in enumerate(shown):
        scores = [
            mean_and_error([100 * row["tasks"][task]["accuracy"] for row in part.methods[method].values()])
            for task in tasks
        ]
        place = np.arange(len(tasks)) + (number - (len(shown) - 1) / 2) * 0.8 / len(shown)
        errors = [error or 0 for _, error in scores]
        axes[0].bar(place, [mean for mean, _ in scores], 0.8 / len(shown), yerr=errors, label=method)
    axes[0].set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=7)
    axes[0].set_ylabel("accuracy, %")
    if shown:
        axes[0].legend(fontsize=6, ncols=3)
    return bool(shown)


def _tasks(part: Part) -> list[str]:
    return list(next(iter(next(iter(part.methods.values())).values()))["tasks"])


# name of the file, what it shows, panels, width, and what draws it
PLOTS: tuple[tuple[str, str, int, float, Callable[[Part, Sequence[Any]], bool]], ...] = (
    ("parameters", "Accuracy and log-likelihood against trainable parameters", 2, 11, _by_parameters),
    ("curves", "Training loss with and without the prior", 1, 7, _curves),
    ("tasks", "Accuracy of each task", 1, 11, _bars),
)


def plot(part: Part, folder: Path) -> Mapping[Path, str]:
    """Draw what there is; the pictures, and what they show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = {}
    for name, title, panels, width, draw in PLOTS:
        figure, axes = pyplot.subplots(1, panels, figsize=(width, 4), squeeze=False)
        if draw(part, axes[0]):
            figure.tight_layout()
            path = folder / f"{part.name}-{name}.png"
            figure.savefig(path, dpi=70)
            written[path] = title
        pyplot.close(figure)
    return written


# the report


def _section(part: Part, pictures: Mapping[Path, str]) -> str:
    rows = [row for runs in part.methods.values() for row in runs.values()]
    last = max(rows, key=lambda row: row["date"])
    settings = ", ".join(f"{name} {value}" for name, value in (last["data_settings"] or {}).items())
    commits = sorted({f"{row['commit']}{' with changes' * bool(row['dirty'])}" for row in rows})
    written = [
        f"## {part.name}\n",
        f"{last['base']}, {last['precision']}; data: {last['data']}{f' ({settings})' if settings else ''}, "
        f"{_plural(len(_tasks(part)), 'task')}, {last['train_rows']} training rows, "
        f"{sum(task['rows'] for task in last['tasks'].values())} test rows; {max(row['steps'] for row in rows)} steps "
        f"of {last['rows_per_step']} rows. On {', '.join(sorted({row['device_name'] for row in rows}))}; torch "
        f"{last['torch']}, peft {last['peft']}, transformers {last['transformers']}, peft_trex {last['peft_trex']} "
        f"({', '.join(commits)}), {last['date'][:10]}.\n",
        _regime(part),
        _methods(part),
        _paces(part),
        *(_against(part, baseline) for baseline in (LORA, EQUAL, TREX)),
        _tuning(part),
        _diagnosis(part),
        *(f"![{title}]({path.parent.name}/{path.name})\n" for path, title in pictures.items()),
    ]
    return "\n".join(text for text in written if text)


def write(rows: Sequence[Row], folder: Path) -> str:
    """Write verdict and tables into a file beside the folder, plots into it; returns the verdict."""
    parts = parts_of(rows)
    said = verdict(parts)
    sections = [said, *(_section(part, plot(part, folder)) for part in parts)]
    page(folder.with_suffix(".md"), "Quality", "quality/report.py", sections)
    return said


def main(argv: list[str] | None = None) -> int:
    """Write the report; 1 when there is nothing to report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results",
        type=Path,
        default=FOLDER / "results" / "quality",
        help="folder of rows and plots; FOLDER.md is written",
    )
    arguments = parser.parse_args(argv)
    rows = load(arguments.results)
    if not any(row["phase"] == "final" for row in rows):
        print(f"no final rows in {arguments.results}; run benchmarks/quality/run.py first", file=sys.stderr)
        return 1
    print(write(rows, arguments.results))
    print(f"{len(rows)} rows reported in {arguments.results.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
