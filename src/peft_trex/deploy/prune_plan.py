"""What to remove next from an adapter, greedily: the vector or layer that costs least for each parameter it saves.

Axis legend: r_a input and r_b output vectors of a layer, E experts, J the output vectors that are kept.

A layer adds `gate * B m` with `m = S p`, where p are its experts' outputs before B and S sums over the input vectors.
With fewer vectors it adds `gate * B U m'`, where m' are the sums over those that are kept. U (r_b, J) lets them take
over what they can (least squares, from the second moments of p), and what is missed follows without another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..analysis.figures import SHUT, LayerRouting
from .moments import RIDGE, Moments, ridge

# What misses no more than this share of what a layer adds is removed whatever the budget is.
NOTHING = 1e-6


class Selection(NamedTuple):
    """What is kept of a layer, by its numbers in it; nothing where the layer goes."""

    inputs: list[int]
    outputs: list[int]
    experts: list[int]
    take_over: Tensor  # U (r_b, J)
    # What is missed is relative to the energy of the base layer's output.
    missed: float
    parameters: int


class LayerCosts:
    """What a layer misses with fewer vectors, from its state (what it holds of the adapter) and its routing."""

    def __init__(self, state: Mapping[str, Any], routing: LayerRouting) -> None:
        self.routing, self.grid = routing, state["trex_settings"].layout == "grid"
        self.idle = routing.gate < SHUT or not routing.energy > 0
        self.sizes = {kind: value.numel() for kind, value in state.items() if isinstance(value, nn.Parameter)}
        B = state["trex_B"].detach().double().cpu()
        self.r_a, self.r_b, self.BB = len(state["trex_A"]), B.shape[1], B.T @ B
        self.pp = torch.as_tensor(routing.moments, dtype=torch.float64)  # (E, E)
        # In the paired layout, where E = r_b, expert i has output vector i.
        self.S = (torch.arange(len(self.pp)) % self.r_b == torch.arange(self.r_b)[:, None]).double()  # (r_b, E)
        self.mp, self.mm = self.S @ self.pp, self.S @ self.pp @ self.S.T
        self.added = float((self.BB * self.mm).sum())
        # Rounding must not make it look as if the whole layer missed something.
        self.whole = self.select(list(range(self.r_a)), list(range(self.r_b)))._replace(missed=0.0)
        self.gone = Selection([], [], [], self.BB[:, :0], routing.energy, 0)

    def select(self, inputs: list[int], outputs: list[int]) -> Selection:
        """Keep these vectors, of which the output vectors take over what they can from the others."""
        experts = [i * self.r_b + j for i in inputs for j in outputs] if self.grid else inputs
        S = self.S[outputs] * torch.isin(torch.arange(len(self.pp)), torch.tensor(experts))  # (J, E)
        moments = Moments(S @ self.pp @ S.T, self.mp @ S.T, self.mm, torch.ones(()))
        start = torch.eye(self.r_b, dtype=torch.float64)[:, outputs]
        U = moments.solve(start, ridge(moments.zz, RIDGE["core"]))
        missed = moments.missed(U, self.BB) / self.added if self.added > 0 else 0.0
        shares = dict.fromkeys(("trex_router", "trex_map", "trex_core"), len(experts) / len(self.pp))
        shares |= {"trex_A": len(inputs) / self.r_a, "trex_B": len(outputs) / self.r_b}
        parameters = sum(round(shares.get(kind, 1) * size) for kind, size in self.sizes.items())
        return Selection(inputs, outputs, experts, U, missed * self.routing.energy, parameters)

    def price(self, selection: Selection, rest: Selection) -> tuple[bool, float]:
        """Whether `rest` misses anything of note, and what it misses more for each parameter that it saves."""
        saved = selection.parameters - rest.parameters
        return rest.missed > NOTHING * self.routing.energy, (rest.missed - selection.missed) / saved

    def cheapest(self, selection: Selection, last: bool = False) -> Selection:
        """What is left when the cheapest vector goes, or the whole layer if that is cheaper and it is not the last."""
        inputs, outputs = selection.inputs, selection.outputs
        if self.grid:
            sides = [(fewer, outputs) for fewer in _shorter(inputs)] + [(inputs, fewer) for fewer in _shorter(outputs)]
        else:
            sides = [(fewer, fewer) for fewer in _shorter(inputs)]
        rests = [self.select(*side) for side in sides] + ([] if last else [self.gone])
        return min(rests, key=partial(self.price, selection), default=selection)


def _shorter(numbers: list[int]) -> list[list[int]]:
    """The numbers without one of them, for each one; a single number cannot go."""
    return [[other for other in numbers if other != number] for number in numbers] if len(numbers) > 1 else []


def choose(layers: Mapping[str, LayerCosts], unseen: int, budget: float) -> dict[str, Selection]:
    """What to keep of each layer, so that no more parameters than the budget are left, if that is possible.

    One layer stays in any case. `unseen` parameters belong to layers that are not among these; they stay too.
    """
    selections = {name: layer.gone if layer.idle else layer.whole for name, layer in layers.items()}
    # The best next removal of each layer.
    rests = {name: layer.cheapest(layer.whole) for name, layer in layers.items() if not layer.idle}
    while rests:
        name = min(rests, key=lambda name: layers[name].price(selections[name], rests[name]))
        layer, selection, rest = layers[name], selections[name], rests.pop(name)
        left = unseen + sum(other.parameters for other in selections.values())
        if rest is layer.gone and left == selection.parameters:
            # The last of all layers may get smaller, but not go.
            rest = layer.cheapest(selection, last=True)
        if rest is selection or (left <= budget and layer.price(selection, rest)[0]):
            break
        selections[name] = rest
        if rest is not layer.gone:
            rests[name] = layer.cheapest(rest)
    return selections
