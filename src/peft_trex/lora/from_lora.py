"""Start a T-REX adapter from existing LoRA adapters: their leading rank-one parts become its experts.

Axis legend: n LoRA adapters, E experts, K clusters, P prompts; `lora_fit` has the mathematics.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import TRexConfig
from ..fit.fitting import initialize_trex_prior
from ..model import TRexModel, find_tuner
from ..prior.inputs import EMBEDS, Inputs
from ..undo import Snapshot, Undone
from .lora_fit import LayerErrors, PromptScores, prompt_scores, start_layer
from .reader import Lora, Source, factors_by_layer, read_lora


@dataclass(frozen=True)
class TRexFromLoraReport:
    """What the new adapter misses of each LoRA adapter, as shares of its energy |dW|^2: at 0 nothing is missed.

    Attributes:
        adapters: the LoRA adapters' names.
        layout: "paired" or "grid".
        errors: what the experts miss with the best weights, in all layers together.
        start_errors: what the start misses: the mean over the adapter's prompts, or with equal weights without any.
        layers: `errors` of each layer; None for an adapter that leaves the layer as it is.
        start_layers: `start_errors` of each layer.
    """

    adapters: tuple[str, ...]
    layout: str
    errors: tuple[float, ...]
    start_errors: tuple[float, ...]
    layers: dict[str, tuple[float | None, ...]]
    start_layers: dict[str, tuple[float | None, ...]]

    def __str__(self) -> str:
        adapters = "; ".join(
            f"{name} misses {error:.2%}, {start:.2%} at the start"
            for name, error, start in zip(self.adapters, self.errors, self.start_errors, strict=True)
        )
        worst, layer = max((max(error or 0.0 for error in errors), name) for name, errors in self.layers.items())
        return f"T-REX from LoRA ({self.layout}): {adapters}; worst layer {worst:.2%} ({layer})"


def trex_from_lora(
    model: nn.Module,
    adapters: Sequence[Source],
    *,
    prompts: Sequence[Iterable[Mapping[str, Any]]] | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    progress: bool = True,
    **config: Any,
) -> tuple[PeftModel, TRexFromLoraReport]:
    """Make a T-REX adapter whose experts begin as the leading rank-one parts of existing LoRA adapters.

        model, report = trex_from_lora(base, ["lora/french", "lora/sql"], prompts=[french, sql], trainable="router")

    In the paired layout (the default here) a layer's experts are the largest singular parts of the adapters' weights,
    each measured by its share of its adapter; with as many as the ranks add up to, nothing is missed. In the grid
    layout the adapters share fitted bases A and B. The router starts at zero, so that equal weights make the mean of
    the adapters (in the grid layout the best matrix of rank one for it). With `shared_core=True` the core makes the
    mean, in both layouts and without a token router too: one LoRA of rank r is exactly reproduced by r x r vectors.

    Args:
        model: the base model, without any adapter. It is changed in place, as by `get_peft_model`.
        adapters: plain LoRA adapters of this base model, of any ranks and target modules: folders with safetensors,
            or loaded ones, each a `PeftModel` for its active adapter or a pair (`PeftModel`, adapter's name).
        prompts: for each adapter, batches of its prompts as the forward takes them. The prior is fitted to them, and
            its map so that they begin with their adapter, each adapter counting the same. They are read twice;
            iterators are kept in memory. Several processes must all get the same.
        adapter_name: the new adapter's name.
        seed: the seed of the clustering.
        progress: show a progress bar.
        config: fields of [`TRexConfig`]. Other than there, `expert_layout` is "paired" by default, with as many
            experts as the largest sum of the adapters' ranks in a layer; `use_prior` is whether there are prompts or a
            shared core; the prior's map is learned; target modules are those of all adapters. `trainable="router"`
            keeps the experts.

    Raises:
        ValueError, TypeError: if an adapter cannot be read, is not a plain LoRA of this model, is zero or not finite;
            for a base model with adapters; for settings that leave no such start (`use_router=False` without a shared
            core, `router_top_k`, `prior_map="identity"`); if prompts do not match. The base model is then as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected the base model.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The base model has an adapter already; save that, and call unload() to take it out.")
    if isinstance(adapters, (str, os.PathLike, PeftModel)) or not adapters:
        raise ValueError("adapters must be a list of at least one LoRA adapter.")
    loras = [read_lora(source) for source in adapters]
    factors = factors_by_layer(model, loras)
    if prompts is not None:
        count = len(prompts) if isinstance(prompts, Sized) else "no list"
        if isinstance(prompts, Mapping) or count != len(loras):
            wanted = f"the batches for each of the {len(loras)} LoRA adapters, in their order"
            raise ValueError(f"prompts must list {wanted}; got {count}.")
        prompts = [list(batches) if isinstance(batches, Iterator) else batches for batches in prompts]
    settings = _settings(config, loras, with_prompts=prompts is not None)
    with Undone(Snapshot(model)):
        peft_model = get_peft_model(model, settings, adapter_name=adapter_name)
        tuner = find_tuner(peft_model)
        layers = tuner.layers_of(adapter_name)
        missing = [name for name in factors if name not in layers]
        if missing:
            raise ValueError(
                f"The new adapter has no layer at {len(missing)} modules that the LoRA adapters change, such as "
                f"{missing[0]}; leave target_modules out, or name them there."
            )
        scores = None
        if prompts is not None:
            initialize_trex_prior(peft_model, chain(*prompts), adapter_name=adapter_name, seed=seed, progress=progress)
            scores = _score(tuner, adapter_name, prompts)
        errors = {}
        for name, layer in layers.items():
            # B becomes zero, and stays so where no LoRA changes the layer.
            layer.reset_trex_parameters(adapter_name, "zero_router")
            if name in factors:
                errors[name] = start_layer(layer, adapter_name, settings, factors[name], scores)
    return peft_model, _report(loras, settings.expert_layout, errors)


def _settings(options: dict[str, Any], loras: list[Lora], with_prompts: bool) -> TRexConfig:
    """The new adapter's configuration: the user's options, and our defaults for the others."""
    ranks: Counter[str] = Counter()
    for lora in loras:
        ranks.update({name: len(factors.down) for name, factors in lora.factors.items()})
    use_prior = with_prompts or bool(options.get("shared_core"))
    values = {"expert_layout": "paired", "target_modules": sorted(ranks), "use_prior": use_prior, **options}
    if values["expert_layout"] == "paired":
        experts = values.get("r_a", values.get("r_b", max(ranks.values())))
        values = {"r_a": experts, "r_b": experts, **values}
    if values["use_prior"]:
        values.setdefault("prior_map", "learned")
    tasks = {lora.config.task_type for lora in loras}
    values.setdefault("task_type", tasks.pop() if len(tasks) == 1 else None)
    config = TRexConfig(**values)
    starts = {"router_top_k": (None,), "init_weights": (True, "zero_router")}
    starts["use_router"] = (True, not config.shared_core)
    for name, values_of_start in starts.items():
        if getattr(config, name) not in values_of_start:
            raise ValueError(
                f"{name}={getattr(config, name)} leaves no such start: all experts begin with equal weights from the "
                "token router."
            )
    if config.expert_pattern:
        raise ValueError("expert_pattern is what prune_trex leaves; build the adapter whole, and prune it afterwards.")
    if config.use_prior and not config.learned_map:
        raise ValueError("The prior reaches the adapters' experts by a map; use prior_map='learned', or leave it out.")
    if with_prompts and not config.use_prior:
        raise ValueError("prompts are for the prior, which use_prior=False drops; leave one of the two out.")
    return config


@torch.no_grad()
def _score(tuner: TRexModel, adapter_name: str, prompts: Sequence[Iterable[Mapping[str, Any]]]) -> PromptScores:
    """Score each adapter's prompts with the fitted prior."""
    prior, scorer = tuner.prior_of(adapter_name), tuner.prompts.scorer
    assert prior is not None
    scores = []
    with scorer.whole_embedding():
        for number, batches in enumerate(prompts):
            rows = []
            for batch in batches:
                if tuner.config_of(adapter_name).prior_encoder == "external":
                    embeds, has_tokens = batch[EMBEDS], batch[EMBEDS].any(-1)
                else:
                    embeds, places = scorer.embed(Inputs.of(batch), adapter_name)
                    has_tokens = places.known
                rows.append(prior.score(embeds[has_tokens]).double().cpu())
            if not any(map(len, rows)):
                raise ValueError(f"There are no prompts for the LoRA adapter {number} (counted from 0).")
            scores.append(torch.cat(rows))
    return prompt_scores(scores)


def _report(loras: list[Lora], layout: str, errors: Mapping[str, LayerErrors]) -> TRexFromLoraReport:
    def shares(energies: Tensor, missed: Tensor) -> tuple[Any, ...]:
        pairs = zip(energies.tolist(), missed.tolist(), strict=True)
        return tuple(lost / energy if energy else None for energy, lost in pairs)

    energies, missed, missed_at_start = (torch.stack(layers).sum(0) for layers in zip(*errors.values(), strict=True))
    return TRexFromLoraReport(
        adapters=tuple(lora.name for lora in loras),
        layout=layout,
        errors=shares(energies, missed),
        start_errors=shares(energies, missed_at_start),
        layers={name: shares(energies, missed) for name, (energies, missed, _) in errors.items()},
        start_layers={name: shares(energies, missed) for name, (energies, _, missed) in errors.items()},
    )
