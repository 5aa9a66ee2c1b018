"""The whole life of an adapter on each kind of model: fit, train, save, load, switch off, generate, merge."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import BEFORE_5, PAD, VOCAB, answered, batches, make_gpt2, make_llama, make_t5, pad_to, prompts
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE_TOKEN = VOCAB - 1


def _made(model_class, config_class, **kwargs):
    torch.manual_seed(0)
    return model_class(config_class(**{**SIZES, **kwargs})).eval()


class Bag(nn.Module):
    """No transformers model: an embedding, two linear layers, and a method that says where the embedding is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCAB, 32)
        self.inner = nn.Linear(32, 24)
        self.outer = nn.Linear(24, 3)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        return self.outer(torch.tanh(self.inner(self.words(input_ids))).mean(1))


class Rows(nn.Module):
    """Neither tokens nor an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, features):
        return self.layers(features)


def _classes(count=8):
    return torch.arange(count) % 3


def _pixels(count=8):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _embeddings(count, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def _encoder_answer(output):
    """A loss that both outputs of an encoder take part in."""
    return (output.last_hidden_state[:, 0] - 1).square().mean() + (output.pooler_output + 0.5).square().mean()


def _class_answer(output):
    return nn.functional.cross_entropy(output, _classes())


@dataclass
class Case:
    """A kind of model, and how it is used."""

    make: Callable[[], nn.Module]
    task: str | None = "CAUSAL_LM"
    batch: Callable[[], dict[str, Any]] = lambda: answered(8)
    loss: Callable[[Any], torch.Tensor] = lambda output: output.loss
    config: dict[str, Any] = field(default_factory=dict)
    targets: int = 14  # adapted layers
    warns: str | None = None  # what building the adapter warns of

    @property
    def generates(self):
        return self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _bert(model_class, task, labels, num_labels=3, **kwargs):
    return Case(
        lambda: _made(model_class, BertConfig, num_labels=num_labels, **NO_DROPOUT),
        task,
        lambda: {"input_ids": prompts(8), **labels()},
        **{"targets": 12, **kwargs},
    )


def _seq2seq(make, targets):
    return Case(make, "SEQ_2_SEQ_LM", lambda: {"input_ids": prompts(8), "labels": prompts(8, 4)}, targets=targets)


def _vit(**config):
    sizes = {"image_size": 8, "patch_size": 4, "num_labels": 3, **NO_DROPOUT}
    sizes = {**{key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}, **sizes}

    def make():
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(num_hidden_layers=2, **sizes)).eval()

    return Case(
        make,
        None,
        lambda: {"pixel_values": _pixels(), "labels": _classes()},
        config={"exclude_modules": ["classifier"], "modules_to_save": ["classifier"], **config},
        targets=12,
    )


EXPERTS_IN_LISTS = pytest.mark.skipif(BEFORE_5, reason="transformers before 5 holds experts in lists of linear layers")
EXTERNAL = {"prior_encoder": "external", "prior_dim": 6}
CASES = {
    "llama": Case(make_llama),
    "qwen3": Case(lambda: _made(Qwen3ForCausalLM, Qwen3Config, num_key_value_heads=2, head_dim=8)),
    "gemma3": Case(
        lambda: _made(
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mistral": Case(lambda: _made(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=8)),
    "gpt2": Case(make_gpt2, targets=8),
    "opt": Case(  # with the projections around its layers that one of its sizes has
        lambda: _made(OPTForCausalLM, OPTConfig, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3, dropout=0.0)
    ),
    "phi": Case(lambda: _made(PhiForCausalLM, PhiConfig), targets=12),
    "mixtral": Case(
        lambda: _made(MixtralForCausalLM, MixtralConfig, num_key_value_heads=2, num_local_experts=4),
        targets=8,
        warns=r"experts in model.layers.0.mlp.experts, model.layers.1.mlp.experts are not adapted.* 7\d %",
    ),
    "qwen3 moe": Case(  # its first layer has no experts
        lambda: _made(Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=8, mlp_only_layers=[0], **EXPERTS),
        targets=11,
        warns=r"experts in model.layers.1.mlp.experts are not adapted",
    ),
    "qwen2 moe": Case(  # its shared expert sees the tokens of all rows in one axis
        lambda: _made(Qwen2MoeForCausalLM, Qwen2MoeConfig, shared_expert_intermediate_size=16, **EXPERTS),
        targets=16,
        warns="experts in .* are not adapted",
    ),
    "t5": _seq2seq(make_t5, 32),
    "bart": _seq2seq(
        lambda: _made(
            BartForConditionalGeneration,
            BartConfig,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            init_std=0.3,
            dropout=0.0,
            decoder_start_token_id=PAD,
            forced_eos_token_id=None,
        ),
        32,
    ),
    "bert, sequences": _bert(BertForSequenceClassification, "SEQ_CLS", lambda: {"labels": _classes()}, targets=13),
    "bert, tokens": _bert(BertForTokenClassification, "TOKEN_CLS", lambda: {"labels": prompts(8) % 3}),
    "bert, questions": _bert(
        BertForQuestionAnswering,
        "QUESTION_ANS",
        lambda: {"start_positions": _classes(), "end_positions": _classes() + 2},
        num_labels=2,
    ),
    "bert, features": _bert(BertModel, "FEATURE_EXTRACTION", dict, loss=_encoder_answer, targets=13),
    "vit, no prior": _vit(use_prior=False),
    "vit, external": _vit(**EXTERNAL),
    "plain with an embedding": Case(Bag, None, lambda: {"input_ids": prompts(8)}, _class_answer, targets=2),
    "plain without": Case(
        Rows,
        None,
        lambda: {"features": torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))[:, 0]},
        _class_answer,
        {"use_prior": False},
        2,
    ),
    "plain without, external": Case(
        Rows,
        None,
        lambda: {"features": torch.randn(8, 16, generator=torch.Generator().manual_seed(0))},
        _class_answer,
        EXTERNAL,
        2,
    ),
}


def _adapt(case):
    """The model with a fresh adapter and a fitted prior, a batch for it, and what evaluation takes of that."""
    config = {"r_a": 2, "r_b": 3, "num_clusters": 4, "target_modules": "all-linear", "task_type": case.task}
    config = TRexConfig(**{**config, **case.config})
    if case.warns:
        with pytest.warns(UserWarning, match=case.warns):
            model = get_peft_model(case.make(), config)
    else:
        model = get_peft_model(case.make(), config)
    batch = case.batch()
    if config.prior_encoder == "external":
        initialize_trex_prior(model, embeddings=_embeddings(32))
        batch["semantic_embeds"] = _embeddings(8)
    elif config.use_prior:
        initialize_trex_prior(model, batches(), progress=False)
    return model, batch


def _answer(case, model, batch):
    """What a model says, as one tensor."""
    with torch.no_grad():
        output = model.eval()(**batch)
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in output:
            return output[name]
    raise AssertionError(f"no answer in {list(output)}")


def _train(case, model, batch, steps=8):
    """The losses of some steps; checks that in the end every parameter that is trained gets a gradient."""
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=2e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = case.loss(model(**batch))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any(), f"the gradient of {name} is zero"
    return losses


def _generate(model, batch, **kwargs):
    inputs = {key: batch[key] for key in ("input_ids", "semantic_embeds") if key in batch}
    return model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, **kwargs)


def _runs(name):
    return pytest.param(name, marks=EXPERTS_IN_LISTS) if name in ("mixtral", "qwen3 moe", "qwen2 moe") else name


@pytest.mark.parametrize("name", map(_runs, CASES))
def test_the_life_of_an_adapter(tmp_path, name):
    case = CASES[name]
    before = _answer(case, case.make(), case.batch())
    model, batch = _adapt(case)
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    assert len(layers) == case.targets
    torch.testing.assert_close(_answer(case, model, batch), before)

    losses = _train(case, model, batch)
    assert losses[-1] < 0.9 * losses[0], losses
    trained = _answer(case, model, batch)
    assert (trained - before).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:  # all that could be said was said when it was built
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(case.make(), tmp_path)
    assert not [warning for warning in caught if "peft_trex" in str(warning.filename)]
    torch.testing.assert_close(_answer(case, loaded, batch), trained, rtol=0, atol=0)
    if case.generates:
        assert torch.equal(_generate(loaded, batch), _generate(model, batch))

    plain = {key: value for key, value in batch.items() if key != "semantic_embeds"}
    with model.disable_adapter():
        torch.testing.assert_close(_answer(case, model, plain), before, rtol=0, atol=0)
        if case.generates:
            assert torch.equal(_generate(model, batch), _generate(case.make(), batch))

    weights = {name: weight.clone() for name, weight in case.make().state_dict().items()}
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter(safe_merge=True)
    merged = _answer(case, model, plain)
    assert torch.isfinite(merged).all()
    assert (merged - before).abs().max() > 1e-3
    model.unmerge_adapter()
    torch.testing.assert_close(_answer(case, model, batch), trained, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="merged approximately"):
        base = model.merge_and_unload()
    assert not any(isinstance(module, TRexLayer) for module in base.modules())
    assert {name: weight.shape for name, weight in base.state_dict().items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    torch.testing.assert_close(_answer(case, base, plain), merged, rtol=1e-4, atol=1e-4)
    if case.generates:
        assert _generate(base, batch).shape == _generate(loaded, batch).shape


@pytest.mark.parametrize("name", [_runs(name) for name, case in CASES.items() if case.task == "CAUSAL_LM"])
def test_padding_on_either_side_changes_nothing(name):
    case = CASES[name]
    model, _ = _adapt(case)
    _train(case, model, answered(8), steps=3)
    rows = [row[:length] for row, length in zip(prompts(4), (9, 4, 1, 6), strict=True)]
    single = [_answer(case, model, {"input_ids": row[None]})[0] for row in rows]
    for side in ("left", "right"):
        padded = [pad_to(row, 9, side) for row in rows]
        ids, mask = (torch.stack(part) for part in zip(*padded, strict=True))
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        if name == "opt":
            batch["position_ids"] = (mask.cumsum(-1) * mask - 1).long()
        together = _answer(case, model, batch)
        for row, (one, kept) in enumerate(zip(single, mask.bool(), strict=True)):
            torch.testing.assert_close(together[row, kept], one, rtol=1e-4, atol=1e-4)


@EXPERTS_IN_LISTS
@pytest.mark.parametrize("kind", ["mixtral", "qwen3 moe"])
@pytest.mark.parametrize(
    ("targets", "target", "parameter"),
    [
        (["q_proj", "gate_up_proj"], "gate_up_proj", "gate_up_proj"),
        (["experts.down_proj"], "experts.down_proj", "down_proj"),
        (["q_proj", "w1", "w3"], "w1", "gate_up_proj"),
        (["q_proj", "w2"], "w2", "down_proj"),
        (["q_proj", "experts"], "experts", "gate_up_proj"),
        (r".*\.(q_proj|up_proj)", r".*\.(q_proj|up_proj)", "gate_up_proj"),
    ],
)
def test_experts_in_one_parameter_are_refused_by_name(kind, targets, target, parameter):
    base = CASES[kind].make()
    shape = tuple(getattr(base.model.layers[1].mlp.experts, parameter).shape)
    with pytest.raises(ValueError, match=r"exclude_modules=\['experts'\]") as caught:
        get_peft_model(base, TRexConfig(target_modules=targets, use_prior=False))
    said = (
        f"target_modules names {target!r}, which in model.layers.{int(kind != 'mixtral')}.mlp.experts is the parameter"
    )
    assert str(caught.value).startswith(f"{said} {parameter} of shape {shape}: T-REX adapts linear layers")
    assert not any(isinstance(module, TRexLayer) for module in base.modules())
    assert all(weight.requires_grad for weight in base.parameters())


@EXPERTS_IN_LISTS
@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"target_modules": "all-linear", "exclude_modules": ["experts"]}, 11),
        ({"target_modules": r".*\.(q_proj|up_proj)", "exclude_modules": ["experts"]}, 3),
        ({"target_modules": r".*\.(q_proj|up_proj)", "exclude_modules": r".*experts.*"}, 3),
        ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]}, 2),
        ({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, 2),
    ],
)
def test_linear_layers_beside_experts_are_adapted_without_a_word(settings, adapted):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(CASES["qwen3 moe"].make(), TRexConfig(use_prior=False, **settings))
    assert sum(isinstance(module, TRexLayer) for module in model.modules()) == adapted


@EXPERTS_IN_LISTS
@pytest.mark.parametrize("targets", [["down_proj"], "all-linear"])
def test_names_that_fit_linear_layers_and_experts_warn_once_and_load(tmp_path, targets):
    def make():  # so many linear layers that PEFT saves "down_proj" for the few that are none of the experts
        return _made(
            Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=8, num_hidden_layers=5, mlp_only_layers=[0, 2], **EXPERTS
        )

    with pytest.warns(UserWarning, match=r"experts in model.layers.1.mlp.experts, model.layers.3.mlp.experts, \.\.\."):
        model = get_peft_model(make(), TRexConfig(target_modules=targets, use_prior=False))
    assert "down_proj" in model.peft_config["default"].target_modules
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_an_attention_that_would_pass_the_adapter_by_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    base = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.out_proj belongs to a torch.nn.MultiheadAttention"):
        get_peft_model(base, TRexConfig(target_modules=["out_proj"], use_prior=False))
    for excluded in (None, ["linear1"], "layers.0.linear1"):
        config = TRexConfig(target_modules="all-linear", exclude_modules=excluded, use_prior=False)
        model = get_peft_model(copy.deepcopy(base), config)
        adapted = {name for name, module in model.base_model.model.named_modules() if isinstance(module, TRexLayer)}
        assert adapted == {"layers.0.linear1", "layers.0.linear2"} - ({"layers.0.linear1"} if excluded else set())


def _with_images(**settings):
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
    )
    base = Gemma3ForConditionalGeneration(config).eval()
    nn.init.normal_(base.model.multi_modal_projector.mm_input_projection_weight)  # zero in a fresh one
    settings = {"num_clusters": 4, "init_weights": False, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base, TRexConfig(r_a=2, r_b=3, **settings))
    if model.peft_config["default"].use_prior:
        initialize_trex_prior(model, batches(), progress=False)
    return model.eval()


def _batch_with_images(images, rows=2):
    """Prompts of 17 tokens that begin with as many images as `images` says."""
    ids = prompts(rows, 17)
    for row, count in enumerate(images):
        ids[row, : 4 * count] = IMAGE_TOKEN
    pixels = torch.randn(sum(images), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE_TOKEN).long()}


def test_one_image_for_each_prompt():
    model, batch = _with_images(), _batch_with_images([1, 1])
    adapted = [name for name, module in model.named_modules() if isinstance(module, TRexLayer)]
    assert sum("vision_tower" in name for name in adapted) == 6 + 2 and len(adapted) == 14 + 8
    with torch.no_grad():
        both = model(**batch).logits
        for row in range(2):
            single = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits[0]
            torch.testing.assert_close(both[row], single, rtol=1e-4, atol=1e-4)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 20)


@pytest.mark.parametrize("settings", [{"use_prior": False}, {"exclude_modules": r".*vision_tower.*"}])
def test_images_of_one_prompt_are_not_taken_for_those_of_another(settings):
    batch = _batch_with_images([2, 0])
    model = _with_images()
    said = r"different numbers of image tokens, \[8, 0\], so the layer model.vision_tower.*exclude_modules"
    with pytest.raises(ValueError, match=said):
        model(**batch)
    with pytest.raises(ValueError, match=said):
        model.generate(**batch, max_new_tokens=3)
    first = {**batch, **{key: batch[key][:1] for key in ("input_ids", "token_type_ids")}}
    with torch.no_grad():
        model(**first)
        model(input_ids=batch["input_ids"][1:], token_type_ids=batch["token_type_ids"][1:])
        free = _with_images(**settings)
        torch.testing.assert_close(free(**batch).logits[:1], free(**first).logits, rtol=1e-4, atol=1e-4)
