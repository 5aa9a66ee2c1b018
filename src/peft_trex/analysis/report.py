"""RoutingReport: what the routers of an adapter did on some data, in figures, in words and as a picture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from .figures import RoutingFigures
from .plot import draw
from .text import markdown, summary


@dataclass(frozen=True)
class RoutingReport(RoutingFigures):
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

    def to_dict(self) -> dict[str, Any]:
        """All but the layers' moments, as JSON holds it: with lists instead of tuples."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return json.loads(json.dumps({**vars(self), "layers": layers}))

    def __str__(self) -> str:
        return summary(self)

    def to_markdown(self) -> str:
        """Tables by kind of layer, what stands out by name, clusters and groups: as long for 200 layers as for 10."""
        return markdown(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the report, as heatmaps over blocks and kinds of layers, to a file of any kind that matplotlib writes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        draw(self, path)
