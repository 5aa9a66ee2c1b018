"""The figures of a routing report as heatmaps over a model's blocks (from left to right) and kinds of layers.

Axis legend: E experts, K clusters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from .figures import LayerRouting, group_changes, kinds_of

# The number of groups that are drawn, those of the most prompts.
GROUPS = 24
# Room in inches: above a map for its title, below it for its ticks, right of it for its colours, and for the heading.
ABOVE, BELOW, BAR, HEAD = 0.3, 0.4, 0.9, 0.4
# The short picture in inches: it fits on a screen of 1280 x 800 pixels, beside what a browser shows around it.
WIDTH, HEIGHT, DPI = 11.2, 6.2, 110
# The layers of each kind by block, None where a block has none.
Grid = Mapping[str, Sequence[LayerRouting | None]]


class _Map(NamedTuple):
    """A heatmap of values (rows, columns), and its range of colours, None for the values' own.

    The columns are the model's blocks, unless `columns` says what else they are. No `rows` leaves the rows numbered.
    The short picture shows the title `tells`, which says what to see, and beside the colours the words `legend`.
    """

    title: str
    values: np.ndarray
    low: float | None
    high: float | None
    colours: str
    rows: Sequence[str] = ()
    columns: str = ""
    tells: str = ""
    legend: str = ""


def draw(
    path: str | os.PathLike[str],
    title: str,
    layers: Mapping[str, LayerRouting],
    groups: Mapping[str, int],
    group_clusters: Mapping[str, Sequence[int]],
    detail: bool,
) -> None:
    """Draw a report to a file; see [`RoutingReport.plot`]."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing a routing report needs matplotlib, which is not installed: pip install 'peft-trex[plot]', or "
            "take to_markdown() or to_dict()."
        ) from error
    kinds = kinds_of(layers)
    blocks = sorted({block for by_block in kinds.values() for block in by_block})
    grid = {kind: [by_block.get(block) for block in blocks] for kind, by_block in kinds.items()}
    changes = group_changes(layers, groups, most=GROUPS)
    of_groups = _group_maps(changes, group_clusters)
    if detail:
        bands = [
            (0.22 * len(grid), _layer_maps(grid)),
            (1.5, _expert_maps(grid)),
            (0.24 * len(changes), of_groups),
        ]
        # Each row has two maps of the same height.
        rows = [(height, maps[start : start + 2]) for height, maps in bands for start in range(0, len(maps), 2)]
        width = 2 * (_margin(rows) + max(5.0, 0.12 * len(blocks)) + BAR)
        height = HEAD + sum(ABOVE + row_height + BELOW for row_height, _ in rows)
    else:
        of_layers = [heatmap for heatmap in _layer_maps(grid) if heatmap.tells][:3]
        room = HEIGHT - HEAD - (ABOVE + BELOW) * (2 if of_groups else 1)
        # What tells the groups apart comes first, and gets the larger part.
        rows = [(0.66 * room, of_groups), (0.34 * room, of_layers)] if of_groups else [(0.5 * room, of_layers)]
        width, height = WIDTH, HEAD + sum(ABOVE + row_height + BELOW for row_height, _ in rows)
    figure = Figure(figsize=(width, height))
    text = title if detail else title.replace(": ", "\n", 1)
    figure.text(0.5, 1 - 0.12 / height, text, ha="center", va="top", fontsize=10 if detail else 8)
    # The maps are placed by hand, in inches: matplotlib's own layouts take many times the time of all the rest.
    y = height - HEAD
    for row_height, maps in rows:
        y -= ABOVE + row_height
        # The maps of a row have the same rows, whose names stand once in the short picture.
        left = _margin(rows) if detail else min(_margin([(row_height, maps)]), 0.4 * width)
        size, apart = width / 2 - left - BAR, width / 2
        if not detail:
            size = (width - left) / len(maps) - BAR
            apart = size + BAR
        for number, heatmap in enumerate(maps):
            axes, scale = (
                figure.add_axes(((left + number * apart + x) / width, y / height, wide / width, row_height / height))
                for x, wide in ((0.0, size), (size + 0.08, 0.12))
            )
            _draw_map(heatmap, axes, scale, blocks, detail)
            if number and not detail:
                axes.set_yticks([])
        y -= BELOW
    figure.savefig(path, dpi=DPI)


def _margin(rows: Sequence[tuple[float, Sequence[_Map]]]) -> float:
    """The room in inches left of maps, for the names of their rows."""
    return 0.4 + 0.075 * max((len(name) for _, maps in rows for heatmap in maps for name in heatmap.rows), default=0)


def _draw_map(heatmap: _Map, axes: Any, scale: Any, blocks: list[int], detail: bool) -> None:
    # The ground shows where there is no layer.
    axes.set_facecolor("0.85")
    colours = {"vmin": heatmap.low, "vmax": heatmap.high, "cmap": heatmap.colours}
    image = axes.imshow(heatmap.values, aspect="auto", interpolation="nearest", **colours)
    axes.set_title(heatmap.title if detail else heatmap.tells, fontsize=8)
    axes.tick_params(labelsize=7)
    bar = axes.figure.colorbar(image, cax=scale)
    bar.ax.tick_params(labelsize=7)
    if heatmap.rows:
        axes.set_yticks(range(len(heatmap.rows)), heatmap.rows, fontsize=7)
    else:
        axes.set_ylabel("expert", fontsize=7)
    if heatmap.columns:
        axes.set_xlabel(heatmap.columns, fontsize=7)
    else:
        step = next((step for step in (1, 2, 5, 10, 20, 50) if len(blocks) <= 20 * step), 100)
        axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], fontsize=7)
    if not detail:
        bar.set_label(heatmap.legend, fontsize=7)
        if not heatmap.columns:
            axes.set_xlabel("block of the model", fontsize=7)


def _layer_maps(grid: Grid) -> list[_Map]:
    """The maps of one number a layer (kinds, blocks), without those whose number no layer has."""

    def of(read: Callable[[LayerRouting], float | None]) -> np.ndarray:
        # NumPy makes NaN of None.
        return np.array([[layer and read(layer) for layer in row] for row in grid.values()], float)

    energy = of(lambda layer: np.log10(max(layer.energy, 1e-8)))
    dead = of(lambda layer: len(layer.dead) / len(layer.load))
    used = of(lambda layer: layer.used_experts / len(layer.load))
    rank, nats = of(lambda layer: layer.core_rank), of(lambda layer: layer.mutual_information)
    affinity = of(lambda layer: layer.affinity)
    routed = any(layer and layer.router_entropy is not None for row in grid.values() for layer in row)
    most_nats = np.nanmax(nats, initial=1e-3)
    # The short picture has the first three of those with words of their own.
    maps = [
        _Map(
            "what the adapter adds, log10 of its share of the layer's energy", energy, None, None, "magma",
            tells="Bright: layers where the adapter adds most", legend="of the layer's energy, log10",
        ),
        _Map(
            "what an expert tells about the group, nats", nats, 0.0, most_nats, "magma",
            tells="Bright: layers whose experts tell the groups apart", legend="nats an expert tells",
        ),
        _Map(
            "router's share of the weights", of(lambda layer: layer.token_share), 0.0, 1.0, "RdBu_r",
            tells="Blue: the prompt decides, red: the token" * routed, legend="the token router's share",
        ),
        _Map(
            "gate", of(lambda layer: layer.gate), 0.0, 1.0, "viridis",
            tells="Dark: layers whose gate is shut", legend="share that the gate lets pass",
        ),
        _Map("omega: router (1) against prior (0)", of(lambda layer: layer.omega), 0.0, 1.0, "RdBu_r"),
        _Map("router's entropy for a token, of log E", of(lambda layer: layer.router_entropy), 0.0, 1.0, "viridis"),
        _Map("experts that all tokens use, share of E", used, 0.0, 1.0, "viridis"),
        _Map("rank of what the weights mix", rank, 1.0, np.nanmax(rank, initial=1.5), "viridis"),
        _Map("dead experts, share of E", dead, 0.0, 1.0, "magma"),
        _Map("what the block before tells, nats", affinity, 0.0, np.nanmax(affinity, initial=1e-3), "magma"),
    ]  # fmt: skip
    return [heatmap._replace(rows=list(grid)) for heatmap in maps if not np.isnan(heatmap.values).all()]


def _expert_maps(grid: Grid) -> list[_Map]:
    """The load of each expert (E, blocks), in a map for each kind of layer."""
    maps = []
    for kind, row in grid.items():
        loads = [np.array(layer.load if layer else ()) for layer in row]
        columns = [np.log2(np.maximum(load * len(load), 1e-9)) for load in loads]
        # Blocks with fewer experts, or none, are filled up.
        values = np.array(list(zip_longest(*columns, fillvalue=np.nan)))
        maps.append(_Map(f"load of each expert, log2 against the mean: {kind}", values, -3.0, 3.0, "RdBu_r"))
    return maps


def _group_maps(changes: Mapping[str, np.ndarray], group_clusters: Mapping[str, Sequence[int]]) -> list[_Map]:
    """The experts (groups, E) and the clusters (groups, K) of groups; no maps without groups."""
    if not changes:
        return []
    labels, percent = list(changes), 100 * np.stack(list(changes.values()))
    limit = max(1e-9, float(np.abs(percent).max()))
    maps = [
        _Map(
            "an expert's load in a group, against all (%)", percent, -limit, limit, "RdBu_r", labels, "expert",
            "Red: experts that a group uses more than the others do", "against the mean of the groups, %",
        )
    ]  # fmt: skip
    if group_clusters:
        none = np.zeros_like(next(iter(group_clusters.values())))
        counts = np.array([group_clusters.get(label, none) for label in labels], float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        maps.append(
            _Map(
                "clusters of a group's prompts (share)", shares, 0.0, shares.max(), "magma", labels, "cluster",
                "Bright: the prior's clusters that a group's prompts fall into", "share of the group's prompts",
            )
        )  # fmt: skip
    return maps
