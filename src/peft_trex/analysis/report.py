"""RoutingReport: what the routers of an adapter did on some data, in figures, in words and as a picture.

Axis legend: K clusters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from .figures import SHUT, LayerRouting, group_changes, kinds_of
from .plot import draw

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
    "nats from the block before": ("affinity", ".3f"),
}
GROUP_COLUMNS = {
    "nats about the group": ("mutual_information", ".3f"),
    "variance between groups": ("group_share", ".2f"),
}


@dataclass(frozen=True)
class RoutingReport:
    """What [`routing_report`] measured.

    Attributes:
        adapter_name: the adapter.
        tokens: number of tokens that were seen (by the layer that saw most).
        layers: what each layer did, by its name in the base model.
        groups: the groups, in alphabetical order, and how many prompts each had; empty without `group_by`.
        clusters: (K,), how many prompts fell to each cluster; empty without a fitted prior, as is the next.
        group_clusters: (K,) for each group, how many of its prompts fell to each cluster.
        prior_spread: standard deviation of a prompt's cluster scores, mean over the prompts.
        purity: share of the prompts whose group is the commonest of their cluster.
        nmi: normalised mutual information of the prompts' clusters and groups (arithmetic mean), in [0, 1].
        group_overlap: mean of |cos| between two groups' mean scores, in [0, 1]: at 0 each group has a prior of its
            own, at 1 all have the same or its opposite. Where it is large, see `TRexConfig.prior_whitening`.
    """

    adapter_name: str
    tokens: int
    layers: dict[str, LayerRouting]
    groups: dict[str, int]
    clusters: tuple[int, ...]
    group_clusters: dict[str, tuple[int, ...]]
    prior_spread: float | None
    purity: float | None
    nmi: float | None
    group_overlap: float | None

    def to_dict(self) -> dict[str, Any]:
        """All but the layers' moments, as JSON holds it: with lists instead of tuples."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return json.loads(json.dumps({**vars(self), "layers": layers}))

    def __str__(self) -> str:
        layers = self.layers.values()
        strongest = max(self.layers, key=lambda name: self.layers[name].energy)
        text = (
            f"T-REX routing of {self.adapter_name!r} ({self.tokens} tokens, {len(layers)} layers): adds "
            f"{median(layer.energy for layer in layers):.2%} of a layer's output energy in the median layer, "
            f"{self.layers[strongest].energy:.2%} in the strongest ({strongest}); "
            f"{sum(len(layer.dead) for layer in layers)} of {sum(len(layer.load) for layer in layers)} experts are "
            f"dead, {sum(layer.gate < SHUT for layer in layers)} gates shut"
        )
        entropies = [layer.router_entropy for layer in layers if layer.router_entropy is not None]
        if entropies:
            text += f"; router entropy {median(entropies):.2f} of log E"
        if self.nmi is not None:
            text += f"; clusters against groups: purity {self.purity:.2f}, NMI {self.nmi:.2f}"
        return text

    def to_markdown(self) -> str:
        """Tables by kind of layer, what stands out by name, clusters and groups: as long for 200 layers as for 10."""
        sections = [
            f"# Routing of `{self.adapter_name}`",
            f"{self}.",
            "Medians over the blocks; `adds` is the adapter's energy relative to the layer's own.",
            self._layer_table(),
            "What stands out:",
            self._outliers(),
        ]
        if self.clusters:
            filled = sorted((count for count in self.clusters if count), reverse=True)
            sections.append(
                f"Clusters: {sum(self.clusters)} prompts in {len(filled)} of {len(self.clusters)}; the largest hold "
                f"{', '.join(map(str, filled[:NAMED]))}. Scores of a prompt spread by {self.prior_spread or 0:.2f}."
            )
            if self.group_overlap is not None:
                sections[-1] += f" Those of two groups overlap by {self.group_overlap:.2f}."
        if self.groups:
            sections.append(self._group_table())
        return "\n\n".join(sections) + "\n"

    def plot(self, path: str | os.PathLike[str], *, detail: bool = False) -> None:
        """Draw the report, as heatmaps over blocks and kinds of layers, to a file of any kind that matplotlib writes.

        Args:
            path: the file.
            detail: False draws up to five maps that fit on a screen: which experts and which clusters the groups use,
                in which layers the adapter adds most, and where the groups are told apart. True draws all maps, among
                them the load of each expert in each layer.

        Raises:
            ImportError: if matplotlib is missing.
        """
        draw(path, str(self).partition(";")[0], self.layers, self.groups, self.group_clusters, detail)

    def _layer_table(self) -> str:
        columns = COLUMNS | (GROUP_COLUMNS if self.groups else {})
        rows = [["layers", "blocks", *columns]]
        for kind, layers in kinds_of(self.layers).items():
            rows.append([f"`{kind}`", str(len(layers))])
            for field, form in columns.values():
                values = [getattr(layer, field) for layer in layers.values()]
                numbers = [value for value in values if value is not None]
                rows[-1].append(format(median(numbers), form) if numbers else "")
        return _table(rows)

    def _outliers(self) -> str:
        """One line for each thing that stands out, with the layers where it does most."""
        layers = self.layers

        def line(title: str, form: str, values: Mapping[str, float]) -> str:
            ranked = sorted(values, key=lambda name: -abs(values[name]))[:NAMED]
            named = ", ".join(f"`{name}` ({format(values[name], form)})" for name in ranked) or "none"
            return f"- {title}: {named}" + f", and {len(values) - NAMED} more" * (len(values) > NAMED)

        strongest = sorted(layers, key=lambda name: -layers[name].energy)[:NAMED]
        shut = {name: layer.gate for name, layer in layers.items() if layer.gate < SHUT}
        dead = {name: len(layer.dead) for name, layer in layers.items() if layer.dead}
        duplicates = {name: len(layer.duplicates) for name, layer in layers.items() if layer.duplicates}
        used = {name: layer.used_experts for name, layer in layers.items()}
        collapsed = {name: count for name, count in used.items() if count < len(layers[name].load) / 4}
        lines = [
            line("layers that add most", ".2%", {name: layers[name].energy for name in strongest}),
            line(f"gates that are shut (below {SHUT:g})", ".1e", shut),
            line("dead experts", "d", dead),
            line("duplicate pairs", "d", duplicates),
            line("load on less than a quarter of the experts (experts used)", ".1f", collapsed),
        ]
        return "\n".join(lines)

    def _group_table(self) -> str:
        changes = group_changes(self.layers, self.groups)
        rows = [["group", "prompts", "clusters", "experts it uses most, against all (mean of layers)"]]
        for label, prompts in self.groups.items():
            change = changes.get(label, np.zeros(0))
            preferred = np.argsort(-change, kind="stable")[:3]
            clusters = sum(count > 0 for count in self.group_clusters.get(label, ())) if self.clusters else ""
            experts = ", ".join(f"{expert} ({change[expert]:+.1%})" for expert in preferred)
            rows.append([label, str(prompts), str(clusters), experts])
        return _table(rows)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
