"""TRexRoutingCallback: what the routers do, among a Trainer's logs while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .batches import check_count
from .layer import TRexLayer
from .model import find_tuner
from .routing import SHUT, Rows, entropy_of, layers_of, look


class TRexRoutingCallback(TrainerCallback):
    """Logs a handful of figures about the routing to whatever a Trainer reports to:

        trainer.add_callback(TRexRoutingCallback(trainer))

    With each of the Trainer's own logs, from the parameters alone: the means over the layers of `routing/omega` and
    `routing/gate`, and `routing/gates_shut`, the number of gates below 0.001.

    With the first log, and then with the first after every `every` steps, from one forward of the training besides:
    the means over the layers of `routing/router_entropy` (of a token's router, relative to log E: 1 is uniform, 0
    chooses one expert), `routing/token_share` (the router's share of the weights; the rest is the prior's) and
    `routing/used_experts` (the share of its experts that a layer uses: exp of the entropy of their mean load, over E);
    and `routing/used_experts_min`, that of the layer which uses least: a router that collapses shows there, and
    [`routing_report`] says which it is.

    The forward is a micro-batch of this process's data. It is left out where the model is compiled.

    Args:
        trainer: the Trainer that this is added to; a callback alone has no way to its reporters.
        adapter_name: the adapter.
        every: training steps between two forwards that are looked at; 0 looks at none. A step with such a forward
            takes an eighth longer or so; the default makes that little, however often the Trainer logs.

    Raises:
        TypeError, ValueError: for a trainer without `log`, or an `every` that is no number of steps.
    """

    def __init__(self, trainer: Any, *, adapter_name: str = "default", every: int = 100) -> None:
        if not callable(getattr(trainer, "log", None)):
            raise TypeError(
                f"trainer is a {type(trainer).__name__}; expected the Trainer that the callback is added to, by "
                "trainer.add_callback(TRexRoutingCallback(trainer))."
            )
        check_count("every", every, least=0, none=False)
        self.trainer = trainer
        self.adapter_name = adapter_name
        self.every = every
        self._looked: int | None = None  # the last step of which a forward was looked at
        self._layers: dict[str, TRexLayer] = {}
        self._handles: list[Any] = []
        self._seen: list[Tensor] = []  # (3,) of each layer: entropy, used experts, share

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuner = find_tuner(model)
        tuner.config_of(self.adapter_name)
        self._layers, self._looked = layers_of(tuner, self.adapter_name), None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._detach()
        step = state.global_step + 1
        due = self._looked is None or step - self._looked >= self.every
        if self.every and due and step % max(1, int(state.logging_steps)) == 0 and not args.torch_compile:
            self._looked, self._seen = step, []
            self._attach(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:  # a training step's, and not what this adds
            self.trainer.log(self._figures())

    @torch.no_grad()
    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name in ("omega", "gate"):
            values = [
                layer.trex_settings[self.adapter_name]["temperature"] * logit.float()
                for layer in self._layers.values()
                if (logit := _whole(getattr(layer, f"trex_{name}")[self.adapter_name])) is not None
            ]
            if values:
                open_ = torch.sigmoid(torch.cat([value.to(values[0].device) for value in values])).cpu()
                figures[f"routing/{name}"] = float(open_.mean())
                if name == "gate":
                    figures["routing/gates_shut"] = int((open_ < SHUT).sum())
        if self._seen:
            entropy, used, share = torch.stack([row.to(self._seen[0].device) for row in self._seen]).cpu().unbind(-1)
            if not entropy.isnan().all():
                figures["routing/router_entropy"] = float(entropy.nanmean())
            figures["routing/token_share"] = float(share.mean())
            figures["routing/used_experts"] = float(used.mean())
            figures["routing/used_experts_min"] = float(used.min())
            self._seen = []
        return figures

    def _attach(self, model: nn.Module) -> None:
        """Look at the next forward, and no more: gradient checkpointing calls the layers once again."""
        tuner = find_tuner(model)
        rows = Rows(tuner)

        def start(_: nn.Module, args: tuple, inputs: Mapping[str, Any]) -> None:
            rows.start(inputs)

        self._handles += rows.handles
        self._handles.append(tuner.model.register_forward_pre_hook(start, with_kwargs=True))
        for layer in self._layers.values():
            assert isinstance(layer, nn.Module)
            self._handles.append(layer.register_forward_pre_hook(self._watching(layer, rows)))
        self._handles.append(tuner.model.register_forward_hook(lambda *_: self._detach(), always_call=True))

    def _watching(self, layer: TRexLayer, rows: Rows) -> Any:
        @torch.no_grad()
        def watch(_: nn.Module, args: tuple) -> None:
            kept = rows.kept(args[0], layer)
            x = layer._cast_input_dtype(args[0], layer.trex_A[self.adapter_name].dtype)
            p, by_token, by_prior = (
                None if part is None else part[kept] for part in look(layer, self.adapter_name, x)
            )
            assert by_token is not None and by_prior is not None
            experts = by_token.shape[-1]
            sizes = by_token.abs() + by_prior.abs()
            share = by_token.abs().sum(-1) / sizes.sum(-1).clamp(min=1e-30)
            weights = (by_token + by_prior).abs()
            load = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)).mean(0)
            load = load / load.sum().clamp(min=1e-30)
            entropy = share.new_tensor(torch.nan) if p is None else entropy_of(p).mean()
            if experts > 1:
                entropy = entropy / torch.log(share.new_tensor(float(experts)))
            self._seen.append(torch.stack((entropy, entropy_of(load).exp() / experts, share.mean())))

        return watch

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _whole(parameter: Any) -> Tensor | None:
    """A parameter that FSDP2 may have sharded; None where DeepSpeed's ZeRO-3 keeps it elsewhere."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    return parameter.detach() if parameter.numel() else None
