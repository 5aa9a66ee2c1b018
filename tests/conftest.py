"""Tiny models made in memory, and prompts to fit a prior on. Tests never reach for a hub."""

import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start, two at a time, would hinder each other

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_trex import TRexConfig, initialize_trex_prior

torch.set_num_threads(1)

TRANSFORMERS = Version(transformers.__version__)
BEFORE_5 = TRANSFORMERS < Version("5")
# the name of a forward's cache, among its arguments and in its output: another one since transformers 5.24
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
VOCAB = 64
PAD = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws without a generator is the same whichever tests ran before it."""
    torch.manual_seed(0)


def make_llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # logits that tell tokens apart, so that equal greedy tokens mean something
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **kwargs})).eval()


def make_gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.pad_token_id, config.eos_token_id, config.bos_token_id = PAD, None, 1
    return GPT2LMHeadModel(config).eval()


def make_t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=None,
        decoder_start_token_id=PAD,
        initializer_factor=2.0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).eval()


MAKERS = {"llama": make_llama, "gpt2": make_gpt2, "t5": make_t5}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def prompts(count, length=9, seed=0):
    """Token ids (count, length) without padding, in groups of kin so that there is something to cluster."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(count) % 4
    low = 3 + 15 * groups[:, None]
    return low + torch.randint(0, 15, (count, length), generator=generator)


def batches(count=32, size=8, **kwargs):
    ids = prompts(count, **kwargs)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


def answered(count, seed=0):
    """A training batch: prompts of five tokens, labelled answers of four."""
    ids = prompts(count, seed=seed)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)}


def pad_to(ids, length, side):
    """A row of ids padded to `length`, and its attention mask."""
    missing = length - ids.shape[0]
    pad, keep = torch.full((missing,), PAD), torch.ones(ids.shape[0], dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    masks = (torch.zeros(missing, dtype=torch.long), keep) if side == "left" else (keep, torch.zeros_like(pad))
    return torch.cat(parts), torch.cat(masks)


def randomize(model, adapter_name="default", seed=0):
    """Move every adapter parameter off its start, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "trex_" in name and name.endswith(f".{adapter_name}"):
            scale = 0.01 if "omega" in name or "gate" in name else 0.3
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(kind="llama", fit=True, base=None, **kwargs):
    """A tiny model with a T-REX adapter that is not at its start and, unless told otherwise, a fitted prior."""
    settings = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": TASKS[kind], **kwargs}
    model = get_peft_model(MAKERS[kind]() if base is None else base, TRexConfig(**settings))
    randomize(model)
    if fit:
        initialize_trex_prior(model, batches(), progress=False)
    return model.eval()


@pytest.fixture
def llama():
    return adapted("llama")


def exact_model(kind="llama", fit=True, **config):
    """An adapter in float64, so that what is left of an error is not rounding."""
    external = config.get("prior_encoder") == "external"
    fit = fit and config.get("use_prior", True) and not external
    model = adapted(kind, fit=fit, base=MAKERS[kind]().double(), **config)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if external:
        initialize_trex_prior(model, embeddings=some_embeddings(40), progress=False)
    return model


def some_embeddings(count):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(0))


def padded(ids, side, length=9):
    """Rows of three to nine tokens, padded, as a batch."""
    rows = [pad_to(row[: 3 + index % 7], length, side) for index, row in enumerate(ids)]
    ids, mask = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def padded_data(kind="llama", external=False, side="left", count=24):
    data = [padded(part, side) for part in prompts(count, seed=3).split(8)]
    for index, batch in enumerate(data):
        if kind == "t5":
            del batch["position_ids"]
            answer = padded(prompts(8, seed=4), "right", 10)
            batch["decoder_input_ids"], batch["decoder_attention_mask"] = answer["input_ids"], answer["attention_mask"]
        if external:
            batch["semantic_embeds"] = some_embeddings(count)[8 * index : 8 * index + 8]
    return data
