"""Measure T-REX against LoRA and its kin.

    python benchmarks/speed/run.py [--case layer step ...] [--size cpu] [--rounds 9]

Without arguments: all cases, at the sizes that suit the device. Before anything is measured, the adapter is checked
against the readable formula in each precision; where it differs, no speed is printed and no row written. Rows are
appended to benchmarks/results/<device>.jsonl as each group of variants is done; `report.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from speed.cases import CASES, Case, Group, Setting
from speed.check import CheckFailed
from speed.measure import (
    Job,
    Samples,
    environment,
    interleave,
    launches,
    peak_memory,
    resident_memory,
    spread,
    trainable,
)
from speed.variants import PRECISIONS, REFERENCE, SIZES, has_reference

RESULTS = Path(__file__).resolve().parents[1] / "results"
INTERRUPTED = 130  # what a shell calls it


def _rows(name: str, case: Case, setting: Setting, group: Group, rounds: int | None) -> list[dict[str, Any]]:
    """Measure a group: a row for each of its variants."""
    jobs = group.jobs()
    device = setting.device
    samples = interleave(jobs, device, rounds or group.rounds or case.rounds, case.at_least, case.warm_ups)
    peaks = {variant: peak_memory(job, device) if case.memory else None for variant, job in jobs.items()}
    rows = []
    for variant, job in jobs.items():
        own, other = samples[variant], samples[group.baseline]
        rows.append(
            {
                "case": name,
                "variant": variant,
                "settings": job.settings,
                "size": setting.size,
                "precision": setting.precision,
                "shape": group.shape,
                "baseline": group.baseline,
                "rounds": len(own.times),
                "repeats": own.repeats,
                **_times(own, other),
                **_share(job, own),
                **_memory(job, peaks[variant], jobs[group.baseline], peaks[group.baseline]),
                "trainable": trainable(job),
                "launches": launches(job, device) if case.launches else None,
                **environment(device),
            }
        )
    return rows


def _times(own: Samples, other: Samples) -> dict[str, float]:
    median, low, high = spread([mine / theirs for mine, theirs in zip(own.times, other.times, strict=True)])
    return {"seconds": spread(own.times)[0], "ratio": median, "ratio_low": low, "ratio_high": high}


def _share(job: Job, own: Samples) -> dict[str, float | None]:
    """The looked-for part's share of the whole."""
    if job.part is None:
        return {"share": None, "share_low": None, "share_high": None}
    median, low, high = spread([part / whole for part, whole in zip(own.parts, own.times, strict=True)])
    return {"share": median, "share_low": low, "share_high": high}


def _memory(job: Job, peak: int | None, other: Job, other_peak: int | None) -> dict[str, float | None]:
    """Peak of what a run allocates, the same with what is there before it, and both against the baseline's."""
    if peak is None or other_peak is None:
        return dict.fromkeys(("memory_peak", "memory_total", "memory_ratio", "memory_total_ratio"))
    resident, other_resident = resident_memory(job) or 0, resident_memory(other) or 0
    total = peak + resident
    ratio = peak / other_peak if other_peak else None
    return {
        "memory_peak": peak,
        "memory_total": total,
        "memory_ratio": ratio,
        "memory_total_ratio": total / (other_peak + other_resident),
    }


def _line(row: dict[str, Any]) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in row["shape"].items() if value is not None)
    text = f"{row['case']} {row['size']} {row['precision']} ({shape}): {row['variant']} "
    if row["share"] is not None:
        return text + f"{row['share']:.2%} (20/80 %: {row['share_low']:.2%} to {row['share_high']:.2%})"
    text += f"{row['ratio']:.3f} x {row['baseline']} (20/80 %: {row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
    if row["memory_ratio"] is not None:
        text += f", memory {row['memory_ratio']:.3f} x"
    return text + (f", {row['launches']} launches" if row["launches"] is not None else "")


def _settings(arguments: argparse.Namespace) -> Iterator[tuple[str, Case, Setting]]:
    for name in arguments.case:
        case = CASES[name]
        for size in arguments.size:
            for precision in case.precisions:
                fits = arguments.device == "cpu" or SIZES[size].fp32_base or PRECISIONS[precision].base.itemsize < 4
                if precision in arguments.precision and fits:
                    yield name, case, Setting(size, precision, arguments.device)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs="+", choices=SIZES, help="default: cpu on a CPU, 1b and 8b on a GPU")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, help="that count (default: each case's own)")
    parser.add_argument("--out", type=Path, help="file to append rows to (default: results/<device>.jsonl)")
    arguments = parser.parse_args(argv)
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    arguments.size = arguments.size or (["cpu"] if arguments.device == "cpu" else ["1b", "8b"])
    arguments.out = arguments.out or RESULTS / f"{arguments.device}.jsonl"
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run; 0 when all is measured, 1 when the check failed, 130 when interrupted (finished rows are kept)."""
    arguments = _parse(argv)
    settings = list(_settings(arguments))
    if not settings:
        print("Nothing to measure: none of the cases is measured in that precision at that size.", file=sys.stderr)
        return 1
    print(
        f"torch {torch.__version__}, {environment(arguments.device)['device_name']}, {torch.get_num_threads()} "
        f"threads; rows go to {arguments.out}"
    )
    if not has_reference():
        print(f"without '{REFERENCE}': TRexConfig has no mixture_implementation")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own, for every model
            _measure(settings, arguments)
    except CheckFailed as failure:
        print(f"The adapter does not equal the formula, so no speed is measured. {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the rows that were finished are kept in {arguments.out}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _measure(settings: list[tuple[str, Case, Setting]], arguments: argparse.Namespace) -> None:
    """Check everything, then measure it group by group."""
    for _, case, setting in settings:
        for group in case.groups(setting):
            group.check()
    print("the adapter equals the formula, gradients included, in every precision and shape to be measured")
    for name, case, setting in settings:
        for group in case.groups(setting):
            rows = _rows(name, case, setting, group, arguments.rounds)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                print(_line(row), flush=True)
            if arguments.device == "cuda":  # where the next group's models need the room
                gc.collect()
                torch.cuda.empty_cache()
        gc.collect()  # models hold themselves in circles


if __name__ == "__main__":
    sys.exit(main())
