"""The figures of a layer in a routing report, and how the layers are put together.

Axis legend: E experts, r_a input and r_b output vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Layer = TypeVar("Layer")
# A gate below this value is shut: it lets nothing of note through.
SHUT = 1e-3
# An expert is dead if it adds less than this share of the energy that the mean expert of its layer adds.
DEAD = 0.01
# Two experts are duplicates, up to a factor, if the cosine of what they add to all tokens is above this value.
ALIKE = 0.99


@dataclass(frozen=True)
class LayerRouting:
    """What the routing of one layer did. Means are over its tokens; energies are means of squared lengths.

    Attributes:
        omega, gate: the two sigmoids, in [0, 1].
        router_entropy: entropy of a token's router, relative to log E: 1 is uniform, 0 chooses one expert. This and
            the next two are None without a router.
        effective_experts: exp of that entropy, from 1 to E: how many experts a token uses.
        router_load: (E,), the router's mean probability of each expert.
        load: (E,), each expert's share of a token's weights (of their absolute values), router and prior together.
        used_experts: exp of the entropy of `load`, from 1 to E: how many experts all tokens together use.
        token_share: the router's share of a token's weights, in [0, 1]; the rest is the prior's.
        core_rank: how many directions the weights mix: the effective rank tr(GG')^2 / tr(GG'GG') of a token's weights
            (r_a, r_b). It is 1 where all experts weigh alike. None in the paired layout.
        energy: what the adapter adds, relative to the output of the layer it is in.
        input_contribution: (r_a,), the energy that would go if this input vector went, relative to the adapter's.
            Vectors that cancel each other may have more than 1 together.
        output_contribution: (r_b,), the same for each output vector.
        expert_contribution: (E,), the same for each expert; in the grid layout expert (i, j) stands at i * r_b + j.
        dead: the experts that add less than 1 % of what the mean expert of the layer adds.
        duplicates: pairs of experts whose outputs agree, up to a factor (cosine over the tokens above 0.99).
        group_load: `load` over the tokens of each group.
        mutual_information: what an expert drawn by its weight says about the group of its token, in nats.
        group_share: share of the variance of a prompt's mean weights that lies between the groups, in [0, 1].
        affinity: how well a token's experts in the same kind of layer one block before tell those here: the mutual
            information, in nats, of an expert drawn there by its weight and one drawn here. 0 tells nothing. None in
            the first block, and where the two layers do not get the same rows of tokens.
        tokens: how many were seen.
        moments: (E, E), the mean of p p^T for the tokens' experts `p_ij = a_i G_ij`, for [`prune_trex`]; `to_dict`
            leaves it out.
    """

    omega: float
    gate: float
    router_entropy: float | None
    effective_experts: float | None
    router_load: tuple[float, ...] | None
    load: tuple[float, ...]
    used_experts: float
    token_share: float
    core_rank: float | None
    energy: float
    input_contribution: tuple[float, ...]
    output_contribution: tuple[float, ...]
    expert_contribution: tuple[float, ...]
    dead: tuple[int, ...]
    duplicates: tuple[tuple[int, int], ...]
    group_load: dict[str, tuple[float, ...]]
    mutual_information: float | None
    group_share: float | None
    affinity: float | None
    tokens: int
    moments: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All attributes but the moments."""
        return {name: value for name, value in vars(self).items() if name != "moments"}


def kinds_of(layers: Mapping[str, Layer]) -> dict[str, dict[int, Layer]]:
    """The layers by kind and block: `model.layers.3.mlp.up_proj` is an `up_proj` in block 3.

    A kind keeps as many parts of the name as tell the kinds apart.
    """
    kinds: dict[str, dict[int, Layer]] = {}
    for name, layer in layers.items():
        match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
        kind, block = (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, 0)
        kinds.setdefault(kind, {})[block] = layer
    short: dict[str, dict[int, Layer]] = {}
    parts = 0
    while len(short) < len(kinds):
        parts += 1
        short = {".".join(kind.split(".")[-parts:]): blocks for kind, blocks in kinds.items()}
    return short


def layers_before(names: Iterable[str]) -> dict[str, str]:
    """For each layer, by name, the one of its kind in the nearest block before; none for those of a first block."""
    before: dict[str, str] = {}
    for blocks in kinds_of({name: name for name in names}).values():
        order = [blocks[block] for block in sorted(blocks)]
        before.update(zip(order[1:], order, strict=False))
    return before


def group_changes(
    layers: Mapping[str, LayerRouting], groups: Mapping[str, int], most: int | None = None
) -> dict[str, np.ndarray]:
    """How far each expert's load (E,) in a group is above its mean over the groups, as a share of that mean.

    The loads are means over the layers of the commonest size. `most` keeps the groups of the most prompts.
    """
    grouped = [layer for layer in layers.values() if layer.group_load]
    sizes = [len(layer.load) for layer in grouped]
    size = max(sizes, key=sizes.count, default=0)
    loads = [layer.group_load for layer in grouped if len(layer.load) == size]
    labels = [label for label in groups if all(label in load for load in loads)]
    largest = set(sorted(labels, key=lambda label: -groups[label])[:most])
    labels = [label for label in labels if label in largest]
    if not labels:
        return {}
    mean = np.mean([[load[label] for label in labels] for load in loads], axis=0)  # (groups, E)
    return dict(zip(labels, mean / np.maximum(mean.mean(0), 1e-30) - 1, strict=True))
