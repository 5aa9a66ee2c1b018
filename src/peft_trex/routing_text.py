"""A routing report in words and tables, by kind of layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from .routing import SHUT, LayerRouting, RoutingReport

NAMED = 5  # layers that are named for each thing that stands out


def place_of(name: str) -> tuple[str, int]:
    """The kind of a layer, and its block: `model.layers.3.mlp.up_proj` is a `model.layers.mlp.up_proj` in block 3."""
    found = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else (name, 0)


def kinds_of(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """The layers' names by kind, as short as tells them apart, and block."""
    kinds: dict[str, dict[int, str]] = {}
    for name in names:
        kind, block = place_of(name)
        kinds.setdefault(kind, {})[block] = name
    for parts in range(1, 1 + max((kind.count(".") + 1 for kind in kinds), default=1)):
        short = {".".join(kind.split(".")[-parts:]) for kind in kinds}
        if len(short) == len(kinds):
            return {".".join(kind.split(".")[-parts:]): own for kind, own in kinds.items()}
    return kinds


def tables(report: RoutingReport) -> list[str]:
    """The parts of [`RoutingReport.to_markdown`] below its first lines."""

    def median(layers: Sequence[LayerRouting], read: Callable[[LayerRouting], float | None], form: str) -> str:
        values = [value for value in map(read, layers) if value is not None]
        return format(statistics.median(values), form) if values else ""

    columns: dict[str, tuple[Callable[[LayerRouting], float | None], str]] = {
        "omega": (lambda layer: layer.omega, ".2f"),
        "gate": (lambda layer: layer.gate, ".2f"),
        "adds": (lambda layer: layer.energy, ".2%"),
        "router entropy": (lambda layer: layer.router_entropy, ".2f"),
        "a token's experts": (lambda layer: layer.effective_experts, ".1f"),
        "all tokens' experts": (lambda layer: layer.used_experts, ".1f"),
        "router's share": (lambda layer: layer.token_share, ".2f"),
        "core rank": (lambda layer: layer.core_rank, ".2f"),
    }
    if report.groups:
        columns["nats about the group"] = (lambda layer: layer.mutual_information, ".3f")
        columns["variance between groups"] = (lambda layer: layer.group_share, ".2f")
    rows = [["layers", "blocks", *columns]]
    for kind, names in kinds_of(report.layers).items():
        own = [report.layers[name] for name in names.values()]
        rows.append([f"`{kind}`", str(len(own)), *(median(own, *column) for column in columns.values())])
    parts = ["Medians over the blocks; `adds` is the adapter's energy relative to the layer's own.", _table(rows)]
    parts.append("\n".join(["What stands out:", "", *_outliers(report)]))
    if report.clusters:
        filled = sorted((count for count in report.clusters if count), reverse=True)
        parts.append(
            f"Clusters: {sum(report.clusters)} prompts in {len(filled)} of {len(report.clusters)}; the largest hold "
            f"{', '.join(map(str, filled[:NAMED]))}. Scores of a prompt spread by {report.prior_spread or 0:.2f}."
            + (
                f" Those of two groups overlap by {report.group_overlap:.2f}."
                if report.group_overlap is not None
                else ""
            )
        )
    if report.groups:
        rows = [["group", "prompts", "clusters", "experts it uses most, against all (mean of layers)"]]
        rows += [
            [
                label,
                str(count),
                str(sum(own > 0 for own in report.group_clusters.get(label, ()))) if report.clusters else "",
                ", ".join(f"{expert} ({change:+.1%})" for expert, change in _preferred(report, label)),
            ]
            for label, count in report.groups.items()
        ]
        parts.append(_table(rows))
    return parts


def mean_group_load(report: RoutingReport) -> tuple[list[str], np.ndarray]:
    """The groups, and the load (groups, E) of each expert in them, mean over the layers of the commonest size."""
    by_size: dict[int, list[LayerRouting]] = {}
    for layer in report.layers.values():
        if layer.group_load:
            by_size.setdefault(len(layer.load), []).append(layer)
    if not by_size:
        return [], np.zeros((0, 0))
    own = max(by_size.values(), key=len)
    groups = [label for label in report.groups if all(label in layer.group_load for layer in own)]
    return groups, np.mean([[layer.group_load[label] for label in groups] for layer in own], axis=0)


def _preferred(report: RoutingReport, label: str) -> list[tuple[int, float]]:
    groups, loads = mean_group_load(report)
    if label not in groups:
        return []
    change = loads[groups.index(label)] / np.maximum(loads.mean(0), 1e-30) - 1
    return [(int(expert), float(change[expert])) for expert in np.argsort(-change, kind="stable")[:3]]


def _outliers(report: RoutingReport) -> list[str]:
    """One line for each thing that stands out, with the layers where it does most."""

    def line(what: str, found: Mapping[str, float], form: str, of: int | None = None) -> list[str]:
        if not found:
            return [f"- {what}: none"]
        ranked = sorted(found, key=lambda name: -abs(found[name]))[:NAMED]
        named = ", ".join(f"`{name}` ({format(found[name], form)})" for name in ranked)
        more = f", and {len(found) - NAMED} more" if of is None and len(found) > NAMED else ""
        return [f"- {what}: {named}{more}"]

    layers = report.layers.items()
    lines = line("layers that add most", {name: layer.energy for name, layer in layers}, ".2%", of=NAMED)
    lines += line(
        f"gates that are shut (below {SHUT:g})",
        {name: layer.gate for name, layer in layers if layer.gate < SHUT},
        ".1e",
    )
    lines += line("dead experts", {name: len(layer.dead) for name, layer in layers if layer.dead}, ".0f")
    lines += line("duplicate pairs", {name: len(layer.duplicates) for name, layer in layers if layer.duplicates}, "d")
    collapsed = {
        name: layer.used_experts
        for name, layer in layers
        if len(layer.load) > 1 and layer.used_experts < len(layer.load) / 4
    }
    lines += line("load on less than a quarter of the experts (experts used)", collapsed, ".1f")
    return lines


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
