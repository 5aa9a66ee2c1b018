"""A smaller adapter from a trained one: without the vectors and layers that carry least, as a routing report measured.

Axis legend: r_a input and r_b output vectors of a layer, E experts, D_out its width; I and J the input and the output
vectors that are kept.

A layer adds `gate * B m` with `m_j = sum_i p_ij`, and the report has the second moments of p. Without some vectors it
adds `gate * B U m'`, with `m'_j = sum_(i in I) p_ij` for j in J, where U (r_b, J) is chosen so that what is kept takes
over what it can (least squares, in closed form); what is missed follows without another run. Two things are not in the
moments: the softmax is over fewer experts, which a layer's token scale makes up for on average, and layers that come
later see other inputs. `pruning_curve` measures what that does to the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .batches import check_count, reading
from .config import TRexConfig
from .export import target_names
from .layer import TRexLayer
from .merging import Attended, Moments, only_adapter, ridge_of, uncompiled
from .model import TRexModel, find_peft_model, find_tuner
from .routing import SHUT, RoutingReport, layers_of

NOTHING = 1e-6  # of what a layer's adapter adds: vectors that miss no more are removed whatever `keep` is


@dataclass(frozen=True)
class TRexPruneReport:
    """What `prune_trex` did.

    Attributes:
        keep: as it was given.
        parameters_before, parameters: of the adapter's layers, before and after.
        error: what is missed of what the adapter adds, each layer counting by what it adds relative to its base
            layer's output: by the moments of the routing report, without another run.
        layers: the same for each layer by itself; 1 for one that is gone.
        sizes: (r_a, r_b) of each layer that is left.
        removed: the layers that are gone.
    """

    keep: float
    parameters_before: int
    parameters: int
    error: float
    layers: dict[str, float]
    sizes: dict[str, tuple[int, int]]
    removed: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"T-REX pruned to {self.parameters} of {self.parameters_before} parameters "
            f"({self.parameters / self.parameters_before:.1%}): misses {self.error:.2%} of what the adapter adds; "
            f"{len(self.removed)} of {len(self.layers)} layers are gone"
        )


@dataclass(frozen=True)
class PruningPoint:
    """A point of `pruning_curve`.

    Attributes:
        keep: as it was given.
        parameters, share: of the pruned adapter, and relative to the whole one.
        error: what it misses, as in [`TRexPruneReport`].
        kl: KL(whole || pruned) of the predictions, in nats, mean over the tokens that count.
    """

    keep: float
    parameters: int
    share: float
    error: float
    kl: float


def prune_trex(model: nn.Module, report: RoutingReport, keep: float = 1.0) -> TRexPruneReport:
    """Remove the input and output vectors of an adapter that carry least, and layers that carry nothing.

    What a vector carries is measured: the energy of the change of its layer's output if it were removed and what is
    left took over what it can, relative to the base layer's output. Vectors go one by one, and layers as a whole,
    whatever misses least for each parameter that it saves; a gate that is shut (below 0.001), and what carries nothing
    (less than a millionth of what its layer adds), in any case.

    The adapter is changed in place: its layers have fewer vectors each, which its configuration names in
    `expert_pattern`; layers that are gone are those of the base model again, and no longer in `target_modules`. It
    saves, loads, trains, merges and exports as before. Calibrated static weights are dropped; an optimizer must be
    made anew. To go back, save the adapter first. A short training afterwards mends most of the loss.

    Args:
        model: a model with the adapter, which has not changed since the report.
        report: of [`routing_report`], on data of the kind that the adapter is for; a few thousand tokens do.
        keep: share of the parameters of the adapter's layers, in (0, 1], that are kept at most. 1 removes only what
            carries nothing. `pruning_curve` shows what which share costs.

    Returns:
        A report: sizes, and what is missed.

    Raises:
        ValueError, TypeError: for another `keep`, a report of another adapter or of this one before it was changed, an
            adapter that is merged, sharded or offloaded, or if nothing would be left.
    """
    pruner = _Pruner(model, report)
    plan = pruner.plan(keep)
    with pruner.flags_kept():
        pruner.apply(plan)
    pruner.finish(plan)
    return plan.report


def pruning_curve(
    model: nn.Module,
    report: RoutingReport,
    dataloader: Iterable[Mapping[str, Any]],
    keep: Sequence[float] = (0.9, 0.75, 0.5, 0.25),
    *,
    max_batches: int | None = None,
    progress: bool = True,
) -> list[PruningPoint]:
    """Measure what pruning costs: the size of the adapter against KL(whole || pruned) of the model's predictions.

    The model is left as it was. The KL is over the tokens that are attended to; in a causal language model that gets
    labels, over those whose next token is labelled.

    Args:
        model, report: as for [`prune_trex`].
        dataloader: batches as the model's forward takes them.
        keep: the shares of the parameters to measure, as for [`prune_trex`].
        max_batches: stop after this many batches; None reads all.
        progress: show a progress bar.

    Returns:
        A point for each share, in their order.
    """
    check_count("max_batches", max_batches)
    pruner = _Pruner(model, report)
    plans = [pruner.plan(share) for share in keep]
    tuner, running, tokens = pruner.tuner, find_peft_model(model), Attended(pruner.tuner)
    totals, count = [0.0] * len(plans), 0
    whole = pruner.states()
    try:
        with (
            only_adapter(tuner, pruner.adapter_name),
            pruner.flags_kept(),
            uncompiled(),
            torch.no_grad(),
            reading(dataloader, max_batches, progress, "T-REX pruning") as batches,
        ):
            pruned = []
            for plan in plans:
                pruner.apply(plan)
                pruned.append(pruner.states())
                pruner.put(whole)
            embedding = tuner.input_embedding()
            home = next(tuner.parameters()).device if embedding is None else embedding.weight.device
            for batch in batches:
                batch = {key: part.to(home) if isinstance(part, Tensor) else part for key, part in batch.items()}
                tokens.start(batch)
                kept = _counted(tuner, batch, tokens)
                expected = _log_probabilities(running(**batch), kept)
                count += len(expected)
                for number, states in enumerate(pruned):
                    pruner.put(states)
                    found = _log_probabilities(running(**batch), kept)
                    totals[number] += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
                    pruner.put(whole)
    finally:
        pruner.put(whole)
        for handle in tokens.handles:
            handle.remove()
    if not count:
        raise ValueError("The dataloader gave no batch with a token to predict from; a curve needs some.")
    return [
        PruningPoint(
            plan.report.keep,
            plan.report.parameters,
            plan.report.parameters / plan.report.parameters_before,
            plan.report.error,
            total / count,
        )
        for plan, total in zip(plans, totals, strict=True)
    ]


@dataclass
class _Kept:
    """What stays of a layer: vectors by their number in it, none for a layer that goes; and what that misses."""

    inputs: list[int]
    outputs: list[int]
    missed: float  # relative to the base layer's output energy
    parameters: int


@dataclass
class _Plan:
    kept: dict[str, _Kept]  # of the layers that change
    config: TRexConfig
    report: TRexPruneReport


class _Layer:
    """What the report knows of a layer, and what fewer vectors would miss."""

    def __init__(self, layer: TRexLayer, adapter_name: str, moments: Any, energy: float) -> None:
        A, B = layer.trex_A[adapter_name].detach(), layer.trex_B[adapter_name].detach()
        self.r_a, self.r_b = A.shape[0], B.shape[1]
        self.grid = layer.trex_settings[adapter_name]["layout"] == "grid"
        self.p = torch.as_tensor(moments, dtype=torch.float64)  # (E, E)
        B = B.double().cpu()
        self.BB = B.T @ B
        everything = self._moments(range(self.r_a), range(self.r_b))
        self.added = float((self.BB * everything.mm).sum())
        self.energy = energy
        parameters = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names}
        self._sizes = {kind: own[adapter_name].numel() for kind, own in parameters.items() if adapter_name in own}

    def experts(self, inputs: Iterable[int], outputs: Iterable[int]) -> list[int]:
        return [i * self.r_b + j for i in inputs for j in outputs] if self.grid else list(inputs)

    def _moments(self, inputs: Iterable[int], outputs: Iterable[int]) -> Moments:
        """Those of m' for these vectors, in the place of z, and of m."""
        outputs = list(outputs)
        kept, all_ = (self._sums(*those) for those in ((inputs, outputs), (range(self.r_a), range(self.r_b))))
        left = kept[outputs]
        return Moments(left @ self.p @ left.T, all_ @ self.p @ left.T, all_ @ self.p @ all_.T, torch.ones(()))

    def _sums(self, inputs: Iterable[int], outputs: Iterable[int]) -> Tensor:
        """(r_b, E), with `m = S p`."""
        experts = torch.tensor(self.experts(inputs, outputs))
        sums = torch.zeros(self.r_b, len(self.p), dtype=torch.float64)
        sums[experts % self.r_b, experts] = 1.0  # paired, expert i is output vector i
        return sums

    def take_over(self, inputs: Sequence[int], outputs: Sequence[int]) -> tuple[Tensor, float]:
        """U (r_b, J), by which the output vectors that are kept take over; and what is missed all the same."""
        moments = self._moments(inputs, outputs)
        start = torch.eye(self.r_b, dtype=torch.float64)[:, list(outputs)]
        U = moments.solve(start, ridge_of(moments.zz, "core"))
        share = moments.missed(U, self.BB) / self.added if self.added > 0 else 0.0
        return U, share * self.energy

    def parameters(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        experts = len(self.experts(inputs, outputs))
        own = {"trex_A": len(inputs) / self.r_a, "trex_B": len(outputs) / self.r_b}
        own |= dict.fromkeys(("trex_router", "trex_map"), experts / len(self.p))
        return sum(round(own.get(kind, 1) * size) for kind, size in self._sizes.items())

    def whole(self) -> _Kept:
        inputs, outputs = list(range(self.r_a)), list(range(self.r_b))
        return _Kept(inputs, outputs, 0.0, self.parameters(inputs, outputs))

    def gone(self) -> _Kept:
        return _Kept([], [], self.energy, 0)

    def smaller(self, kept: _Kept) -> Iterator[_Kept]:
        """All that is left by removing one more vector."""
        sides = [(kept.inputs, 0), (kept.outputs, 1)] if self.grid else [(kept.inputs, 0)]
        for numbers, side in sides:
            for number in numbers if len(numbers) > 1 else ():
                rest = [other for other in numbers if other != number]
                inputs = kept.inputs if side and self.grid else rest
                outputs = rest if side or not self.grid else kept.outputs
                yield _Kept(inputs, outputs, self.take_over(inputs, outputs)[1], self.parameters(inputs, outputs))


class _Pruner:
    """An adapter and its report, checked against each other."""

    def __init__(self, model: nn.Module, report: RoutingReport) -> None:
        if not isinstance(report, RoutingReport):
            raise TypeError(f"report is a {type(report).__name__}; expected what routing_report returned.")
        self.tuner, self.routing, self.adapter_name = find_tuner(model), report, report.adapter_name
        self.config = self.tuner.config_of(self.adapter_name)
        self.layers = layers_of(self.tuner, self.adapter_name)
        if any(layer.merged for layer in self.tuner.modules() if isinstance(layer, BaseTunerLayer)):
            raise ValueError("An adapter is merged into the model; call unmerge_adapter() before pruning.")
        for name, layer in self.layers.items():
            if any(hasattr(one, "full_tensor") or one.is_meta or not one.numel() for one in self._own(layer)):
                raise ValueError(
                    f"The adapter's parameters in {name} are sharded or offloaded; prune the adapter where it is "
                    "loaded whole."
                )
        for name, found in report.layers.items():
            own, experts = self.layers.get(name), len(self.config.experts_of(name))
            if own is None or len(found.load) != experts or self._gates(own) != (found.omega, found.gate):
                raise ValueError(
                    f"The report does not fit the adapter {self.adapter_name!r} in the layer {name}: it is of another "
                    "adapter, or this one has changed since. Call routing_report anew."
                )
        self.known = {
            name: _Layer(self.layers[name], self.adapter_name, found.moments, found.energy)
            for name, found in report.layers.items()
        }
        self.unknown = sum(
            sum(one.numel() for one in self._own(layer))
            for name, layer in self.layers.items()
            if name not in self.known
        )

    def _own(self, layer: TRexLayer) -> list[nn.Parameter]:
        return layer.parameters_of(self.adapter_name)

    def _gates(self, layer: TRexLayer) -> tuple[float, float]:
        temperature = layer.trex_settings[self.adapter_name]["temperature"]
        logits = (one[self.adapter_name].detach().double().cpu() for one in (layer.trex_omega, layer.trex_gate))
        omega, gate = (float(torch.sigmoid(temperature * logit)) for logit in logits)
        return omega, gate

    def plan(self, keep: float) -> _Plan:
        """What to remove so that at most this share of the parameters is left."""
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise ValueError(f"keep={keep!r} must be a share of the parameters, above 0 and at most 1.")
        kept = {name: layer.whole() for name, layer in self.known.items()}
        before = self.unknown + sum(own.parameters for own in kept.values())
        for name, layer in self.known.items():
            if self.routing.layers[name].gate < SHUT or not layer.energy > 0:
                kept[name] = layer.gone()
        # to each layer what is best removed from it next, and what that costs for each parameter
        best = {name: found for name, own in kept.items() if own.inputs and (found := self._next(name, own))}
        left = self.unknown + sum(own.parameters for own in kept.values())
        while best:
            name, (price, less) = min(best.items(), key=lambda item: (not self._free(*item), item[1][0]))
            if left <= keep * before and not self._free(name, (price, less)):
                break
            if not less.inputs and left == kept[name].parameters:  # the last of all layers stays
                if (found := self._next(name, kept[name], may_go=False)) is None:
                    break
                best[name] = found
                continue
            left += less.parameters - kept[name].parameters
            kept[name] = less
            del best[name]
            if less.inputs and (found := self._next(name, less)) is not None:
                best[name] = found
        if not left:
            raise ValueError(
                f"Nothing would be left of the adapter {self.adapter_name!r}: by the report all of its layers add "
                "nothing, or have their gates shut."
            )
        if left > keep * before:
            raise ValueError(
                f"keep={keep!r} leaves less than a layer of one expert, which has {left} of the adapter's {before} "
                "parameters."
            )
        return self._finished(keep, before, left, kept)

    def _next(self, name: str, kept: _Kept, may_go: bool = True) -> tuple[float, _Kept] | None:
        """What to remove next from a layer, and its price: what is missed more for each parameter that is saved."""
        layer = self.known[name]
        found = [*layer.smaller(kept), *([layer.gone()] if may_go else [])]
        priced = [((less.missed - kept.missed) / (kept.parameters - less.parameters), less) for less in found]
        return min(priced, key=lambda pair: (not self._free(name, pair), pair[0]), default=None)

    def _free(self, name: str, priced: tuple[float, _Kept]) -> bool:
        return priced[1].missed <= NOTHING * self.known[name].energy

    def _finished(self, keep: float, before: int, left: int, kept: Mapping[str, _Kept]) -> _Plan:
        config = copy.deepcopy(self.config)
        removed = tuple(name for name, own in kept.items() if not own.inputs)
        changed = {name: own for name, own in kept.items() if own.parameters < self.known[name].whole().parameters}
        for name, own in changed.items():
            inputs, outputs = self.config.vectors_of(name)
            config.expert_pattern.pop(name, None)
            if not own.inputs:
                continue
            entry: dict[str, Any] = {
                "inputs": [inputs[i] for i in own.inputs],
                "outputs": [outputs[j] for j in own.outputs],
            }
            load = self.routing.layers[name].router_load
            if load is not None:  # the softmax over those that are left gives each of them more, on average so much
                mass = sum(load[expert] for expert in self.known[name].experts(own.inputs, own.outputs))
                scale = self.layers[name].trex_settings[self.adapter_name]["token_scale"]
                entry["token_scale"] = scale * max(mass / sum(load), 1e-6)
            config.expert_pattern[name] = entry
        if removed:
            rest = {name: layer for name, layer in self.layers.items() if name not in removed}
            names = target_names(self.tuner.model, rest)
            config.target_modules = set(names) if isinstance(names, list) else names  # type: ignore[assignment]
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        energy = sum(layer.energy for layer in self.known.values()) or 1.0
        report = TRexPruneReport(
            float(keep),
            before,
            left,
            sum(own.missed for own in kept.values()) / energy,
            {name: own.missed / (self.known[name].energy or 1.0) if own.inputs else 1.0 for name, own in kept.items()},
            {name: (len(own.inputs), len(own.outputs)) for name, own in kept.items() if own.inputs},
            removed,
        )
        return _Plan(changed, config, report)

    @torch.no_grad()
    def apply(self, plan: _Plan) -> None:
        """Give the layers what is left of them, made as a configuration makes them when it is loaded."""
        for name, own in plan.kept.items():
            layer, before = self.layers[name], self._state(self.layers[name])
            if not own.inputs:
                self._put(layer, {})
                continue
            known = self.known[name]
            device = before["trex_A"].device
            inputs = torch.tensor(own.inputs, device=device)
            experts = torch.tensor(known.experts(own.inputs, own.outputs), device=device)
            U, _ = known.take_over(own.inputs, own.outputs)
            B = before["trex_B"]
            rows = {"trex_A": inputs, "trex_router": experts, "trex_map": experts}
            values = {kind: before[kind][index] for kind, index in rows.items() if kind in before}
            wide = torch.promote_types(B.dtype, torch.float32)
            values["trex_B"] = (B.to(wide) @ U.to(device, wide)).to(B.dtype)
            layer.update_layer(self.adapter_name, plan.config, name)
            layer.trex_dropout[self.adapter_name] = before["trex_dropout"]
            for kind in layer.adapter_layer_names:
                if kind in before:
                    parameters = getattr(layer, kind)
                    value = values.get(kind, before[kind]).detach().clone().contiguous()
                    parameters[self.adapter_name] = nn.Parameter(value, before[kind].requires_grad)

    def finish(self, plan: _Plan) -> None:
        """After `apply`: the configuration, and layers that are the base model's again."""
        self.tuner.peft_config[self.adapter_name] = plan.config
        self.tuner.forget_static(self.adapter_name)
        for name in plan.report.removed:
            layer = self.layers[name]
            if layer.trex_A.keys():  # of other adapters
                continue
            parent, _, child = name.rpartition(".")
            base: Any = layer.base_layer
            setattr(self.tuner.model.get_submodule(parent), child, base)
            self.tuner.targeted_module_names[:] = [one for one in self.tuner.targeted_module_names if one != name]

    @contextmanager
    def flags_kept(self) -> Iterator[None]:
        """A layer that gets an adapter makes all of the active ones trainable."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.tuner.parameters()]
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def states(self) -> dict[str, dict[str, Any]]:
        """What the adapter has in each layer, as it is."""
        return {name: self._state(layer) for name, layer in self.layers.items()}

    def put(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        for name, state in states.items():
            self._put(self.layers[name], state)

    def _state(self, layer: TRexLayer) -> dict[str, Any]:
        kinds = (*layer.adapter_layer_names, *layer.other_param_names)
        return {
            kind: getattr(layer, kind)[self.adapter_name]
            for kind in kinds
            if self.adapter_name in getattr(layer, kind)
        }

    def _put(self, layer: TRexLayer, state: Mapping[str, Any]) -> None:
        for kind in (*layer.adapter_layer_names, *layer.other_param_names):
            holder = getattr(layer, kind)
            if self.adapter_name in holder:
                del holder[self.adapter_name]
            if kind in state:
                holder[self.adapter_name] = state[kind]


def _counted(tuner: TRexModel, batch: Mapping[str, Any], tokens: Attended) -> Tensor | None:
    """(B, T), bool: the tokens whose predictions count; None where a row has one prediction."""
    labels = batch.get("labels")
    if tuner.prompts.scorer.is_causal() and isinstance(labels, Tensor) and labels.dim() == 2:
        return torch.cat((labels[:, 1:] != -100, torch.zeros_like(labels[:, :1], dtype=torch.bool)), 1)
    return tokens.masks[-1] if tokens.masks else None


def _log_probabilities(output: Any, kept: Tensor | None) -> Tensor:
    """(N, V), float32 or wider."""
    logits = output["logits"] if isinstance(output, Mapping) else output[0]
    if kept is not None and kept.shape == logits.shape[:-1]:
        logits = logits[kept.to(logits.device)]
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).flatten(0, -2)
