"""The figures of a routing report in words and tables, by kind of layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .figures import SHUT, LayerRouting, RoutingFigures

# The number of layers that are named for each thing that stands out.
NAMED = 5
# The columns of the table of layers: the field that each shows, and its format.
COLUMNS = {
    "omega": ("omega", ".2f"),
    "gate": ("gate", ".2f"),
    "adds": ("energy", ".2%"),
    "router entropy": ("router_entropy", ".2f"),
    "a token's experts": ("effective_experts", ".1f"),
    "all tokens' experts": ("used_experts", ".1f"),
    "router's share": ("token_share", ".2f"),
    "core rank": ("core_rank", ".2f"),
}
GROUP_COLUMNS = {
    "nats about the group": ("mutual_information", ".3f"),
    "variance between groups": ("group_share", ".2f"),
}


def kinds_of(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """The layers' names by kind and block: `model.layers.3.mlp.up_proj` is an `up_proj` in block 3.

    A kind keeps as many parts of the name as tell the kinds apart.
    """
    kinds: dict[str, dict[int, str]] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
        kind, block = (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, 0)
        kinds.setdefault(kind, {})[block] = name
    for parts in range(1, 1 + max((kind.count(".") + 1 for kind in kinds), default=1)):
        short = {".".join(kind.split(".")[-parts:]): blocks for kind, blocks in kinds.items()}
        if len(short) == len(kinds):
            return short
    return kinds


def mean_group_load(figures: RoutingFigures) -> tuple[list[str], np.ndarray]:
    """The groups, and the load (groups, E) of each expert in them, mean over the layers of the commonest size."""
    by_size: dict[int, list[LayerRouting]] = {}
    for layer in figures.layers.values():
        if layer.group_load:
            by_size.setdefault(len(layer.load), []).append(layer)
    if not by_size:
        return [], np.zeros((0, 0))
    layers = max(by_size.values(), key=len)
    groups = [label for label in figures.groups if all(label in layer.group_load for layer in layers)]
    return groups, np.mean([[layer.group_load[label] for label in groups] for layer in layers], axis=0)


def summary(figures: RoutingFigures) -> str:
    """The report in one sentence; see [`RoutingReport`]."""
    layers = figures.layers.values()
    energies = {name: layer.energy for name, layer in figures.layers.items()}
    strongest = max(energies, key=lambda name: energies[name])
    text = (
        f"T-REX routing of {figures.adapter_name!r} ({figures.tokens} tokens, {len(layers)} layers): adds "
        f"{statistics.median(energies.values()):.2%} of a layer's output energy in the median layer, "
        f"{energies[strongest]:.2%} in the strongest ({strongest}); {sum(len(layer.dead) for layer in layers)} of "
        f"{sum(len(layer.load) for layer in layers)} experts are dead, "
        f"{sum(layer.gate < SHUT for layer in layers)} gates shut"
    )
    entropies = [layer.router_entropy for layer in layers if layer.router_entropy is not None]
    if entropies:
        text += f"; router entropy {statistics.median(entropies):.2f} of log E"
    if figures.nmi is not None:
        text += f"; clusters against groups: purity {figures.purity:.2f}, NMI {figures.nmi:.2f}"
    return text


def markdown(figures: RoutingFigures) -> str:
    """The report in tables; see [`RoutingReport.to_markdown`]."""
    sections = [
        f"# Routing of `{figures.adapter_name}`",
        f"{summary(figures)}.",
        "Medians over the blocks; `adds` is the adapter's energy relative to the layer's own.",
        _layer_table(figures),
        "\n".join(["What stands out:", "", *_outliers(figures.layers)]),
    ]
    if figures.clusters:
        sections.append(_clusters(figures))
    if figures.groups:
        sections.append(_group_table(figures))
    return "\n\n".join(sections) + "\n"


def _layer_table(figures: RoutingFigures) -> str:
    def median(layers: Sequence[LayerRouting], field: str, form: str) -> str:
        values = [value for layer in layers if (value := getattr(layer, field)) is not None]
        return format(statistics.median(values), form) if values else ""

    columns = COLUMNS | (GROUP_COLUMNS if figures.groups else {})
    rows = [["layers", "blocks", *columns]]
    for kind, names in kinds_of(figures.layers).items():
        layers = [figures.layers[name] for name in names.values()]
        rows.append([f"`{kind}`", str(len(layers)), *(median(layers, *column) for column in columns.values())])
    return _table(rows)


def _outliers(layers: Mapping[str, LayerRouting]) -> list[str]:
    """One line for each thing that stands out, with the layers where it does most."""

    def line(title: str, values: Mapping[str, float], form: str) -> str:
        if not values:
            return f"- {title}: none"
        ranked = sorted(values, key=lambda name: -abs(values[name]))[:NAMED]
        named = ", ".join(f"`{name}` ({format(values[name], form)})" for name in ranked)
        return f"- {title}: {named}" + f", and {len(values) - NAMED} more" * (len(values) > NAMED)

    strongest = sorted(layers, key=lambda name: -layers[name].energy)[:NAMED]
    gates = {name: layer.gate for name, layer in layers.items() if layer.gate < SHUT}
    dead = {name: len(layer.dead) for name, layer in layers.items() if layer.dead}
    duplicates = {name: len(layer.duplicates) for name, layer in layers.items() if layer.duplicates}
    collapsed = {
        name: layer.used_experts
        for name, layer in layers.items()
        if len(layer.load) > 1 and layer.used_experts < len(layer.load) / 4
    }
    return [
        line("layers that add most", {name: layers[name].energy for name in strongest}, ".2%"),
        line(f"gates that are shut (below {SHUT:g})", gates, ".1e"),
        line("dead experts", dead, "d"),
        line("duplicate pairs", duplicates, "d"),
        line("load on less than a quarter of the experts (experts used)", collapsed, ".1f"),
    ]


def _clusters(figures: RoutingFigures) -> str:
    filled = sorted((count for count in figures.clusters if count), reverse=True)
    text = (
        f"Clusters: {sum(figures.clusters)} prompts in {len(filled)} of {len(figures.clusters)}; the largest hold "
        f"{', '.join(map(str, filled[:NAMED]))}. Scores of a prompt spread by {figures.prior_spread or 0:.2f}."
    )
    if figures.group_overlap is not None:
        text += f" Those of two groups overlap by {figures.group_overlap:.2f}."
    return text


def _group_table(figures: RoutingFigures) -> str:
    groups, loads = mean_group_load(figures)
    preferred = {}
    for label, load in zip(groups, loads, strict=True):
        change = load / np.maximum(loads.mean(0), 1e-30) - 1
        strongest = np.argsort(-change, kind="stable")[:3]
        preferred[label] = ", ".join(f"{expert} ({change[expert]:+.1%})" for expert in strongest)
    rows = [["group", "prompts", "clusters", "experts it uses most, against all (mean of layers)"]]
    for label, prompts in figures.groups.items():
        clusters = sum(count > 0 for count in figures.group_clusters.get(label, ()))
        rows.append([label, str(prompts), str(clusters) if figures.clusters else "", preferred.get(label, "")])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
