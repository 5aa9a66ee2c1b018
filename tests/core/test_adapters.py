"""Several adapters on one model, the paper's layouts and ablations, and what else users do with an adapter."""

import copy

import pytest
import torch
from conftest import BEFORE_5, adapted, answered, batches, make_llama, pad_to, prompts, randomize
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior

EMBEDS = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
CONFIGS = {
    "default": {"r_a": 2, "r_b": 3, "num_clusters": 4},
    "ext": {"r_a": 3, "r_b": 1, "num_clusters": 5, "prior_encoder": "external", "prior_dim": 6},
    "bare": {"r_a": 2, "r_b": 2, "expert_layout": "paired", "use_prior": False, "router_rank": 1},
}
TARGETS = {"default": None, "ext": ["q_proj", "down_proj"], "bare": ["v_proj", "down_proj"]}


def _config(name, **kwargs):
    return TRexConfig(**{**CONFIGS[name], "target_modules": TARGETS[name], "task_type": "CAUSAL_LM", **kwargs})


def _fit(model, name):
    if name == "ext":
        embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(6))
        initialize_trex_prior(model, embeddings=embeddings, adapter_name=name)
    elif name == "default":
        initialize_trex_prior(model, batches(), progress=False)


def _three(**kwargs):
    """A model with an adapter of each of CONFIGS, "default" active."""
    model = get_peft_model(make_llama(), _config("default", **kwargs))
    for name in ("ext", "bare"):
        model.add_adapter(name, _config(name, **kwargs))
    for seed, name in enumerate(CONFIGS):
        randomize(model, name, seed)
        _fit(model, name)
    return model.eval()


def _logits(model, name=""):
    with torch.no_grad():
        return model(input_ids=prompts(3), **({"semantic_embeds": EMBEDS} if "ext" in name else {})).logits


def _own(model, name):
    """The tensors of one adapter."""
    state = {f"{key}.": value.clone() for key, value in model.state_dict().items() if "trex_" in key}
    return {key: value for key, value in state.items() if f".{name}." in key}


def _same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=key)


def _active(layer):
    return [name for name in layer.active_adapters if name in layer.trex_A]


# several adapters


def test_each_does_beside_the_others_what_it_does_alone(tmp_path):
    model = _three()
    outputs = {}
    for name in CONFIGS:
        model.set_adapter(name)
        outputs[name] = _logits(model, name)
    model.save_pretrained(tmp_path)
    for name, folder in {"default": "", "ext": "ext", "bare": "bare"}.items():
        alone = PeftModel.from_pretrained(make_llama(), tmp_path / folder, adapter_name=name)
        torch.testing.assert_close(_logits(alone, name), outputs[name], rtol=0, atol=0)
        _same(_own(alone, name), _own(model, name))
    assert not torch.equal(outputs["ext"], outputs["bare"])
    model.set_adapter("bare")
    with pytest.raises(ValueError, match="semantic_embeds was given, but the active adapters"):
        model.set_adapter("default")
        _logits(model, "ext")


def test_active_together_their_outputs_add_up():
    model = _three(target_modules=["lm_head"])  # the logits are linear in what the adapters of this layer add
    with model.disable_adapter():
        base = _logits(model)
    added = {}
    for name in CONFIGS:
        model.set_adapter(name)
        added[name] = _logits(model, name) - base
    model.base_model.set_adapter(["default", "ext"])
    torch.testing.assert_close(_logits(model, "ext") - base, added["default"] + added["ext"])
    model.base_model.set_adapter(list(CONFIGS))
    torch.testing.assert_close(_logits(model, "ext") - base, sum(added.values()))
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), base, rtol=0, atol=0)
    torch.testing.assert_close(_logits(model, "ext") - base, sum(added.values()))
    generated = model.generate(input_ids=prompts(3), semantic_embeds=EMBEDS, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(generated[:, 9], _logits(model, "ext")[:, -1].argmax(-1))


def test_active_together_both_train():
    model = _three().train()
    model.base_model.set_adapter(["default", "ext"])
    before = {name: _own(model, name) for name in CONFIGS}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**answered(3), semantic_embeds=EMBEDS).loss.backward()
    optimizer.step()
    for name in ("default", "ext"):
        after = _own(model, name)
        still = {key for key in after if torch.equal(after[key], before[name][key])}
        assert still == {key for key in after if "trex_prior" in key}
    _same(_own(model, "bare"), before["bare"])


@pytest.mark.parametrize("deleted", list(CONFIGS))
@pytest.mark.parametrize("active", list(CONFIGS))
def test_one_is_deleted_and_comes_back_anew(deleted, active):
    model = _three()
    kept = [name for name in CONFIGS if name != deleted]
    outputs = {}
    for name in kept:
        model.set_adapter(name)
        outputs[name] = _logits(model, name)
    model.set_adapter(active)
    model.delete_adapter(deleted)
    assert not [key for key in model.state_dict() if key.endswith(f".{deleted}") or f".{deleted}." in key]
    assert list(model.peft_config) == kept
    # whichever takes over, model and layers agree on it
    names = set(model.base_model.active_adapters)
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    assert {name for layer in layers for name in _active(layer)} <= names
    assert names == ({active} if active != deleted else names) and names <= set(kept)
    for name in kept:
        model.set_adapter(name)
        torch.testing.assert_close(_logits(model, name), outputs[name], rtol=0, atol=0)

    model.add_adapter(deleted, TRexConfig(r_a=1, r_b=2, num_clusters=3, task_type="CAUSAL_LM"))
    torch.testing.assert_close(_logits(model, kept[-1]), outputs[kept[-1]], rtol=0, atol=0)
    model.set_adapter(deleted)
    with model.disable_adapter():
        base = _logits(model)
    with pytest.warns(UserWarning, match="not fitted"):
        torch.testing.assert_close(_logits(model), base)
    initialize_trex_prior(model, batches(), adapter_name=deleted, progress=False)
    randomize(model, deleted)
    assert (_logits(model) - base).abs().max() > 0.1


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_beside_a_trained_one_leaves_it_alone(tmp_path, low_cpu_mem_usage):
    other = _three()
    other.save_pretrained(tmp_path, selected_adapters=["ext", "bare"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["bare", "ext"]
    assert not (tmp_path / "adapter_model.safetensors").exists()
    for name, count in {"ext": 4 * 6 + 3, "bare": 4 * 6}.items():
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert len(tensors) == count and not any("default" in key for key in tensors)

    model = adapted(base=make_llama())
    before, logits = _own(model, "default"), _logits(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in ("ext", "bare"):
        model.load_adapter(tmp_path / name, name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.active_adapter == "default"
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    _same(_own(model, "default"), before)
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)
    for name in ("ext", "bare"):
        other.set_adapter(name)
        model.set_adapter(name)
        _same(_own(model, name), _own(other, name))
        # weights that stay where the file was mapped are not aligned, so that other kernels run
        tolerance = 1e-5 if low_cpu_mem_usage else 0
        torch.testing.assert_close(_logits(model, name), _logits(other, name), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Adapter name 't")  # PEFT fears for names that are part of the prefix
@pytest.mark.parametrize("name", ["trex_A", "trex", "t", "model", "q_proj", "weight", "default_2", "with space"])
def test_odd_names(tmp_path, name):
    model = adapted()
    model.add_adapter(name, _config("default"))
    randomize(model, name, seed=9)
    initialize_trex_prior(model, batches(seed=1), adapter_name=name, progress=False)
    first = _own(model, "default")
    model.set_adapter(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / name, adapter_name=name)
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=0, atol=0)
    model.delete_adapter(name)
    assert not [key for key in model.state_dict() if "trex_" in key and key.endswith(f".{name}")]
    _same(_own(model, "default"), first)


@pytest.mark.parametrize("name", ["", "a.b"])
@pytest.mark.parametrize("use_prior", [True, False])
def test_names_that_cannot_be_are_refused_and_change_nothing(name, use_prior):
    model = adapted()
    keys, logits = list(model.state_dict()), _logits(model)
    with pytest.raises(ValueError, match=f"cannot be called '{name}': .* neither empty nor hold a dot"):
        model.add_adapter(name, _config("default", use_prior=use_prior))
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)
    base = make_llama()
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        get_peft_model(base, _config("default", use_prior=use_prior), adapter_name=name)
    assert not any(isinstance(module, TRexLayer) for module in base.modules())


def test_a_second_adapter_that_fails_leaves_no_half():
    model = adapted()
    keys, logits = list(model.state_dict()), _logits(model)
    with pytest.raises(ValueError, match="input_layernorm is a LlamaRMSNorm"):
        model.add_adapter("second", _config("default", target_modules=["q_proj", "input_layernorm"]))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)
    model.add_adapter("second", _config("default", target_modules=["v_proj"]))
    assert not [key for key in model.state_dict() if "q_proj" in key and key.endswith(".second")]


def test_what_peft_allows_of_one_adapter_alone_stays_so():
    model = adapted(bias="trex_only")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", _config("default", bias="all"))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", _config("default"))
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert list(model.state_dict()) == keys and model.base_model.trex_prior["default"].fitted


def test_merging_two_of_three():
    model = _three()
    weights = {name: module.get_base_layer().weight.clone() for name, module in _layers(model).items()}
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter(adapter_names=["default", "ext"])
    for name, layer in _layers(model).items():
        merged = [adapter for adapter in ("default", "ext") if adapter in layer.trex_A]
        assert layer.merged_adapters == merged
        delta = sum(layer.get_delta_weight(adapter) for adapter in merged)
        torch.testing.assert_close(layer.get_base_layer().weight, weights[name] + delta)
    model.unmerge_adapter()
    for name, layer in _layers(model).items():
        torch.testing.assert_close(layer.get_base_layer().weight, weights[name])
    with pytest.warns(UserWarning, match="merged approximately"):
        base = model.merge_and_unload(adapter_names=["bare"])
    close = {
        name: torch.allclose(base.get_submodule(name).weight, weight, atol=1e-5) for name, weight in weights.items()
    }
    changed = {name for name in weights if not close[name]}
    assert changed == {name for name in weights if name.endswith(("v_proj", "down_proj"))}


def _layers(model):
    return {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, TRexLayer)}


def test_what_is_trained_follows_the_calls():
    model = _three()

    def trained():
        return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained() == {"default"}
    model.set_adapter("ext")
    assert trained() == {"ext"}
    model.set_adapter("bare", inference_mode=True)
    assert trained() == set() and model.active_adapters == ["bare"]
    model.set_requires_grad(["default", "bare"])
    assert trained() == {"default", "bare"}
    model.set_requires_grad("bare", requires_grad=False)
    assert trained() == {"default"}
    model.set_adapter("default")
    status = model.get_model_status()
    assert (status.peft_types, status.enabled) == ({"default": "TREX", "ext": "TREX", "bare": "TREX"}, True)
    assert (status.active_adapters, status.merged_adapters) == (["default"], [])
    assert status.requires_grad == {"default": True, "ext": False, "bare": False}
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert len(layers) == 14
    down = layers["model.model.layers.0.mlp.down_proj"]
    assert sorted(down.available_adapters) == ["bare", "default", "ext"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


# beside other methods


def test_averaging_is_refused(tmp_path):
    model = adapted()
    before, logits = _own(model, "default"), _logits(model)
    with pytest.raises(
        NotImplementedError, match=r"cannot be averaged .* set_adapter with a list .*save_trex_as_lora"
    ):
        model.add_weighted_adapter(["default"], [1.0], "mix")
    _same(_own(model, "default"), before)
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)


def test_a_mixed_model_refuses_by_name_and_stays_as_it_was(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = make_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="'TREX' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, _config("default"), mixed=True)
    with pytest.raises(ValueError, match=r"TREX is not supported for mixed models"):
        PeftMixedModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names and not hasattr(base, "peft_config")
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), mixed=True)
    names, logits = [name for name, _ in model.named_modules()], _logits(model)
    with pytest.raises(ValueError, match="'TREX' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("second", _config("default"))
    with pytest.raises(ValueError, match="'TREX' is not compatible with the `PeftMixedModel`"):
        model.load_adapter(tmp_path, "second")
    assert [name for name, _ in model.named_modules()] == names and list(model.peft_config) == ["default"]
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)


def _lora(**kwargs):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False, **kwargs})


def test_one_model_holds_one_method():
    model, other = adapted(), get_peft_model(make_llama(), _lora())
    for holder, config in ((model, _lora()), (other, _config("default"))):
        logits = _logits(holder)
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            holder.add_adapter("second", config)
        assert list(holder.peft_config) == ["default"]
        torch.testing.assert_close(_logits(holder), logits, rtol=0, atol=0)


def test_on_top_of_lora_both_count():
    base = make_llama()
    plain = _logits(base)
    lora = get_peft_model(base, _lora()).eval()
    under = _logits(lora)
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(base, _config("bare", target_modules=["q_proj", "v_proj"]), adapter_name="top").eval()
    torch.testing.assert_close(_logits(model), under, rtol=0, atol=0)
    randomize(model, "top")
    both = _logits(model)
    assert (both - under).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), plain, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter()
    merged = _logits(model)
    model.unmerge_adapter()
    torch.testing.assert_close(_logits(model), both, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="merged approximately"):
        unloaded = model.merge_and_unload()
    assert not [name for name, _ in unloaded.named_modules() if "lora_" in name or "trex_" in name]
    torch.testing.assert_close(_logits(unloaded), merged, rtol=1e-4, atol=1e-4)


def test_another_method_that_takes_the_adapters_name_is_found_out():
    base = make_llama()
    get_peft_model(base, _config("default"))
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(base, _lora())
    with pytest.raises(ValueError, match=r"'default' was a T-REX adapter, .* is a LoraConfig now"):
        _logits(model)


# layouts and ablations of the paper

VARIANTS = {
    "paper": {"r_a": 4, "r_b": 8, "num_clusters": 32},
    "paired": {"expert_layout": "paired", "r_a": 3, "r_b": 3, "num_clusters": 3},
    "no router": {"use_router": False},
    "no prior": {"use_prior": False},
    "learned map": {"num_clusters": 5},
    "learned map of equal size": {"num_clusters": 6, "prior_map": "learned"},
    "external": {"prior_encoder": "external", "prior_dim": 6},
    "external, paired, no router": {
        **{"expert_layout": "paired", "r_a": 3, "r_b": 3, "num_clusters": 4, "use_router": False},
        **{"prior_encoder": "external", "prior_dim": 6},
    },
    "reduced router": {"router_rank": 2},
    "reduced router, paired, no prior": {
        **{"expert_layout": "paired", "r_a": 3, "r_b": 3, "use_prior": False, "router_rank": 2}
    },
    "biases of its layers": {"bias": "trex_only"},
    "all biases": {"bias": "all"},
    "head in full": {"modules_to_save": ["lm_head"]},
}
PREFIX = "base_model.model."


def _expected(base, config):
    """Names and shapes of the tensors in an adapter's file."""
    shapes = {}
    experts, clusters = config.num_experts, config.num_clusters
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        rows = {
            "A": (config.r_a, module.in_features),
            "B": (module.out_features, config.r_b),
            "router": (experts, config.router_rank or module.in_features) if config.use_router else None,
            "router_down": (config.router_rank, module.in_features) if config.router_rank else None,
            "map": (experts, clusters) if config.learned_map else None,
            "omega": (1,),
            "gate": (1,),
        }
        shapes |= {f"{PREFIX}{name}.trex_{part}": shape for part, shape in rows.items() if shape}
        if config.bias != "none" and module.bias is not None:
            shapes[f"{PREFIX}{name}.base_layer.bias"] = (module.out_features,)
    if config.use_prior:
        width = config.prior_dim or 32
        shapes |= {
            "base_model.trex_prior.centroids": (clusters, width),
            "base_model.trex_prior.mean": (width,),
            "base_model.trex_prior.mean_scores": (clusters,),
        }
    if config.modules_to_save:
        shapes[f"{PREFIX}lm_head.weight"] = (64, 32)
    return shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_trains_saves_and_merges(tmp_path, variant):
    def make():
        return make_llama(attention_bias=True)

    base = make()
    nn.init.normal_(base.model.layers[0].self_attn.q_proj.bias)
    weights = copy.deepcopy(base.state_dict())
    config = TRexConfig(**{"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", **VARIANTS[variant]})
    model = get_peft_model(base, config)
    external = config.prior_encoder == "external"
    embeds = {"semantic_embeds": EMBEDS.repeat(3, 1)[:8]} if external else {}
    if external:
        initialize_trex_prior(model, embeddings=torch.randn(40, 6, generator=torch.Generator().manual_seed(6)))
    elif config.use_prior:
        initialize_trex_prior(model, batches(64), progress=False)

    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**answered(8), **embeds).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    trained = {name.partition("base_model.model.")[2] for name, p in model.named_parameters() if p.requires_grad}

    model.eval()
    batch = {"input_ids": prompts(8), **embeds}
    with torch.no_grad():
        logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == _expected(make(), config)
    assert len(trained) == len([name for name in tensors if "trex_prior" not in name])
    fresh = make()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, logits, rtol=0, atol=0)
    assert loaded.peft_config["default"].router_rank == config.router_rank
    with pytest.warns(UserWarning, match="merged approximately"):
        merged = loaded.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        assert torch.isfinite(merged(input_ids=prompts(8)).logits).all()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    expected = weights["model.layers.0.mlp.down_proj.weight"] + layer.get_delta_weight("default")
    torch.testing.assert_close(merged.model.layers[0].mlp.down_proj.weight, expected)


# what users do with a LoRA


@pytest.mark.parametrize(
    ("settings", "adapted_layers"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r"model\.layers\.1\.mlp\..*_proj"}, 3),
        ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, 2),
        ({"exclude_modules": ["q_proj", "o_proj"]}, 10),
        ({"exclude_modules": r".*\.mlp\..*"}, 8),
        ({"target_modules": ["lm_head", "q_proj"]}, 3),
    ],
)
def test_targets_are_chosen_as_for_lora(capsys, settings, adapted_layers):
    model = get_peft_model(make_llama(), _config("bare", **{"target_modules": None, **settings}))
    lora = get_peft_model(make_llama(), _lora(**{"target_modules": "all-linear", **settings}))
    names = {name for name, module in model.named_modules() if isinstance(module, TRexLayer)}
    assert names == {name for name, module in lora.named_modules() if hasattr(module, "lora_A")}
    assert len(names) == adapted_layers
    model.print_trainable_parameters()
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if "trex_" in name)
    assert f"trainable params: {count:,d} ||" in capsys.readouterr().out


def test_all_linear_layers_of_some_blocks(tmp_path):
    model = get_peft_model(make_llama(), TRexConfig(layers_to_transform=[1], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    for adapted_model in (model, PeftModel.from_pretrained(make_llama(), tmp_path)):
        names = [name for name, module in adapted_model.named_modules() if isinstance(module, TRexLayer)]
        assert len(names) == 7
        assert all(name.startswith("base_model.model.model.layers.1.") for name in names)


def test_a_tied_head_keeps_the_embedding_and_refuses_a_merge():
    model = adapted(base=make_llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    base = model.base_model.model
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), _logits(make_llama(tie_word_embeddings=True)), rtol=0, atol=0)
    logits = _logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weight of lm_head is tied to that of model\.embed_tokens"):
            merge()
        torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)


def test_a_weight_tied_to_that_of_a_longer_name_is_not_merged_into():
    base = nn.Sequential()
    base.lin, base.lin_too = nn.Linear(3, 3), nn.Linear(3, 3)
    base.lin_too.weight = base.lin.weight
    model = get_peft_model(base, TRexConfig(target_modules=["lin"], use_prior=False))
    with pytest.raises(ValueError, match="weight of lin is tied to that of lin_too"):
        model.merge_adapter()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_casting_an_adapted_model(cast):
    model = adapted()
    logits = _logits(model)
    if cast == "to":
        model.to(torch.float64)
    else:
        getattr(model, cast)()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "to": torch.float64}[cast]
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    there = _logits(model)
    assert there.dtype == dtype
    tolerance = {"half": 5e-2, "bfloat16": 0.5, "to": 1e-4}[cast]
    torch.testing.assert_close(there.float(), logits, rtol=tolerance, atol=tolerance)
    loss = model.train()(**answered(4)).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_of_a_bfloat16_base(tmp_path, autocast_adapter_dtype):
    def base():
        return make_llama().to(torch.bfloat16)

    model = get_peft_model(base(), _config("default"), autocast_adapter_dtype=autocast_adapter_dtype)
    randomize(model)
    _fit(model, "default")
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {parameter.dtype for name, parameter in model.named_parameters() if "trex_" in name} == {wanted}
    logits = _logits(model.eval())
    assert logits.dtype == torch.bfloat16
    model.train()(**answered(4)).loss.backward()
    assert all(p.grad.any() and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    torch.testing.assert_close(_logits(loaded), logits, rtol=0, atol=0)


def test_a_copy_trains_by_itself():
    model = _three()
    model.set_adapter("bare")
    twin = copy.deepcopy(model)
    torch.testing.assert_close(_logits(twin), _logits(model), rtol=0, atol=0)
    randomize(twin, "bare", seed=77)
    logits = _logits(model)
    assert not torch.equal(_logits(twin), logits)
    twin.delete_adapter("bare")
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)
    twin.set_adapter("default")
    logits = _logits(twin)  # while the original runs another adapter
    model.set_adapter("default")
    torch.testing.assert_close(logits, _logits(model), rtol=0, atol=0)
    twin.base_model.trex_prior["default"].centroids.zero_()
    twin.base_model.trex_prior["default"]._fitted = None
    assert model.base_model.trex_prior["default"].fitted


def test_dropout_in_training_only():
    model = adapted(trex_dropout=0.5)
    torch.testing.assert_close(_logits(model), _logits(model), rtol=0, atol=0)
    model.train()
    batch = answered(3)
    assert model(**batch).loss.item() != model(**batch).loss.item()
    model.eval()
    torch.testing.assert_close(_logits(model), _logits(adapted()), rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_one_short_prompt(length):
    model, ids = adapted(), prompts(1, length)
    with torch.no_grad():
        one = model(input_ids=ids).logits
        for side in ("left", "right"):
            padded, mask = (part[None] for part in pad_to(ids[0], 12, side))
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(logits[mask.bool()], one[0], rtol=1e-4, atol=1e-4)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, one, rtol=0, atol=0)
    left, mask = (part[None] for part in pad_to(ids[0], 12, "left"))
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[:, length:]
    assert torch.equal(model.generate(input_ids=left, attention_mask=mask, max_new_tokens=4)[:, 12:], tokens)
    if length > 1 or not BEFORE_5:  # which takes the wrong one of two branches for a single embedding
        assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False), tokens)
