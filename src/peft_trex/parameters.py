"""The parameters of the adapters in one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from .config import TRexConfig
from .fused import width_of
from .loading import shapes_of
from .mixture import Experts, Settings
from .prior.channel import PriorChannel
from .prior.order import Order
from .unsuited import CONVOLUTIONS

Start = Literal[True, False, "random_router", "zero_router"]
KINDS = tuple(f"trex_{field}" for field in Experts._fields)
# The shared core begins as this multiple of the identity, and the map beside it as this share of its usual start.
CORE_START, MAP_START = 0.5, 0.3


def features_of(layer: Any) -> tuple[int, int]:
    """D_in and D_out of a layer; a token of a convolution is what lies under its kernel."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
    width = width_of(layer)
    shape: Any = _get_in_out_features(layer) if width is None else (width, width)
    return shape


class Kinship(NamedTuple):
    """How close the static weights of K clusters are in a layer, on the data that they were fitted to.

    Attributes:
        products: (K, K) float64, the mean over all tokens of the product of what two clusters' weights add.
        tokens: (K,) float64, those of each cluster.
        energy: the sum of the squares of what the adapter adds.
    """

    products: Tensor
    tokens: Tensor
    energy: float


class TRexParameters(BaseTunerLayer):
    """The parameters of the T-REX adapters of one layer, and their settings.

    Axis legend: E experts, K clusters, Q the rank of a reduced router; `mixture.py` explains the others.
    """

    adapter_layer_names: tuple[str, ...] = (*KINDS, "trex_map", "trex_core")
    other_param_names: tuple[str, ...] = (
        "trex_dropout",
        "trex_settings",
        "trex_fused",
        "trex_uses_prior",
        "trex_reached",
        "trex_chosen",
        "trex_static",
        "trex_kinship",
    )

    def __init__(self, base_layer: nn.Module, channel: PriorChannel) -> None:
        self.base_layer = base_layer
        self.trex_A = nn.ParameterDict()
        self.trex_B = nn.ParameterDict()
        self.trex_router = nn.ParameterDict()
        self.trex_router_down = nn.ParameterDict()
        self.trex_map = nn.ParameterDict()
        self.trex_core = nn.ParameterDict()
        self.trex_omega = nn.ParameterDict()
        self.trex_gate = nn.ParameterDict()
        self.trex_dropout = nn.ModuleDict()
        # A calibrated adapter has a static core for all tokens, and perhaps one for each cluster's: C with `m = C a`,
        # (1 or 1 + K, r_b, r_a), or a wide C with `m = C x`, (1 or 1 + K, r_b, D_in).
        self.trex_static = BufferDict(persistent=True)
        # It is known of weights for clusters that were calibrated in this process, and is not saved.
        self.trex_kinship: dict[str, Kinship] = {}
        self.trex_settings: dict[str, Settings] = {}
        self.trex_fused: dict[str, bool] = {}
        self.trex_uses_prior: dict[str, bool] = {}
        # What the tokens of the prompt that ran last have in common, for the next token of it.
        self._kept: dict[str, tuple[Any, Any]] = {}
        # A prior reaches the layers of the text model; the tuner says which these are.
        self.trex_reached: dict[str, bool] = {}
        # A layer that is called with hidden states and with relative positions must tell them apart.
        self.takes_positions = False
        # A layer within a module that turns rows and tokens round must find out which of them come first.
        self.order: Order | None = None
        # After pruning with the identity map, these are the clusters that the remaining experts belong to.
        self.trex_chosen: dict[str, Tensor] = {}
        self._channel = channel
        self.merged_adapters: list[str] = []
        # A quantised base weight is kept while an adapter is merged into it.
        self._former_weight: dict[str, Any] | None = None
        self.in_features, self.out_features = features_of(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: TRexConfig, layer_name: str = "") -> None:
        """Add an adapter, or replace the one of this name; the layer's own name tells which experts it has."""
        experts = config.num_experts_of(layer_name)
        shapes: dict[str, Any] = dict.fromkeys((*self.adapter_layer_names, "trex_static", "trex_kinship"))
        # The two logits have an axis because FSDP shards no scalars.
        shapes |= {"trex_omega": (1,), "trex_gate": (1,)}
        shapes |= shapes_of(config, layer_name, self.in_features, self.out_features)
        for name, shape in shapes.items():
            tensors = getattr(self, name)
            # An adapter that is replaced may have had tensors that the new one lacks.
            if adapter_name in tensors:
                del tensors[adapter_name]
            if shape is not None:
                tensors[adapter_name] = nn.Parameter(torch.empty(shape))
        self.trex_dropout[adapter_name] = nn.Dropout(config.trex_dropout) if config.trex_dropout else nn.Identity()
        self.trex_settings[adapter_name] = Settings(
            config.token_scale_of(layer_name),
            config.prior_scale,
            config.gate_temperature,
            config.expert_layout,
            None if config.router_top_k is None else min(config.router_top_k, experts),
        )
        self.trex_fused[adapter_name] = config.mixture_implementation == "auto"
        self.trex_uses_prior[adapter_name] = config.use_prior
        self.trex_reached[adapter_name] = True
        self.trex_chosen.pop(adapter_name, None)
        self._kept.pop(adapter_name, None)
        if config.use_prior and not config.learned_map and experts < config.num_experts:
            # No state dict has it, so it must not be made on the meta device, as parameters may be.
            self.trex_chosen[adapter_name] = torch.tensor(config.experts_of(layer_name), device="cpu")
        # PEFT keeps these frozen whenever it makes the adapter trainable. The dict belongs to PEFT's class at first.
        frozen = ("trex_A", "trex_B") if config.trainable == "router" else ()
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        start = config.init_weights
        # The tuner makes the prior before the layers. In the paired layout each column of B has a row of A of its own.
        if start is True and config.expert_layout == "grid" and adapter_name not in self._channel.priors:
            start = "random_router"
        self.reset_trex_parameters(adapter_name, start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_trex_parameters(self, adapter_name: str, start: Start = True) -> None:
        """One of the starts of `TRexConfig.init_weights`: with any but False, the adapter's output is zero at first.

        True is the paper's here, with a router of zeros, whether there is a prior or not.
        """
        at_zero = ["trex_B", "trex_router"] if start in (True, "zero_router") else ["trex_B"] if start else []
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name not in parameters:
                continue
            if name in (*at_zero, "trex_omega", "trex_gate"):
                nn.init.zeros_(parameters[adapter_name])
            elif name == "trex_core":
                self._reset_core(adapter_name)
            else:
                nn.init.kaiming_uniform_(parameters[adapter_name], a=math.sqrt(5))

    @torch.no_grad()
    def _reset_core(self, adapter_name: str) -> None:
        """The core's start, at which each input vector goes to one output vector, and the map's beside it.

        Where there are fewer vectors on one side of a grid, several on the other share each of them.
        """
        core, A, B = (kind[adapter_name] for kind in (self.trex_core, self.trex_A, self.trex_B))
        r_a, r_b = len(A), B.shape[1]
        if self.trex_settings[adapter_name].layout == "grid":
            number = torch.arange(len(core))
            least = min(r_a, r_b)
            core.copy_(CORE_START * (number // r_b % least == number % r_b % least))
        else:
            core.fill_(CORE_START)
        if adapter_name in self.trex_map:
            self.trex_map[adapter_name].mul_(MAP_START)

    def set_reach(self, adapter_name: str, config: TRexConfig, reached: bool) -> None:
        """Take over whether the adapter's prior reaches this layer; one that it does not reach starts without it."""
        self.trex_reached[adapter_name] = reached
        drawn = config.init_weights is True and config.expert_layout == "grid" and adapter_name in self.trex_router
        if drawn and not reached:
            nn.init.kaiming_uniform_(self.trex_router[adapter_name], a=math.sqrt(5))

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's parameters in this layer."""
        kinds = (getattr(self, name) for name in self.adapter_layer_names)
        return [parameters[adapter_name] for parameters in kinds if adapter_name in parameters]

    def keep_static(self, adapter_name: str, static: Tensor | None, kinship: Kinship | None = None) -> None:
        """Store the static cores of a calibrated adapter, or drop them with None."""
        self.trex_kinship.pop(adapter_name, None)
        if kinship is not None:
            self.trex_kinship[adapter_name] = kinship
        if static is not None:
            self.trex_static[adapter_name] = static.to(self.trex_A[adapter_name].device)
            self._channel.calibrated.add(adapter_name)
        elif adapter_name in self.trex_static:
            del self.trex_static[adapter_name]

    def make_room(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """A hook before adapters are loaded: take over as many static weights as there are for each, or none."""
        for name in list(self.trex_A):
            if f"{prefix}trex_A.{name}" in state_dict:
                static = state_dict.get(f"{prefix}trex_static.{name}")
                self.keep_static(name, None if static is None else torch.zeros_like(static))

    def read_from(self, channel: PriorChannel) -> Any:
        """Read from another channel from now on; the priors of the former one are returned."""
        former, self._channel = self._channel, channel
        channel.calibrated |= former.calibrated
        return former.priors

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this layer, and its prior with it; PEFT deletes an adapter in all layers."""
        others = [name for name in self.active_adapters if name != adapter_name]
        was_active = len(others) < len(self.active_adapters)
        self._kept.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        priors: Any = self._channel.priors
        priors.put(adapter_name, None)
        # PEFT lets each layer choose the next active adapter among those that it has; all must choose the same.
        if was_active:
            self.set_adapter(others or priors.others(adapter_name)[:1])

    def experts_of(self, adapter_name: str) -> Experts:
        """The adapter's tensors in this layer."""
        return Experts(*self._find(KINDS, adapter_name))

    def _find(self, kinds: tuple[str, ...], adapter_name: str) -> list[Any]:
        """The adapter's parameters of these kinds, None for a kind that it has not."""
        modules: Any = self._modules  # type: ignore[attr-defined]
        tensors = []
        for kind in kinds:
            # Decoding feels the time that nn.Module's own way takes. What wraps or shards modules may leave no other,
            # and DeepSpeed's ZeRO-3 notices an access by brackets, but not by get.
            parameters, direct = modules[kind], modules[kind]._parameters
            if adapter_name in direct:
                tensors.append(direct[adapter_name])
            else:
                tensors.append(parameters[adapter_name] if adapter_name in parameters else None)
        return tensors

    @contextmanager
    def _onloaded(self) -> Iterator[None]:
        """Have accelerate bring offloaded parameters: it does so before a forward, and a ParameterDict has none."""
        kinds: list[Any] = [getattr(self, name) for name in self.adapter_layer_names]
        offloaded = [kind for kind in kinds if kind and hasattr(kind, "_hf_hook")]
        for module in offloaded:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in offloaded:
                module._hf_hook.post_forward(module, None)
