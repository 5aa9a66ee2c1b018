"""What the routers of a trained T-REX adapter do: whether they choose, whether they tell tasks apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quality.corpora import Row
from quality.scoring import Texts

from peft_trex import LayerRouting, routing_report

# what a row calls a figure, and what `LayerRouting` does
BY_LAYER = {
    "omega": "omega",
    "gate": "gate",
    "token_entropy": "router_entropy",
    "token_share": "token_share",
    "task_share": "group_share",
    "core_rank": "core_rank",
}


def diagnose(model: Any, texts: Texts, rows: Sequence[Row], most: int = 128, batch_rows: int = 16) -> dict[str, Any]:
    """Look at the routing on some rows' prompts.

    Returns:
        What [`peft_trex.routing_report`] says of each layer, and of the prompts' clusters against their tasks: see
        [`peft_trex.LayerRouting`] and [`peft_trex.RoutingReport`]. None where the adapter has no such part.
    """
    model.eval()
    report = routing_report(model, _prompts(texts, list(rows)[:most], batch_rows), group_by="task", progress=False)
    layers = list(report.layers.values())
    found = {name: _of(layers, field) for name, field in BY_LAYER.items()}
    by_model = {name: getattr(report, name) for name in ("prior_spread", "purity", "nmi", "group_overlap")}
    return {**found, **{name: value if value is None else round(value, 4) for name, value in by_model.items()}}


def _prompts(texts: Texts, rows: list[Row], batch_rows: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), batch_rows):
        part = rows[start : start + batch_rows]
        examples = [{"prompt": texts.prompt(row), "completion": ()} for row in part]
        examples = [one | extra for one, extra in zip(examples, texts.embeddings(part), strict=True)]
        yield {**texts.collate(examples), "task": [row["task"] for row in part]}


def _of(layers: list[LayerRouting], field: str) -> list[float] | None:
    values = [getattr(layer, field) for layer in layers]
    return None if values[0] is None else [round(value, 4) for value in values]
