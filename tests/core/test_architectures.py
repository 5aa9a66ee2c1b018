"""The whole life of an adapter on each kind of model: fit, train, save, load, switch off, generate, merge."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import (
    BEFORE_5,
    PAD,
    VOCAB,
    answered,
    batches,
    make_gpt2,
    make_llama,
    make_t5,
    pad_to,
    prompts,
    randomize,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
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
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipConfig,
    SiglipModel,
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
SINCE_5 = pytest.mark.skipif(BEFORE_5, reason="transformers before 5 has other arguments for images")
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
        warns=r"experts in model.layers.0.mlp.experts, model.layers.1.mlp.experts are not adapted.* 7\d %.*"
        r"target_parameters=\['experts.down_proj'\] adapts each block",
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
        (r".*\.(q_proj|up_proj)", r".*\.(q_proj|up_proj)", "gate_up_proj"),
    ],
)
def test_experts_in_one_parameter_are_refused_by_its_name(kind, targets, target, parameter):
    base = CASES[kind].make()
    shape = tuple(getattr(base.model.layers[1].mlp.experts, parameter).shape)
    with pytest.raises(ValueError, match=r"exclude_modules=\['experts'\]") as caught:
        get_peft_model(base, TRexConfig(target_modules=targets, use_prior=False))
    said = (
        f"target_modules names {target!r}, which in model.layers.{int(kind != 'mixtral')}.mlp.experts is the parameter"
    )
    instead = f"it is no module. Write target_parameters=['experts.{parameter}'], which"
    assert str(caught.value).startswith(f"{said} {parameter} of shape {shape}: {instead}")
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
    with pytest.raises(ValueError, match=r"layers.0.self_attn.out_proj: its weight is read by the MultiheadAttention"):
        get_peft_model(base, TRexConfig(target_modules=["out_proj"], use_prior=False))
    for excluded in (None, ["linear1"], "layers.0.linear1"):
        config = TRexConfig(target_modules="all-linear", exclude_modules=excluded, use_prior=False)
        model = get_peft_model(copy.deepcopy(base), config)
        adapted = {name for name, module in model.base_model.model.named_modules() if isinstance(module, TRexLayer)}
        assert adapted == {"layers.0.linear1", "layers.0.linear2"} - ({"layers.0.linear1"} if excluded else set())


def test_an_encoder_layer_calls_its_adapters_in_evaluation_too():
    """PyTorch has a fast path there that reads the weights of both linear layers."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        before = base(x)
        model = randomize(get_peft_model(base, TRexConfig(r_a=2, r_b=3, use_prior=False)))
        trained = model.train()(x)
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-4, atol=1e-5)
    assert (trained - before).abs().max() > 1e-2


class Gate(nn.Linear):
    """A router that returns its logits alone."""

    def forward(self, x):
        return super().forward(x.float())


class Router(nn.Linear):
    """A router that returns what it chooses as well."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.topk(1).indices


class Grouped(nn.Linear):
    """Its output is that of several products with parts of the weight."""

    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x, self.weight.unflatten(0, (2, -1)))


class Wide(nn.Linear):
    """Its output is wider than out_features says."""

    def forward(self, x):
        return torch.cat([super().forward(x), x], -1)


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.plain, self.inner = nn.Linear(6, 6), inner

    def forward(self, x):
        return self.plain(x)


@pytest.mark.parametrize(
    ("inner", "suited"),
    [
        (nn.Linear(6, 8), True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(6, 8), True),
        (Gate(6, 8), True),
        (Router(6, 8), False),
        (Grouped(6, 8), False),
        (Wide(6, 8), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_linear_layers_that_return_no_product_are_left_out_or_refused(inner, suited):
    model = get_peft_model(Holder(copy.deepcopy(inner)), TRexConfig(use_prior=False))
    assert set(model.targeted_module_names) == ({"plain", "inner"} if suited else {"plain"})
    base, config = Holder(inner), TRexConfig(use_prior=False, target_modules=["inner"])
    if suited:
        assert get_peft_model(base, config).targeted_module_names == ["inner"]
        return
    said = rf"target module inner: it is a {type(inner).__name__}, whose forward does not .* 8\)"
    with pytest.raises(ValueError, match=said + r".*exclude_modules=\['inner'\]"):
        get_peft_model(base, config)
    assert not any(isinstance(module, TRexLayer) for module in base.modules())


SMALL = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
JAMBA = {"num_key_value_heads": 2, "num_experts": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
# Each mixer, and the linear layers whose weights it reads.
MIXERS = {
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4, time_step_rank=4)),
        {"x_proj", "dt_proj", "out_proj"},
    ),
    "falcon mamba": (
        lambda: FalconMambaForCausalLM(FalconMambaConfig(**SMALL, state_size=4, time_step_rank=4)),
        {"x_proj", "dt_proj", "out_proj"},
    ),
    "mamba 2": (
        lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, state_size=4, num_heads=8, head_dim=8, n_groups=2)),
        {"out_proj"},
    ),
    "jamba": (
        lambda: _made(JambaForCausalLM, JambaConfig, **JAMBA, attn_layer_period=2, attn_layer_offset=1),
        {"dt_proj"},
    ),
}


@SINCE_5
@pytest.mark.parametrize("kind", MIXERS)
def test_layers_whose_weights_a_mixer_reads_are_left_out_or_refused(kind):
    make, read = MIXERS[kind]
    model = get_peft_model(make(), TRexConfig(r_a=2, r_b=3, use_prior=False, task_type="CAUSAL_LM"))
    linear = {name.rpartition(".")[2] for name, module in make().named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == linear - read - {"lm_head"}
    # One name stands for the layers of all blocks.
    assert set(model.peft_config["default"].exclude_modules) == read
    model.train()(**answered(2)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name in read:
        config = TRexConfig(target_modules=["in_proj", name], use_prior=False)
        # The others are called where no fused kernels run.
        if name == "dt_proj":
            with pytest.raises(ValueError, match=rf"\.{name}.*its weight is read by the .*Mixer around it"):
                get_peft_model(make(), config)
        else:
            named = get_peft_model(make(), config).train()
            named(**answered(2)).loss.backward()
            assert not [each for each, p in named.named_parameters() if p.requires_grad and p.grad is None]


@SINCE_5
def test_an_adapter_of_such_a_layer_from_before_loads_with_a_warning(tmp_path):
    settings = {"r_a": 2, "r_b": 3, "use_prior": False}
    model = get_peft_model(MIXERS["mamba"][0](), TRexConfig(target_modules=["in_proj"], **settings))
    model.save_pretrained(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(config.read_text().replace('"in_proj"', '"in_proj", "dt_proj"'))
    tensors = load_file(weights)
    dt_proj = MIXERS["mamba"][0]().backbone.layers[0].mixer.dt_proj
    shapes = {"trex_A": (2, dt_proj.in_features), "trex_B": (dt_proj.out_features, 3)}
    shapes["trex_router"] = (6, dt_proj.in_features)
    others = {name: torch.zeros(shapes.get(name.rpartition(".")[2], (1,))) for name in tensors}
    save_file({**tensors, **{name.replace("in_proj", "dt_proj"): zeros for name, zeros in others.items()}}, weights)
    with pytest.warns(UserWarning, match=r"dt_proj.*its weight is read by the MambaMixer .* may have no effect here"):
        loaded = PeftModel.from_pretrained(MIXERS["mamba"][0](), tmp_path)
    assert any("dt_proj" in name for name in loaded.targeted_module_names)


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


def test_images_may_be_spread_unevenly():
    """No prompt's prior reaches the tower, so that an image is seen alike whatever stands beside it."""
    model, batch = _with_images(), _batch_with_images([2, 0])
    first = {**batch, **{key: batch[key][:1] for key in ("input_ids", "token_type_ids")}}
    second = {key: batch[key][1:] for key in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        both = model(**batch).logits
        torch.testing.assert_close(both[:1], model(**first).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[1:], model(**second).logits, rtol=1e-4, atol=1e-4)


def _qwen2_vl():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config={**SIZES, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    model = get_peft_model(
        Qwen2VLForConditionalGeneration(config),
        TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM", init_weights=False),
    )
    randomize(model)
    initialize_trex_prior(model, batches(), progress=False)
    return model.eval()


def _qwen2_vl_batch(images):
    """Rows of 19 tokens that begin with as many images, four tokens each, as `images` says; answers are labelled."""
    ids = prompts(len(images), 19)
    for row, count in enumerate(images):
        for image in range(count):
            start = 6 * image
            ids[row, start], ids[row, start + 5] = VOCAB - 3, VOCAB - 4
            ids[row, start + 1 : start + 5] = VOCAB - 1
    total = sum(images)
    pixels = torch.randn(16 * total, 96, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(19) < 14, -100)}
    images_of_batch = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * total)}
    return {**batch, **images_of_batch, "mm_token_type_ids": (ids == VOCAB - 1).int()}


@SINCE_5
@pytest.mark.parametrize("images", [[1, 1], [2, 1], [2, 0], [1, 1, 2]])
def test_rows_with_any_number_of_images_are_what_they_are_alone(images):
    """Qwen2-VL's tower takes the patches of all images in one axis."""
    model, batch = _qwen2_vl(), _qwen2_vl_batch(images)
    with torch.no_grad():
        together = model(**batch).logits
        first = 0
        for row, count in enumerate(images):
            alone = {key: batch[key][row : row + 1] for key in ("input_ids", "labels", "mm_token_type_ids")}
            if count:
                alone["pixel_values"] = batch["pixel_values"][16 * first : 16 * (first + count)]
                alone["image_grid_thw"] = batch["image_grid_thw"][first : first + count]
            first += count
            torch.testing.assert_close(together[row], model(**alone).logits[0], rtol=1e-4, atol=1e-4)
    model.train()(**batch).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("visual" in name for name in trained)
    assert not {name for name, p in trained.items() if p.grad is None}


def _siglip():
    torch.manual_seed(0)
    text = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    base = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model = get_peft_model(base, TRexConfig(r_a=2, r_b=3, num_clusters=4, target_modules="all-linear"))
    randomize(model)
    initialize_trex_prior(model, batches(), progress=False)
    return model.eval()


@pytest.mark.skipif(BEFORE_5, reason="SigLIP does not name its token embedding before transformers 5")
def test_an_image_is_embedded_alike_whatever_text_stands_beside_it():
    model, ids, pixels = _siglip(), prompts(8), _pixels()
    adapted_layers = [name for name, module in model.named_modules() if isinstance(module, TRexLayer)]
    assert all(any(tower in name for name in adapted_layers) for tower in ("text_model", "vision_model"))
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
        other = model(input_ids=ids.flip(0), pixel_values=pixels)
        torch.testing.assert_close(other.image_embeds, output.image_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.text_embeds.flip(0), output.text_embeds, rtol=1e-4, atol=1e-5)
        # What either tower says alone, up to the norm.
        for features, expected in (
            (model.get_base_model().get_image_features(pixel_values=pixels), output.image_embeds),
            (model.get_base_model().get_text_features(input_ids=ids), output.text_embeds),
        ):
            features = getattr(features, "pooler_output", features)
            torch.testing.assert_close(nn.functional.normalize(features), expected, rtol=1e-4, atol=1e-5)
        # The prior does act on the text.
        prior = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(8, 4)
        steered = model(input_ids=ids, pixel_values=pixels, semantic_prior=prior)
    assert (steered.text_embeds - output.text_embeds).abs().max() > 1e-3
    torch.testing.assert_close(steered.image_embeds, output.image_embeds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_multiple_choice_takes_each_choice_for_a_prompt(rows):
    model = _bert_for_choices()
    ids = prompts(4 * rows).view(rows, 4, 9)
    batch = {"input_ids": ids, "labels": torch.arange(rows) % 4}
    with torch.no_grad():
        together = model(**batch).logits
        for choice in range(4):
            one = model(input_ids=ids[:, choice : choice + 1]).logits
            torch.testing.assert_close(together[:, choice : choice + 1], one, rtol=1e-4, atol=1e-4)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def _bert_for_choices():
    base = _made(BertForMultipleChoice, BertConfig, **NO_DROPOUT)
    model = get_peft_model(base, TRexConfig(r_a=2, r_b=3, num_clusters=4, target_modules=["query", "value"]))
    randomize(model)
    initialize_trex_prior(model, batches(), progress=False)
    return model.eval()


DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "num_labels": 3, **NO_DROPOUT}
V2 = {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
DEBERTAS = {
    "v1": lambda: _made(DebertaForSequenceClassification, DebertaConfig, max_relative_positions=32, **DEBERTA),
    "v2": lambda: _made(DebertaV2ForSequenceClassification, DebertaV2Config, share_att_key=False, **V2),
    "v3": lambda: _made(DebertaV2ForSequenceClassification, DebertaV2Config, share_att_key=True, **V2),
}


# Sixteen tokens are as many as there are relative positions in v2 and v3.
@pytest.mark.parametrize("length", [9, 16])
@pytest.mark.parametrize("kind", DEBERTAS)
def test_a_row_of_deberta_is_the_same_alone_and_among_others(kind, length):
    settings = {"r_a": 2, "r_b": 3, "num_clusters": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = randomize(get_peft_model(DEBERTAS[kind](), TRexConfig(**settings)))
    initialize_trex_prior(model, batches(), progress=False)
    model.eval()
    ids = prompts(3, length)
    with torch.no_grad():
        together = model(input_ids=ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    # The prior acts on what a row holds.
    with torch.no_grad():
        steered = model(input_ids=ids[:1], semantic_prior=torch.tensor([[0.0, 0.0, 0.0, 1.0]])).logits
    assert (steered - together[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_deberta_trains_on_one_row_as_on_a_row_of_two(checkpointing):
    """The gradients of a single row are those of the same row twice."""
    found = []
    for rows in (1, 2):
        base = DEBERTAS["v3"]()
        settings = {"r_a": 2, "r_b": 3, "num_clusters": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
        model = randomize(get_peft_model(base, TRexConfig(**settings)))
        initialize_trex_prior(model, batches(), progress=False)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = prompts(1, 16).expand(rows, -1)
        model(input_ids=ids, labels=torch.ones(rows, dtype=torch.long)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("key_proj" in name for name in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
