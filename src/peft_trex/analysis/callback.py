"""TRexRoutingCallback: what the routers do, among a Trainer's logs while it trains."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..data_pass import Attended, check_count
from ..model import find_tuner
from ..prior.inputs import Inputs
from .figures import SHUT
from .routing import routing_parts
from .statistics import entropy_of, shares_of, used_experts


class TRexRoutingCallback(TrainerCallback):
    """Logs a handful of figures about the routing to whatever a Trainer reports to:

        trainer.add_callback(TRexRoutingCallback(trainer))

    Each of the Trainer's own logs is followed by figures from the parameters alone: the means over the layers of
    `routing/omega` and `routing/gate`, and `routing/gates_shut`, the number of gates below 0.001.

    The first log, and then the first after every `every` steps, has figures from one forward of the training besides:
    the means over the layers of `routing/router_entropy`, `routing/token_share` and `routing/used_experts`, as in
    [`LayerRouting`] but `used_experts` as a share of E; and `routing/used_experts_min`, for the layer which uses
    least. A router that collapses shows there, and [`routing_report`] says which it is. The forward is a micro-batch
    of this process's data. It is left out where the model is compiled.

    Args:
        trainer: the Trainer that this is added to; a callback alone has no way to its reporters.
        adapter_name: the adapter.
        every: training steps between two forwards that are watched; 0 watches none. A step with such a forward takes
            an eighth longer or so; the default makes that little, however often the Trainer logs.

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
        self.trainer, self.adapter_name, self.every = trainer, adapter_name, every
        # The last step of which a forward was watched.
        self._watched: int | None = None
        self._layers: dict[str, Any] = {}
        self._hooks = ExitStack()
        # The entropy, the used experts and the router's share (3,) of each layer in the watched forward.
        self._rows: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuner = find_tuner(model)
        tuner.config_of(self.adapter_name)
        self._layers, self._watched = tuner.layers_of(self.adapter_name), None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._hooks.close()
        step = state.global_step + 1
        due = self._watched is None or step - self._watched >= self.every
        if not (self.every and due and step % max(1, int(state.logging_steps)) == 0) or args.torch_compile:
            return
        self._watched, self._rows = step, []
        tuner = find_tuner(model)
        attended = self._hooks.enter_context(Attended(tuner))

        @torch.no_grad()
        def watch(layer: Any, args: tuple[Tensor, ...]) -> None:
            x = layer.tokens_of(args[0])
            p, by_token, by_prior = routing_parts(layer, self.adapter_name, x, attended.kept(x, layer))
            share = by_token.abs().sum(-1) / (by_token.abs() + by_prior.abs()).sum(-1).clamp(min=1e-30)
            used = used_experts(shares_of(by_token + by_prior).mean(0)) / p.shape[-1]
            # The entropy of a single expert is zero, and so is log 1.
            entropy = entropy_of(p).mean() / math.log(max(p.shape[-1], 2))
            self._rows.append(torch.stack((entropy, used, share.mean())))

        # The next forward alone is watched: gradient checkpointing calls the layers once again.
        hooks = [
            tuner.model.register_forward_pre_hook(
                lambda _, args, arguments: attended.start(Inputs.of(arguments)), with_kwargs=True
            ),
            *(layer.register_forward_pre_hook(watch) for layer in self._layers.values()),
            tuner.model.register_forward_hook(lambda *_: self._hooks.close(), always_call=True),
        ]
        for hook in hooks:
            self._hooks.callback(hook.remove)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hooks.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # Only the log of a training step has a loss; the one that this callback adds has none.
        if logs is not None and "loss" in logs:
            self.trainer.log(self._figures())

    @torch.no_grad()
    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name in ("omega", "gate"):
            logits = [
                layer.trex_settings[self.adapter_name].temperature * logit.float()
                for layer in self._layers.values()
                if (logit := _whole(getattr(layer, f"trex_{name}")[self.adapter_name])) is not None
            ]
            if logits:
                values = torch.sigmoid(_stack(logits))
                figures[f"routing/{name}"] = float(values.mean())
                if name == "gate":
                    figures["routing/gates_shut"] = int((values < SHUT).sum())
        if self._rows:
            entropy, used, share = _stack(self._rows).unbind(-1)
            if any(self.adapter_name in layer.trex_router for layer in self._layers.values()):
                figures["routing/router_entropy"] = float(entropy.mean())
            figures["routing/token_share"] = float(share.mean())
            figures["routing/used_experts"] = float(used.mean())
            figures["routing/used_experts_min"] = float(used.min())
            self._rows = []
        return figures


def _stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of layers, which may be on several devices, on the CPU."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).cpu()


def _whole(parameter: Any) -> Tensor | None:
    """A parameter that FSDP2 may have sharded; None where DeepSpeed's ZeRO-3 keeps it elsewhere."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    return parameter.detach() if parameter.numel() else None
