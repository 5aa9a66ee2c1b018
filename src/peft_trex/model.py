"""TRexModel: PEFT's tuner for the method."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import TRexConfig
from .layer import APPROXIMATE, Linear, TRexLayer
from .prior import PriorChannel, SemanticPrior
from .prompts import PromptWatch
from .quantized import check_mergeable, include_quantised, keep_trainable, release, scheme_of
from .targets import check_fused_experts, check_untied, leave_out, name_by_kind

# TRL's trainers that go on with an adapter (DPO and its kin) add one of this name, with the very configuration of
# "default", and copy to it what is called `*.default.*`: that misses parameters in a ParameterDict, and buffers
REFERENCE = "ref"


class TRexModel(BaseTuner):
    """
    Creates a T-REX model, a mixture of rank-one experts with a semantic prior, from a pretrained model.

    The method is described in https://arxiv.org/abs/2404.08985.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`TRexConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    **Attributes**:
        - **model** -- The model to be adapted.
        - **peft_config** (`dict[str, TRexConfig]`): The configuration of each adapter.
        - **trex_prior** (`nn.ModuleDict`): The [`SemanticPrior`] of each adapter that has one.
        - **prompts** ([`PromptWatch`]): What finds the prior of each forward.
    """

    prefix: str = "trex_"
    tuner_layer_cls = TRexLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it
    # the priors belong to the model, not to a layer, and are saved once
    uses_shared_state: bool = True

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.trex_prior = nn.ModuleDict()
        self.prompts = PromptWatch(self, PriorChannel(self.trex_prior))
        self._to_merge: list[str] | None = None
        for layer in model.modules():  # of a tuner that was here before: its adapters go on under this one
            if isinstance(layer, TRexLayer):
                self.trex_prior.update(dict(layer.adopt(self.prompts.channel).items()))
        self.register_load_state_dict_pre_hook(_explain_wrong_shapes)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        # the paper adapts all linear layers, whatever the architecture, so there is no table of model types
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        leave_out(peft_config, self.model)
        check_fused_experts(peft_config, self.model)
        include_quantised(peft_config, self.model)
        if peft_config.layers_to_transform is not None:
            name_by_kind(peft_config, self.model)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not adapter_name or "." in adapter_name:  # found out halfway, PyTorch's own error would leave half of it
            raise ValueError(
                f"The adapter cannot be called {adapter_name!r}: its name becomes part of parameters' names, and must "
                "be neither empty nor hold a dot."
            )
        # a prior belongs to the model; its layers, which are built here, find it through the channel
        config, embedding = self.config_of(adapter_name), self.input_embedding()
        self._forget_prior(adapter_name)
        dim = config.prior_dim if embedding is None or config.prior_dim else embedding.embedding_dim
        if config.use_prior and dim is not None:
            prior = SemanticPrior(config.num_clusters, dim, config.prior_whitening)
            if embedding is not None and embedding.weight.device.type != "meta":
                prior.to(embedding.weight.device)
            prior.look()  # now, because a compiled forward could not
            self.trex_prior[adapter_name] = prior
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_pattern(adapter_name)
        except Exception:
            self._forget_prior(adapter_name)
            # a base model that is tried again must not keep half of it
            if set(self.peft_config) <= {adapter_name}:
                super()._unload_and_optionally_merge(merge=False)
            else:
                delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)
            raise
        if adapter_name == REFERENCE and self.peft_config.get("default") is config:
            self._copy_adapter("default", REFERENCE)
        self.prompts.attach()
        keep_trainable(model)

    def _check_pattern(self, adapter_name: str) -> None:
        """Raise a ValueError if the configuration names layers that have no adapter."""
        layers = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, TRexLayer) and adapter_name in module.trex_A
        }
        unknown = sorted(set(self.config_of(adapter_name).expert_pattern) - layers)
        if unknown:
            raise ValueError(
                f"expert_pattern names {len(unknown)} modules that the adapter is not in, such as {unknown[0]!r}; it "
                f"takes names in full, as {min(layers)!r}."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, TRexLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        plain = isinstance(base_layer, (nn.Linear, Conv1D)) and base_layer.weight.is_floating_point()
        if not plain and scheme_of(base_layer) is None:
            raise ValueError(
                f"The target module {current_key} is a {type(base_layer).__name__}; T-REX adapts torch.nn.Linear and "
                "transformers' Conv1D with floating-point weights, and quantised layers that PEFT knows. Name such "
                "layers in target_modules, or leave this one out with exclude_modules."
            )
        if isinstance(parent, nn.MultiheadAttention):  # which reads the weight, and never calls the layer
            raise ValueError(
                f"The target module {current_key} belongs to a torch.nn.MultiheadAttention, which would pass the "
                "adapter by in silence. Leave it out with exclude_modules."
            )
        new_module = Linear(target, adapter_name, peft_config, self.prompts.channel, current_key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT looks for the weight of what it unwraps, which a module trained in full, or quantised, need not have
        if isinstance(child, AuxiliaryTrainingWrapper) or not isinstance(new_module, TRexLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "T-REX adapters cannot be averaged into one: each has a router and clusters of its own. set_adapter with "
            "a list of names runs several at once and adds their outputs."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # the layers' own clean-up does not reach what belongs to the model
        self._forget_prior(adapter_name)
        if was_active and self.peft_config:  # and each layer chose by itself, among its own, which one takes over
            self.set_adapter(self.active_adapters or [next(iter(self.peft_config))])

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        with self._merging(adapter_names):
            super().merge_adapter(adapter_names, *args, **kwargs)

    @contextmanager
    def _merging(self, adapter_names: list[str] | None) -> Iterator[None]:
        """While these are merged: PEFT asks `_check_merge_allowed` without saying what is to be merged."""
        self._to_merge = adapter_names
        try:
            yield
        finally:
            self._to_merge = None

    def _check_mergeable(self) -> tuple[set[str], set[str]]:
        """The adapters that are to be merged, and the names of the quantisations of what they are merged into.

        All layers are looked at before any is touched; what cannot be merged raises a ValueError.
        """
        chosen = set(self.active_adapters if self._to_merge is None else self._to_merge)
        check_untied(self.model, chosen)
        schemes = {
            check_mergeable(layer.get_base_layer(), path)
            for path, layer in self.model.named_modules()
            if isinstance(layer, TRexLayer) and not chosen.isdisjoint(layer.trex_A)
        }
        return chosen & set(self.peft_config), {scheme.name for scheme in schemes if scheme is not None}

    def _check_merge_allowed(self) -> None:
        # PEFT asks once per merge, which makes this the place for a warning that should not come from every layer
        super()._check_merge_allowed()
        chosen, quantised = self._check_mergeable()
        if quantised:
            names = ", ".join(sorted(quantised))
            warnings.warn(
                f"The merged weights are quantised anew ({names}), which rounds them: the outputs differ more from "
                "the adapter's than its approximation explains. A base model that is loaded without quantisation "
                "takes it up without that.",
                stacklevel=3,
            )
        if not chosen <= self.calibrated_adapters():
            warnings.warn(APPROXIMATE, stacklevel=3)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        # PEFT puts the innermost layer in a T-REX layer's place, and drops another method's adapter between the two
        between = [layer.base_layer for layer in self.model.modules() if isinstance(layer, TRexLayer)]
        names = kwargs.get("adapter_names")
        with self._merging(names):
            if merge:
                self._check_mergeable()
                for layer in between:
                    if isinstance(layer, BaseTunerLayer):
                        layer.merge(safe_merge=kwargs.get("safe_merge", False), adapter_names=names)
            # the base model leaves as it came, without the hooks that watch it
            model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self.prompts.detach()
        release(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops this argument for methods that do not know it, and would run every row with the active adapter
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "T-REX does not support adapter_names, one adapter for each row of a batch; use set_adapter and one "
                "call for each adapter."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layers = [layer for layer in model.modules() if isinstance(layer, TRexLayer) and adapter_name in layer.trex_A]
        former = [layer.trex_static[adapter_name] if adapter_name in layer.trex_static else None for layer in layers]
        try:
            _make_room_for_static(model, config, adapter_name, state_dict)
            loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            cls._check_complete(model, adapter_name, loaded)
        except ValueError:
            for layer, static in zip(layers, former, strict=True):
                layer.keep_static(adapter_name, static)
            raise
        return loaded

    @classmethod
    def _check_complete(cls, model: nn.Module, adapter_name: str, loaded: Mapping[str, Tensor]) -> None:
        # PEFT loads without strictness: what a damaged or foreign file lacks would stay at its start, in silence. An
        # adapter may be called like a part of a module's name, so that only its place in the key tells
        own_key = re.compile(rf"\.{cls.prefix}\w+\.{re.escape(adapter_name)}(\.\w+)?$")
        known = set(model.state_dict())  # a module of the base model, trained in full, may carry the prefix as well
        own = {key for key in known if own_key.search(key)}
        unknown = {key for key in set(loaded) - known if f".{cls.prefix}" in key}
        for what, keys in (("lacks", sorted(own - set(loaded))), ("holds unknown", sorted(unknown))):
            if keys:
                raise ValueError(
                    f"The adapter file {what} {len(keys)} T-REX tensors, such as {keys[0]}; the adapter has "
                    f"{len(own)}. The file is damaged or was saved for another base model or configuration: restore "
                    "it, or load it onto the model that its adapter_config.json names. delete_adapter"
                    f"({adapter_name!r}) removes what was made for it."
                )

    def calibrated_adapters(self) -> set[str]:
        """Adapters with static weights of their own, which merging uses; see [`calibrate_trex_merge`]."""
        return {name for layer in self.modules() if isinstance(layer, TRexLayer) for name in layer.trex_static.keys()}

    def forget_static(self, adapter_name: str) -> None:
        """Drop the calibrated static weights of an adapter, which has changed since."""
        for layer in self.modules():
            if isinstance(layer, TRexLayer):
                layer.keep_static(adapter_name, None)
        self.prompts.channel.calibrated.discard(adapter_name)

    def forget_trained(self) -> None:
        """Before a training forward: drop the calibrated static weights of the adapters that it will change."""
        for name in self.calibrated_adapters():
            layers = [layer for layer in self.modules() if isinstance(layer, TRexLayer) and name in layer.trex_A]
            trained = any(parameter.requires_grad for layer in layers for parameter in layer.parameters_of(name))
            if trained and name in self.active_adapters and not any(layer.merged for layer in layers):
                self.forget_static(name)
                warnings.warn(
                    f"The adapter {name!r} is trained again, so the static weights that calibrate_trex_merge found "
                    "for it were dropped; call it anew before the adapter is merged or exported.",
                    stacklevel=2,
                )

    def config_of(self, adapter_name: str) -> TRexConfig:
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(self.peft_config)}.")
        config = self.peft_config[adapter_name]
        if not isinstance(config, TRexConfig):  # PEFT warns of a second method on a model, and lets it take the name
            raise ValueError(
                f"The adapter {adapter_name!r} was a T-REX adapter, and another method has taken its name: its "
                f"configuration is a {type(config).__name__} now. Give the second adapter_name to get_peft_model."
            )
        return config

    def prior_of(self, adapter_name: str) -> SemanticPrior | None:
        """The adapter's semantic prior, or None if it has none."""
        prior = self.trex_prior[adapter_name] if adapter_name in self.trex_prior else None
        assert prior is None or isinstance(prior, SemanticPrior)
        return prior

    @torch.no_grad()
    def _copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the values of another one of the same configuration, its prior's included."""
        for layer in self.modules():
            if isinstance(layer, TRexLayer) and source in layer.trex_A:
                for name in layer.adapter_layer_names:
                    parameters = getattr(layer, name)
                    if source in parameters:
                        parameters[target].copy_(parameters[source])
        if source in self.trex_prior:
            self.trex_prior[target].load_state_dict(self.trex_prior[source].state_dict())

    def _forget_prior(self, adapter_name: str) -> None:
        if adapter_name in self.trex_prior:
            del self.trex_prior[adapter_name]

    def input_embedding(self) -> nn.Embedding | None:
        """The base model's frozen token embedding, or None for a model without one."""
        try:
            embedding = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        if isinstance(embedding, AuxiliaryTrainingWrapper):  # trained beside the adapter; the frozen one is kept in it
            embedding = embedding.original_module
        if isinstance(embedding, BaseTunerLayer):
            embedding = embedding.get_base_layer()
        return embedding if isinstance(embedding, nn.Embedding) else None


def find_tuner(model: Any) -> TRexModel:
    """The T-REX tuner in a model, as `get_peft_model` returns it or around that."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a model with a T-REX adapter.")
    tuner = next((module for module in model.modules() if isinstance(module, TRexModel)), None)
    if tuner is None:
        raise ValueError(
            f"The model, a {type(model).__name__}, has no T-REX adapter; make one with get_peft_model and TRexConfig."
        )
    return tuner


def find_peft_model(model: nn.Module) -> nn.Module:
    """The PeftModel in a wrapper (DDP's, torch.compile's), or the tuner itself where there is none."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None) or find_tuner(model)


def _make_room_for_static(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Let the layers hold the static weights that an adapter's file brings, or none where it was not calibrated."""
    assert isinstance(config, TRexConfig)
    layers = {
        f"{name}.trex_static": module
        for name, module in model.named_modules()
        if isinstance(module, TRexLayer) and adapter_name in module.trex_A
    }
    given = {key: state_dict[key] for key in layers if key in state_dict}
    sets = Counter(len(static) for static in given.values()).most_common(1)
    for key, layer in layers.items():
        static = given.get(key)
        if static is None:
            layer.keep_static(adapter_name, None)
        elif (
            static.dim() != 3
            or len(static) != sets[0][0]
            or len(static) not in (1, 1 + config.num_clusters)
            or static.shape[1] != layer.trex_B[adapter_name].shape[1]
            or static.shape[2] not in (len(layer.trex_A[adapter_name]), layer.in_features)
        ):
            r_a, r_b = len(layer.trex_A[adapter_name]), layer.trex_B[adapter_name].shape[1]
            raise ValueError(
                f"The T-REX tensor {key} has shape {tuple(static.shape)} in the file; expected (1 or "
                f"{1 + config.num_clusters}, {r_b}, {r_a} or {layer.in_features}), and as many sets as the other "
                "layers have. The file is damaged or was saved for another base model or configuration."
            )
        else:
            layer.keep_static(adapter_name, torch.zeros_like(static))
    if given and len(given) < len(layers):
        missing = [key for key in layers if key not in given]
        raise ValueError(
            f"The adapter file lacks {len(missing)} of {len(layers)} calibrated static weights, such as {missing[0]}; "
            "it is damaged: restore it, or remove all of them and calibrate the adapter again."
        )


def _explain_wrong_shapes(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Before weights are loaded: say what to do about tensors that do not fit, besides what torch will say."""
    error_messages: list[str] = rest[-1]
    for key, own in module.state_dict(prefix=prefix).items():
        given = state_dict.get(key)
        if f".{TRexModel.prefix}" in key and given is not None and given.shape != own.shape:
            error_messages.append(
                f"The T-REX tensor {key} has shape {tuple(given.shape)} in the file and {tuple(own.shape)} in the "
                "model: the adapter was saved for another base model or configuration. Load it onto the model that "
                "its adapter_config.json names."
            )
            return
