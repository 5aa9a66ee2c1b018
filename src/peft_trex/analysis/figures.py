"""The figures of a routing report, as data without behaviour.

Axis legend: E experts, r_a input and r_b output vectors, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
            (r_a, r_b). It is 1 where all experts weigh alike, since their sum then has rank one. None in the paired
            layout.
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
    tokens: int
    moments: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All attributes but the moments."""
        return {name: value for name, value in vars(self).items() if name != "moments"}


@dataclass(frozen=True)
class RoutingFigures:
    """The fields of a [`RoutingReport`], which describes them."""

    adapter_name: str
    tokens: int
    layers: dict[str, LayerRouting]
    groups: dict[str, int]
    clusters: tuple[int, ...]  # (K,)
    group_clusters: dict[str, tuple[int, ...]]  # (K,)
    prior_spread: float | None
    purity: float | None
    nmi: float | None
    group_overlap: float | None
