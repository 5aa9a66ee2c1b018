"""TRexConfig: every knob of the method, explained once and checked when it is built."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from types import MappingProxyType
from typing import Any, Literal

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from .checks import (
    COUNT,
    SIZES,
    check_combinations,
    check_expert_pattern,
    check_names,
    check_number,
    check_values,
    settle_size_patterns,
)
from .loading import check_against_config, check_weights, known_fields, read_config, shapes_of
from .mixture import num_experts
from .version import VERSION
from .words import in_own_words


@in_own_words
@dataclass
class TRexConfig(PeftConfig):
    """Configuration of a [`TRexModel`]: a mixture of rank-one experts with a semantic prior (arXiv 2404.08985).

    Args:
        r_a: Number of input vectors of each layer (rows of A). The paper's value is 4.
        r_b: Number of output vectors of each layer (columns of B). The paper's value is 8.
        expert_layout: "grid" mixes and matches: r_a * r_b rank-one experts b_j a_i^T. "paired" is the paper's first
            version: r_a = r_b experts b_i a_i^T.
        num_clusters: K, the number of clusters of the training prompts. The paper's value is 32.
        prior_map: How the K cluster scores reach the E experts: as they are ("identity", which needs K = E), or
            through a trained matrix (E, K) in each layer ("learned"). "auto" takes the identity when K = E in all
            layers, that is, without the two patterns of sizes below.
        shared_core: True adds a trained core C to each layer's prior, one number for each of the E experts, which all
            prompts and tokens get (ours, not the paper's). Without a token router the layer is then a LoRA whose core
            moves with the prompt, and prompts share what they have in common. C starts at half the identity, and a
            learned map beside it at 0.3 of its usual size. Where a prior is zero or not fitted, C alone is left.
        use_router: False is the ablation without the token router.
        router_rank: Rank of a reduced router: R (E, D_in) is the product of two trained factors, (E, router_rank) and
            (router_rank, D_in). It saves parameters when it is less than E * D_in / (E + D_in), a little less than E.
            None, the paper's, keeps R whole.
        router_top_k: The token router's softmax is over the router_top_k largest logits of each token alone; of equal
            logits the first are chosen. The prior weighs all experts in either case. It saves no arithmetic. None, the
            paper's, mixes all experts.
        balance_loss_coef: Weight of a loss that is added to the model's in training, and is least when the token
            router gives all experts the same (Switch Transformer's, mean over the layers; from 1 to E). Each forward
            is balanced by itself. It costs a second product with R. 0, the paper's, leaves it out.
        router_z_loss_coef: Weight of another loss, which keeps the router's logits small (ST-MoE's z-loss). 0, the
            paper's, leaves it out.
        expert_pattern: Layers that have only some of the r_a input and r_b output vectors, as [`prune_trex`] leaves
            them: by the layer's full name in the base model, {'inputs': [0, 2], 'outputs': [0, 1, 5], 'token_scale':
            9.5}. The numbers, ascending, are those of a layer of full size; with the identity map its experts keep the
            clusters that they have there. Without a token_scale the field below counts, as for other layers.
        r_a_pattern: r_a of some layers, as LoRA's `rank_pattern`: {'down_proj': 8, 'layers.0..*': 2}. A key is a
            regular expression for the end of a layer's name that begins after a dot; the first that fits counts, so
            that a file holds pairs in their order. The prior has a learned map then.
        r_b_pattern: The same for r_b.
        use_prior: False is the ablation without the semantic prior.
        token_scale: c_token of the paper. None stands for the number of experts (32 in the paper's setting).
        prior_scale: c_prior of the paper, whose value is 4.
        gate_temperature: Temperature of the two sigmoids, omega (token against prior) and the output gate. Paper: 100.
        trex_dropout: Dropout on the adapter's input, as LoRA's, in [0, 1).
        prior_encoder: What the prior is computed from: the mean of the base model's frozen input embeddings over the
            prompt, or ("external") embeddings that each forward and generate gets as `semantic_embeds` (B, prior_dim).
        prior_dim: Width of the external embeddings; only with prior_encoder="external", and needed there.
        prior_whitening: Compare prompts along this many principal directions of the training prompts' embeddings, each
            scaled to the same variance, so that the strongest (whether prompts are words or numbers, say) does not
            drown those that tell tasks apart. 16 kept 8 and 16 tasks apart best (benchmarks/results/studies.md).
            "auto" takes K, or as many as the embeddings vary in where these are fewer. None compares the embeddings
            as they are, centred.
        prior_scope: The tokens that the prior acts on. "prompt", the paper's: all tokens of a turn, a prompt and its
            answer. "answer": those from the last token of the prompt on, which predict the answer; the prompt's other
            tokens see zero, so that a cached prefix or an earlier turn does not depend on what follows.
        chat_markers: Token ids around a user's message, as [`chat_markers`] finds them in the tokenizer's chat
            template. The prior then is that of the latest user's message alone, in training for each answer, in
            generate, and in the exported router. None stands for none yet: initialize_trex_prior and the
            TRexPriorCallback find them where they are given a tokenizer whose template the training prompts follow.
            False switches that off.
        mixture_implementation: "auto" takes the fastest way to compute the mixture: a Triton kernel on GPUs, the
            formula where a compiler fuses it. "reference" always takes the readable formula, which has second
            derivatives and works with `torch.func` and batched gradients. The results are equal up to rounding.
        init_weights: How the adapter starts. True is the paper's start: A and the learned map Kaiming-uniform, B and
            the router zero, so that the adapter changes nothing at first. With a router of zeros only the prior tells
            the columns of B in a grid apart. Where there is none (use_prior=False, a model without a token embedding,
            a layer outside of the text model) they would stay equal for good, at rank one, so there it is drawn.
            "zero_router" starts it at zero there too, and "random_router" draws it everywhere; B is zero in both.
            False draws B as well (for tests).
        trainable: "router" trains what chooses experts (R, the prior's map, omega and the gate) and keeps the experts
            (A and B) as they are, for an adapter from [`trex_from_lora`]; a new one (B is zero) would learn nothing.
        target_modules: Names, or a regular expression, of the modules to adapt. None stands for "all-linear": all
            linear layers but the head, as in the paper.
        target_parameters: Names of parameters of blocks of experts, as LoRA has them ("experts.gate_up_proj"), which
            many models hold in three-dimensional parameters. A block is adapted once and as a whole, from its input to
            its output, whichever of its parameters are named; target_modules can name its module as well. Other
            targets are adapted besides: all linear layers, unless target_modules names some, or is empty. A model's
            adapter has the blocks among its target_modules, so exclude_modules and layers_to_transform count for them.
        exclude_modules: Names, or a regular expression, of the modules to leave out.
        modules_to_save: Modules besides the adapter that are trained and saved in full, a new classification head for
            instance. With the token embedding, the frozen rows that training has changed are saved, too: the prior
            reads them.
        layers_to_transform: Indices of the layers to adapt; target_modules must then be a list of names, or None.
        layers_pattern: Name of the `nn.ModuleList` that these indices count, when it is not one of the usual ones.
        fan_in_fan_out: True if the base layer stores its weight as (in, out); transformers' `Conv1D` needs no hint.
        bias: Which biases are trained and saved: none, all of the model, those of the adapted layers.
        peft_trex_version: The release of this package that wrote the adapter's file; None for an adapter that is no
            file yet, and for files of before there was this field. Saving writes the release that saves.

    Raises:
        ValueError, TypeError: naming the field, the value and the rule, for every value or combination that cannot be.
    """

    r_a: int = 4
    r_b: int = 8
    expert_layout: Literal["grid", "paired"] = "grid"
    num_clusters: int = 32
    prior_map: Literal["auto", "identity", "learned"] = "auto"
    shared_core: bool = False
    use_router: bool = True
    router_rank: int | None = None
    router_top_k: int | None = None
    balance_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    expert_pattern: dict[str, dict[str, Any]] = field(default_factory=dict)
    r_a_pattern: dict[str, int] = field(default_factory=dict)
    r_b_pattern: dict[str, int] = field(default_factory=dict)
    use_prior: bool = True
    token_scale: float | None = None
    prior_scale: float = 4.0
    gate_temperature: float = 100.0
    trex_dropout: float = 0.0
    prior_encoder: Literal["input_embeddings", "external"] = "input_embeddings"
    prior_dim: int | None = None
    prior_whitening: int | Literal["auto"] | None = None
    prior_scope: Literal["prompt", "answer"] = "prompt"
    chat_markers: dict[str, list[int]] | bool | None = None
    mixture_implementation: Literal["auto", "reference"] = "auto"
    init_weights: Literal[True, False, "random_router", "zero_router"] = True
    trainable: Literal["all", "router"] = "all"
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "trex_only"] = "none"
    peft_trex_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TREX")
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(self.peft_type) is not TRexConfig:
            raise RuntimeError(
                "PEFT knows another configuration for the method TREX: either this release of PEFT brings its own, "
                "which is then the one to use, or peft_trex was imported twice; restart Python."
            )
        check_names(self)
        settle_size_patterns(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        check_values(self, TRexConfig)
        check_combinations(self, TRexConfig)
        check_expert_pattern(self)

    @classmethod
    def recommended(cls, **overrides: Any) -> "TRexConfig":
        """The form that we recommend, with `overrides` for any field; `TRexConfig()` is the paper's.

        8 x 8 experts without a token router: each layer is a LoRA of rank 8 whose core moves with the prompt, by a
        shared core and a learned map of the prior, which is whitened and has four times the paper's scale. It is for
        data whose tasks are told apart by their prompts, and above all for tasks that contradict each other.
        """
        form: dict[str, Any] = {
            "r_a": 8,
            "r_b": 8,
            "use_router": False,
            "prior_map": "learned",
            "shared_core": True,
            "prior_scale": 16.0,
            "prior_whitening": "auto",
        }
        return cls(**{**form, **overrides})

    @classmethod
    def like_lora(cls, r: int, width: int = 4096, **overrides: Any) -> "TRexConfig":
        """The recommended form, with `overrides`, in the size that trains about as many parameters as LoRA of rank r.

        A and B have LoRA's shapes and are as many, r_a = r_b, less what the learned map and the core take. What these
        take depends on the width of the model, and not the sizes alone: beside wide layers they are small.

        Args:
            r: LoRA's rank, at least 1.
            width: D_in and D_out of the model's layers, or between them where they differ; 4096 is that of many
                models with 7 or 8 billion parameters.
            overrides: fields of the configuration, but for r_a and r_b.
        """
        check_number("r", r, COUNT)
        check_number("width", width, COUNT)
        chosen, missed = None, math.inf
        for size in range(1, r + 1):
            config = cls.recommended(r_a=size, r_b=size, **overrides)
            shapes = shapes_of(config, "").values()
            # The two logits, omega and gate, are no part of the shapes that the configuration gives.
            trained = 2 + sum(math.prod(width if axis is None else axis for axis in shape) for shape in shapes)
            if abs(trained - 2 * r * width) >= missed:
                break
            chosen, missed = config, abs(trained - 2 * r * width)
        assert chosen is not None
        return chosen

    @property
    def num_experts(self) -> int:
        """E, the number of rank-one experts of a layer that no pattern names."""
        return num_experts(self.r_a, self.r_b, self.expert_layout)

    @property
    def learned_map(self) -> bool:
        """Whether each layer learns the map from cluster scores to experts."""
        if self.prior_map == "auto":
            sized = bool(self.r_a_pattern or self.r_b_pattern)
            return self.use_prior and (sized or self.num_clusters != self.num_experts)
        return self.use_prior and self.prior_map == "learned"

    def sizes_of(self, layer: str) -> tuple[int, int]:
        """r_a and r_b of a layer, before any of its vectors are left out."""
        sides = ((self.r_a_pattern, self.r_a), (self.r_b_pattern, self.r_b))
        r_a, r_b = (pattern.get(get_pattern_key(list(pattern), layer), size) for pattern, size in sides)
        return r_a, r_b

    def vectors_of(self, layer: str) -> tuple[Sequence[int], Sequence[int]]:
        """The input and the output vectors that a layer has, by their numbers in one of full size."""
        entry = self.expert_pattern.get(layer)
        if entry is not None:
            return entry["inputs"], entry["outputs"]
        r_a, r_b = self.sizes_of(layer)
        return range(r_a), range(r_b)

    def num_experts_of(self, layer: str) -> int:
        """The number of experts that a layer has."""
        inputs, outputs = self.vectors_of(layer)
        return num_experts(len(inputs), len(outputs), self.expert_layout)

    def experts_of(self, layer: str) -> list[int]:
        """The experts that a layer has, by their numbers in one of full size."""
        inputs, outputs = self.vectors_of(layer)
        if self.expert_layout == "paired":
            return list(inputs)
        r_b = self.sizes_of(layer)[1]
        return [i * r_b + j for i in inputs for j in outputs]

    def token_scale_of(self, layer: str) -> float:
        """c_token of a layer."""
        scale = self.expert_pattern.get(layer, {}).get("token_scale", self.token_scale)
        return float(self.num_experts_of(layer) if scale is None else scale)

    def to_dict(self) -> dict[str, Any]:
        """All fields as PEFT writes them, and the release that writes them.

        PEFT sorts the keys of a dict, but the first key of a pattern that fits counts: it becomes a list of pairs.
        """
        patterns = {name: [list(pair) for pair in getattr(self, name).items()] for name in SIZES}
        return {**super().to_dict(), **patterns, "peft_trex_version": VERSION}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "TRexConfig":
        """Load as every PEFT config, after a look at the weights beside it: their names and shapes, not their data.

        Raises:
            ValueError: if a file is damaged, no safetensors, or of other shapes than the configuration asks for.
        """
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        check_weights(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_against_config(folder, config)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read as PEFT does, but refuse what is too large or nested too deep."""
        read_config(path_json_file)
        return super().from_json_file(path_json_file, **kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file that this release knows, with a warning of others."""
        return known_fields(cls, kwargs)


# Each field is explained in the docstring; who asks a field for its help, as PEFT's do, gets the same text.
for _name, _text in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", cleandoc(TRexConfig.__doc__ or ""), re.MULTILINE):
    TRexConfig.__dataclass_fields__[_name].metadata = MappingProxyType({"help": " ".join(_text.split())})
