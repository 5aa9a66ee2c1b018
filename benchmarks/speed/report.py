"""Tables and a plot from benchmarks/results/*.jsonl, into speed.md beside them: python benchmarks/speed/report.py

The latest row of every case, size, precision, variant, shape, machine and number of threads counts. Ratios are to the
baseline that took turns with the variant; absolute times are shown for GPUs only. Rows that miss a goal are listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reporting import Row, latest, millions, page, table
from speed.variants import LORA, RECOMMENDED, REFERENCE, TREX

FOLDER = Path(__file__).resolve().parents[1]
PAGE, PICTURE = "speed.md", "sweeps.png"

# what is asked of T-REX's fast path: variant, case, field, at most, in words
GOALS = (
    (TREX, "step", "ratio", 1.00, "time of a training step"),
    (TREX, "step", "memory_total_ratio", 1.00, "peak memory of a training step"),
    (TREX, "compiled", "ratio", 1.00, "time of a compiled training step"),
    (TREX, "decode", "ratio", 1.05, "time of one new token"),
    (TREX, "prior", "share", 0.01, "the prior's share of a training step"),
    (RECOMMENDED, "step", "ratio", 0.95, "time of a training step"),
    (RECOMMENDED, "step", "memory_total_ratio", 0.95, "peak memory of a training step"),
    (RECOMMENDED, "generate", "ratio", 1.00, "time of new tokens"),
)


def load(folder: Path) -> list[Row]:
    """The latest row of everything that was measured, smoke runs left out."""
    names = ("case", "size", "precision", "variant", "shape", "device", "device_name", "cpu_capability", "threads")
    return latest(folder, names, lambda row: row["size"] != "smoke")


def machine_of(row: Row) -> str:
    """Where a row was measured, in words. What a CPU's arithmetic is capable of decides how fast bfloat16 is."""
    if row["device"] == "cuda":
        return row["device_name"]
    return f"{row['device_name']} with {row['cpu_capability']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"


def machines(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each machine and number of threads."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(machine_of(row), []).append(row)
    return found


def regressions(rows: Iterable[Row]) -> list[str]:
    """Each row of T-REX's fast path that misses a goal, in words."""
    found = []
    for row in rows:
        for variant, case, name, goal, words in GOALS:
            value = row[name]
            if row["case"] == case and row["variant"] == variant and value is not None and value > goal:
                said = f"{value:.2%}" if name == "share" else f"{value:.3f} x {row['baseline']}"
                wanted = f"{goal:.0%}" if name == "share" else f"{goal:.2f}"
                where = machine_of(row)
                what = f"{variant}: " * (variant != TREX) + words
                found.append(f"{what}, {row['size']}, {row['precision']}: {said}; the goal is {wanted} ({where})")
    return found


def _ratio(row: Row) -> str:
    text = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    if row["variant"] == row["baseline"]:
        text = "1"
    return text + (f", {row['seconds'] * 1e3:.3g} ms" if row["device"] == "cuda" else "")


def _time_and_memory(row: Row) -> str:
    if row["memory_ratio"] is None:
        return _ratio(row)
    memory = f"{row['memory_ratio']:.3f}"
    if row["case"] in ("step", "compiled"):
        memory = f"{row['memory_total_ratio']:.3f}, {memory} of what passes"
    return _ratio(row) + f"; memory {memory}" * (row["variant"] != row["baseline"])


def _by_variant(rows: list[Row], cell: Callable[[Row], str], extra: dict[str, Callable[[Row], str]]) -> str:
    """A line for each variant, a column for each precision (and number of layers, where they differ)."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    columns = list(dict.fromkeys((row["precision"], row["shape"].get("layers")) for row in rows))
    differ = len({layers for _, layers in columns}) > 1
    cells = {(row["variant"], row["precision"], row["shape"].get("layers")): row for row in rows}
    lines = []
    for variant in variants:
        own = {column: cells[(variant, *column)] for column in columns if (variant, *column) in cells}
        first = next(iter(own.values()))
        name = f"**{variant}**" if variant == TREX else variant
        if variant in ("LoRA, equal parameters", "Lily"):
            name += f" ({first['settings']})"
        values = [cell(own[column]) if column in own else "" for column in columns]
        lines.append([name, *(get(first) for get in extra.values()), *values])
    heads = [precision + f", {layers} layers" * differ for precision, layers in columns]
    return table(["", *extra, *heads], lines)


def _shape(row: Row) -> str:
    shown = {key: value for key, value in row["shape"].items() if value is not None}
    return ", ".join(str(value) if key == "what" else f"{key} {value}" for key, value in shown.items())


def _section(machine: str, rows: list[Row]) -> str:
    last = max(rows, key=lambda row: row["date"])
    commits = sorted({f"{row['commit']}{' with changes' * bool(row['dirty'])}" for row in rows})
    parts = [
        f"## {machine}\n",
        f"torch {last['torch']}, peft {last['peft']}, transformers {last['transformers']}, peft_trex "
        f"{last['peft_trex']} ({', '.join(commits)}), {last['date'][:10]}; {last['cpus']} CPUs. "
        f"In brackets: 20th and 80th percentile.\n",
    ]
    for size in dict.fromkeys(row["size"] for row in rows):
        cases: dict[str, list[Row]] = {}
        for row in rows:
            if row["size"] == size:
                cases.setdefault(row["case"], []).append(row)
        for case, write in SECTIONS.items():
            if case in cases:
                parts.append(write(size, cases[case]))
    return "\n".join(parts)


def _step(size: str, rows: list[Row]) -> str:
    head = f"**Training step, {size}** ({_shape(rows[0])}): time and peak memory against {LORA}\n\n"
    return head + _by_variant(rows, _time_and_memory, {"trainable": millions})


def _compiled(size: str, rows: list[Row]) -> str:
    head = f"**Training step by torch.compile, {size}** ({_shape(rows[0])}): time and peak memory against {LORA}, "
    return head + "compiled as well\n\n" + _by_variant(rows, _time_and_memory, {"trainable": millions})


def _decode(size: str, rows: list[Row]) -> str:
    counted = "operators" if rows[0]["device"] == "cpu" else "kernels"
    head = f"**One new token, {size}** ({_shape(rows[0])}): time against {LORA}, and {counted} for each token\n\n"
    return head + _by_variant(rows, lambda row: f"{_ratio(row)}; {row['launches']} {counted}", {})


def _generate(size: str, rows: list[Row]) -> str:
    head = f"**New tokens by generate, {size}** ({_shape(rows[0])}): time against {LORA}\n\n"
    return head + _by_variant(rows, _ratio, {})


def _layer(size: str, rows: list[Row]) -> str:
    whole = [row for row in rows if row["shape"]["sweep"] is None]
    head = f"**One layer, {size}, forward and backward** ({_shape(whole[0])}): time and peak memory against {LORA}\n\n"
    return head + _by_variant(whole, _time_and_memory, {"trainable": millions}) + "\n" + _sweeps(size, rows)


def _family(variant: str) -> str:
    """The variant's name without its size, which a sweep changes."""
    return variant.replace(" 4x8", "")


def _sweeps(size: str, rows: list[Row]) -> str:
    parts = []
    for sweep in ("tokens", "experts", "width"):
        points = [row for row in rows if row["shape"]["sweep"] == sweep and row["variant"] != row["baseline"]]
        if not points:
            continue
        values = sorted({row["shape"][sweep] for row in points})
        lines = []
        for variant, precision in dict.fromkeys((row["variant"], row["precision"]) for row in points):
            own = {
                row["shape"][sweep]: f"{row['ratio']:.2f}"
                for row in points
                if (row["variant"], row["precision"]) == (variant, precision)
            }
            name = f"{_family(variant)}, {precision}"
            lines.append([name, *(own.get(value, "") for value in values)])
        head = f"**One layer, {size}, by {sweep}**: time against {LORA} of the same width\n\n"
        parts.append(head + table([sweep, *map(str, values)], lines))
    return "\n".join(parts)


def _prior(size: str, rows: list[Row]) -> str:
    lines = [
        [row["precision"], f"{row['share']:.2%} ({row['share_low']:.2%} to {row['share_high']:.2%})"] for row in rows
    ]
    return f"**The prior's share of a training step, {size}**\n\n" + table(["precision", "share"], lines)


def _against(title: str) -> Callable[[str, list[Row]], str]:
    def write(size: str, rows: list[Row]) -> str:
        lines = [
            [_shape(row), row["precision"], _time_and_memory(row), row["baseline"]]
            for row in rows
            if row["variant"] != row["baseline"]
        ]
        return f"**{title}, {size}**\n\n" + table(["what", "precision", TREX, "against"], lines)

    return write


SECTIONS: dict[str, Callable[[str, list[Row]], str]] = {
    "step": _step,
    "compiled": _compiled,
    "decode": _decode,
    "generate": _generate,
    "prior": _prior,
    "layer": _layer,
    "merge": _against("Merging"),
    "fit": _against("Fitting a prior"),
}


def plot(rows: list[Row], path: Path) -> bool:
    """Three panels for each machine: ratio over tokens, experts and width. Returns whether there was anything."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    swept = {
        (machine, size): points
        for machine, own in machines([row for row in rows if row["case"] == "layer"]).items()
        for size in dict.fromkeys(row["size"] for row in own)
        if (points := [row for row in own if row["size"] == size and row["shape"]["sweep"]])
    }
    if not swept:
        return False
    figure, axes = pyplot.subplots(len(swept), 3, figsize=(12, 3.6 * len(swept)), squeeze=False, sharey="row")
    styles = {TREX: "-", REFERENCE: ":"}
    for (machine, size), line in zip(swept, axes, strict=True):
        own = [row for row in swept[machine, size] if row["variant"] != row["baseline"]]
        precisions = list(dict.fromkeys(row["precision"] for row in own))
        for axis, sweep in zip(line, ("tokens", "experts", "width"), strict=True):
            for variant, precision in dict.fromkeys((row["variant"], row["precision"]) for row in own):
                points = sorted(
                    (row["shape"][sweep], row["ratio"], row["ratio_low"], row["ratio_high"])
                    for row in own
                    if (row["variant"], row["precision"], row["shape"]["sweep"]) == (variant, precision, sweep)
                )
                if points:
                    x, y, low, high = zip(*points, strict=True)
                    color = f"C{precisions.index(precision)}"
                    axis.plot(x, y, styles[variant], color=color, marker=".", label=f"{_family(variant)}, {precision}")
                    axis.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xlabel({"tokens": "tokens", "experts": "experts", "width": "width of the layer"}[sweep])
        line[0].set_ylabel(f"time / {LORA}")
        line[1].set_title(f"{machine}: one layer, forward and backward, {size}", fontsize=10)
        line[-1].legend(fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    pyplot.close(figure)
    return True


def write(rows: list[Row], folder: Path) -> list[str]:
    """Write the tables and the plot into the folder; returns what misses a goal."""
    missed = regressions(rows)
    parts = [_section(machine, own) for machine, own in machines(rows).items()]
    if plot(rows, folder / PICTURE):
        parts.insert(0, f"![Time of one layer]({PICTURE})\n")
    listed = "\n".join(f"- {line}" for line in missed) if missed else "None: every goal that was measured is met."
    page(folder / PAGE, "Speed", "speed/report.py", [f"## What misses its goal\n\n{listed}\n", *parts])
    return missed


def main(argv: list[str] | None = None) -> int:
    """Write the report; 1 when there is nothing to report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=FOLDER / "results", help="folder of the rows and of the report"
    )
    arguments = parser.parse_args(argv)
    rows = load(arguments.results)
    if not rows:
        print(f"no rows in {arguments.results}; run benchmarks/speed/run.py first", file=sys.stderr)
        return 1
    missed = write(rows, arguments.results)
    print(f"{len(rows)} rows reported in {arguments.results / PAGE}; {len(missed)} miss a goal")
    for line in missed:
        print(f"- {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
