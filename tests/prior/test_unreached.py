"""Layers that a prior does not reach start so that their output vectors become unlike, and none is idle in silence."""

import pytest
import torch
from conftest import BEFORE_5, make_llama, make_t5, prompts
from peft import get_peft_model
from transformers import (
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2ForTokenClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_trex import TRexConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
SMALL = {"r_a": 2, "r_b": 3, "num_clusters": 4}
IMAGE = 63


def siglip():
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))


def llava():
    text = LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=2)
    vision = CLIPVisionConfig(**{**VISION, "num_hidden_layers": 2})
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE))


def deberta():
    return DebertaV2ForTokenClassification(
        DebertaV2Config(
            **SIZES, vocab_size=64, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
            share_att_key=False, position_biased_input=False, type_vocab_size=0, num_labels=3,
        )
    )  # fmt: skip


def pixels(rows):
    return torch.randn(rows, 3, 8, 8, dtype=torch.float64)


def image_prompts():
    ids = prompts(4, length=8)
    ids[:, :4] = IMAGE
    return ids


# The base model, its adapter, a batch, and a part of the names of the layers that no prior reaches.
CASES = {
    "a tower": (siglip, {}, lambda: {"input_ids": prompts(4), "pixel_values": pixels(4)}, "vision_model"),
    "a projector": (
        llava,
        {"task_type": "CAUSAL_LM"},
        lambda: {"input_ids": image_prompts(), "labels": image_prompts(), "pixel_values": pixels(4)},
        "multi_modal_projector.linear_2",
    ),
    "positions": (
        deberta,
        {"task_type": "TOKEN_CLS"},
        lambda: {"input_ids": prompts(4), "labels": prompts(4) % 3},
        "pos_key_proj",
    ),
    "an encoder": (
        make_t5,
        {"task_type": "SEQ_2_SEQ_LM", "prior_scope": "answer"},
        lambda: {"input_ids": prompts(4), "labels": prompts(4)},
        "encoder.block.0",
    ),
}


NAMED_SINCE_5 = pytest.mark.skipif(BEFORE_5, reason="SigLIP does not name its token embedding before transformers 5")
NAMES = [pytest.param(name, marks=NAMED_SINCE_5) if name == "a tower" else name for name in CASES]


def first_gradients(name, **settings):
    """The rank of B's first gradient in each layer, and the model; a batch has 36 tokens or more."""
    make, own, batch, _ = CASES[name]
    torch.manual_seed(0)
    model = get_peft_model(make(), TRexConfig(**SMALL, **own, **settings)).double()
    output = model(**batch())
    loss = output.loss
    if loss is None:
        loss = (output.image_embeds @ output.text_embeds.T).square().sum()
    loss.backward()
    layers = dict(model.base_model.trex_layers())
    grads = {path: layer.trex_B["default"].grad for path, layer in layers.items()}
    # The last layers of LLaVA's tower have no part.
    called = {path: grad for path, grad in grads.items() if grad is not None}
    return {path: int(torch.linalg.matrix_rank(grad, rtol=1e-9)) for path, grad in called.items()}, model


@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter", "ignore:The labels leave some rows")
@pytest.mark.parametrize("name", NAMES)
def test_output_vectors_become_unlike(name):
    place = CASES[name][3]
    ranks, model = first_gradients(name)
    unreached = {path: rank for path, rank in ranks.items() if place in path}
    assert unreached and min(unreached.values()) >= 2, ranks
    # Elsewhere the prior tells them apart, and the start is the paper's.
    routers = {path: bool(layer.trex_router["default"].any()) for path, layer in model.base_model.trex_layers()}
    reached = {path for path, layer in model.base_model.trex_layers() if layer.trex_reached["default"]}
    assert reached and routers == {path: path not in reached for path in routers}
    ranks, _ = first_gradients(name, init_weights="zero_router")
    assert max(rank for path, rank in ranks.items() if place in path) == 1


@NAMED_SINCE_5
def test_a_second_adapter_starts_alike():
    config = TRexConfig(**SMALL, target_modules=["fc1", "q_proj"])
    model = get_peft_model(siglip(), config)
    model.add_adapter("second", TRexConfig(**SMALL, target_modules=["fc1", "q_proj"]))
    model.add_adapter("ref", model.peft_config["default"])
    for path, layer in model.base_model.trex_layers():
        assert bool(layer.trex_router["second"].any()) == ("vision" in path)
        assert torch.equal(layer.trex_router["ref"], layer.trex_router["default"])


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_without_any_part_is_named(name):
    make, own, _, place = CASES[name]
    with pytest.warns(UserWarning, match=r"where the prior has no part .*use_router=False.*shared_core=True") as told:
        get_peft_model(make(), TRexConfig(**SMALL, **own, use_router=False))
    assert sum("has no part" in str(each.message) for each in told) == 1
    get_peft_model(make(), TRexConfig(**SMALL, **own, use_router=False, shared_core=True))
    if name == "a tower":
        get_peft_model(make(), TRexConfig(**SMALL, use_router=False, exclude_modules=rf".*{place}.*"))
        get_peft_model(make(), TRexConfig(**SMALL, use_router=False, inference_mode=True))
    get_peft_model(make_llama(), TRexConfig(**SMALL, use_router=False))


def test_a_model_that_hears_has_no_prompt_of_tokens():
    """Its token embedding is the decoder's, so no prior is promised that could not be fitted."""
    sides = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
    config = WhisperConfig(**sizes, vocab_size=64, d_model=32, num_mel_bins=8, max_source_positions=20, pad_token_id=0)
    config.decoder_start_token_id = 1
    model = get_peft_model(WhisperForConditionalGeneration(config), TRexConfig(**SMALL))
    assert model.base_model.prior_of("default") is None
    assert all(bool(layer.trex_router["default"].any()) for _, layer in model.base_model.trex_layers())
    with pytest.warns(UserWarning, match="this model names no token embedding of its prompts"):
        model(input_features=torch.randn(2, 8, 40), labels=prompts(2))
    assert get_peft_model(make_t5(), TRexConfig(**SMALL)).base_model.prior_of("default") is not None


def test_a_second_adapter_for_all_layers_has_those_of_the_first():
    """Some attentions' out_proj cannot be adapted, and the others are adapted already."""
    model = get_peft_model(siglip(), TRexConfig(**SMALL))
    model.add_adapter("second", TRexConfig(**SMALL))
    first, second = (set(model.base_model.layers_of(name)) for name in ("default", "second"))
    assert first == second and any(name.endswith("self_attn.out_proj") for name in first)
