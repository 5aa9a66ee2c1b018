"""What a calibration sums up while the model runs over the data, within a bound of memory.

Axis legend: N tokens, D_in a layer's width, r_a input and r_b output features, S sets of tokens, p leading directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data_pass import Attended, Data, DataPass
from ..layer import TRexLayer
from ..mixture import mix_features
from ..model import find_peft_model, find_tuner
from ..prior.inputs import Inputs
from ..undo import Undone
from .moments import Moments, add_products
from .shared import InputSums, fill, fitting, most_directions, share, sketch_size

Fit = Literal["auto", "core", "leading", "input"]


class Features(NamedTuple):
    """Moments of a layer's features z, and how z comes of x: by a `basis` (n, D_in), or as it is, with None."""

    fit: Fit
    moments: Moments
    basis: Tensor | None


class Sums:
    """The moments of layers over the data: of each cluster and, last, of the tokens that have none.

    Those of `A x` are kept for each of the `layers`, those of x for the names in `wide`, and those of `basis x` for
    the layers with a basis. Sketches of x are kept for so many `directions`.
    """

    def __init__(self, layers: Mapping[str, Any], sets: int, wide: Collection[str] = (), directions: int = 0) -> None:
        self.layers, self.sets, self.wide, self.directions = layers, sets, wide, directions
        self.bases: dict[str, Tensor] = {}
        self.cores: dict[str, Moments] = {}
        self.led: dict[str, Moments] = {}
        self.mixed: dict[str, Tensor] = {}  # the sums of m x^T (S, r_b, D_in)
        self.inputs = InputSums(sets, wide, directions)

    def of(self, name: str) -> tuple[Moments, Features | None]:
        """The moments of a layer: of `A x`, and of x or of its leading directions if there are some."""
        core, inputs = self.cores[name], self.inputs.of(name)
        if name in self.bases:
            return core, Features("leading", self.led[name], self.bases[name])
        if inputs is None:
            return core, None
        return core, Features("input", Moments(inputs, self.mixed[name], core.mm, core.tokens), None)


class Plan(NamedTuple):
    """Data that can be read as often as planned, and what is gathered.

    Attributes:
        passes: the layers that are fitted from all of their input, in each pass over the data.
        directions: the number of leading directions that are looked for; 0 for none.
    """

    data: Data
    passes: list[Collection[str]]
    directions: int = 0


def make_plan(model: nn.Module, adapter_name: str, data: Data, sets: int, limits: tuple[Fit, int]) -> Plan:
    """Plan the passes over the data for a fit within so many bytes.

    The first batch tells which layers share their inputs, where that matters.

    Raises:
        ValueError: if the data must be read several times, but can be read once.
    """
    (fit, most), layers = limits, find_tuner(model).layers_of(adapter_name)
    if fit == "core":
        return Plan(data, [()])
    once, advice = isinstance(data.batches, Iterator), "give a DataLoader or a list of batches"
    if fit == "leading" and once:
        raise ValueError(f"fit='leading' reads the data twice, but the dataloader is an iterator; {advice}.")
    shared = share(layers, adapter_name, (), sets)
    if sum(each.size for each in shared) > most:
        first: Iterable[Any] = data.batches
        if once:
            first, rest = itertools.tee(data.batches)
            data = replace(data, batches=rest)
        # Without sets, nothing is summed up.
        watched = Sums(layers, 0, list(layers))
        gather(model, adapter_name, Data(first, 1), watched)
        shared = share(layers, adapter_name, watched.inputs.groups, sets)
    if fit == "input":
        passes = fill(shared, most)
        if once and len(passes) > 1:
            raise ValueError(
                f"fit='input' reads the data {len(passes)} times for this model, but the dataloader is an iterator, "
                f"which can be read once; {advice}, more memory_gb, or use fit='auto'."
            )
        return Plan(data, list(passes))
    directions = 0 if once else most_directions(layers, adapter_name, shared, (sets, most))
    if fit == "leading":
        if not directions:
            raise ValueError("memory_gb has no room for fit='leading'; give more of it, or use fit='core'.")
        return Plan(data, [()], directions)
    return Plan(data, [fitting(layers, shared, most - sketch_size(shared, directions))], directions)


def gather(model: nn.Module, adapter_name: str, data: Data, sums: Sums) -> None:
    """Run the model over the data, and sum up what the layers do."""
    tuner, peft_model, sets = find_tuner(model), find_peft_model(model), sums.sets
    for name, layer in sums.layers.items():
        A, B = layer.trex_A[adapter_name], layer.trex_B[adapter_name]
        # MPS has no float64.
        device = torch.device("cpu") if A.device.type == "mps" else A.device
        sums.cores[name] = Moments.zeros(sets, len(A), B.shape[1], device)
        if name in sums.wide:
            sums.mixed[name] = sums.cores[name].mz.new_zeros(sets, B.shape[1], A.shape[1])
        if name in sums.bases:
            sums.led[name] = Moments.zeros(sets, len(sums.bases[name]), B.shape[1], device)

    def count(name: str, layer: TRexLayer, args: tuple) -> None:
        A, core = layer.trex_A[adapter_name], sums.cores[name]
        tokens = layer.tokens_of(args[0])
        x, kept = layer._cast_input_dtype(tokens, A.dtype), attended.kept(tokens, layer)
        clusters = layer.cluster_of(args[0], adapter_name) if sets > 1 else x.new_zeros(x.shape[:-1], dtype=torch.long)
        where = clusters[kept].to(core.zz.device)
        watched = name in sums.wide or sums.directions
        rows = sums.inputs.read(name, tokens, x, kept, where) if watched else None
        if not sets:
            return
        a = F.linear(x, A)
        m = mix_features(a, layer.expert_weights(args[0], adapter_name), layer.trex_settings[adapter_name].layout)
        a, m = (values[kept].to(core.zz.device) for values in (a, m))
        core.add(a, m, where)
        if name in sums.wide and rows is not None:
            add_products(sums.mixed[name], m, rows, where)
        if name in sums.bases:
            basis = sums.bases[name]
            z = F.linear(x.to(basis.dtype), basis)
            sums.led[name].add(z[kept].to(core.zz.device), m, where)

    passing = DataPass(tuner, adapter_name, data)
    with Undone(passing), Attended(tuner) as attended, passing as batches, ExitStack() as hooks:
        for name, layer in sums.layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(count, name)))
        for batch in batches:
            attended.start(Inputs.of(batch))
            peft_model(**batch)
            sums.inputs.close()
