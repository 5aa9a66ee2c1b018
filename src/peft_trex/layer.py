"""The adapter in a linear layer: forward and merging."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .config import TRexConfig
from .fast.autograd import without_autocast
from .fast.base import Base, separable
from .fast.core import Folded, fold
from .fast.dispatch import add_mixture, is_fast, weighs_itself
from .fast.one_token import OneToken, Stamp
from .mixture import Experts, mean_core, num_experts, router_logits, weigh_experts
from .parameters import KINDS, TRexParameters
from .prior.channel import PriorChannel
from .quantized import Scheme, check_mergeable, read_weight, restore_weight, write_weight

APPROXIMATE = (
    "T-REX depends on its input, so no static weight equals it. The adapter is merged approximately, with its mean "
    "routing: uniform over the experts for the tokens, the training prompts' mean scores for the prior. This may lose "
    "most of what it has learnt: of the demo's tasks 82 % were right before and 38 % after. Call "
    "calibrate_trex_merge(model, dataloader) first, which finds the best static weights (79 % there) and says what "
    "they miss."
)
SOURCES = (*KINDS, "trex_map", "trex_core")


class TRexLayer(TRexParameters):
    """The T-REX adapters of one layer; [`Linear`] has the equation."""

    training: bool

    def _prior(self, adapter_name: str, scores: Tensor | None) -> Tensor | None:
        """Prior of each expert (..., E) from the scores of the clusters (..., K); None stands for zero in both."""
        mapping, core = self._find(("trex_map", "trex_core"), adapter_name)
        chosen, prior = self.trex_chosen.get(adapter_name), scores
        if mapping is not None:
            # Without scores, the map still takes part in the graph: DDP waits for every parameter.
            scores = mapping.new_zeros(1, mapping.shape[1]) if scores is None else scores.to(mapping.dtype)
            # Autocast would round the map's part, and on CPUs so small a product takes longer in half precision.
            return without_autocast(mapping.device.type, F.linear, scores, mapping, core)
        if chosen is not None and scores is not None:
            if chosen.device != scores.device:
                chosen = self.trex_chosen[adapter_name] = chosen.to(scores.device)
            prior = scores.index_select(-1, chosen)
        return prior if core is None else core[None] if prior is None else prior + core

    def scores_of(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """The scores that go with an input `x` in the forward that runs, as the channel gives them."""
        return self._channel.scores(adapter_name, x, self.order)

    def _prior_for(self, adapter_name: str, x: Tensor, experts: Experts, shared: bool = False) -> Tensor | None:
        """Prior of each expert for an input `x` of the forward that runs, None where it has no part.

        An input that is `shared` by all rows sees a zero prior.
        """
        prior = None
        if self.trex_uses_prior[adapter_name]:
            reached = self.trex_reached[adapter_name] and not shared
            prior = self._prior(adapter_name, self.scores_of(adapter_name, x) if reached else None)
        # An unfitted prior is the only part that an adapter without a router has.
        if experts.router is None and prior is None:
            layout = self.trex_settings[adapter_name].layout
            prior = x.new_zeros(1, num_experts(len(experts.A), experts.B.shape[1], layout))
        return prior

    def _fold(self, adapter_name: str, x: Tensor, experts: Experts, shared: bool) -> Folded:
        """The experts' weights of an adapter without a router: those that are kept, or new ones, which then are."""
        keeps = not (shared or torch.is_grad_enabled() or torch.compiler.is_compiling())
        stamp = self._stamp(adapter_name, x) if keeps else None
        former, folded = self._kept.get(adapter_name, (None, None))
        if stamp is not None and former is not None and isinstance(folded, Folded) and former.holds(stamp.scores):
            return folded
        folded = fold(experts, self._prior_for(adapter_name, x, experts, shared), self.trex_settings[adapter_name])
        if stamp is not None:
            self._kept[adapter_name] = stamp, folded
        return folded

    def _stamp(self, adapter_name: str, x: Tensor) -> Stamp | None:
        """What the tokens of a prompt have in common; None where that cannot be kept from one to the next.

        All tokens of an answer have the very same scores, within a generate call and by hand. Without scores nothing
        would tell one prompt from another.
        """
        state = self._channel.running.state
        scores = None if state is None else state.scores.get(adapter_name)
        # Scores of each token take memory, and those that were made for this input alone will not come again.
        if scores is None or scores.dim() != 2 or self.scores_of(adapter_name, x) is not scores:
            return None
        places: list[Any] = [self.trex_settings, self.trex_chosen]
        for kind, parameter in zip(SOURCES, self._find(SOURCES, adapter_name), strict=True):
            place = self._modules[kind]._parameters  # type: ignore[attr-defined]
            # Parameters of inference mode, or that something wraps or shards, do not tell when they change.
            if place.get(adapter_name) is not parameter or (parameter is not None and parameter.is_inference()):
                return None
            places.append(place)
        return Stamp(scores, adapter_name, places)

    @torch.no_grad()
    def static_factors(self, adapter_name: str, clusters: Mapping[int, float] | None = None) -> tuple[Tensor, Tensor]:
        """The static weight as `up @ down`: down (r, D_in) and up (D_out, r), float32 or wider, r at most r_b.

        It is the calibrated weight for the prompts of these clusters, each with its share, None for all prompts;
        uncalibrated, that of the mean routing.
        """
        tensors = (self.trex_A[adapter_name], self.trex_B[adapter_name], self.trex_gate[adapter_name])
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        A, B, gate = (tensor.to(dtype) for tensor in tensors)
        up = torch.sigmoid(self.trex_settings[adapter_name].temperature * gate) * B
        if adapter_name not in self.trex_static:
            core = self.mean_core(adapter_name).to(dtype)
        else:
            static = self.trex_static[adapter_name].to(dtype)
            core = (
                static[0] if clusters is None else sum(share * static[1 + index] for index, share in clusters.items())
            )
            if core.shape[1] == self.in_features:
                return core, up
        with torch.autocast(A.device.type, enabled=False):
            return (A, up @ core) if A.shape[0] < B.shape[1] else (core @ A, up)

    @torch.no_grad()
    def mean_core(self, adapter_name: str) -> Tensor:
        """The core C (r_b, r_a) of the mean routing: uniform over the experts, the training prompts' mean scores."""
        experts, prior = self.experts_of(adapter_name), None
        if self.trex_uses_prior[adapter_name]:
            scores = self._channel.mean_scores(adapter_name) if self.trex_reached[adapter_name] else None
            prior = self._prior(adapter_name, None if scores is None else scores[None].to(experts.A.device))
        return mean_core(experts, prior, self.trex_settings[adapter_name])

    def tokens_of(self, x: Tensor) -> Tensor:
        """The tokens (..., D_in) in an input of the layer; a convolution's are what lies under its kernel."""
        return x

    def outputs_of(self, y: Tensor) -> Tensor:
        """The output (..., D_out) of each token in an output of the layer."""
        return y

    def check_static(self, path: str) -> None:
        """Raise a ValueError, with the layer's name, if no static weight can stand for an adapter in it."""

    def check_mergeable(self, path: str) -> Scheme | None:
        """How the base weight has to be read and written, None for a plain one; a ValueError if it cannot be."""
        self.check_static(path)
        return check_mergeable(self.get_base_layer(), path)

    def as_lora(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Static factors, down (r, D_in) and up (D_out, r), in the shapes of a LoRA on the layer."""
        return down, up

    def expert_weights(self, x: Tensor, adapter_name: str = "default") -> Tensor:
        """Weight of every expert, before the output gate, for the layer's input `x`, of [`tokens_of`] (..., E).

        It can be called within a forward of the model only, from a hook for instance, since the prior belongs to it.
        """
        experts = self.experts_of(adapter_name)
        shared = self.takes_positions and self._channel.is_position(x)
        x = self._cast_input_dtype(self.tokens_of(x), experts.A.dtype)
        logits = None if experts.router is None else router_logits(x, experts.router, experts.router_down)
        prior = self._prior_for(adapter_name, x, experts, shared)
        weights = weigh_experts(x, logits, prior, experts.omega, self.trex_settings[adapter_name])
        return weights.expand(*x.shape[:-1], weights.shape[-1])

    def cluster_of(self, x: Tensor, adapter_name: str = "default") -> Tensor:
        """The group of each token's prompt, [`SemanticPrior.group_of`]: (...) for [`tokens_of`] the input.

        It can be called where `expert_weights` can; the adapter's prior must be fitted.
        """
        x = self.tokens_of(x)
        scores = self.scores_of(adapter_name, x)
        assert scores is not None
        clusters = self._channel.priors[adapter_name].group_of(scores)  # type: ignore[operator]
        return clusters.reshape(*clusters.shape, *[1] * (x.dim() - 1 - clusters.dim())).expand(x.shape[:-1])

    def _add_adapter(self, adapter_name: str, base: Base) -> Tensor:
        """The base layer's output plus the adapter's, (..., D_out)."""
        stamp, kept = self._kept.get(adapter_name, (None, None))
        if stamp is not None and isinstance(kept, OneToken) and self._is_one_token(base.x):
            state = self._channel.running.state
            if state is not None and stamp.holds(state.scores.get(adapter_name)):
                return kept.add(base)
        experts = self.experts_of(adapter_name)
        if experts.A.is_meta and hasattr(self.trex_A, "_hf_hook"):
            with self._onloaded():
                return self._add_adapter(adapter_name, base)
        return self._add(adapter_name, base, experts)

    def _is_one_token(self, x: Tensor) -> bool:
        """Whether an input of a layer that is no longer trained is one token, on a CPU and as it is."""
        if self.training or torch.is_grad_enabled() or not x.is_cpu or x.dim() != 3 or x.shape[:2] != (1, 1):
            return False
        return is_fast(x, x) and not self.takes_positions and not torch.is_autocast_enabled("cpu")

    def _add(self, adapter_name: str, base: Base, experts: Experts) -> Tensor:
        x, settings, fused = base.x, self.trex_settings[adapter_name], self.trex_fused[adapter_name]
        dtype = experts.A.dtype
        # The fast path takes a bfloat16 input beside float32 adapters as it is, without a copy in float32.
        short = x.dtype == torch.bfloat16 and dtype == torch.float32
        if x.dtype != dtype and not (fused and short and is_fast(x, experts.A)):
            x = self._cast_input_dtype(x, dtype)
        shared = self.takes_positions and self._channel.is_position(base.x)
        prior: Tensor | None
        one = fused and self._is_one_token(base.x) and OneToken.suits(experts, settings)
        stamp = self._stamp(adapter_name, x) if one else None
        if fused and experts.router is None and not weighs_itself(base.x, experts):
            prior, settings = self._fold(adapter_name, x, experts, shared)
            experts = Experts(experts.A, experts.B)
        else:
            prior = self._prior_for(adapter_name, x, experts, shared)
        if one:
            adding = OneToken(experts, prior, settings)
            if stamp is not None:
                self._kept[adapter_name] = stamp, adding
            return adding.add(base)
        dropout = self._modules["trex_dropout"]._modules[adapter_name]  # type: ignore[attr-defined]
        if type(dropout) is not nn.Identity:
            x = dropout(x)
        state = self._channel.running.state
        if state is not None and state.losses is not None and experts.router is not None:
            turned = self.order is not None and self.order.is_turned(x, state.rows)
            state.losses.add(adapter_name, x.transpose(0, 1) if turned else x, experts, settings.top_k)
        return add_mixture(base, x, experts, prior, settings, fused)


class Linear(nn.Module, TRexLayer):
    """T-REX in an `nn.Linear` or a transformers `Conv1D`: `y = W0 x + gate * B (a G)`, (..., D_out) for x (..., D_in).

    G holds the weight of every expert, from the token's router and the prompt's prior; [`mixture`] has the formula.
    The `base_layer` may be another adapter's layer; `layer_name` is its name in the base model. The `channel` gives
    the prior of the forward that is running.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: TRexConfig, channel: PriorChannel, layer_name: str = ""
    ) -> None:
        super().__init__()
        TRexParameters.__init__(self, base_layer, channel)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if config.fan_in_fan_out and not self.fan_in_fan_out:
            name = type(self.get_base_layer()).__name__
            warnings.warn(f"fan_in_fan_out=True does not fit a {name} and is ignored there.", stacklevel=2)
        self._active_adapter = adapter_name
        self.register_load_state_dict_pre_hook(TRexParameters.make_room)
        self.update_layer(adapter_name, config, layer_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's static weight in the base weight's layout and the adapter's dtype, [`static_factors`]."""
        return self._delta_weight(adapter).to(self.trex_A[adapter].dtype)

    @torch.no_grad()
    def _delta_weight(self, adapter: str) -> Tensor:
        # In float32 or wider, so that a merge rounds only once, with the base weight.
        down, up = self.static_factors(adapter)
        with torch.autocast(down.device.type, enabled=False):
            delta = up @ down
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Allow PEFT to turn the adapter into a LoRA, which it makes from `get_delta_weight`."""
        if adapter_name in self.trex_A and adapter_name not in self.trex_static:
            warnings.warn(APPROXIMATE, stacklevel=3)
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the static weights of these adapters, None for the active ones, to the base weight.

        Raises:
            ValueError: if the base weight is quantised in a way that cannot be written; with `safe_merge`, if the sum
                is not finite. The base weight is then as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.trex_A:
                self._add_to_base(self._delta_weight(name), name, check=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`: a plain base weight is restored up to rounding, a quantised one to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # Subtracting would leave the rounding of two quantisations.
        if self._former_weight is not None:
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
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        # Decoding feels the time that properties take, as in _find.
        base_layer: Any = self._modules["base_layer"]
        if self._disable_adapters or self.merged_adapters:
            return base_layer(x, *args, **kwargs)
        if self._channel.running.rows is not None:
            return self._forward_by_row(x, base_layer(x, *args, **kwargs))
        # A simple layer waits: the first adapter may make both products together. (torch.compile knows no `not args`.)
        waits = len(args) == 0 and not kwargs and separable(base_layer)
        base = Base(x, base_layer) if waits else Base(x, None, base_layer(x, *args, **kwargs))
        active = self._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            if name in self.trex_fused:
                base = Base(x, None, self._add_adapter(name, base))
        return base.compute()

    def _forward_by_row(self, x: Tensor, output: Tensor) -> Tensor:
        """The base layer's output with what the adapter of each row adds to that row."""
        channel = self._channel
        rows, state = channel.running.rows, channel.running.state
        if rows is None or state is None:
            raise ValueError("adapter_names needs a forward of the model itself, which tells the rows of its layers.")
        axis = int(self.order is not None and self.order.is_turned(x, state.rows))
        for name, places, own in rows.parts(state, x, axis):
            if name in self.trex_fused and len(places):
                base = Base(x.index_select(axis, places), None, output.index_select(axis, places))
                output = output.index_copy(axis, places, channel.run(own, self._add_adapter, name, base))
        return output

    def __repr__(self) -> str:
        return "trex." + super().__repr__()
