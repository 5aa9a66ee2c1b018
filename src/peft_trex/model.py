"""TRexModel: PEFT's tuner for the method."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.config import PeftConfig
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .callers import check_caller
from .config import TRexConfig
from .convolution import layer_for
from .keys import for_model, for_peft
from .layer import APPROXIMATE, TRexLayer
from .loading import PREFIX, check_shapes, check_tensors, check_values, newer_writer, shapes_of, split_calibrated
from .parameters import features_of
from .prior.adapters import find_embedding, is_trex
from .prior.hooks import PromptWatch
from .prior.priors import Priors
from .prior.reach import modules_outside, tell_layers
from .prior.rows import RowAdapters, running_by_row
from .prior.semantic_prior import CELLS, SemanticPrior
from .quantized import former_weights, keep_trainable, release
from .room import Room
from .saved_rows import SavedRows
from .targets import check_pattern, check_patterns, check_target, check_untied, settle_targets
from .undo import Snapshot, Undone
from .unsuited import keep_called

# TRL's trainers that train an adapter further, such as DPO's, add a reference adapter of this name with the very
# configuration of "default". They copy the parameters called `*.default.*`, which misses ours and all buffers.
REFERENCE = "ref"


class TRexModel(BaseTuner):
    """A pretrained model with T-REX adapters, mixtures of rank-one experts with a semantic prior (arXiv 2404.08985).

    PEFT's low-level functions keep the base model alone, so all that adapters need after their injection is in that.

    Attributes:
        model: the base model, with the adapted layers in it.
        peft_config: the configuration of each adapter.
    """

    prefix: str = PREFIX
    tuner_layer_cls = TRexLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # PEFT leaves half of the layers in the base model when the first injection fails.
        with Undone(Snapshot(model)):
            super().__init__(model, *args, **kwargs)

    @classmethod
    def around(cls, priors: Priors) -> TRexModel:
        """A tuner for adapters that are in a base model already, where PEFT has thrown away the one that made them."""
        adapters = priors.prompts.adapters
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model, tuner.peft_config, tuner.active_adapter = adapters.base, adapters.configs, adapters.active()
        tuner.targeted_module_names, tuner.targeted_parameter_names = [name for name, _ in adapters.layers()], []
        tuner._priors = [priors]
        return tuner

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # PEFT has nothing to prepare. Here the layers, which are built next, need the channel that they read from.
        base: nn.Module = getattr(self.model, "_orig_mod", self.model)
        priors = Priors.within(base)
        if priors is None or priors.prompts.adapters.base is not base:
            priors = Priors(base, self.peft_config)
            self._take_over(priors)
        priors.prompts.adapters.configs = self.peft_config
        # They are a module of a layer, and here in a list, since they must be no module of the tuner's as well.
        self._priors = [priors]

    def _take_over(self, priors: Priors) -> None:
        """Have the adapters of a part of this model, which was a base model itself, go on under these priors."""
        inside = set(self.model.modules())
        for _, layer in list(priors.prompts.adapters.layers()):
            former = layer.read_from(priors.prompts.channel)
            if former is priors or not former.prompts.attached:
                continue
            adapters = former.prompts.adapters
            if adapters.base not in inside:
                raise ValueError(
                    "The model is a part of one that has T-REX adapters already (its base model is a "
                    f"{type(adapters.base).__name__}); add the adapter to that model, not to its part."
                )
            priors.update(dict(former.items()))
            for name, config in adapters.configs.items():
                self.peft_config.setdefault(name, config)
            former.leave()

    @property
    def trex_prior(self) -> Priors:
        """The [`SemanticPrior`] of each adapter that has one. They are a module of the first adapted layer."""
        return self._priors[0]

    @property
    def prompts(self) -> PromptWatch:
        """The watch over the base model, which finds the prior of each forward."""
        return self.trex_prior.prompts

    @property
    def card_notes(self) -> dict[str, dict[str, Any]]:
        """What the model card of each adapter says besides; see [`describe_trex`]."""
        return self.trex_prior.card_notes

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        # PEFT has a table of target modules by model type. The paper adapts all linear layers of any architecture.
        return settle_targets(peft_config, self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT injects layers only. An adapter also has a prior.
        if not adapter_name or "." in adapter_name:
            raise ValueError(f"An adapter cannot be called {adapter_name!r}: it must be neither empty nor hold a dot.")
        config = self.config_of(adapter_name)
        check_patterns(config, self.model)
        self.prompts.adapters.check(config)
        self._room = Room(config, self.model)
        with torch.device("meta") if kwargs.get("low_cpu_mem_usage") else nullcontext():
            self.trex_prior.put(adapter_name, self._make_prior(config))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.trex_prior.settle()
        check_pattern(config, self.layers_of(adapter_name))
        self.prompts.outside = modules_outside(self.prompts.adapters)
        tell_layers(self.prompts.adapters, adapter_name, self.prompts.outside)
        if adapter_name == REFERENCE and self.peft_config.get("default") is config:
            self._copy_adapter("default", REFERENCE)
        if not self.prompts.attached:
            self.prompts.attach(self.model.register_load_state_dict_pre_hook(check_shapes))
        keep_trainable(model)

    def _make_prior(self, config: TRexConfig) -> SemanticPrior | None:
        embedding = self.input_embedding()
        dim = config.prior_dim or getattr(embedding, "embedding_dim", None)
        if not config.use_prior or dim is None:
            return None
        self._room.take("the prior", SemanticPrior.shapes(config.num_clusters, dim, config.prior_whitening).values())
        prior = SemanticPrior(config.num_clusters, dim, config.prior_whitening)
        if embedding is not None and not (embedding.weight.is_meta or prior.mean.is_meta):
            prior.to(embedding.weight.device)
        # A compiled forward could not look later.
        prior.look()
        return prior

    @torch.no_grad()
    def _copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the values of another one of the same configuration, its prior's included."""
        for layer in self.layers_of(source).values():
            for parameter, copied in zip(layer.parameters_of(target), layer.parameters_of(source), strict=True):
                parameter.copy_(copied)
        if source in self.trex_prior:
            self.trex_prior[target].load_state_dict(self.trex_prior[source].state_dict())

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
        # PEFT leaves it to each method what takes the place of a target module.
        check_target(target, current_key)
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        shapes: Any = shapes_of(peft_config, current_key, *features_of(layer))
        # A pruned layer also lists its experts.
        listed = (peft_config.num_experts_of(current_key),) if current_key in peft_config.expert_pattern else (0,)
        self._room.take(current_key, [*shapes.values(), listed])
        if isinstance(target, TRexLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        new_module = layer_for(target)(target, adapter_name, peft_config, self.prompts.channel, current_key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        keep_called(new_module, parent)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT reads the weight of the module that it unwraps. A module trained in full or quantised may have none.
        if isinstance(child, AuxiliaryTrainingWrapper) or not isinstance(new_module, TRexLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        # Other methods average their adapters here, which would mix up the clusters of ours.
        raise NotImplementedError(
            "T-REX adapters cannot be averaged into one: each has a router and clusters. set_adapter with a list of "
            "names adds their outputs; and the LoRA that save_trex_as_lora writes of each can be averaged."
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        # PEFT does not tell its own check which adapters will be merged, and a failure leaves some layers merged.
        self._check_before_merge(adapter_names)
        with Undone(self._with_weights()):
            super().merge_adapter(adapter_names, *args, **kwargs)

    def unmerge_adapter(self) -> None:
        # What a failure leaves of PEFT's is a model with some layers unmerged.
        with Undone(self._with_weights()):
            super().unmerge_adapter()

    def _with_weights(self) -> Snapshot:
        return Snapshot(self, values=former_weights(layer for _, layer in self.trex_layers()))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        # PEFT puts the innermost layer in a T-REX layer's place, and drops another method's adapter between the two.
        # It also may fail half-way, and the base model must leave without the hooks that watch it.
        names = kwargs.get("adapter_names")
        if merge:
            self._check_before_merge(names)
        with Undone(self._with_weights() if merge else Snapshot(self)):
            for layer in [layer.base_layer for _, layer in self.trex_layers()]:
                if merge and isinstance(layer, BaseTunerLayer):
                    layer.merge(safe_merge=kwargs.get("safe_merge", False), adapter_names=names)
            model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
            self.trex_prior.leave()
            release(model)
        return model

    def _check_before_merge(self, adapter_names: list[str] | None) -> None:
        """Check all layers before any is changed, and warn once instead of in every layer."""
        names = set(self.active_adapters if adapter_names is None else adapter_names)
        layers = {path: layer for path, layer in self.trex_layers() if not names.isdisjoint(layer.trex_A)}
        check_untied(self.model, layers)
        schemes = [layer.check_mergeable(path) for path, layer in layers.items()]
        quantised = sorted({scheme.name for scheme in schemes if scheme is not None})
        if quantised:
            warnings.warn(
                f"The merged weights are quantised anew ({', '.join(quantised)}), which rounds them beside the "
                "adapter's approximation. A base model that is loaded without quantisation takes it up without that.",
                stacklevel=2,
            )
        if uncalibrated := names & set(self.peft_config) - self.calibrated_adapters():
            check_caller(uncalibrated)
            warnings.warn(APPROXIMATE, stacklevel=2)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops this argument for methods that do not know it, and would run every row with the active adapter.
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names, one for each row, is for inference; call eval() first.")
        if any(layer.merged for _, layer in self.trex_layers()):
            raise ValueError("adapter_names was given while adapters are merged; call unmerge_adapter() first.")
        known = [name for name, config in self.peft_config.items() if is_trex(config)]
        with running_by_row(self.prompts.channel.running, RowAdapters.of(names, known), self.model):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT saves an embedding that is trained in full, but not the frozen one, which the prior reads.
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        saved_rows = SavedRows(model, find_tuner(model).prompts.scorer, adapter_name)
        return for_peft(model, saved_rows.split(tensors)[1] | saved_rows.for_file(state_dict))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT takes a file for complete, its tensors for those that the layers have from the start, and all that it
        # holds for the adapter's own. The model stays as it is until all of them are checked.
        assert isinstance(config, TRexConfig)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TRexLayer)}
        layers = {name: layer for name, layer in layers.items() if adapter_name in layer.trex_A}
        saved_rows = SavedRows(model, find_tuner(model).prompts.scorer, adapter_name)
        rows, others = saved_rows.split(for_model(model, adapter_name, state_dict))
        cells = f"{saved_rows.place}.{CELLS}"
        calibrated, others = split_calibrated(layers, adapter_name, config.num_clusters, cells, others)
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, others)
        # Parameters themselves tell their shape where ZeRO-3 shards them.
        in_model = saved_rows.split(model.state_dict(keep_vars=True))[1]
        in_model.pop(cells, None)
        saved = super()._get_adapter_state_dict(model, config, adapter_name, in_model, [])
        biases = {key for key in saved if key.endswith("bias") and ".modules_to_save." not in key}
        embeddings = saved_rows.check_embeddings(model, tensors, in_model)
        newer = newer_writer(config.peft_trex_version)
        check_tensors(adapter_name, in_model, tensors, biases | embeddings, newer)
        check_values(calibrated, in_model)
        find_tuner(model).card_notes.pop(adapter_name, None)
        # A layer makes room for its static weights, or drops them, when they are loaded; so does a prior for cells.
        return tensors | saved_rows.for_model(rows, tensors) | calibrated

    def calibrated_adapters(self) -> set[str]:
        """The adapters that have static weights, which merging uses; see [`calibrate_trex_merge`]."""
        return self.prompts.static.calibrated()

    def forget_static(self, adapter_name: str) -> None:
        """Drop the calibrated static weights of an adapter, which has changed since: those of all layers or none."""
        self.prompts.static.forget(adapter_name)

    def config_of(self, adapter_name: str) -> TRexConfig:
        """The configuration of an adapter; a ValueError if it is none of T-REX."""
        return self.prompts.adapters.config_of(adapter_name)

    def prior_of(self, adapter_name: str) -> SemanticPrior | None:
        """The semantic prior of an adapter, or None if it has none."""
        return self.prompts.adapters.prior_of(adapter_name)

    def input_embedding(self) -> nn.Embedding | None:
        """The base model's frozen token embedding, or None for a model without one."""
        return find_embedding(self.model)

    def trex_layers(self) -> Iterator[tuple[str, TRexLayer]]:
        """The adapted layers of the base model, by their names in it."""
        return self.prompts.adapters.layers()

    def layers_of(self, adapter_name: str) -> dict[str, TRexLayer]:
        """The layers that an adapter is in, by their names in the base model."""
        return self.prompts.adapters.layers_of(adapter_name)


def find_tuner(model: Any) -> TRexModel:
    """The T-REX tuner in a model, as `get_peft_model` returns it or around that; a new one where there is no more."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a model with a T-REX adapter.")
    for module in model.modules():
        if isinstance(module, TRexModel):
            return module
    priors = Priors.within(model)
    if priors is not None:
        return TRexModel.around(priors)
    raise ValueError(
        f"The model, a {type(model).__name__}, has no T-REX adapter; make one with get_peft_model and TRexConfig."
    )


def find_peft_model(model: nn.Module) -> nn.Module:
    """The PeftModel in a wrapper (DDP's, torch.compile's), or the tuner itself where there is none."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None) or find_tuner(model)
