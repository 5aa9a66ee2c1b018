"""What is said of an adapter in its model card and by `peft-trex info`: the same facts in the same words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData

from .fused import shape_of
from .loading import STATIC

# PEFT's template of a card has this where nobody has written anything, and this title.
MISSING = "[More Information Needed]"
NO_TITLE = "# Model Card for Model ID"
BEGIN = "<!-- peft-trex writes this part anew with each save -->"
END = "<!-- the part of peft-trex ends -->"
CARD_HEADING = "## Loading this adapter"
GUIDE = "https://github.com/peft-trex/peft-trex/blob/main/docs/guide"
# What PEFT says of an adapter whose method it does not know, before any code of this package could run.
UNKNOWN = "KeyError: 'TREX'"
VERSIONS = "### Framework versions"
# A file does not tell these two fits apart.
WIDE = "input or leading"
HEADING = re.compile(r"(#{1,6}) \S")


def facts_of(
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    fitted: bool,
    fits: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The facts of an adapter, each with its name.

    Args:
        config: the fields of its configuration.
        shapes: the shapes of its tensors by their names, such as "model.layers.0.mlp.up_proj.trex_A".
        fitted: whether its prior is fitted.
        fits: of its static weights, by the layers' names, for those of which a calibration in this process told it.
    """
    layers = [name.removesuffix(".trex_A") for name in shapes if name.endswith(".trex_A")]
    sizes = {(shapes[f"{layer}.trex_A"][0], shapes[f"{layer}.trex_B"][-1]) for layer in layers}
    full = (config["r_a"], config["r_b"])
    experts = f"{full[0]} x {full[1]}" if config["expert_layout"] == "grid" else f"{full[0]}, paired"
    pruned = "" if sizes <= {full} else ", some of them pruned"
    trained = {name: shape for name, shape in shapes.items() if _kind(name) != STATIC}
    return {
        "Base model": str(config["base_model_name_or_path"] or "not named"),
        "Experts": f"{experts} in each of {len(layers)} layers{pruned}",
        "Token router": _router(config),
        "Clusters": _clusters(config, fitted),
        "Parameters": f"{sum(math.prod(shape) for shape in trained.values()):,}",
        "Calibrated": _calibrated(layers, shapes, fits or {}),
        "Written by": f"peft-trex {config['peft_trex_version'] or 'of before 0.1.0'}",
    }


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _router(config: Mapping[str, Any]) -> str:
    if not config["use_router"]:
        return "none"
    return "whole" if config["router_rank"] is None else f"of rank {config['router_rank']}"


def _clusters(config: Mapping[str, Any], fitted: bool) -> str:
    if not config["use_prior"]:
        return "none (use_prior=False)"
    source = "the prompt" if not config["chat_markers"] else "the latest user message"
    if config["prior_encoder"] == "external":
        source = f"embeddings of width {config['prior_dim']}, which the caller gives"
    return f"{config['num_clusters']}, {'fitted' if fitted else 'not fitted yet'}, by {source}"


def _calibrated(layers: Sequence[str], shapes: Mapping[str, Sequence[int]], fits: Mapping[str, str]) -> str:
    """Whether there are static weights, and by which fits, where a calibration told them of layers.

    The weights are (S, r_b, n) in each layer; n is r_a for a core, and D_in for both of the other fits.
    """
    static = {layer: shapes[f"{layer}.{STATIC}"] for layer in layers if f"{layer}.{STATIC}" in shapes}
    if not static:
        return "no: a merge would hold the mean routing"
    seen = {layer: "core" if shape[2] == shapes[f"{layer}.trex_A"][0] else WIDE for layer, shape in static.items()}
    counts = Counter(fits.get(layer, kind) for layer, kind in seen.items())
    kinds = [f"{kind} in {count} layers" for kind, count in counts.most_common()]
    sets = next(iter(static.values()))[0]
    clusters = f" and for each of {sets - 1} clusters" if sets > 1 else ""
    return f"for all prompts{clusters}, by the fit to {', to '.join(kinds)}"


def facts_of_model(tuner: Any, adapter_name: str) -> dict[str, str]:
    """The facts of an adapter in a model, and what is noted of it besides."""
    layers, prior = tuner.layers_of(adapter_name), tuner.prior_of(adapter_name)
    shapes = {}
    for name, layer in layers.items():
        for kind in (*layer.adapter_layer_names, STATIC):
            tensors = getattr(layer, kind)
            if adapter_name in tensors:
                shapes[f"{name}.{kind}"] = shape_of(tensors[adapter_name])
    notes = tuner.card_notes.get(adapter_name, {})
    report = notes.get("merge")
    fits = None if report is None else report.fits
    facts = facts_of(tuner.peft_config[adapter_name].to_dict(), shapes, prior is not None and prior.fitted, fits)
    if notes.get("tasks"):
        facts["Tasks"] = ", ".join(notes["tasks"])
    if notes.get("learning_rate") is not None:
        facts["Learning rate"] = f"{notes['learning_rate']:g}"
    if report is not None and facts["Calibrated"].startswith("for all"):
        text = f"misses {report.error:.2%} of what the adapter adds"
        if report.cluster_error is not None:
            text += f"; one LoRA for each cluster misses {report.cluster_error:.2%}"
        facts["Merged"] = f"{text}; the mean routing {report.mean_routing_error:.2%}"
    return facts


def complete_card(path: str, auto_class: str, facts: Mapping[str, str]) -> None:
    """Fill in a model card that PEFT or a trainer has written: what the adapter is, how to load and how to serve it.

    Sections that PEFT's template leaves empty go; what anybody has written stays.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "trex"})
    base = card.data.get("base_model")
    base = (base[0] if base else None) if isinstance(base, list) else base
    # There is none for some of PEFT's tasks.
    auto_class = auto_class if hasattr(transformers, auto_class) else "AutoModel"
    part = f"{BEGIN}\n\n{_part(base, auto_class, facts)}\n\n{END}"
    text = without_empty_sections(card.text) if MISSING in card.text else card.text
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + part + rest.partition(END)[2]
    elif NO_TITLE in text.splitlines():
        text = text.replace(NO_TITLE, f"# A T-REX adapter of {base or 'a model'}\n\n{part}", 1)
    else:
        text = f"{text.rstrip()}\n\n{part}\n"
    card.text = text
    card.save(path)


def _part(base: str | None, auto_class: str, facts: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""This is a [T-REX](https://arxiv.org/abs/2404.08985) adapter: a mixture of rank-one experts with a
semantic prior.

| | |
|---|---|
{rows}

{CARD_HEADING}

PEFT learns the method from the package `peft-trex`, which must be imported before the adapter is loaded:

```python
import peft_trex  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base or "the base model"}")
model = PeftModel.from_pretrained(base, "this repository's name, or a folder")
```

| error | cure |
|---|---|
| `{UNKNOWN}` | `pip install peft-trex`, and write `import peft_trex` before `PeftModel.from_pretrained` |
| `ModuleNotFoundError: No module named 'peft_trex'` | `pip install peft-trex` |

## Serving this adapter

transformers and PEFT run it as it is. For vLLM and other servers of LoRA, export it as plain LoRA adapters, one for
each cluster of prompts, with a router that chooses among them:

```bash
peft-trex export "a folder with this adapter" --data prompts.jsonl --out lora
```

The guide of peft-trex says how to [serve]({GUIDE}/deploy.md) the export, and how to merge."""


def without_empty_sections(text: str) -> str:
    """A card without the sections in which all is still PEFT's template, and without its empty lists."""
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    kept: list[str] = []
    # A section that is kept keeps those above it in the outline, so the text is read from its end.
    lowest = 7
    for level, lines in reversed(list(_sections(text))):
        body = lines[1:] if level else lines
        if any(line.strip() and line not in template for line in body):
            kept[:0] = [line for line in lines if MISSING not in line and not (line in template and "<!--" in line)]
            # PEFT puts this one at the end, below whatever section comes last.
            lowest = lowest if lines[0] == VERSIONS else level
        elif level < lowest and (lowest < 7 or level == 1):
            kept[:0] = [*lines[:1], ""]
            lowest = level
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def _sections(text: str) -> Iterator[tuple[int, list[str]]]:
    """The sections of a text in order: the level of the heading (0 before the first one), and the lines."""
    level, fenced = 0, False
    lines: list[str] = []
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else HEADING.match(line)
        if heading:
            yield level, lines
            level, lines = len(heading[1]), []
        lines.append(line)
    yield level, lines
