"""What the reports share: reading rows, and writing tables into a file of their own or between a pair of markers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path, get: Callable[[Row], Any]) -> list[Any]:
    """What `get` finds in the rows of a file, where that is not None.

    Raises:
        ValueError: a line is damaged, or lacks a field that `get` asks for; the message names file and line.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(get(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {number}, is no row: {said}. Remove the line.") from error
    return [one for one in found if one is not None]


def latest(folder: Path, names: Iterable[str], keep: Callable[[Row], bool]) -> list[Row]:
    """The latest of the rows in folder/*.jsonl that agree in the fields `names`, in the order in which they came.

    Args:
        folder: files are read in the order of their names.
        names: fields that tell what was measured.
        keep: rows for which it is false are left out.

    Raises:
        ValueError: a line is damaged, or lacks one of the fields; the message names file and line.
    """
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for key, row in read(
            path, lambda row: (json.dumps([row[name] for name in names]), row) if keep(row) else None
        ):
            rows.pop(key, None)  # so that the order is that of the latest
            rows[key] = row
    return list(rows.values())


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    written = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in written) + "\n"


def millions(row: Row) -> str:
    return f"{row['trainable'] / 1e6:.3g} M" if row["trainable"] else ""


def page(path: Path, title: str, script: str, parts: Iterable[str]) -> None:
    """Write a whole file of what a report found; nobody else writes into it."""
    said = f"`python benchmarks/{script}` writes this file; [the benchmarks](../README.md) say what the figures mean."
    path.write_text("\n".join([f"# {title}\n", f"{said}\n", *parts]), encoding="utf-8")


def surroundings(readme: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before and after the markers.

    Raises:
        ValueError: the markers are missing.
    """
    text = readme.read_text(encoding="utf-8")
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ValueError(f"{readme} lacks the markers {begin!r} and {end!r}; put them where the tables belong.")
    before, rest = text.split(begin, 1)
    return before, rest.split(end, 1)[1]


def put(readme: Path, begin: str, end: str, parts: Iterable[str]) -> None:
    """Replace what stands between the markers."""
    before, after = surroundings(readme, begin, end)
    readme.write_text(f"{before}{begin}\n\n" + "\n".join(parts) + f"\n{end}{after}", encoding="utf-8")
