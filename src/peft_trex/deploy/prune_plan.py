"""What to remove next from an adapter, greedily: the vector or layer that costs least for each parameter it saves.

Axis legend: r_a input and r_b output vectors of a layer, E experts, J the output vectors that are kept.

A layer adds `gate * B m` with `m = S p`, where p are its experts' outputs before B and S sums over the input vectors.
With fewer vectors it adds `gate * B U m'`, where m' are the sums over those that are kept. U (r_b, J) lets them take
over what they can (least squares, from the second moments of p), and what is missed follows without another run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..analysis.figures import SHUT, LayerRouting
from ..layer import TRexLayer
from .moments import RIDGE, Moments, ridge

# What misses no more than this share of what a layer adds is removed whatever the budget is.
NOTHING = 1e-6


class Selection(NamedTuple):
    """The vectors of a layer that are kept, by their numbers in it; none where the layer goes."""

    inputs: list[int]
    outputs: list[int]
    # What is missed is relative to the energy of the base layer's output.
    missed: float
    parameters: int


class LayerCosts:
    """What a layer misses with fewer vectors, by the moments of a routing report."""

    def __init__(self, layer: TRexLayer, adapter_name: str, routing: LayerRouting) -> None:
        A, B = layer.trex_A[adapter_name].detach(), layer.trex_B[adapter_name].detach().double().cpu()
        self.r_a, self.r_b = A.shape[0], B.shape[1]
        self.grid = layer.trex_settings[adapter_name]["layout"] == "grid"
        self.energy = routing.energy
        self.idle = routing.gate < SHUT or not routing.energy > 0
        holders = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names}
        self.sizes = {kind: held[adapter_name].numel() for kind, held in holders.items() if adapter_name in held}
        self.BB = B.T @ B
        self.pp = torch.as_tensor(routing.moments, dtype=torch.float64)  # (E, E)
        S = self._sums(range(self.r_a), range(self.r_b))
        self.mp, self.mm = S @ self.pp, S @ self.pp @ S.T
        self.added = float((self.BB * self.mm).sum())

    def experts(self, inputs: Sequence[int], outputs: Sequence[int]) -> list[int]:
        return [i * self.r_b + j for i in inputs for j in outputs] if self.grid else list(inputs)

    def _sums(self, inputs: Sequence[int], outputs: Sequence[int]) -> Tensor:
        """S (r_b, E), with which `m = S p`."""
        experts = torch.tensor(self.experts(inputs, outputs))
        sums = torch.zeros(self.r_b, len(self.pp), dtype=torch.float64)
        # In the paired layout, expert i has output vector i.
        sums[experts % self.r_b, experts] = 1.0
        return sums

    def take_over(self, inputs: Sequence[int], outputs: Sequence[int]) -> tuple[Tensor, float]:
        """U (r_b, J), by which the kept output vectors take over; and what is missed all the same."""
        S = self._sums(inputs, outputs)[list(outputs)]  # (J, E)
        moments = Moments(S @ self.pp @ S.T, self.mp @ S.T, self.mm, torch.ones(()))
        start = torch.eye(self.r_b, dtype=torch.float64)[:, list(outputs)]
        U = moments.solve(start, ridge(moments.zz, RIDGE["core"]))
        share = moments.missed(U, self.BB) / self.added if self.added > 0 else 0.0
        return U, share * self.energy

    def select(self, inputs: list[int], outputs: list[int]) -> Selection:
        shares = dict.fromkeys(("trex_router", "trex_map"), len(self.experts(inputs, outputs)) / len(self.pp))
        shares |= {"trex_A": len(inputs) / self.r_a, "trex_B": len(outputs) / self.r_b}
        parameters = sum(round(shares.get(kind, 1) * size) for kind, size in self.sizes.items())
        return Selection(inputs, outputs, self.take_over(inputs, outputs)[1], parameters)

    def whole(self) -> Selection:
        return Selection(list(range(self.r_a)), list(range(self.r_b)), 0.0, sum(self.sizes.values()))

    def gone(self) -> Selection:
        return Selection([], [], self.energy, 0)

    def removals(self, selection: Selection) -> list[Selection]:
        """What is left by removing one more vector, for each one that may go, and last by removing the layer."""
        inputs, outputs = selection.inputs, selection.outputs
        if self.grid:
            sides = [(fewer, outputs) for fewer in _shorter(inputs)] + [(inputs, fewer) for fewer in _shorter(outputs)]
        else:
            sides = [(fewer, fewer) for fewer in _shorter(inputs)]
        return [*(self.select(*side) for side in sides), self.gone()]

    def price(self, selection: Selection, rest: Selection) -> tuple[bool, float]:
        """Whether `rest` misses anything of note, and what it misses more for each parameter that it saves."""
        saved = selection.parameters - rest.parameters
        return rest.missed > NOTHING * self.energy, (rest.missed - selection.missed) / saved

    def cheapest(self, selection: Selection, rests: Sequence[Selection]) -> Selection:
        return min(rests, key=lambda rest: self.price(selection, rest))


def _shorter(numbers: list[int]) -> list[list[int]]:
    """The numbers without one of them, for each one; a single number cannot go."""
    return [[other for other in numbers if other != number] for number in numbers] if len(numbers) > 1 else []


def choose(layers: Mapping[str, LayerCosts], unseen: int, keep: float) -> dict[str, Selection]:
    """What to keep of each layer, so that at most the share `keep` of all parameters is left, if that is possible.

    One layer stays in any case. `unseen` parameters belong to layers that are not among these; they stay too.
    """
    selections = {name: layer.whole() for name, layer in layers.items()}
    budget = keep * (unseen + sum(selection.parameters for selection in selections.values()))
    selections |= {name: layer.gone() for name, layer in layers.items() if layer.idle}
    left = unseen + sum(selection.parameters for selection in selections.values())
    # The best next removal of each layer.
    rests = {
        name: layer.cheapest(selections[name], layer.removals(selections[name]))
        for name, layer in layers.items()
        if not layer.idle
    }
    while rests:
        name = min(rests, key=lambda name: layers[name].price(selections[name], rests[name]))
        layer, selection, rest = layers[name], selections[name], rests.pop(name)
        costly, _ = layer.price(selection, rest)
        if costly and left <= budget:
            break
        if not rest.inputs and left == selection.parameters:
            # This is the last of all layers: it may get smaller, but not go.
            smaller = layer.removals(selection)[:-1]
            if not smaller:
                break
            rests[name] = layer.cheapest(selection, smaller)
            continue
        left += rest.parameters - selection.parameters
        selections[name] = rest
        if rest.inputs:
            rests[name] = layer.cheapest(rest, layer.removals(rest))
    return selections
