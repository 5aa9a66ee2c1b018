"""A smaller adapter from a trained one, without the vectors and layers that carry least by a routing report.

Axis legend: B rows and T tokens of a batch, N tokens whose predictions count, V words.

What is missed follows from the report (see `prune_plan`), except for two things: the softmax is over fewer experts,
which a layer's token scale makes up for on average, and later layers see other inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..analysis.report import RoutingReport
from ..config import TRexConfig
from ..data_pass import Attended, Data, DataPass, check_count, check_unmerged
from ..layer import TRexLayer
from ..lora.export import target_names
from ..model import TRexModel, find_peft_model, find_tuner
from ..parameters import TRexParameters
from ..prior.inputs import Inputs
from ..undo import Snapshot, Undone
from .prune_plan import LayerCosts, Selection, choose

# A layer holds these by adapter: parameters, modules, settings and buffers.
KINDS = (*TRexLayer.adapter_layer_names, *TRexLayer.other_param_names)
# Besides its parameters, a smaller layer has these of the whole one.
KEPT = ("trex_dropout", "trex_reached")


@dataclass(frozen=True)
class TRexPruneReport:
    """What `prune_trex` did.

    Attributes:
        keep: the share of the parameters that was asked for.
        parameters_before, parameters: how many the adapter's layers had before, and have now.
        error: share of what the adapter adds that is missed, by the moments of the routing report; a layer counts by
            what it adds relative to its base layer's output.
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
        keep, parameters, error: as in [`TRexPruneReport`].
        share: of the whole adapter's parameters.
        kl: KL(whole || pruned) of the predictions, in nats, mean over the tokens that count.
    """

    keep: float
    parameters: int
    share: float
    error: float
    kl: float


def prune_trex(model: nn.Module, report: RoutingReport, keep: float = 1.0) -> TRexPruneReport:
    """Remove the input and output vectors of an adapter that carry least, and layers that carry nothing.

    What a vector carries is the energy of the change of its layer's output if it were removed and the others took over
    what they can, relative to the base layer's output. Single vectors or whole layers go one after the other,
    whichever misses least for each parameter that it saves. Layers whose gate is shut (below 0.001), and what carries
    less than a millionth of what its layer adds, go in any case.

    The adapter is changed in place: the configuration names the vectors that are left in `expert_pattern`, and layers
    that are gone are those of the base model again. Calibrated static weights are dropped; an optimizer must be made
    anew. To go back, save the adapter first. A short training afterwards mends most of the loss.

    Args:
        model: a model with the adapter, which has not changed since the report.
        report: of [`routing_report`], on data of the kind that the adapter is for; a few thousand tokens do.
        keep: share of the parameters of the adapter's layers, in (0, 1], that are kept at most. 1 removes only what
            carries nothing. `pruning_curve` shows what each share costs.

    Raises:
        ValueError, TypeError: for another `keep`, a report of another adapter or of this one before it was changed, an
            adapter that is merged, sharded or offloaded, or if nothing would be left.
    """
    pruner = _Pruner(model, report)
    selections, pruned = pruner.plan(keep)
    config, states = pruner.prune(selections)
    tuner = pruner.tuner
    if pruned.removed:
        rest = {name: layer for name, layer in pruner.layers.items() if name not in pruned.removed}
        names = target_names(tuner.model, rest)
        config.target_modules = set(names) if isinstance(names, list) else names  # type: ignore[assignment]
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    with Undone(Snapshot(tuner)):
        pruner.put(states)
        tuner.peft_config[pruner.adapter_name] = config
        tuner.forget_static(pruner.adapter_name)
        for name in pruned.removed:
            layer: Any = pruner.layers[name]
            if not layer.trex_A.keys():
                tuner.model.set_submodule(name, layer.base_layer)
                tuner.targeted_module_names = [other for other in tuner.targeted_module_names if other != name]
        # The layer that held the priors may be gone.
        tuner.trex_prior.settle()
    return pruned


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
        dataloader, max_batches, progress: as for [`routing_report`].
        keep: the shares to measure, as for [`prune_trex`]; each gets a point, in their order.

    Raises:
        ValueError, TypeError: as [`prune_trex`], and if the data have no token.
    """
    check_count("max_batches", max_batches)
    pruner = _Pruner(model, report)
    plans = [pruner.plan(share) for share in keep]
    tuner, peft_model = pruner.tuner, find_peft_model(model)
    totals, count = [0.0] * len(plans), 0
    data = Data(dataloader, max_batches, "T-REX pruning" if progress else None)
    variants = [pruner.prune(selections)[1] for selections, _ in plans]
    passing = DataPass(tuner, pruner.adapter_name, data)
    with Undone(pruner, passing), Attended(tuner) as attended, passing as batches:
        for batch in batches:
            attended.start(Inputs.of(batch))
            mask = _predicting(tuner, batch, attended)
            pruner.put(pruner.whole)
            expected = _log_probabilities(peft_model(**batch), mask)
            count += len(expected)
            for number, states in enumerate(variants):
                pruner.put(states)
                actual = _log_probabilities(peft_model(**batch), mask)
                totals[number] += float((expected.exp() * (expected - actual)).sum(dtype=torch.float64))
        pruner.undo()
    if not count:
        raise ValueError("The dataloader gave no batch with a token to predict from; a curve needs some.")
    return [
        PruningPoint(
            keep=pruned.keep,
            parameters=pruned.parameters,
            share=pruned.parameters / pruned.parameters_before,
            error=pruned.error,
            kl=total / count,
        )
        for (_, pruned), total in zip(plans, totals, strict=True)
    ]


class _Sketch(nn.Module, TRexLayer):
    """A layer beside one of the model, for the settings that a configuration makes. It draws no random start."""

    def __init__(self, layer: TRexLayer) -> None:
        super().__init__()
        TRexParameters.__init__(self, layer.base_layer, layer._channel)

    def reset_trex_parameters(self, *_: Any) -> None:
        pass


class _Pruner:
    """An adapter and its routing report, checked against each other."""

    def __init__(self, model: nn.Module, routing: RoutingReport) -> None:
        if not isinstance(routing, RoutingReport):
            raise TypeError(f"report is a {type(routing).__name__}; expected what routing_report returned.")
        self.tuner, self.adapter_name = find_tuner(model), routing.adapter_name
        self.config = self.tuner.config_of(self.adapter_name)
        self.layers = self.tuner.layers_of(self.adapter_name)
        check_unmerged(self.tuner, "pruning")
        self.whole = {name: self._state_of(layer) for name, layer in self.layers.items()}
        self.undo = Snapshot(*(getattr(layer, kind) for layer in self.layers.values() for kind in KINDS)).undo
        self.unseen = 0
        for name, layer in self.layers.items():
            parameters = layer.parameters_of(self.adapter_name)
            if any(hasattr(tensor, "full_tensor") or tensor.is_meta or not tensor.numel() for tensor in parameters):
                raise ValueError(
                    f"The adapter's parameters in {name} are sharded or offloaded; prune the adapter where it is "
                    "loaded whole."
                )
            self.unseen += 0 if name in routing.layers else sum(tensor.numel() for tensor in parameters)
        self.costs: dict[str, LayerCosts] = {}
        for name, measured in routing.layers.items():
            fits = name in self.layers and len(measured.load) == len(self.config.experts_of(name))
            if not fits or _gates(self.whole[name]) != (measured.omega, measured.gate):
                raise ValueError(
                    f"The report does not fit the adapter {self.adapter_name!r} in the layer {name}: it is of another "
                    "adapter, or this one has changed since. Call routing_report anew."
                )
            self.costs[name] = LayerCosts(self.whole[name], measured)

    def plan(self, keep: float) -> tuple[dict[str, Selection], TRexPruneReport]:
        """What to keep of each layer, so that at most this share of the parameters is left, and the report of it."""
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise ValueError(f"keep={keep!r} must be a share of the parameters, above 0 and at most 1.")
        before = self.unseen + sum(costs.whole.parameters for costs in self.costs.values())
        selections = choose(self.costs, self.unseen, keep * before)
        left = self.unseen + sum(selection.parameters for selection in selections.values())
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
        energies = {name: costs.routing.energy for name, costs in self.costs.items()}
        rest = {name: selection for name, selection in selections.items() if selection.inputs}
        return selections, TRexPruneReport(
            keep=float(keep),
            parameters_before=before,
            parameters=left,
            error=sum(selection.missed for selection in selections.values()) / (sum(energies.values()) or 1.0),
            layers={name: rest[name].missed / energies[name] if name in rest else 1.0 for name in selections},
            sizes={name: (len(selection.inputs), len(selection.outputs)) for name, selection in rest.items()},
            removed=tuple(name for name in selections if name not in rest),
        )

    def prune(self, selections: Mapping[str, Selection]) -> tuple[TRexConfig, dict[str, dict[str, Any]]]:
        """The configuration and the states of an adapter with these vectors alone; this one stays as it is."""
        config, states = copy.deepcopy(self.config), dict(self.whole)
        for name, selection in selections.items():
            if selection is not self.costs[name].whole:
                states[name] = self._shrink(name, selection, config)
        return config, states

    @torch.no_grad()
    def _shrink(self, name: str, selection: Selection, config: TRexConfig) -> dict[str, Any]:
        """Enter the selection in the configuration, and return the layer's state with it; it is empty without one."""
        layer, state, load = self.layers[name], self.whole[name], self.costs[name].routing.router_load
        config.expert_pattern.pop(name, None)
        if not selection.inputs:
            return {}
        # An entry counts vectors as a layer of full size does.
        inputs, outputs = self.config.vectors_of(name)
        entry: dict[str, Any] = {
            "inputs": [inputs[i] for i in selection.inputs],
            "outputs": [outputs[j] for j in selection.outputs],
        }
        if load is not None:
            # The softmax over the experts that are left gives each of them more; on average, this takes it back.
            mass = sum(load[expert] for expert in selection.experts) / sum(load)
            entry["token_scale"] = state["trex_settings"].token_scale * max(mass, 1e-6)
        config.expert_pattern[name] = entry
        sketch = _Sketch(layer)
        sketch.update_layer(self.adapter_name, config, name)
        kept = {kind: state[kind] for kind in (*layer.adapter_layer_names, *KEPT) if kind in state}
        rows = dict.fromkeys(("trex_router", "trex_map", "trex_core"), selection.experts)
        rows["trex_A"] = selection.inputs
        values = {kind: state[kind][numbers] for kind, numbers in rows.items() if kind in state}
        B = state["trex_B"]
        wide = torch.promote_types(B.dtype, torch.float32)
        values["trex_B"] = (B.to(wide) @ selection.take_over.to(B.device, wide)).to(B.dtype)
        smaller = {kind: nn.Parameter(value, state[kind].requires_grad) for kind, value in values.items()}
        return self._state_of(sketch) | kept | smaller

    def _state_of(self, layer: TRexLayer) -> dict[str, Any]:
        """What a layer holds of the adapter, by kind."""
        holders = {kind: getattr(layer, kind) for kind in KINDS}
        return {kind: holder[self.adapter_name] for kind, holder in holders.items() if self.adapter_name in holder}

    def put(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Have the layers hold these states; an empty state takes the adapter out of its layer."""
        for name, state in states.items():
            for kind in KINDS:
                holder = getattr(self.layers[name], kind)
                if self.adapter_name in holder:
                    del holder[self.adapter_name]
                if kind in state:
                    holder[self.adapter_name] = state[kind]


def _gates(state: Mapping[str, Any]) -> tuple[float, ...]:
    """omega and gate, as a routing report has them."""
    temperature = state["trex_settings"].temperature
    logits = (state[kind].detach().double().cpu() for kind in ("trex_omega", "trex_gate"))
    return tuple(float(torch.sigmoid(temperature * logit)) for logit in logits)


def _predicting(tuner: TRexModel, batch: Mapping[str, Any], attended: Attended) -> Tensor | None:
    """(B, T), bool: the tokens whose predictions count; None where a row has one prediction."""
    labels = batch.get("labels")
    if tuner.prompts.adapters.is_causal() and isinstance(labels, Tensor) and labels.dim() == 2:
        return F.pad(labels[:, 1:] != -100, (0, 1))
    return attended.masks[-1] if attended.masks else None


def _log_probabilities(output: Any, mask: Tensor | None) -> Tensor:
    """(N, V), float32 or wider."""
    logits = output["logits"] if isinstance(output, Mapping) else output[0]
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.to(logits.device)]
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).flatten(0, -2)
