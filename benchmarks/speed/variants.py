"""What is compared, and on what: sizes of models, precisions, and the adapters that take turns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LilyConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_trex import TRexConfig

TREX, REFERENCE, LORA, BASE = "T-REX 4x8", "T-REX 4x8, reference", "LoRA r=32", "base model alone"
RECOMMENDED, SMALL = "T-REX recommended", "LoRA r=8"
FEW = (TREX, REFERENCE, LORA)
MODELS = (*FEW, RECOMMENDED)  # of models where there is no time for all
PROMPT = 32  # tokens of each row that are prompt, and labelled -100


@dataclass(frozen=True)
class Size:
    """Shapes of a Llama-type model and of what it is run on.

    The vocabulary is small everywhere: the head costs every variant the same, and a large one would hide differences.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rows: int
    tokens: int  # in each row
    cached: int  # tokens in the cache when one more is decoded
    token_sweep: tuple[int, ...]
    expert_sweep: tuple[tuple[int, int], ...]  # r_a, r_b
    width_sweep: tuple[int, ...]
    embeddings: tuple[int, ...]  # to fit a prior on
    vocabulary: int = 4096
    fp32_base: bool = True  # whether the weights fit a GPU of 80 GB in float32, with what a training step keeps


TOKENS = (1, 16, 64, 256, 1024, 4096)
EXPERTS = ((2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
SIZES = {
    "cpu": Size(576, 1536, 6, 9, 3, 4, 128, 128, TOKENS, EXPERTS, WIDTHS[:4], (100_000, 1_000_000)),
    "cpu-long": Size(576, 1536, 6, 9, 3, 4, 512, 512, (), (), (), ()),
    "1b": Size(2048, 8192, 16, 32, 8, 4, 1024, 1024, TOKENS, EXPERTS, WIDTHS, (100_000, 1_000_000)),
    "8b": Size(4096, 14336, 32, 32, 8, 4, 1024, 1024, (), (), (), (), fp32_base=False),
    "smoke": Size(32, 48, 2, 4, 2, 2, 40, 8, (1, 8), ((2, 4), (4, 8)), (16, 32), (200,)),
}


@dataclass(frozen=True)
class Precision:
    base: torch.dtype
    autocast: bool = False

    def context(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def is_slow(self, device: str) -> bool:
        """Whether the device has no arithmetic for it: without AVX-512, products in bfloat16 are 20 times as slow."""
        short = self.autocast or self.base.itemsize < 4
        return short and device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")


# PEFT makes adapters float32 on a float32 and on a bfloat16 base; all of these leave them so
PRECISIONS = {
    "fp32": Precision(torch.float32),
    "autocast": Precision(torch.float32, autocast=True),
    "autocast-bf16-base": Precision(torch.bfloat16, autocast=True),
    "bf16": Precision(torch.bfloat16),
}


def has_reference() -> bool:
    """Whether this state of the package can run the readable formula in place of the fast path."""
    return "mixture_implementation" in {field.name for field in dataclasses.fields(TRexConfig)}


@dataclass(frozen=True)
class Adapted:
    """What a variant's adapters are put on."""

    shapes: list[tuple[int, int]]  # (D_in, D_out) of all linear layers that are adapted
    layers: int  # that follow each other, which Lily shares between
    kwargs: dict[str, Any]  # target_modules and the like
    trex: dict[str, Any]  # what T-REX needs besides
    experts: dict[str, Any]  # the sizes of a T-REX 4x8 that is swept
    tasks: int = 0  # that the data are of, where a variant has a part for each


def _equal_rank(on: Adapted, r_a: int = 4, r_b: int = 8) -> int:
    """The rank at which LoRA's parameters are nearest to T-REX's."""
    trex = sum((r_a + r_a * r_b) * wide + r_b * out + 2 for wide, out in on.shapes)
    return max(1, round(trex / sum(wide + out for wide, out in on.shapes)))


def _lily(on: Adapted) -> LilyConfig:
    """As Lily's documentation advises: A shared by 2 to 4 layers, about as many B as A, r as many times LoRA's.

    So it has about as many parameters as LoRA r = 32.
    """
    stride = next((stride for stride in (4, 3, 2) if on.layers % stride == 0), 1)
    shared = max(2, on.layers // stride)  # of B: with fewer than two its router has nothing to choose
    total = sum(on.layers / stride * wide + shared * out for wide, out in on.shapes) / on.layers
    rank = round(32 * sum(wide + out for wide, out in on.shapes) / total)
    return LilyConfig(r=rank, stride_A=stride, num_B=shared, **on.kwargs)


VARIANTS: dict[str, Callable[[Adapted], Any]] = {
    TREX: lambda on: TRexConfig(**on.kwargs, **on.trex, **on.experts),
    REFERENCE: lambda on: TRexConfig(**on.kwargs, **on.trex, **on.experts, mixture_implementation="reference"),
    RECOMMENDED: lambda on: TRexConfig.recommended(**on.kwargs, **on.trex),
    LORA: lambda on: LoraConfig(r=32, **on.kwargs),
    "LoRA r=16": lambda on: LoraConfig(r=16, **on.kwargs),
    SMALL: lambda on: LoraConfig(r=8, **on.kwargs),
    "LoRA, equal parameters": lambda on: LoraConfig(r=_equal_rank(on), **on.kwargs),
    "DoRA r=32": lambda on: LoraConfig(r=32, use_dora=True, **on.kwargs),
    "Lily": _lily,
    BASE: lambda on: None,
}


def settings_of(config: Any) -> str:
    """The settings that tell a variant from others of its kind."""
    names = ("r_a", "r_b", "mixture_implementation", "r", "stride_A", "num_B")
    return ", ".join(f"{name}={getattr(config, name)}" for name in names if hasattr(config, name))


def variants(on: Adapted, names: tuple[str, ...] = tuple(VARIANTS)) -> Iterator[tuple[str, Any]]:
    """Names and configurations; the readable formula only where the package can run it."""
    for name in names:
        if name != REFERENCE or has_reference():
            yield name, VARIANTS[name](on)


def make_base(size: Size, precision: str, device: str, layers: int | None = None) -> Any:
    """A frozen Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=PRECISIONS[precision].base)
    return model.requires_grad_(False)


def sharing(base: nn.Module) -> Any:
    """A copy of a frozen model that holds the same weights: all variants of a large one fit one device."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def adapted_of(base: nn.Module) -> Adapted:
    """All linear layers but the head, by their last names, which Lily shares by."""
    layers = {
        name: module for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    kwargs = {"target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}), "task_type": "CAUSAL_LM"}
    shapes = [(module.in_features, module.out_features) for module in layers.values()]
    return Adapted(shapes, base.config.num_hidden_layers, kwargs, {}, {})


def adapt(model: Any, config: Any) -> Any:
    """The model with an adapter, or as it is for the configuration None."""
    torch.manual_seed(1)
    return model if config is None else get_peft_model(model, config)


def random_prompts(size: Size, device: str) -> list[dict[str, torch.Tensor]]:
    """Batches to fit a prior on."""
    torch.manual_seed(2)
    return [{"input_ids": torch.randint(size.vocabulary, (64, 16), device=device)} for _ in range(4)]


def batch(size: Size, device: str) -> dict[str, torch.Tensor]:
    """The batch that every variant is trained on, the first tokens of each row being its prompt."""
    torch.manual_seed(3)
    ids = torch.randint(size.vocabulary, (size.rows, size.tokens), device=device)
    labels = ids.masked_fill(torch.arange(size.tokens, device=device) < PROMPT, -100)
    return {"input_ids": ids, "labels": labels}


class OneLayer(nn.Module):
    """A model that is a single linear layer, for PEFT to put adapters on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def adapted_layer(width: int, r_a: int, r_b: int) -> Adapted:
    trex = {"prior_encoder": "external", "prior_dim": 8}
    experts = {"r_a": r_a, "r_b": r_b, "num_clusters": r_a * r_b}
    return Adapted([(width, width)], 1, {"target_modules": ["proj"]}, trex, experts)
