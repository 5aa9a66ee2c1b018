"""Layers of sizes of their own, by the patterns that LoRA's `rank_pattern` has."""

import json

import pytest
import torch
from conftest import batches, exact_model, make_llama, prompts
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_trex import TRexConfig, prune_trex, routing_report, save_trex_as_lora, targets, trex_from_lora
from peft_trex.mixture import rank_one_mixture

SIZES = {
    "r_a_pattern": {"q_proj": 3, r"layers\.1\..*": 1},
    "r_b_pattern": {"layers.0.mlp.down_proj": 2, "self_attn.o_proj": 7, ".*_proj": 4},
}


def sizes_in(model):
    return {
        name: (len(layer.trex_A["default"]), layer.trex_B["default"].shape[1])
        for name, layer in model.base_model.trex_layers()
    }


def test_keys_fit_the_layers_that_they_fit_in_lora():
    model = get_peft_model(make_llama(), TRexConfig(r_a=2, r_b=3, num_clusters=4, **SIZES))
    ranks = []
    for pattern in SIZES.values():
        lora = get_peft_model(make_llama(), LoraConfig(r=9, rank_pattern=pattern, target_modules="all-linear"))
        named = lora.base_model.model.named_modules()
        ranks.append({name: module.r["default"] for name, module in named if hasattr(module, "lora_A")})
    found = sizes_in(model)
    assert set(found) == set(ranks[0])
    assert found == {name: tuple(r if r != 9 else 2 for r in (ranks[0][name], ranks[1][name])) for name in found}
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.1.self_attn.q_proj"] == (3, 4)
    assert found["model.layers.1.mlp.up_proj"] == (1, 4) and found["model.layers.0.mlp.down_proj"] == (2, 2)


@pytest.mark.parametrize("form", [{}, {"mixture_implementation": "reference"}, {"router_top_k": 3}])
def test_each_layer_is_the_mixture_of_its_size(form):
    model = exact_model(r_a=2, r_b=3, num_clusters=6, **SIZES, **form)
    assert model.peft_config["default"].learned_map
    ids, seen = prompts(3), {}
    layers = dict(model.base_model.trex_layers())
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
    tuner = model.base_model
    with torch.no_grad():
        model(input_ids=ids)
        scores = tuner.trex_prior["default"].score(tuner.input_embedding()(ids).mean(1))
    for name, (x, output) in seen.items():
        layer = layers[name]
        get = {kind: getattr(layer, f"trex_{kind}")["default"].detach() for kind in ("A", "B", "router", "map")}
        added = rank_one_mixture(
            x,
            get["A"],
            get["B"],
            get["router"],
            scores.double() @ get["map"].T,
            layer.trex_omega["default"],
            layer.trex_gate["default"],
            token_scale=get["A"].shape[0] * get["B"].shape[1],
            top_k=min(3, len(get["router"])) if form.get("router_top_k") else None,
        )
        # The prior is scored in float32.
        torch.testing.assert_close(output, layer.base_layer(x) + added, atol=1e-5, rtol=1e-4)
    assert len(seen) == 14


def test_saved_pruned_merged_and_exported(tmp_path):
    settings = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", **SIZES}
    model = exact_model(**settings)
    ids = prompts(2)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_llama().double(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.eval()(ids).logits, expected)
    assert sizes_in(loaded) == sizes_in(model)
    with pytest.warns(UserWarning, match="approximately"):
        save_trex_as_lora(model, tmp_path / "lora", per_cluster=False)
        merged = loaded.merge_and_unload()
    lora = PeftModel.from_pretrained(make_llama().double(), tmp_path / "lora", autocast_adapter_dtype=False)
    torch.testing.assert_close(lora.eval()(ids).logits, merged(ids).logits)
    report = prune_trex(model, routing_report(model, batches(16), progress=False), keep=0.5)
    pruned = model.peft_config["default"]
    assert report.sizes and all(sizes_in(model)[name] == size for name, size in report.sizes.items())
    for name, entry in pruned.expert_pattern.items():
        sizes = TRexConfig(**settings).sizes_of(name)
        assert all(max(entry[side]) < size for side, size in zip(("inputs", "outputs"), sizes, strict=True))
    assert any(max(entry["inputs"]) > 1 for entry in pruned.expert_pattern.values())
    TRexConfig(**{**settings, "expert_pattern": pruned.expert_pattern})


def test_the_file_must_have_the_sizes_of_the_patterns(tmp_path):
    get_peft_model(make_llama(), TRexConfig(r_a=2, r_b=3, **SIZES)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.trex_A"
    save_file({**tensors, key: tensors[key][:2].clone()}, file)
    with pytest.raises(ValueError, match=r"q_proj.trex_A has shape \(2, 32\) .* asks for \(3, any\)"):
        TRexConfig.from_pretrained(str(tmp_path))


def test_a_hostile_key_is_refused_before_it_is_matched(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1)
    get_peft_model(make_llama(), TRexConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    entry = {"model.layers.0.self_attn.q_proj": {"inputs": [0], "outputs": [0]}}
    for pattern in ({}, entry):
        hostile = [[r"([a-z_.0-9]+)*$!", 3]]
        file.write_text(json.dumps({**content, "r_b_pattern": hostile, "expert_pattern": pattern}))
        with pytest.raises(ValueError, match=r"regular expressions .* cannot be matched.*more than 1 s"):
            PeftModel.from_pretrained(make_llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r_a_pattern": ["q_proj"]}, ["r_a_pattern", "dict of numbers"]),
        ({"r_b_pattern": {3: 4}}, ["r_b_pattern", "by layers' names"]),
        ({"r_a_pattern": {"q_proj": 0}}, ["r_a_pattern['q_proj']=0", "at least 1"]),
        ({"r_b_pattern": {"q_proj": 2.0}}, ["r_b_pattern['q_proj']=2.0", "whole number"]),
        ({"r_b_pattern": {"((q": 2}}, ["'((q'", "no regular expression"]),
        ({"r_a_pattern": {"q_proj": 2}, "prior_map": "identity"}, ["prior_map='learned'"]),
        ({"r_a": 8, "expert_layout": "paired", "r_a_pattern": {"q": 2}}, ["r_a_pattern={'q': 2}", "must be the same"]),
        ({"r_a_pattern": {"q": 6}, "expert_pattern": {"q": {"inputs": [6], "outputs": [0]}}}, ["0 to 5"]),
    ],
)
def test_refused_by_name(settings, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        TRexConfig(**settings)
    assert all(word in str(caught.value) for word in words)


def test_a_file_keeps_the_order_of_the_keys(tmp_path):
    for keys in (("b", "a.*"), ("a.*", "b")):
        config = TRexConfig(r_a_pattern={key: 1 + size for size, key in enumerate(keys)})
        config.save_pretrained(tmp_path)
        loaded = TRexConfig.from_pretrained(str(tmp_path))
        assert list(loaded.r_a_pattern.items()) == list(config.r_a_pattern.items())
        assert loaded.to_dict() == config.to_dict()


def test_keys_that_fit_nothing_warn():
    config = TRexConfig(target_modules=["q_proj"], r_a_pattern={"q_proj": 2, "k_proj": 2})
    with pytest.warns(UserWarning, match="the key 'k_proj' of a size pattern"):
        get_peft_model(make_llama(), config)


def test_the_paired_layout_has_the_same_sizes_on_both_sides():
    sizes = {"q_proj": 2}
    config = TRexConfig(r_a=4, r_b=4, expert_layout="paired", num_clusters=4, r_a_pattern=sizes, r_b_pattern=sizes)
    assert set(sizes_in(get_peft_model(make_llama(), config)).values()) == {(4, 4), (2, 2)}


@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_a_lora_is_reproduced_at_the_layers_own_sizes(layout):
    """A LoRA of rank one is what equal weights make, in a layer of any size."""
    config = LoraConfig(r=1, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lora = get_peft_model(make_llama(), config)
    sizes = {"r_a_pattern": {"q_proj": 3}, "r_b_pattern": {"q_proj": 3}}
    model, report = trex_from_lora(make_llama(), [lora], expert_layout=layout, r_a=2, r_b=2, **sizes)
    assert set(sizes_in(model).values()) == {(2, 2), (3, 3)}
    assert max(report.errors + report.start_errors) < 1e-10
    ids = prompts(2)
    with torch.no_grad():
        found, expected = (one.double().eval()(ids).logits for one in (model, lora))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
