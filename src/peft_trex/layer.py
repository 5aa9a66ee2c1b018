"""The adapter in a linear layer: parameters, forward, merging."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .config import TRexConfig
from .fused import MixSettings, add_mixture, add_stacked, fusible, separable
from .mixture import expert_weights, mean_core, num_experts, rank_one_mixture, router_logits
from .prior import PriorChannel
from .quantized import read_weight, restore_weight, write_weight

APPROXIMATE = (
    "T-REX depends on its input, so no static weight equals it. The adapter is merged approximately, with its mean "
    "routing: uniform over the experts for the tokens, the training prompts' mean scores for the prior. "
    "calibrate_trex_merge finds the best static weights, and says what they miss."
)


class TRexLayer(BaseTunerLayer):
    """Parameters of the T-REX adapters of one layer; see [`Linear`] for what is done with them."""

    adapter_layer_names: tuple[str, ...] = (
        "trex_A",  # (r_a, D_in)
        "trex_B",  # (D_out, r_b)
        "trex_router",  # (E, D_in), absent with use_router=False; (E, Q) if the router is reduced to rank Q
        "trex_router_down",  # (Q, D_in), only then
        "trex_map",  # (E, K), absent unless learned
        "trex_omega",  # (1,), a logit; of one axis because FSDP shards no scalars
        "trex_gate",  # (1,), likewise
    )
    other_param_names: tuple[str, ...] = (
        "trex_dropout",
        "trex_settings",
        "trex_fused",
        "trex_uses_prior",
        "trex_chosen",
        "trex_static",
    )

    def __init__(self, base_layer: nn.Module, channel: PriorChannel) -> None:
        self.base_layer = base_layer
        self.trex_A = nn.ParameterDict()
        self.trex_B = nn.ParameterDict()
        self.trex_router = nn.ParameterDict()
        self.trex_router_down = nn.ParameterDict()
        self.trex_map = nn.ParameterDict()
        self.trex_omega = nn.ParameterDict()
        self.trex_gate = nn.ParameterDict()
        self.trex_dropout = nn.ModuleDict()
        # what stands for the mixture where weights must be static, once calibrated: for all tokens, and then for each
        # cluster's; cores C with `m = C a` (1 or 1 + K, r_b, r_a), or wide ones with `m = C x` (1 or 1 + K, r_b, D_in)
        self.trex_static = BufferDict(persistent=True)
        self.trex_settings: dict[str, dict[str, Any]] = {}
        self.trex_fused: dict[str, MixSettings | None] = {}
        self.trex_uses_prior: dict[str, bool] = {}
        # with the identity map, the clusters of the experts that are left, where that is not all of them
        self.trex_chosen: dict[str, Tensor] = {}
        self._channel = channel
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._former_weight: dict[str, Any] | None = None  # of a quantised base layer that an adapter is merged into
        shape: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = shape

    def update_layer(self, adapter_name: str, config: TRexConfig, layer_name: str = "") -> None:
        """Add an adapter, or replace the one of this name; the layer's own name tells which experts it has."""
        (inputs, outputs), chosen = config.vectors_of(layer_name), config.experts_of(layer_name)
        experts = len(chosen)
        for name in (*self.adapter_layer_names, "trex_static"):  # of the one that is replaced, which may have had more
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        self.trex_A[adapter_name] = nn.Parameter(torch.empty(len(inputs), self.in_features))
        self.trex_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, len(outputs)))
        if config.use_router:
            width = config.router_rank or self.in_features
            self.trex_router[adapter_name] = nn.Parameter(torch.empty(experts, width))
            if config.router_rank:
                self.trex_router_down[adapter_name] = nn.Parameter(torch.empty(width, self.in_features))
        if config.learned_map:
            self.trex_map[adapter_name] = nn.Parameter(torch.empty(experts, config.num_clusters))
        self.trex_omega[adapter_name] = nn.Parameter(torch.empty(1))
        self.trex_gate[adapter_name] = nn.Parameter(torch.empty(1))
        self.trex_dropout[adapter_name] = nn.Dropout(config.trex_dropout) if config.trex_dropout else nn.Identity()
        self.trex_settings[adapter_name] = {
            "token_scale": config.token_scale_of(layer_name),
            "prior_scale": config.prior_scale,
            "temperature": config.gate_temperature,
            "layout": config.expert_layout,
            "top_k": None if config.router_top_k is None else min(config.router_top_k, experts),
        }
        # without a router there is nothing to be faster at
        fused = config.use_router and config.mixture_implementation == "auto"
        self.trex_fused[adapter_name] = MixSettings(len(inputs), **self.trex_settings[adapter_name]) if fused else None
        self.trex_uses_prior[adapter_name] = config.use_prior
        self.trex_chosen.pop(adapter_name, None)
        if config.use_prior and not config.learned_map and experts < config.num_experts:
            # no state dict has it, so that it must not be made on the meta device, as parameters may be
            self.trex_chosen[adapter_name] = torch.tensor(chosen, device="cpu")
        # PEFT keeps these frozen whenever it makes the adapter trainable; the dict it begins with is the class's
        frozen = ("trex_A", "trex_B") if config.trainable == "router" else ()
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        self.reset_trex_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_trex_parameters(self, adapter_name: str, init_weights: bool | Literal["random_router"] = True) -> None:
        """The start that `TRexConfig.init_weights` names; with any but False the adapter's output is zero at first."""
        starts_at_zero = {True: {"trex_B", "trex_router"}, "random_router": {"trex_B"}, False: set()}[init_weights]
        for name in ("trex_A", "trex_B", "trex_router", "trex_router_down", "trex_map"):
            parameters = getattr(self, name)
            if adapter_name not in parameters:
                continue
            if name in starts_at_zero:
                nn.init.zeros_(parameters[adapter_name])
            else:
                nn.init.kaiming_uniform_(parameters[adapter_name], a=math.sqrt(5))
        nn.init.zeros_(self.trex_omega[adapter_name])
        nn.init.zeros_(self.trex_gate[adapter_name])

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's parameters in this layer."""
        kinds = (getattr(self, name) for name in self.adapter_layer_names)
        return [parameters[adapter_name] for parameters in kinds if adapter_name in parameters]

    def keep_static(self, adapter_name: str, static: Tensor | None) -> None:
        """Store what stands for the mixture where weights must be static, or drop what was stored."""
        if static is not None:
            self.trex_static[adapter_name] = static.to(self.trex_A[adapter_name].device)
            self._channel.calibrated.add(adapter_name)
        elif adapter_name in self.trex_static:
            del self.trex_static[adapter_name]

    def adopt(self, channel: PriorChannel) -> nn.ModuleDict:
        """Read from another channel from now on; the priors of the former one are returned."""
        former, self._channel = self._channel, channel
        channel.calibrated |= former.calibrated
        return former.priors

    def _prior(self, adapter_name: str, scores: Tensor | None) -> Tensor | None:
        """Prior of each expert (..., E) from the scores of the clusters (..., K); None where it has no part."""
        if not self.trex_uses_prior[adapter_name]:
            return None
        if adapter_name not in self.trex_map:
            chosen = self.trex_chosen.get(adapter_name)
            if chosen is None or scores is None:
                return scores
            if chosen.device != scores.device:
                chosen = self.trex_chosen[adapter_name] = chosen.to(scores.device)
            return scores.index_select(-1, chosen)
        mapping = self.trex_map[adapter_name]
        if scores is None:  # zero, but the map still takes part in the graph: DDP waits for every parameter
            scores = mapping.new_zeros(1, mapping.shape[1])
        return F.linear(scores.to(mapping.dtype), mapping)

    def _routing(self, adapter_name: str, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The adapter's router, its lower factor if it has two, and the prior, for an input `x`."""
        prior = None
        if self.trex_uses_prior[adapter_name]:
            prior = self._channel.scores(adapter_name, x)
            if adapter_name in self.trex_chosen or self._find("trex_map", adapter_name) is not None:
                prior = self._prior(adapter_name, prior)
        router = self._find("trex_router", adapter_name)
        if router is None and prior is None:  # a prior that is not known yet
            A, B = self.trex_A[adapter_name], self.trex_B[adapter_name]
            prior = x.new_zeros(1, num_experts(A.shape[0], B.shape[1], self.trex_settings[adapter_name]["layout"]))
        return router, self._find("trex_router_down", adapter_name), prior

    def _find(self, kind: str, adapter_name: str) -> Any:
        """One of the adapter's parameters, None if it has none of that kind."""
        parameters: Any = self._modules[kind]  # type: ignore[attr-defined]
        # decoding feels the time that nn.Module's own way takes; what wraps or shards modules may leave no other
        own = parameters._parameters
        if adapter_name in own:
            return own[adapter_name]  # not by get, an access that DeepSpeed's ZeRO-3 would not notice
        return parameters[adapter_name] if adapter_name in parameters else None

    @torch.no_grad()
    def static_factors(self, adapter_name: str, cluster: int | None = None) -> tuple[Tensor, Tensor]:
        """The static weight as `up @ down`: down (r, D_in) and up (D_out, r), float32 or wider, r at most r_b.

        Args:
            adapter_name: the adapter.
            cluster: for the prompts of this cluster; None for all.
        """
        A, B = self.trex_A[adapter_name], self.trex_B[adapter_name]
        dtype = torch.promote_types(A.dtype, torch.float32)
        A, B = A.to(dtype), B.to(dtype)
        up = (
            torch.sigmoid(self.trex_settings[adapter_name]["temperature"] * self.trex_gate[adapter_name].to(dtype)) * B
        )
        if adapter_name not in self.trex_static:
            core = self.mean_core(adapter_name).to(dtype)
        else:
            core = self.trex_static[adapter_name][0 if cluster is None else 1 + cluster].to(dtype)
            if core.shape[1] == self.in_features:
                return core, up
        with torch.autocast(A.device.type, enabled=False):
            return (A, up @ core) if A.shape[0] < B.shape[1] else (core @ A, up)

    @torch.no_grad()
    def mean_core(self, adapter_name: str) -> Tensor:
        """The core C (r_b, r_a) of the mean routing: uniform over the experts, the training prompts' mean scores."""
        A, B = self.trex_A[adapter_name], self.trex_B[adapter_name]
        scores = self._channel.mean_scores(adapter_name) if self.trex_uses_prior[adapter_name] else None
        settings = {key: value for key, value in self.trex_settings[adapter_name].items() if key != "top_k"}
        return mean_core(
            A.shape[0],
            B.shape[1],
            self._prior(adapter_name, scores if scores is None else scores[None].to(A.device)),
            self.trex_omega[adapter_name],
            use_router=adapter_name in self.trex_router,
            **settings,
        )

    def expert_weights(self, x: Tensor, adapter_name: str = "default") -> Tensor:
        """Weight of every expert, before the output gate, for the layer's input `x` (..., D_in): (..., E).

        To be called within a forward of the model, from a hook for instance, since the prior belongs to it.
        """
        settings = {key: value for key, value in self.trex_settings[adapter_name].items() if key != "layout"}
        x = self._cast_input_dtype(x, self.trex_A[adapter_name].dtype)
        router, down, prior = self._routing(adapter_name, x)
        logits = None if router is None else router_logits(x, router, down)
        weights = expert_weights(x, logits, prior, self.trex_omega[adapter_name], **settings)
        return weights.expand(*x.shape[:-1], weights.shape[-1])

    def cluster_of(self, x: Tensor, adapter_name: str = "default") -> Tensor:
        """The cluster in [0, K) of each token's prompt, K where that has no token: (...) for an input (..., D_in).

        To be called within a forward of the model, like `expert_weights`; the adapter's prior must be fitted.
        """
        scores = self._channel.scores(adapter_name, x)
        assert scores is not None
        clusters = torch.where(scores.any(-1), scores.argmax(-1), scores.shape[-1])
        return clusters.reshape(*clusters.shape, *[1] * (x.dim() - 1 - clusters.dim())).expand(x.shape[:-1])

    @contextmanager
    def _onloaded(self) -> Iterator[None]:
        """While the adapters are used, have accelerate bring what it keeps elsewhere.

        It does so before a module's forward, and a ParameterDict has none.
        """
        offloaded: list[Any] = [module for name in self.adapter_layer_names if (module := getattr(self, name))]
        offloaded = [module for module in offloaded if hasattr(module, "_hf_hook")]
        for module in offloaded:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in offloaded:
                module._hf_hook.post_forward(module, None)

    def _add_adapter(self, adapter_name: str, base: Tensor | nn.Linear, x: Tensor) -> Tensor:
        """The base layer's output (..., D_out), or what it makes of x (..., D_in), plus the adapter's output."""
        A = self._find("trex_A", adapter_name)
        if A.is_meta and hasattr(self.trex_A, "_hf_hook"):
            with self._onloaded():
                return self._add_adapter(adapter_name, base, x)
        settings = self.trex_fused[adapter_name]
        # what is traced is fused by its compiler, which does better with the formula; other devices, and tensors that
        # stand for others, have nothing else
        fused = settings
        if not fusible(x, A) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            fused = None
        own = x
        # bfloat16 needs no copy in float32 there
        if x.dtype != A.dtype and (fused is None or x.dtype != torch.bfloat16 or A.dtype != torch.float32):
            x = self._cast_input_dtype(x, A.dtype)
        B = self._find("trex_B", adapter_name)
        omega = self._find("trex_omega", adapter_name)
        gate = self._find("trex_gate", adapter_name)
        router, down, prior = self._routing(adapter_name, x)
        dropout = self._modules["trex_dropout"]._modules[adapter_name]  # type: ignore[attr-defined]
        if type(dropout) is not nn.Identity:
            x = dropout(x)
        if not isinstance(base, Tensor) and (x is not own or router is None or fused is None):
            base = base(own)
        running = self._channel.running.prior
        if running is not None and running.losses is not None and router is not None:
            running.losses.add(adapter_name, x, router, down, self.trex_settings[adapter_name]["top_k"])
        if fused is not None and router is not None:
            return add_mixture(base, x, A, B, router, down, prior, omega, gate, fused)
        assert isinstance(base, Tensor)
        if settings is not None and router is not None:
            return add_stacked(base, x, A, B, router, down, prior, omega, gate, settings)
        constants = self.trex_settings[adapter_name]
        output = rank_one_mixture(x, A, B, router, prior, omega, gate, router_down=down, **constants)
        return base + output.to(base.dtype)


class Linear(nn.Module, TRexLayer):
    """T-REX in an `nn.Linear` or a transformers `Conv1D`: `y = W0 x + gate * B (a G)`.

    Args:
        base_layer: the layer to adapt, or an adapter layer around it.
        adapter_name: the first adapter's name.
        config: its configuration.
        channel: where this layer finds the prior of the forward that is running.
        layer_name: the layer's name in the base model.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: TRexConfig,
        channel: PriorChannel,
        layer_name: str = "",
    ) -> None:
        super().__init__()
        TRexLayer.__init__(self, base_layer, channel)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if config.fan_in_fan_out and not self.fan_in_fan_out:
            warnings.warn(
                f"fan_in_fan_out=True does not fit a {type(self.get_base_layer()).__name__} and is ignored there.",
                stacklevel=2,
            )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's static weight, in the base weight's layout and the adapter's dtype.

        It is the calibrated one, or that of the mean routing while there is none: see [`calibrate_trex_merge`].
        """
        return self._delta_weight(adapter).to(self.trex_A[adapter].dtype)

    @torch.no_grad()
    def _delta_weight(self, adapter: str) -> Tensor:
        """The same in float32 or wider: what is merged is rounded once, with the base weight."""
        down, up = self.static_factors(adapter)
        with torch.autocast(down.device.type, enabled=False):
            delta = up @ down
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: it does so from `get_delta_weight`."""
        if adapter_name in self.trex_A and adapter_name not in self.trex_static:
            warnings.warn(APPROXIMATE, stacklevel=3)
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' static weights to the base weight.

        Args:
            safe_merge: check the sum for NaN and infinity before the base weight is touched.
            adapter_names: the adapters to merge; None merges the active ones.

        Raises:
            ValueError: if the base weight is quantised in a way that cannot be written; with `safe_merge`, if an
                adapter's weights are not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.trex_A:
                continue
            self._add_to_base(self._delta_weight(name), name, check=safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`; the base weight is restored to rounding, a quantised one, which was kept, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._former_weight is not None:  # subtracting would leave what two quantisations have rounded
            restore_weight(self.get_base_layer(), self._former_weight)
            self._former_weight = None
            self.merged_adapters.clear()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.trex_A:
                self._add_to_base(-self._delta_weight(name), name, check=False)

    @torch.no_grad()
    def _add_to_base(self, delta: Tensor, adapter_name: str, check: bool) -> None:
        layer = self.get_base_layer()
        weight = read_weight(layer)
        merged = (weight + delta.to(weight.device)).to(weight.dtype)
        if check and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: NaN or infinity "
                "was found, and nothing was merged into this layer."
            )
        former = write_weight(layer, merged)
        self._former_weight = self._former_weight or former

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        base_layer: Any = self._modules["base_layer"]  # decoding feels the time that properties take, as in _find
        if self.merged_adapters:
            return base_layer(x, *args, **kwargs)
        # what is simple enough for it is left to the first adapter, which makes both products together
        result = base_layer if not args and not kwargs and separable(base_layer) else base_layer(x, *args, **kwargs)
        active = self._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            if name in self.trex_fused:
                result = self._add_adapter(name, result, x)
        return result(x) if result is base_layer else result

    def __repr__(self) -> str:
        return "trex." + super().__repr__()
