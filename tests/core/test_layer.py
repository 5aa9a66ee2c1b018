"""The adapter in its layer: equal to the formula, and a PEFT citizen in all that PEFT does with layers."""

import copy

import pytest
import torch
from conftest import adapted, answered, batches, make_gpt2, make_llama, prompts, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior, rank_one_mixture
from peft_trex.mixture import num_experts
from peft_trex.prior.hooks import PromptWatch
from peft_trex.prior.state import ForwardState

UNFITTED = "ignore:The semantic prior:UserWarning"


class Two(nn.Module):
    """Two layers without tokens; the second is a Conv1D."""

    def __init__(self, d_in, hidden, d_out, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(d_in, hidden)
        self.second = Conv1D(d_out, hidden)
        self.to(dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def _reference(layer, adapter_name, x, scores, config):
    """The adapter's output by the formula, from the layer's own tensors."""
    prior = None
    if config.use_prior and scores is not None:
        prior = scores @ layer.trex_map[adapter_name].T if config.learned_map else scores
    elif config.use_prior:
        prior = torch.zeros(1, config.num_experts, dtype=x.dtype)
    if config.shared_core:
        prior = prior + layer.trex_core[adapter_name]
    return rank_one_mixture(
        x,
        layer.trex_A[adapter_name],
        layer.trex_B[adapter_name],
        layer.trex_router[adapter_name] if config.use_router else None,
        prior,
        layer.trex_omega[adapter_name],
        layer.trex_gate[adapter_name],
        router_down=layer.trex_router_down[adapter_name] if config.router_rank else None,
        token_scale=float(config.token_scale or config.num_experts),
        prior_scale=config.prior_scale,
        temperature=config.gate_temperature,
        layout=config.expert_layout,
        top_k=config.router_top_k,
    )


@st.composite
def _configs(draw):
    layout = draw(st.sampled_from(["grid", "paired"]))
    r_a = draw(st.integers(1, 4))
    use_router, use_prior = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    external = {"prior_encoder": "external", "prior_dim": draw(st.integers(2, 6))} if use_prior else {}
    r_b = r_a if layout == "paired" else draw(st.integers(1, 4))
    experts = num_experts(r_a, r_b, layout)
    return TRexConfig(
        r_a=r_a,
        r_b=r_b,
        expert_layout=layout,
        num_clusters=draw(st.integers(1, 9)),
        use_router=use_router,
        router_rank=draw(st.sampled_from([None, 1, 3])) if use_router else None,
        router_top_k=draw(st.sampled_from([None, 1, experts])) if use_router else None,
        use_prior=use_prior,
        shared_core=use_prior and draw(st.booleans()),
        token_scale=draw(st.sampled_from([None, 0.5, 32.0])) if use_router else None,
        prior_scale=draw(st.sampled_from([0.25, 4.0])),
        gate_temperature=draw(st.sampled_from([1.0, 100.0])),
        target_modules=["first", "second"],
        **external,
    )


@pytest.mark.filterwarnings(UNFITTED)
@settings(max_examples=60, deadline=None)
@given(
    config=_configs(),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
    fit=st.booleans(),
    path=st.data(),
)
def test_a_layer_equals_the_formula_and_survives_a_round_trip(config, sizes, rows, tokens, dtype, seed, fit, path):
    torch.manual_seed(seed)
    base = Two(*sizes, dtype)
    model = get_peft_model(copy.deepcopy(base), config)
    randomize(model, seed=seed)
    x = torch.randn(rows, tokens, sizes[0], dtype=dtype)
    extra, scores = {}, None
    if config.use_prior and fit:
        generator = torch.Generator().manual_seed(seed)
        initialize_trex_prior(
            model, embeddings=torch.randn(40, config.prior_dim, generator=generator), progress=False, seed=seed
        )
        extra["semantic_embeds"] = torch.randn(rows, config.prior_dim, generator=generator)
        scores = model.base_model.trex_prior["default"].score(extra["semantic_embeds"]).to(dtype)
    y = model(x, **extra)
    tuned = model.base_model.model
    first = base.first(x) + _reference(tuned.first, "default", x, scores, config)
    hidden = torch.tanh(first)
    torch.testing.assert_close(y, base.second(hidden) + _reference(tuned.second, "default", hidden, scores, config))

    with model.disable_adapter():
        torch.testing.assert_close(model(x, **extra), base(x), rtol=0, atol=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        folder = path.draw(st.builds(_folder))
    try:
        model.save_pretrained(folder.name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder.name)
        torch.testing.assert_close(loaded(x, **extra), y, rtol=0, atol=0)

        other = TRexConfig(r_a=1, r_b=2, num_clusters=2, use_prior=False, target_modules=["first"])
        loaded.add_adapter("other", other)
        randomize(loaded, "other", seed + 1)
        loaded.set_adapter("other")
        only = base.first(x) + _reference(loaded.base_model.model.first, "other", x, None, other)
        torch.testing.assert_close(loaded(x, **extra), base.second(torch.tanh(only)))
        loaded.base_model.set_adapter(["default", "other"])
        both = first + _reference(loaded.base_model.model.first, "other", x, None, other)
        hidden = torch.tanh(both)
        expected = base.second(hidden) + _reference(loaded.base_model.model.second, "default", hidden, scores, config)
        torch.testing.assert_close(loaded(x, **extra), expected)
        loaded.set_adapter("default")
        loaded.delete_adapter("other")
        torch.testing.assert_close(loaded(x, **extra), y, rtol=0, atol=0)
    finally:
        folder.cleanup()


def _folder():
    import tempfile

    return tempfile.TemporaryDirectory()


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LoraConfig(r=32, target_modules="all-linear"), 125_173_760),
        (TRexConfig(), 81_183_280),
        # a layer of D_in and D_out: (4 + Q) D_in + 32 Q + 8 D_out + 2
        (TRexConfig(router_rank=8), 38_492_720),
        (TRexConfig(router_rank=4), 31_329_840),
        (TRexConfig(use_router=False), 24_166_960),
        # 8 D_in + 8 D_out, a map of 64 x 32, a core of 64, and 2
        (TRexConfig.recommended(), 31_885_360),
    ],
    ids=["lora", "trex", "router_rank 8", "router_rank 4", "no router", "recommended"],
)
def test_parameter_count_of_llama_2_13b(config, parameters):
    shapes = LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    )
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(shapes), config)
    assert model.get_nb_trainable_parameters()[0] == parameters


def test_an_adapter_that_is_replaced_leaves_nothing_behind():
    base = make_llama()
    get_peft_model(base, TRexConfig(router_rank=2, num_clusters=3, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(base, TRexConfig(use_router=False, num_clusters=32, task_type="CAUSAL_LM"))
    names = {name.split(".")[-2] for name, _ in model.named_parameters() if "trex_" in name}
    assert names == {"trex_A", "trex_B", "trex_omega", "trex_gate"}


def test_starts_as_the_base_model():
    base = make_llama()
    ids = prompts(3)
    expected = base(ids).logits
    model = get_peft_model(base, TRexConfig(task_type="CAUSAL_LM"))
    initialize_trex_prior(model, batches(256), progress=False)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not layer.trex_B["default"].any() and not layer.trex_router["default"].any()
    assert layer.trex_A["default"].abs().sum() > 0
    assert layer.trex_omega["default"] == 0 and layer.trex_gate["default"] == 0


@pytest.mark.parametrize("router_rank", [None, 2])
def test_without_a_prior_only_a_drawn_router_lets_the_output_vectors_differ(router_rank):
    # In float64, as Adam turns roundings of a small gradient into steps.
    x = torch.randn(64, 6, dtype=torch.float64)
    target = torch.randn(64, 7, dtype=torch.float64)
    differences = {}
    for start in (True, "random_router", "zero_router"):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(6, 7)).double()
        config = TRexConfig(
            r_a=2, r_b=3, use_prior=False, target_modules=["0"], init_weights=start, router_rank=router_rank
        )
        expected = layer(x)
        model = get_peft_model(layer, config).double()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
        columns = layer[0].trex_B["default"].detach()
        assert columns.abs().max() > 0.01
        differences[start] = (columns - columns[:, :1]).abs().max()
    assert differences["zero_router"] < 1e-6
    assert min(differences[True], differences["random_router"]) > 1e-3


class Rows(nn.Module):
    """A model without a token embedding."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 7)

    def forward(self, x):
        return self.inner(x)


STARTS = [
    # (a model, settings, whether the router starts at zero)
    (make_llama, {}, True),
    (make_llama, {"use_prior": False}, False),
    (make_llama, {"use_prior": False, "init_weights": "zero_router"}, True),
    (make_llama, {"init_weights": "random_router"}, False),
    (Rows, {}, False),
    (Rows, {"init_weights": "zero_router"}, True),
    (Rows, {"prior_encoder": "external", "prior_dim": 5}, True),
    # Each column of B has a row of A of its own there, so a router of zeros keeps nothing equal.
    (make_llama, {"use_prior": False, "expert_layout": "paired", "r_b": 2}, True),
]


@pytest.mark.parametrize(("make", "settings", "zero"), STARTS)
def test_the_router_is_drawn_where_no_prior_tells_the_output_vectors_apart(make, settings, zero):
    settings = {"r_a": 2, "r_b": 3, "num_clusters": 4, "target_modules": "all-linear", **settings}
    model = get_peft_model(make(), TRexConfig(**settings))
    model.add_adapter("second", TRexConfig(**settings))
    for layer in [module for module in model.modules() if isinstance(module, TRexLayer)]:
        for name in ("default", "second"):
            assert bool(layer.trex_router[name].any()) is not zero
            assert not layer.trex_B[name].any(), "the adapter changes nothing at first"


def test_default_targets_are_all_linear_layers_but_the_head():
    model = get_peft_model(make_llama(), TRexConfig())
    targeted = {name.split(".")[-1] for name in model.targeted_module_names}
    assert targeted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert get_peft_model(make_gpt2(), TRexConfig()).targeted_module_names


def test_only_the_adapter_trains_and_all_of_it():
    model = adapted(r_a=2, r_b=3, num_clusters=4)
    model.train()
    model(**answered(4)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("trex_" in name), name
        if "trex_" in name:
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.filterwarnings(UNFITTED)
def test_every_parameter_takes_part_while_the_prior_is_unfitted():
    model = adapted(fit=False).train()
    model(**answered(4)).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "trex_" in name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_is_the_mean_routing_and_unmerge_restores(kind, safe):
    model = adapted(kind)
    ids = prompts(3)
    routed = model(input_ids=ids).logits
    weights = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, TRexLayer)}
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter(safe_merge=safe)
    merged = model(input_ids=ids).logits
    assert (merged - routed).abs().max() > 1e-3
    for name, module in model.named_modules():
        if isinstance(module, TRexLayer):
            delta = module.get_delta_weight("default")
            assert delta.shape == module.weight.shape
            torch.testing.assert_close(module.weight, weights[name] + delta)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, routed, atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="merged approximately"):
        plain = model.merge_and_unload()
    assert not any(isinstance(module, TRexLayer) for module in plain.modules())
    torch.testing.assert_close(plain(input_ids=ids).logits, merged)


def test_merge_is_exact_where_the_routing_is_constant():
    model = adapted(fit=False, use_prior=False)
    for name, parameter in model.named_parameters():
        if "trex_router" in name:
            parameter.data.zero_()
    ids = prompts(3)
    routed = model(input_ids=ids).logits
    with pytest.warns(UserWarning, match="merged approximately"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, routed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared_core", [False, True])
@pytest.mark.parametrize("clusters", [4, 6])
def test_merge_without_a_router_is_the_mixture_at_the_mean_prior(clusters, shared_core):
    model = adapted(use_router=False, num_clusters=clusters, shared_core=shared_core)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    scores = model.base_model.trex_prior["default"].mean_scores[None]
    x = torch.randn(1, 5, 48)
    expected = _reference(layer, "default", x, scores, model.peft_config["default"])
    torch.testing.assert_close(x @ layer.get_delta_weight("default").T, expected)


def test_safe_merge_refuses_nan_and_leaves_the_weight():
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    layer.trex_B["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter default"):
        layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)
    assert not layer.merged


def test_unload_and_merge_leave_no_trace_on_the_base_model():
    base = make_llama()
    before = {"hooks": len(base._forward_pre_hooks), "generate": vars(base).get("generate")}
    ids = prompts(2)
    expected = base(ids).logits
    model = adapted(base=base)
    model.train()
    model.base_model.model.gradient_checkpointing_enable()
    model(**answered(2))
    plain = model.unload()
    assert plain is base
    assert {"hooks": len(base._forward_pre_hooks), "generate": vars(base).get("generate")} == before
    hooks = [hook for module in base.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(getattr(hook, "__self__", None), PromptWatch) for hook in hooks)
    assert "Prior" not in type(base.model.layers[0]._gradient_checkpointing_func).__name__
    base.gradient_checkpointing_disable()
    torch.testing.assert_close(base.eval()(ids).logits, expected, rtol=0, atol=0)


def test_a_token_whose_prompt_has_no_scores_is_in_no_cluster():
    layer = adapted(num_clusters=4).base_model.model.model.layers[0].self_attn.q_proj
    state = ForwardState({"default": torch.tensor([[0.0, 0, 0, 0], [0.1, 0.2, 0.4, 0.3]])}, rows=2)
    clusters = layer._channel.run(state, layer.cluster_of, torch.zeros(2, 3, layer.in_features))
    assert clusters.tolist() == [[4, 4, 4], [2, 2, 2]]


def test_a_static_core_lies_where_the_adapter_does():
    layer = adapted().to("meta").base_model.model.model.layers[0].self_attn.q_proj
    layer.keep_static("default", torch.zeros(1, 3, 2))
    assert layer.trex_static["default"].is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_dtype_follows_peft(dtype):
    model = adapted(base=make_llama().to(dtype))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.trex_A["default"].dtype == torch.float32
    assert model(input_ids=prompts(2)).logits.dtype == dtype
    model = get_peft_model(make_llama().to(dtype), TRexConfig(use_prior=False), autocast_adapter_dtype=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.trex_A["default"].dtype == layer.trex_router["default"].dtype == dtype
    assert torch.isfinite(model(input_ids=prompts(2)).logits).all()


def test_autocast():
    model = adapted()
    exact = model(input_ids=prompts(2)).logits
    with torch.autocast("cpu", torch.bfloat16):
        y = model(input_ids=prompts(2)).logits
    assert (y - exact).norm() < 0.05 * exact.norm()


def test_dropout_is_on_in_training_only():
    model = adapted(trex_dropout=0.5)
    ids = prompts(2)
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(**answered(2)).logits, model(**answered(2)).logits)


def test_deepcopy_is_a_model_of_its_own():
    model = adapted()
    ids = prompts(2)
    expected = model(input_ids=ids).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.base_model.trex_prior["default"].centroids.zero_()
    torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=0, atol=0)
    twin.generate(input_ids=ids, max_new_tokens=2)


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(5, 3), nn.ConvTranspose2d(3, 3, 1), nn.LSTM(3, 3), nn.MultiheadAttention(4, 2)],
    ids=lambda module: type(module).__name__,
)
def test_refuses_other_layers_by_name(module):
    base = nn.Sequential()
    base.add_module("odd", module)
    with pytest.raises(ValueError, match=f"odd is a {type(module).__name__}"):
        get_peft_model(base, TRexConfig(target_modules=["odd"], use_prior=False))


def test_prior_is_saved_once():
    state = get_peft_model_state_dict(adapted())
    assert [key for key in state if "trex_prior" in key and "centroids" in key] == ["base_model.trex_prior.centroids"]
    assert all("trex_" in key for key in state)
