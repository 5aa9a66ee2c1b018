"""Blocks of experts in three-dimensional parameters: the mixture beside a whole block, with any of its kernels."""

import pytest
import torch
import transformers
from conftest import BEFORE_5, PAD, VOCAB, make_llama, prompts, randomize
from peft import PeftModel, get_peft_model
from torch import nn

from peft_trex import (
    TRexConfig,
    calibrate_trex_merge,
    initialize_trex_prior,
    prune_trex,
    routing_report,
    save_trex_as_lora,
)
from peft_trex.expert_block import ExpertBlock
from peft_trex.fused import width_of
from peft_trex.layer import TRexLayer
from peft_trex.mixture import rank_one_mixture

pytestmark = pytest.mark.skipif(BEFORE_5, reason="transformers before 5 holds experts in lists of linear layers")

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# What each family has of its own.
FAMILIES = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "DeepseekV3": {
        **{"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "head_dim": None},
        **{"n_group": 2, "topk_group": 1, "num_key_value_heads": 4, **LATENT},
    },
    "GraniteMoe": {"num_local_experts": 4},
}
KERNELS = ["eager", "grouped_mm", "batched_mm"]
BLOCKS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def make(family="Mixtral", kernel="eager", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **sizes})
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, experts_implementation=kernel).eval()
    assert model.config._experts_implementation == kernel
    # Some routers begin at zero, and would choose the same experts for all tokens.
    for name, parameter in model.named_parameters():
        if name.endswith(("router.weight", "gate.weight")):
            nn.init.normal_(parameter)
    return model


def adapt(base, **settings):
    """An adapter of the blocks alone that is not at its start, with a fitted prior."""
    config = TRexConfig(**{"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", **BLOCKS, **settings})
    model = randomize(get_peft_model(base, config))
    if config.use_prior:
        initialize_trex_prior(model, [{"input_ids": part} for part in prompts(32).split(8)], progress=False)
    return model.eval()


def rows_of():
    """Prompts of different kin and lengths, padded on both sides: of nine tokens, of five, of one."""
    ids, mask = prompts(3), torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = mask[1, 7:] = mask[2, :4] = mask[2, 5:] = 0
    return {
        "input_ids": ids.where(mask.bool(), PAD),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


class Beside(nn.Module):
    """A block, and beside it the formula, with a prior (B, E) of each row."""

    def __init__(self, layer, scores):
        super().__init__()
        self.layer, self.scores = layer, scores

    def forward(self, hidden_states, *routing):
        layer, settings = self.layer, self.layer.trex_settings["default"]
        kinds = ("A", "B", "router", "router_down", "omega", "gate", "map", "core")
        A, B, router, down, omega, gate, mapping, core = (
            getattr(layer, f"trex_{kind}").get("default") for kind in kinds
        )
        prior = self.scores if mapping is None or self.scores is None else self.scores @ mapping.T
        prior = prior if core is None else prior + core
        added = rank_one_mixture(
            hidden_states.unflatten(0, (3, 9)),
            *(A, B, router, prior, omega, gate),
            router_down=down,
            token_scale=6.0,
            top_k=settings.top_k,
        )
        return layer.base_layer(hidden_states, *routing) + added.flatten(0, 1)


def scores_of(model, batch):
    """The clusters' scores (B, K) of the prompts, each the mean over its own tokens; None without a prior."""
    prior = model.base_model.prior_of("default")
    if prior is None:
        return None
    embeds, mask = model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"].bool()
    scores = torch.cat([prior.score(row[kept].mean(0, keepdim=True)) for row, kept in zip(embeds, mask, strict=True)])
    assert scores.std(0).max() > 0.05, "the prompts' priors are alike"
    return scores.detach().to(embeds.dtype)


def put_formula(module, scores):
    """Put `Beside` into the place of each adapted block in a module."""
    for name, child in list(module.named_children()):
        if isinstance(child, ExpertBlock):
            setattr(module, name, Beside(child, scores))
        else:
            put_formula(child, scores)


FORMS = [
    {"num_clusters": 6, "router_rank": 2},
    {"use_router": False, "shared_core": True},
    {"router_top_k": 2, "mixture_implementation": "reference"},
    {"use_prior": False},
]


def answer_and_gradients(model, batch, parameters):
    logits = model(**batch).logits[batch["attention_mask"].bool()]
    return logits, torch.autograd.grad(logits.sin().sum(), parameters)


CASES = [
    *((family, kernel, {}) for family in FAMILIES for kernel in KERNELS),
    *(("Mixtral", "batched_mm", form) for form in FORMS),
]


@pytest.mark.parametrize(("family", "kernel", "form"), CASES, ids=str)
def test_it_is_the_mixture_beside_the_block_with_every_gradient(family, kernel, form):
    # PyTorch's grouped product has no float64.
    dtype = torch.float32 if kernel == "grouped_mm" else torch.float64
    model, batch = adapt(make(family, kernel), **form).to(dtype), rows_of()
    parameters = {name: one for name, one in model.named_parameters() if "trex_" in name}
    # The gradient of this passes through both blocks.
    first = next(one for name, one in model.named_parameters() if "layers.0.self_attn" in name).requires_grad_()
    found = answer_and_gradients(model, batch, [first, *parameters.values()])
    with model.disable_adapter():
        assert (answer_and_gradients(model, batch, [first])[0] - found[0]).abs().max() > 0.1
    put_formula(model, scores_of(model, batch))
    assert sum(isinstance(module, Beside) for module in model.modules()) == 2
    expected = answer_and_gradients(model, batch, [first, *parameters.values()])
    # Scores of prompts are float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 if dtype == torch.float32 else 1e-5)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_gives_the_same(family):
    model, batch = adapt(make(family)), rows_of()
    kept = batch["attention_mask"].bool()
    logits, texts = {}, {}
    for kernel in KERNELS:
        model.get_base_model().set_experts_implementation(kernel)
        with torch.no_grad():
            logits[kernel] = model(**batch).logits[kept]
            # Rows that are padded on the left alone.
            texts[kernel] = model.generate(**{name: batch[name][:, :5] for name in batch}, max_new_tokens=4)
    for kernel in KERNELS[1:]:
        torch.testing.assert_close(logits[kernel], logits["eager"], rtol=1e-3, atol=1e-3)
        assert torch.equal(texts[kernel], texts["eager"])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_give_what_they_give_alone(family):
    model, batch = adapt(make(family)), rows_of()
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(3):
            alone = model(input_ids=batch["input_ids"][row, kept[row]][None]).logits[0]
            torch.testing.assert_close(together[row, kept[row]], alone, rtol=1e-3, atol=1e-3)


def test_packed_prompts_have_each_its_own_prior():
    model, ids = adapt(make("Qwen3Moe", "grouped_mm")), prompts(3)
    pieces = [ids[0, :4], ids[1, :6], ids[2, :2]]
    packed = torch.cat(pieces)[None]
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[None]
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=piece[None]).logits[0] for piece in pieces])
        other = model(input_ids=packed, use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert (other - alone).abs().max() > 0.1


@pytest.mark.parametrize("scope", ["prompt", "answer"])
def test_generating_with_a_cache_is_generating_without(scope):
    model = adapt(make("Mixtral", "grouped_mm"), prior_scope=scope)
    ids, mask = rows_of()["input_ids"][:, :5], rows_of()["attention_mask"][:, :5]
    for settings in ({}, {"num_beams": 2}):
        texts = [
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, use_cache=use, **settings)
            for use in (True, False)
        ]
        assert torch.equal(*texts)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5), texts[0])


def test_each_row_takes_the_adapter_that_is_named_for_it():
    model, batch = adapt(make("DeepseekV3", "batched_mm")), rows_of()
    model.add_adapter("other", TRexConfig(r_a=3, r_b=2, num_clusters=4, task_type="CAUSAL_LM", **BLOCKS))
    randomize(model, "other", seed=5)
    initialize_trex_prior(
        model, [{"input_ids": part} for part in prompts(32, seed=2).split(8)], adapter_name="other", progress=False
    )
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["other", "default", "__base__"]).logits
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(**batch).logits
        with model.disable_adapter():
            alone["__base__"] = model(**batch).logits
    for row, name in enumerate(["other", "default", "__base__"]):
        kept = batch["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row, kept], alone[name][row, kept], rtol=1e-3, atol=1e-3)
        assert all((alone[name] - alone[each])[row, kept].abs().max() > 0.05 for each in alone if each != name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    model, batch = adapt(make("GptOss", "grouped_mm"), trex_dropout=0.0).train(), rows_of()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :5] = -100
    trained = [one for one in model.parameters() if one.requires_grad]
    plain = torch.autograd.grad(model(**batch).loss, trained)
    model.enable_input_require_grads()
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    loss = model(**batch).loss
    # Another forward in between has other prompts.
    model(input_ids=prompts(2, seed=9), labels=prompts(2, seed=9).masked_fill(torch.arange(9) < 5, -100))
    loss.backward()
    torch.testing.assert_close([one.grad for one in trained], list(plain), rtol=1e-4, atol=1e-5)


def test_under_autocast_and_in_bfloat16():
    # All experts have a part, so that rounding cannot change which ones have.
    batch, kept = rows_of(), rows_of()["attention_mask"].bool()
    model = adapt(make("Mixtral", "grouped_mm", num_experts_per_tok=4))
    with torch.no_grad():
        expected = model(**batch).logits[kept]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(**batch).logits[kept].float(), expected, rtol=0.1, atol=0.3)
        with model.disable_adapter():
            assert (model(**batch).logits[kept] - expected).abs().max() > 1
    half = adapt(make("Mixtral", "grouped_mm", num_experts_per_tok=4).bfloat16())
    layer = half.get_base_model().model.layers[0].mlp.experts
    assert layer.trex_A["default"].dtype == torch.float32 and layer.base_layer.down_proj.dtype == torch.bfloat16
    with torch.no_grad():
        logits = half(**batch).logits[kept]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(("kept", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.uint8, torch.float32)])
def test_parameters_are_where_the_block_is_and_in_a_dtype_that_trains(kept, expected):
    base = make().to("meta")
    for layer in base.model.layers:
        layer.mlp.experts.down_proj = nn.Parameter(layer.mlp.experts.down_proj.to(kept), requires_grad=False)
    config = TRexConfig(use_prior=False, **BLOCKS)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = dict(model.base_model.trex_layers())["model.layers.1.mlp.experts"]
    for parameter in layer.parameters_of("default"):
        assert (parameter.device.type, parameter.dtype) == ("meta", expected) and parameter.requires_grad


def blocks_in(model):
    return [name for name, layer in model.base_model.trex_layers() if isinstance(layer, ExpertBlock)]


@pytest.mark.parametrize(
    ("targets", "blocks", "layers"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}, 2, 0),
        ({"target_parameters": ["gate_up_proj_bias"], "target_modules": []}, 2, 0),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"], "target_modules": []}, 1, 0),
        ({"target_modules": ["experts"]}, 2, 0),
        ({"target_modules": ["q_proj", "layers.0.mlp.experts"]}, 1, 2),
        ({"target_modules": r".*\.(q_proj|experts)"}, 2, 2),
        ({"target_modules": r".*\.q_proj", "target_parameters": ["experts.down_proj"]}, 2, 2),
        ({"target_modules": r".*\.q_proj", "target_parameters": ["1.mlp.experts.down_proj"]}, 1, 2),
        ({"target_parameters": ["experts.down_proj"]}, 2, 8),
        ({"target_parameters": ["experts.down_proj"], "layers_to_transform": [1]}, 1, 4),
        ({"target_parameters": ["experts.down_proj"], "exclude_modules": ["layers.0.mlp.experts"]}, 1, 8),
    ],
    ids=str,
)
def test_blocks_are_named_as_lora_does_or_by_their_module(tmp_path, targets, blocks, layers):
    model = get_peft_model(make("GptOss"), TRexConfig(r_a=2, r_b=3, use_prior=False, **targets))
    adapted = dict(model.base_model.trex_layers())
    assert len(blocks_in(model)) == blocks and len(adapted) == blocks + layers
    assert repr(adapted[blocks_in(model)[0]]).startswith("trex.ExpertBlock(")
    randomize(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("GptOss"), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.peft_config["default"].target_parameters is None
    ids = prompts(2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


def test_what_is_trained_is_counted(capsys):
    model = get_peft_model(make(), TRexConfig(r_a=2, r_b=3, num_clusters=5, **BLOCKS))
    # A, B, the router, the map, omega and gate, in two blocks of width 32.
    trained = 2 * (2 * 32 + 3 * 32 + 6 * 32 + 6 * 5 + 2)
    assert model.get_nb_trainable_parameters()[0] == trained
    model.print_trainable_parameters()
    assert f"trainable params: {trained}" in capsys.readouterr().out
    assert all(one.requires_grad == ("trex_" in name) for name, one in model.named_parameters() if "prior" not in name)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["experts.up_proj"], r"'experts.up_proj', and no module .* model.layers.0.mlp.experts, model.layers.1"),
        (["experts.down_proj", "experts"], r"'experts', and no module"),
        (
            ["q_proj.weight"],
            r"'q_proj.weight', .* shape \(32, 32\), of a Linear: no block .* Write 'q_proj' in target_modules",
        ),
        ("gate_up", r"'gate_up', and no module"),
    ],
)
def test_parameters_that_are_none_of_a_block_are_refused(targets, words):
    base = make()
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=f"target_parameters names {words}"):
        get_peft_model(base, TRexConfig(target_parameters=targets, use_prior=False))
    assert set(base.state_dict()) == before


def test_a_model_without_blocks_says_that_there_are_none():
    with pytest.raises(ValueError, match=r"blocks of experts in it are: none\. Experts that are linear layers"):
        get_peft_model(make_llama(), TRexConfig(target_parameters=["mlp.experts.down_proj"], use_prior=False))
    with pytest.raises(TypeError, match="target_parameters=3 must be a name or a list of names"):
        TRexConfig(target_parameters=3)


def llama4():
    config = transformers.Llama4TextConfig(
        **{**SIZES, "intermediate_size_mlp": 24, "num_local_experts": 4, "interleave_moe_layer_step": 1}
    )
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("targets", [{"target_modules": ["experts"]}, BLOCKS])
def test_experts_that_see_each_token_several_times_are_refused(targets):
    words = "experts is the parameter gate_up_proj .*its forward does not take tokens, the experts of each"
    with pytest.raises(ValueError, match=words):
        get_peft_model(llama4(), TRexConfig(use_prior=False, **targets))
    with pytest.warns(UserWarning, match="parameters.$"):
        get_peft_model(llama4(), TRexConfig(use_prior=False, exclude_modules=["router"]))


def test_the_width_is_that_of_the_hidden_states():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    for inner in (16, 32, 64):
        qwen = transformers.Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=inner, num_experts=3)
        assert width_of(Qwen3MoeExperts(qwen)) == 32
        assert width_of(GptOssExperts(transformers.GptOssConfig(hidden_size=32, intermediate_size=inner))) == 32
        plain = transformers.NemotronHConfig(hidden_size=32, moe_intermediate_size=inner, n_routed_experts=3)
        assert width_of(NemotronHExperts(plain)) == 32
        turned = NemotronHExperts(plain)
        for name in ("up_proj", "down_proj"):
            setattr(turned, name, nn.Parameter(getattr(turned, name).mT.contiguous()))
        turned.is_transposed = True
        assert width_of(turned) == 32
    assert width_of(nn.Linear(3, 4)) is None and width_of(nn.Conv1d(3, 4, 2)) is None


def test_all_linear_says_how_to_adapt_the_experts_and_then_says_nothing():
    with pytest.warns(UserWarning, match=r"hold (\d+) % .* target_parameters=\['experts.down_proj'\] adapts each"):
        model = get_peft_model(make(), TRexConfig(use_prior=False))
    assert not blocks_in(model)
    model = get_peft_model(make(), TRexConfig(use_prior=False, target_parameters=["experts.down_proj"]))
    assert len(blocks_in(model)) == 2
    # For a second adapter the blocks have adapters around them.
    model.add_adapter("second", TRexConfig(use_prior=False, target_parameters=["mlp.experts.down_proj"]))
    with pytest.warns(UserWarning, match="experts in model.layers.0.mlp.experts, model.layers.1.mlp.experts are not"):
        model.add_adapter("third", TRexConfig(use_prior=False))
    assert {len(layer.trex_A) for _, layer in model.base_model.trex_layers()} == {2, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_and_travels(tmp_path, family):
    model, batch = adapt(make(family, "grouped_mm")).train(), {"input_ids": prompts(8)}
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(9) < 5, -100)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=2e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert all(one.grad is not None and one.grad.isfinite().all() and one.grad.any() for one in trained)
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    batch = rows_of()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(family, "grouped_mm"), tmp_path)
    plain = make(family, "grouped_mm")
    plain.load_adapter(str(tmp_path))
    for each in (loaded.eval(), plain.eval()):
        with torch.no_grad():
            torch.testing.assert_close(each(**batch).logits, expected, rtol=1e-6, atol=1e-6)


def test_adapters_come_and_go():
    model, batch, base = adapt(make("Qwen3Moe")), rows_of(), make("Qwen3Moe")
    with torch.no_grad():
        plain, first = base(**batch).logits, model(**batch).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, plain)
        model.add_adapter("other", TRexConfig(r_a=3, r_b=2, use_prior=False, **BLOCKS))
        randomize(model, "other", seed=3)
        torch.testing.assert_close(model(**batch).logits, first)
        model.set_adapter("other")
        assert (model(**batch).logits - first).abs().max() > 0.1
        model.delete_adapter("other")
        model.set_adapter("default")
        torch.testing.assert_close(model(**batch).logits, first)
        assert not any(".other" in name for name in model.state_dict())
        bare = model.unload()
        torch.testing.assert_close(bare(**batch).logits, plain)
    assert bare.state_dict().keys() == base.state_dict().keys()


def test_what_is_static_is_refused_and_changes_nothing(tmp_path):
    model, batch = adapt(make(), target_modules=["q_proj"]), rows_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = dict(model.base_model.trex_layers())["model.layers.0.mlp.experts"]
    words = "model.layers.0.mlp.experts is a block of experts, which .* neither merged, calibrated nor exported"
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: calibrate_trex_merge(model, [batch], progress=False),
        lambda: save_trex_as_lora(model, tmp_path / "lora", per_cluster=False),
        lambda: save_trex_as_lora(model, tmp_path / "lora"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt()
    for attempt in (layer.merge, lambda: layer.get_delta_weight("default")):
        with pytest.raises(ValueError, match="The module is a block of experts"):
            attempt()
    assert not model.base_model.supports_lora_conversion() and not (tmp_path / "lora").exists()
    assert not any(layer.merged for _, layer in model.base_model.trex_layers())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_counts_the_tokens_of_a_block():
    model, batch = adapt(make("Mixtral", "grouped_mm")), rows_of()
    seen = {}
    layer = dict(model.base_model.trex_layers())["model.layers.1.mlp.experts"]
    layer.register_forward_hook(lambda _, args, output: seen.update(args=args, y=output))
    report = routing_report(model, [{**batch, "kind": ["a", "b", "c"]}], group_by="kind", progress=False)
    figures, kept = report.layers["model.layers.1.mlp.experts"], batch["attention_mask"].bool().flatten()
    assert figures.tokens == 15 and report.groups == {"a": 1, "b": 1, "c": 1}
    with torch.no_grad():
        base = layer.base_layer(*seen["args"])
    energy = (seen["y"] - base)[kept].square().sum() / base[kept].square().sum()
    assert figures.energy == pytest.approx(float(energy), rel=1e-3)
    assert len(set(figures.group_load)) == 3 and sum(report.clusters) == 3


def test_it_is_pruned(tmp_path):
    model, batch = adapt(make("Mixtral", "grouped_mm"), r_a=4, r_b=4), rows_of()
    data = [{"input_ids": part} for part in prompts(64).split(16)]
    pruned = prune_trex(model, routing_report(model, data, progress=False), keep=0.8)
    assert pruned.parameters <= 0.8 * pruned.parameters_before and not pruned.removed
    assert set(model.peft_config["default"].expert_pattern) <= set(blocks_in(model)) == set(pruned.sizes)
    assert set(pruned.sizes.values()) != {(4, 4)}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("Mixtral", "grouped_mm"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)


def test_router_losses_are_those_of_tokens_that_are_attended_to():
    model, batch = adapt(make(), balance_loss_coef=0.5, use_prior=False).train(), rows_of()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    seen = []
    for _, layer in model.base_model.trex_layers():
        layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0])))
    output = model(**batch)
    kept, expected = batch["attention_mask"].bool().flatten(), []
    for layer, x in seen:
        p = (x[kept] @ layer.trex_router["default"].T).softmax(-1).mean(0)
        expected.append(6 * p.square().sum())
    added = output.trex_router_loss
    torch.testing.assert_close(added, 0.5 * torch.stack(expected).mean())
    assert all(isinstance(layer, TRexLayer) for layer, _ in seen)


@pytest.mark.slow
def test_it_is_compiled_in_one_graph():
    model, batch = adapt(make("Mixtral", "batched_mm", num_hidden_layers=1)), rows_of()
    parameters, kept = (
        [one for name, one in model.named_parameters() if "trex_" in name],
        batch["attention_mask"].bool(),
    )
    expected = answer_and_gradients(model, batch, parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = answer_and_gradients(compiled, batch, parameters)
    torch._dynamo.reset()
    assert len(found[0]) == kept.sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
