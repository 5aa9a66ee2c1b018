"""A routing report as a picture: heatmaps over a model's blocks (from left to right) and kinds of layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .routing_text import kinds_of, mean_group_load

if TYPE_CHECKING:
    from .routing import LayerRouting, RoutingReport

GROUPS = 24  # that are drawn, of the most prompts


def draw(report: RoutingReport, path: str | os.PathLike[str]) -> None:
    """Draw a report to a file; see [`RoutingReport.plot`]."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing a routing report needs matplotlib, which is not installed: pip install 'peft-trex[plot]', or "
            "take to_markdown() or to_dict()."
        ) from error
    kinds = kinds_of(report.layers)
    blocks = sorted({block for own in kinds.values() for block in own})
    maps = [(title, values, *rest) for title, values, *rest in _maps(report, kinds, blocks) if values.size]
    groups, loads = mean_group_load(report)
    groups, loads = _largest(report, groups, loads)
    # in inches, since matplotlib's own layouts take many times the time of all the rest; two maps beside each other,
    # then each kind's experts, then the groups
    wide = max(5.0, 0.12 * len(blocks))
    rows = [0.22 * len(kinds)] * -(-len(maps) // 2) + [1.5] * -(-len(kinds) // 2)
    rows += [0.24 * len(groups)] if groups else []
    names = [*kinds, *groups]
    sheet = _Sheet(Figure, wide, rows, left=0.4 + 0.075 * max(map(len, names)))
    sheet.figure.text(0.5, 1 - 0.12 / sheet.height, str(report).partition(";")[0], ha="center", va="top", fontsize=10)
    for number, (title, values, low, high, colours) in enumerate(maps):
        axes = sheet.heat(number // 2, number % 2, values, title, low, high, colours)
        axes.set_yticks(range(len(kinds)), list(kinds), fontsize=7)
        _number_blocks(axes, blocks)
    first = -(-len(maps) // 2)
    for number, (kind, own) in enumerate(kinds.items()):
        experts = max(len(report.layers[name].load) for name in own.values())
        values = np.full((experts, len(blocks)), np.nan)
        for block, name in own.items():
            load = report.layers[name].load
            values[: len(load), blocks.index(block)] = np.log2(np.maximum(np.array(load) * len(load), 1e-9))
        title = f"load of each expert, log2 against the mean: {kind}"
        axes = sheet.heat(first + number // 2, number % 2, values, title, -3.0, 3.0, "RdBu_r")
        axes.set_ylabel("expert", fontsize=7)
        _number_blocks(axes, blocks)
    if groups:
        change = 100 * (loads / np.maximum(loads.mean(0), 1e-30) - 1)
        limit = max(1e-9, float(np.abs(change).max()))
        title = "an expert's load in a group, against all (%)"
        axes = sheet.heat(len(rows) - 1, 0, change, title, -limit, limit, "RdBu_r")
        _name_groups(axes, groups, "expert")
    if groups and report.group_clusters:
        counts = np.array([report.group_clusters.get(label, (0,) * len(report.clusters)) for label in groups], float)
        values = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        title = "clusters of a group's prompts (share)"
        axes = sheet.heat(len(rows) - 1, 1, values, title, 0.0, float(values.max()), "magma")
        _name_groups(axes, groups, "cluster")
    sheet.figure.savefig(path, dpi=110)


class _Sheet:
    """A figure of two columns of heatmaps, each `wide` and as high as its row, in inches."""

    above, below, bar = 0.3, 0.4, 0.75

    def __init__(self, make: Any, wide: float, rows: list[float], left: float) -> None:
        self.wide, self.rows, self.left = wide, rows, left
        self.width = 2 * (left + wide + self.bar)
        self.height = 0.4 + sum(rows) + len(rows) * (self.above + self.below)
        self.figure = make(figsize=(self.width, self.height))

    def heat(
        self,
        row: int,
        column: int,
        values: np.ndarray,
        title: str,
        low: float | None,
        high: float | None,
        colours: str,
    ) -> Any:
        x = column * self.width / 2 + self.left
        y = self.height - 0.4 - sum(self.rows[: row + 1]) - row * (self.above + self.below) - self.above
        axes = self._axes(x, y, self.wide, self.rows[row])
        axes.set_facecolor("0.85")  # of layers that are not there
        image = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=low, vmax=high, cmap=colours)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
        scale = self._axes(x + self.wide + 0.08, y, 0.12, self.rows[row])
        self.figure.colorbar(image, cax=scale).ax.tick_params(labelsize=7)
        return axes

    def _axes(self, x: float, y: float, width: float, height: float) -> Any:
        return self.figure.add_axes((x / self.width, y / self.height, width / self.width, height / self.height))


def _maps(report: RoutingReport, kinds: dict[str, dict[int, str]], blocks: list[int]) -> list[tuple[Any, ...]]:
    """Title, values (kinds, blocks), range and colours of each map that the report has values for."""

    def of(read: Callable[[LayerRouting], float | None]) -> np.ndarray:
        values = np.full((len(kinds), len(blocks)), np.nan)
        for row, own in enumerate(kinds.values()):
            for block, name in own.items():
                value = read(report.layers[name])
                values[row, blocks.index(block)] = np.nan if value is None else value
        return values[:0] if np.isnan(values).all() else values

    energy = of(lambda layer: np.log10(max(layer.energy, 1e-8)))
    dead = of(lambda layer: len(layer.dead) / len(layer.load))
    used = of(lambda layer: layer.used_experts / len(layer.load))
    rank, told = of(lambda layer: layer.core_rank), of(lambda layer: layer.mutual_information)
    return [
        ("omega: router (1) against prior (0)", of(lambda layer: layer.omega), 0.0, 1.0, "RdBu_r"),
        ("gate", of(lambda layer: layer.gate), 0.0, 1.0, "viridis"),
        ("what the adapter adds, log10 of its share of the layer's energy", energy, None, None, "magma"),
        ("router's entropy for a token, of log E", of(lambda layer: layer.router_entropy), 0.0, 1.0, "viridis"),
        ("experts that all tokens use, share of E", used, 0.0, 1.0, "viridis"),
        ("router's share of the weights", of(lambda layer: layer.token_share), 0.0, 1.0, "RdBu_r"),
        ("rank of what the weights mix", rank, 1.0, _most(rank, 1.5), "viridis"),
        ("dead experts, share of E", dead, 0.0, 1.0, "magma"),
        ("what an expert tells about the group, nats", told, 0.0, _most(told, 1e-3), "magma"),
    ]


def _most(values: np.ndarray, least: float) -> float:
    return max(least, float(np.nanmax(values))) if values.size else least


def _number_blocks(axes: Any, blocks: list[int]) -> None:
    step = next((step for step in (1, 2, 5, 10, 20, 50) if len(blocks) <= 20 * step), 100)
    shown = range(0, len(blocks), step)
    axes.set_xticks(shown, [str(blocks[place]) for place in shown], fontsize=7)


def _name_groups(axes: Any, groups: list[str], across: str) -> None:
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.set_xlabel(across, fontsize=7)


def _largest(report: RoutingReport, groups: list[str], loads: np.ndarray) -> tuple[list[str], np.ndarray]:
    places = sorted(range(len(groups)), key=lambda place: -report.groups[groups[place]])[:GROUPS]
    return [groups[place] for place in sorted(places)], loads[sorted(places)] if groups else loads
