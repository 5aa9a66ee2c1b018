"""TRexConfig: every knob of the method, explained once and checked when it is built."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from .hub import check_adapter_file
from .mixture import num_experts


@dataclass
class TRexConfig(PeftConfig):
    """
    Configuration of a [`TRexModel`]: a mixture of rank-one experts with a semantic prior (arXiv 2404.08985).

    Args:
        r_a (`int`):
            Number of input vectors of each layer (rows of A). The paper's value is 4.
        r_b (`int`):
            Number of output vectors of each layer (columns of B). The paper's value is 8.
        expert_layout (`"grid"` or `"paired"`):
            "grid" mixes and matches: r_a * r_b rank-one experts b_j a_i^T. "paired" is the paper's first version:
            r_a = r_b experts b_i a_i^T.
        num_clusters (`int`):
            K, the number of clusters of the training prompts. The paper's value is 32.
        prior_map (`"auto"`, `"identity"` or `"learned"`):
            How the K cluster scores reach the E experts: as they are (needs K = E), or through a trained matrix
            (E, K) in each layer. "auto" takes the identity when K = E.
        use_router (`bool`):
            False is the ablation without the token router.
        router_rank (`int`, *optional*):
            Rank of a reduced router: R (E, D_in) is the product of two trained factors, (E, router_rank) and
            (router_rank, D_in), which makes most of the adapter smaller. None, the paper's, keeps R whole. It saves
            parameters when it is less than E * D_in / (E + D_in), a little less than E.
        router_top_k (`int`, *optional*):
            The token router chooses the `router_top_k` experts of the largest logits for each token, and its softmax
            is over them alone; of equal logits the first are chosen. None, the paper's, mixes all experts. The prior
            weighs all of them in either case. It saves no arithmetic.
        balance_loss_coef (`float`):
            Weight of a loss that is added to the model's in training, and is least when the token router gives all
            experts the same (Switch Transformer's, mean over the layers; from 1 to E). Each forward is balanced by
            itself. 0, the paper's, leaves it out. It costs a second product with R.
        router_z_loss_coef (`float`):
            Weight of another one, which keeps the router's logits small (ST-MoE's z-loss). 0, the paper's, leaves it
            out.
        use_prior (`bool`):
            False is the ablation without the semantic prior.
        expert_pattern (`dict`):
            Layers that have only some of the `r_a` input and `r_b` output vectors, as [`prune_trex`] leaves them: by
            the layer's full name in the base model, `{"inputs": [0, 2], "outputs": [0, 1, 5], "token_scale": 9.5}`.
            The numbers, ascending, are those of a layer of full size. `token_scale` may be left out; it then is the
            one below, None standing for the number of experts that the layer has. With the identity map its experts
            keep the clusters that they have in full size.
        token_scale (`float`, *optional*):
            c_token of the paper. None stands for the number of experts (32 in the paper's setting).
        prior_scale (`float`):
            c_prior of the paper.
        gate_temperature (`float`):
            Temperature of the two sigmoids, omega (token against prior) and the output gate.
        trex_dropout (`float`):
            Dropout on the adapter's input, as LoRA's, in [0, 1).
        prior_encoder (`"input_embeddings"` or `"external"`):
            What the prior is computed from: the mean of the base model's frozen input embeddings over the prompt, or
            embeddings that each forward and generate gets as `semantic_embeds` (B, prior_dim).
        prior_dim (`int`, *optional*):
            Width of the external embeddings; only with `prior_encoder="external"`, and needed there.
        prior_whitening (`int`, *optional*):
            Compare prompts along this many principal directions of the training prompts' embeddings, each scaled to
            the same variance, so that the strongest (what the prompts are made of, say: words or numbers) does not
            drown those that tell tasks apart. 16 kept 8 and 16 tasks apart best (benchmarks/README.md). None compares
            the embeddings as they are, centred.
        mixture_implementation (`"auto"` or `"reference"`):
            How the mixture is computed. "auto" takes the fast path, with a Triton kernel on GPUs, and the formula with
            a single product for A and the router where a compiler fuses it. "reference" always takes the readable
            formula, which has second derivatives and works with `torch.func` and batched gradients. The results are
            equal up to rounding.
        init_weights (`bool` or `"random_router"`):
            True starts as in the paper: A and the learned map Kaiming-uniform, B and the router zero, so that the
            adapter changes nothing at first. "random_router" draws the router too, and changes nothing at first
            either: with a router of zeros only the prior tells the columns of B in a grid apart, and without a prior
            they stay equal for good. False makes B Kaiming-uniform as well (for tests).
        trainable (`"all"` or `"router"`):
            "router" trains what chooses experts (R, the prior's map, omega and the gate) and keeps the experts (A and
            B) as they are, for an adapter that has them already: see [`trex_from_lora`]. A new adapter has none (B is
            zero), and would learn nothing.
        target_modules (`list[str]` or `str`, *optional*):
            Names, or a regular expression, of the modules to adapt. None stands for "all-linear": all linear layers
            but the head, as in the paper.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names, or a regular expression, of the modules to leave out.
        modules_to_save (`list[str]`, *optional*):
            Modules besides the adapter that are trained and saved in full, a new classification head for instance.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the layers to adapt; `target_modules` must then be a list of names, or None.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the `nn.ModuleList` that these indices count, when it is not one of the usual ones.
        fan_in_fan_out (`bool`):
            True if the base layer stores its weight as (in, out), as transformers' `Conv1D` does; it is set by itself
            for that class.
        bias (`"none"`, `"all"` or `"trex_only"`):
            Which biases are trained and saved: none, all of the model, those of the adapted layers.

    Raises:
        ValueError, TypeError: naming the field, the value and the rule, for every value or combination that cannot be.
    """

    r_a: int = field(default=4, metadata={"help": "Number of input vectors (rows of A). Paper: 4."})
    r_b: int = field(default=8, metadata={"help": "Number of output vectors (columns of B). Paper: 8."})
    expert_layout: Literal["grid", "paired"] = field(
        default="grid", metadata={"help": "'grid': r_a * r_b experts; 'paired': r_a = r_b experts."}
    )
    num_clusters: int = field(default=32, metadata={"help": "Number of clusters of the training prompts. Paper: 32."})
    prior_map: Literal["auto", "identity", "learned"] = field(
        default="auto", metadata={"help": "Cluster scores to experts: as they are, or by a learned matrix."}
    )
    use_router: bool = field(default=True, metadata={"help": "False: ablation without the token router."})
    router_rank: int | None = field(default=None, metadata={"help": "Rank of a reduced router; None: the whole one."})
    router_top_k: int | None = field(default=None, metadata={"help": "Experts the router chooses; None: all."})
    balance_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the loss against unused experts."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the loss against large logits."})
    expert_pattern: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Layers with only some of the input and output vectors."}
    )
    use_prior: bool = field(default=True, metadata={"help": "False: ablation without the semantic prior."})
    token_scale: float | None = field(default=None, metadata={"help": "c_token; None: the number of experts."})
    prior_scale: float = field(default=4.0, metadata={"help": "c_prior. Paper: 4."})
    gate_temperature: float = field(default=100.0, metadata={"help": "Temperature of omega and gate. Paper: 100."})
    trex_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    prior_encoder: Literal["input_embeddings", "external"] = field(
        default="input_embeddings", metadata={"help": "What the prior is computed from."}
    )
    prior_dim: int | None = field(default=None, metadata={"help": "Width of external embeddings."})
    prior_whitening: int | None = field(
        default=None, metadata={"help": "Principal directions that prompts are compared along; None: all, unscaled."}
    )
    mixture_implementation: Literal["auto", "reference"] = field(
        default="auto", metadata={"help": "'auto': the fast path; 'reference': the readable formula."}
    )
    init_weights: bool | Literal["random_router"] = field(
        default=True, metadata={"help": "'random_router': only B starts at zero; False: nothing does (for tests)."}
    )
    trainable: Literal["all", "router"] = field(
        default="all", metadata={"help": "'router': the experts themselves, A and B, stay as they are."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; None: all linear layers but the head."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layers' list."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "True if weights are stored (in, out)."})
    bias: Literal["none", "all", "trex_only"] = field(default="none", metadata={"help": "Which biases are trained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TREX")
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(self.peft_type) is not TRexConfig:
            raise RuntimeError(
                "TRexConfig is not the configuration that PEFT knows for the method TREX: either this release of PEFT "
                "brings its own, which is then the one to use, or peft_trex was imported twice; restart Python."
            )
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_values()
        self._check_combinations()
        for name, entry in self._checked_pattern().items():
            self._check_entry(name, entry)

    @property
    def num_experts(self) -> int:
        """E, the number of rank-one experts of a layer."""
        return num_experts(self.r_a, self.r_b, self.expert_layout)

    @property
    def learned_map(self) -> bool:
        """Whether each layer learns the map from cluster scores to experts."""
        if self.prior_map == "auto":
            return self.use_prior and self.num_clusters != self.num_experts
        return self.use_prior and self.prior_map == "learned"

    def vectors_of(self, layer: str) -> tuple[list[int], list[int]]:
        """The input and the output vectors that a layer has, by their numbers in one of full size."""
        entry = self.expert_pattern.get(layer)
        return (list(range(self.r_a)), list(range(self.r_b))) if entry is None else (entry["inputs"], entry["outputs"])

    def experts_of(self, layer: str) -> list[int]:
        """The experts that a layer has, by their numbers in one of full size."""
        inputs, outputs = self.vectors_of(layer)
        if self.expert_layout == "paired":
            return list(inputs)
        return [i * self.r_b + j for i in inputs for j in outputs]

    def token_scale_of(self, layer: str) -> float:
        """c_token of a layer."""
        scale = self.expert_pattern.get(layer, {}).get("token_scale", self.token_scale)
        return float(len(self.experts_of(layer)) if scale is None else scale)

    def _checked_pattern(self) -> dict[str, Any]:
        if not isinstance(self.expert_pattern, dict):
            raise TypeError(
                f"expert_pattern is a {type(self.expert_pattern).__name__}; expected a dict of entries such as "
                "{'inputs': [0, 2], 'outputs': [0, 1, 5]} by the layers' names."
            )
        return self.expert_pattern

    def _check_entry(self, name: str, entry: Any) -> None:
        known = {"inputs", "outputs", "token_scale"}
        if not isinstance(entry, dict) or not {"inputs", "outputs"} <= set(entry) <= known:
            raise ValueError(
                f"expert_pattern[{name!r}]={entry!r} must be a dict of 'inputs' and 'outputs', and 'token_scale' if "
                "it has its own."
            )
        for side, count in (("inputs", self.r_a), ("outputs", self.r_b)):
            numbers = entry[side]
            whole = isinstance(numbers, list) and all(isinstance(one, int) for one in numbers) and numbers
            if not whole or numbers != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < count:
                raise ValueError(
                    f"expert_pattern[{name!r}] has {side} {numbers!r}; expected a list of at least one of the numbers "
                    f"0 to {count - 1}, ascending."
                )
        if self.expert_layout == "paired" and entry["inputs"] != entry["outputs"]:
            raise ValueError(
                f"expert_pattern[{name!r}] has inputs {entry['inputs']} and outputs {entry['outputs']}; with "
                "expert_layout='paired' they must be the same."
            )
        if "token_scale" in entry:
            scale = entry["token_scale"]
            _check_number(f"expert_pattern[{name!r}]['token_scale']", scale)
            if scale <= 0 or not math.isfinite(scale):
                raise ValueError(f"expert_pattern[{name!r}]['token_scale']={scale!r} must be positive and finite.")
            if not self.use_router:
                raise ValueError(
                    f"expert_pattern[{name!r}]['token_scale']={scale!r} scales the token router, which "
                    "use_router=False drops."
                )

    def _check_values(self) -> None:
        for name in ("r_a", "r_b", "num_clusters"):
            _check_int(name, getattr(self, name))
        for name in ("prior_dim", "prior_whitening", "router_rank", "router_top_k"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        choices = {
            "expert_layout": ("grid", "paired"),
            "prior_map": ("auto", "identity", "learned"),
            "prior_encoder": ("input_embeddings", "external"),
            "mixture_implementation": ("auto", "reference"),
            "trainable": ("all", "router"),
            "bias": ("none", "all", "trex_only"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; it must be one of {', '.join(allowed)}.")
        for name in ("use_router", "use_prior", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False.")
        if not isinstance(self.init_weights, bool) and self.init_weights != "random_router":
            raise ValueError(f"init_weights={self.init_weights!r} must be True, False or 'random_router'.")
        for name in ("token_scale", "prior_scale", "gate_temperature"):
            value = getattr(self, name)
            if name == "token_scale" and value is None:
                continue
            _check_number(name, value)
            if value <= 0 or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a positive, finite number.")
        for name in ("balance_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            _check_number(name, value)
            if value < 0 or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a finite number, at least 0.")
        _check_number("trex_dropout", self.trex_dropout)
        if not 0 <= self.trex_dropout < 1:
            raise ValueError(f"trex_dropout={self.trex_dropout!r} must be at least 0 and less than 1.")

    def _check_combinations(self) -> None:
        if not (self.use_router or self.use_prior):
            raise ValueError("use_router=False and use_prior=False leave nothing to mix; set at least one to True.")
        if self.expert_layout == "paired" and self.r_a != self.r_b:
            raise ValueError(
                f"expert_layout='paired' needs r_a = r_b, one output vector for each input vector; got r_a={self.r_a} "
                f"and r_b={self.r_b}."
            )
        if not self.use_router and self.token_scale is not None:
            raise ValueError(
                f"token_scale={self.token_scale!r} scales the token router, which use_router=False drops."
            )
        if not self.use_router and self.router_rank is not None:
            raise ValueError(f"router_rank={self.router_rank} reduces the token router, which use_router=False drops.")
        if not self.use_router and self.init_weights == "random_router":
            raise ValueError("init_weights='random_router' draws the token router, which use_router=False drops.")
        for name in ("balance_loss_coef", "router_z_loss_coef"):
            if not self.use_router and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} is for the token router, which use_router=False drops."
                )
        if self.router_top_k is not None:
            if not self.use_router:
                raise ValueError(
                    f"router_top_k={self.router_top_k} chooses for the token router, which use_router=False drops."
                )
            if self.router_top_k > self.num_experts:
                raise ValueError(f"router_top_k={self.router_top_k} is more than the {self.num_experts} experts.")
        if not self.use_prior and self.prior_map != "auto":
            raise ValueError(f"prior_map={self.prior_map!r} maps the prior, which use_prior=False drops.")
        if not self.use_prior and self.prior_encoder != "input_embeddings":
            raise ValueError(f"prior_encoder={self.prior_encoder!r} feeds the prior, which use_prior=False drops.")
        if not self.use_prior and self.prior_whitening is not None:
            raise ValueError(f"prior_whitening={self.prior_whitening} is for the prior, which use_prior=False drops.")
        if self.trainable == "router" and not (self.use_router or self.learned_map):
            raise ValueError(
                "trainable='router' trains what chooses experts, but there is nothing that does: use_router=False, "
                "and the prior has no learned map (prior_map='learned')."
            )
        if self.prior_map == "identity" and self.num_clusters != self.num_experts:
            raise ValueError(
                f"prior_map='identity' needs as many clusters as experts; got num_clusters={self.num_clusters} and "
                f"{self.num_experts} experts. Use prior_map='learned' or change one of them."
            )
        if self.prior_encoder == "external" and self.prior_dim is None:
            raise ValueError(
                "prior_encoder='external' needs prior_dim, the width of the embeddings that will be given as "
                "`semantic_embeds`; got None."
            )
        if self.prior_encoder == "input_embeddings" and self.prior_dim is not None:
            raise ValueError(
                f"prior_dim={self.prior_dim} is for prior_encoder='external'; with 'input_embeddings' the width is "
                "the base model's, leave it None."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules to be a list of module names, "
                f"or None for all linear layers; got target_modules={self.target_modules!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} has no use without layers_to_transform.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> TRexConfig:
        """Load as every PEFT config, after a look whether the adapter's weights beside it can be read at all."""
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        check_adapter_file(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a whole number, not {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
