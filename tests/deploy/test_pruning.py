"""prune_trex: what is removed, what it costs, and an adapter that goes on like any other."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import MAKERS, adapted, answered, batches, make_llama, prompts, randomize
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_trex import (
    TRexConfig,
    TRexLayer,
    calibrate_trex_merge,
    initialize_trex_prior,
    prune_trex,
    pruning_curve,
    routing_report,
    save_trex_as_lora,
)

VARIANTS = {
    "learned map": {},
    "identity map": {"num_clusters": 6},
    "paired": {"expert_layout": "paired", "r_a": 3, "num_clusters": 3},
    "paired, learned map": {"expert_layout": "paired", "r_a": 3, "num_clusters": 4},
    "reduced router": {"router_rank": 2},
    "top k": {"router_top_k": 5},
    "no prior": {"use_prior": False},
    "no router": {"use_router": False},
    "no router, identity map": {"use_router": False, "num_clusters": 6},
    "gpt2": {"kind": "gpt2"},
    "t5": {"kind": "t5"},
}
ONE = "model.layers.1.mlp.up_proj"


def _model(kind="llama", **config):
    fit = config.get("use_prior", True)
    model = adapted(kind, fit=fit, base=MAKERS[kind]().double(), **config)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def _data(kind="llama", count=16):
    extra = {"decoder_input_ids": prompts(8, seed=5)} if kind == "t5" else {}
    return [{**batch, **extra} for batch in batches(count, seed=3)]


def _report(model, data=None, **kwargs):
    return routing_report(model, _data() if data is None else data, progress=False, **kwargs)


def _layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}


@torch.no_grad()
def _logits(model, data=None):
    return torch.cat([model(**batch).logits for batch in (_data() if data is None else data)])


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _parameters(model):
    return sum(parameter.numel() for layer in _layers(model).values() for parameter in layer.parameters_of("default"))


@torch.no_grad()
def _silence(layer):
    """Let the last input vector (the last pair of vectors, if paired) and the first output vector carry nothing.

    The router is made uniform, so that those which are left share what went to the others alike for every token.
    """
    layer.trex_A["default"][-1] = 0
    if layer.trex_settings["default"].layout == "grid":
        layer.trex_B["default"][:, 0] = 0
    if "default" in layer.trex_router:
        layer.trex_router["default"].zero_()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_carries_nothing_goes_and_the_output_stays(variant):
    model = _model(**variant)
    for layer in _layers(model).values():
        _silence(layer)
    data = _data(variant.get("kind"))
    before, size = _logits(model, data), _parameters(model)
    pruned = prune_trex(model, _report(model, data))
    # a uniform router alone gives all output vectors the same features, so that one of them takes over for all
    alone = not variant.get("use_prior", True)
    tolerance = 1e-5 if alone else 1e-7
    torch.testing.assert_close(_logits(model, data), before, rtol=tolerance, atol=tolerance)
    left = (2, 2) if variant.get("expert_layout") == "paired" else (1, 1 if alone else 2)
    assert all(size == left for size in pruned.sizes.values()) and len(pruned.sizes) == len(_layers(model))
    assert pruned.parameters_before == size and pruned.parameters == _parameters(model) < size
    assert pruned.error < 1e-6 and not pruned.removed
    assert model.get_nb_trainable_parameters()[0] == pruned.parameters


@pytest.mark.parametrize("settings", [{}, {"num_clusters": 6}, {"expert_layout": "paired", "r_a": 3}])
def test_the_cost_is_what_a_layer_misses(settings):
    # without a router nothing is normalised, and nothing but rounding is left between the forecast and the truth
    model = _model(use_router=False, target_modules=[ONE], **settings)
    layer, found = _layers(model)[ONE], []

    def watch(layer, args, output):
        found.append((output - layer.base_layer(args[0])).flatten(0, -2))

    handle = layer.register_forward_hook(watch)
    _logits(model)
    report = _report(model)
    pruned = prune_trex(model, report, 0.7)
    found = [torch.cat(found[: len(_data())])]
    assert pruned.parameters <= 0.7 * pruned.parameters_before and _layers(model)[ONE] is layer
    handle.remove()
    handle, after = layer.register_forward_hook(watch), found.copy()
    found.clear()
    _logits(model)
    handle.remove()
    missed = (torch.cat(found) - after[0]).square().sum() / after[0].square().sum()
    assert pruned.error == pytest.approx(float(missed), rel=1e-4) and 0 < pruned.error < 1
    assert pruned.layers[ONE] == pytest.approx(pruned.error)


def test_what_is_kept_takes_over_and_the_vector_that_carries_least_goes():
    model = _model(use_router=False, target_modules=[ONE])
    layer = _layers(model)[ONE]
    with torch.no_grad():  # the longest output vector of all, which another one can stand for
        layer.trex_B["default"][:, 2] = 60 * layer.trex_B["default"][:, 0]
        mapping = layer.trex_map["default"].unflatten(0, (2, 3))
        mapping[:, 2] = mapping[:, 0]
    before = _logits(model)
    report = _report(model)
    assert report.layers[ONE].output_contribution[2] > 0.8
    pruned = prune_trex(model, report)
    assert pruned.sizes == {ONE: (2, 2)}
    torch.testing.assert_close(_logits(model), before, rtol=1e-5, atol=1e-5)


def test_small_but_strong_is_kept_where_large_is_idle():
    model = _model(target_modules=[ONE])
    layer = _layers(model)[ONE]
    with torch.no_grad():  # the first input vector is the shorter one by far, and all the layer lives by
        layer.trex_A["default"][0] *= 1e-3
        layer.trex_A["default"][1] *= 1e3
        layer.trex_map["default"].unflatten(0, (2, 3))[1] *= 100
        layer.trex_map["default"].unflatten(0, (2, 3))[0] *= 1e9
        layer.trex_router["default"].zero_()
        layer.trex_omega["default"].fill_(-0.2)
    prune_trex(model, _report(model), 0.6)
    assert model.peft_config["default"].expert_pattern[ONE]["inputs"] == [0]


@pytest.mark.parametrize("num_clusters", [4, 6])
def test_token_scales_hold_the_mean_share_that_is_kept(num_clusters):
    model = _model(num_clusters=num_clusters)
    report = _report(model)
    pruned = prune_trex(model, report, 0.5)
    config, layers = model.peft_config["default"], _layers(model)
    for name, entry in config.expert_pattern.items():
        experts = [3 * i + j for i in entry["inputs"] for j in entry["outputs"]]
        mass = sum(report.layers[name].router_load[expert] for expert in experts)
        assert entry["token_scale"] == pytest.approx(6 * mass)
        assert layers[name].trex_settings["default"].token_scale == entry["token_scale"]
        assert (len(entry["inputs"]), len(entry["outputs"])) == pruned.sizes[name]
    assert config.expert_pattern and json.loads(json.dumps(config.expert_pattern)) == config.expert_pattern
    again = pruned.parameters
    second = prune_trex(model, _report(model), 0.5)  # entries count vectors as a layer of full size does
    assert second.parameters_before == again and second.parameters <= 0.5 * again
    for name, entry in model.peft_config["default"].expert_pattern.items():
        former = config.expert_pattern.get(name, {"inputs": [0, 1], "outputs": [0, 1, 2]})
        assert set(entry["inputs"]) <= set(former["inputs"]) and set(entry["outputs"]) <= set(former["outputs"])


@torch.no_grad()
def test_entries_count_vectors_as_a_layer_of_full_size_does():
    model = _model(num_clusters=6, target_modules=[ONE])  # the identity map: each expert has its own cluster
    layer = _layers(model)[ONE]
    layer.trex_router["default"].zero_()
    layer.trex_A["default"][0] = 0
    before = _logits(model)
    prune_trex(model, _report(model))
    assert layer.trex_chosen["default"].tolist() == [3, 4, 5]
    torch.testing.assert_close(_logits(model), before)
    layer.trex_B["default"][:, 1] = 0
    before = _logits(model)
    prune_trex(model, _report(model))
    entry = model.peft_config["default"].expert_pattern[ONE]
    assert (entry["inputs"], entry["outputs"]) == ([1], [0, 2])
    assert layer.trex_chosen["default"].tolist() == [3, 5]
    torch.testing.assert_close(_logits(model), before)


RELOAD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import batches, make_llama
import peft_trex
from peft import PeftModel
from safetensors.torch import save_file
logits = {}
for folder in Path(sys.argv[2]).iterdir():
    for low in (False, True):
        model = PeftModel.from_pretrained(make_llama(), folder, low_cpu_mem_usage=low).eval()
        with torch.no_grad():
            found = [model(**batch).logits for batch in batches(16, seed=3)]
        logits[f"{folder.name} {low}"] = torch.cat(found)
save_file(logits, sys.argv[3])
"""


@pytest.mark.slow
def test_a_fresh_process_loads_it(tmp_path, request):
    expected = {}
    for clusters in (4, 6):  # with a learned map, and with the identity
        model = adapted(num_clusters=clusters)
        _layers(model)["model.layers.0.mlp.gate_proj"].trex_gate["default"].data.fill_(-0.2)
        pruned = prune_trex(model, _report(model), 0.5)
        assert "model.layers.0.mlp.gate_proj" in pruned.removed
        folder = tmp_path / "adapters" / str(clusters)
        model.save_pretrained(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        prior = sum(value.numel() for name, value in saved.items() if "trex_prior" in name)
        assert sum(value.numel() for value in saved.values()) - prior == pruned.parameters
        expected |= {f"{clusters} {low}": _logits(model) for low in (False, True)}
    command = [sys.executable, "-c", RELOAD, request.path.parents[1], tmp_path / "adapters", tmp_path / "logits"]
    subprocess.run(list(map(str, command)), check=True)
    assert _same(load_file(tmp_path / "logits"), expected)


def test_layers_that_are_shut_are_the_base_models_again(tmp_path):
    model = adapted()
    shut = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    for name in shut:
        _layers(model)[name].trex_gate["default"].data.fill_(-0.2)
    names = set(_layers(model))
    before = _logits(model)
    pruned = prune_trex(model, _report(model))
    assert sorted(pruned.removed) == shut and set(_layers(model)) == names - set(shut) == set(pruned.sizes)
    assert all(type(model.base_model.model.get_submodule(name)) is torch.nn.Linear for name in shut)
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert set(_layers(again)) == names - set(shut) and torch.equal(_logits(again), _logits(model))
    assert "2 of 14 layers are gone" in str(pruned)


def test_settings_that_chose_layers_make_way_for_names():
    base = make_llama(num_hidden_layers=4)
    settings = {"layers_to_transform": [1, 3], "target_modules": ["q_proj", "up_proj", "v_proj"]}
    model = adapted(base=base, exclude_modules=["model.layers.3.self_attn.v_proj"], **settings)
    _layers(model)["model.layers.1.mlp.up_proj"].trex_gate["default"].data.fill_(-0.2)
    left = set(_layers(model)) - {"model.layers.1.mlp.up_proj"}
    prune_trex(model, _report(model))
    config = copy.deepcopy(model.peft_config["default"])
    assert config.layers_to_transform is None and config.exclude_modules is None
    assert set(_layers(get_peft_model(make_llama(num_hidden_layers=4), config))) == left and len(left) == 4


def test_it_trains_merges_and_leaves_as_lora(tmp_path):
    model = adapted()
    prune_trex(model, _report(model), 0.4)
    model.train()
    before = _state(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(**answered(16)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    after = _state(model)
    assert all(not torch.equal(before[name], after[name]) for name in before if "trex_A" in name or "trex_B" in name)
    model.eval()
    error = calibrate_trex_merge(model, _data(), per_cluster=True, progress=False).error
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
    assert torch.equal(_logits(again), _logits(model))
    save_trex_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make_llama(), tmp_path / "lora").eval()
    merged = model.merge_and_unload()
    torch.testing.assert_close(_logits(lora), _logits(merged), rtol=1e-3, atol=1e-3)
    assert 0 < error < 1


def test_other_adapters_and_flags_stay_as_they_are():
    model = adapted()
    model.add_adapter("other", TRexConfig(r_a=2, r_b=3, num_clusters=4, target_modules=["q_proj", "up_proj"]))
    randomize(model, "other", seed=1)
    initialize_trex_prior(model, batches(), adapter_name="other", progress=False)
    layers = _layers(model)
    layers["model.layers.0.mlp.up_proj"].trex_gate["default"].data.fill_(-0.2)
    layers["model.layers.0.mlp.up_proj"].trex_A["default"].requires_grad_(False)
    layers["model.layers.1.mlp.up_proj"].trex_A["default"].requires_grad_(False)
    layers["model.layers.1.mlp.up_proj"].trex_A["other"].requires_grad_(True)
    others = {name: value for name, value in _state(model).items() if name.endswith(".other")}
    flags = {name: one.requires_grad for name, one in model.named_parameters()}
    model.set_adapter("other")
    expected = _logits(model)
    model.set_adapter("default")
    for name, one in model.named_parameters():
        one.requires_grad_(flags[name])
    prune_trex(model, _report(model), 0.5)
    assert _same(others, {name: value for name, value in _state(model).items() if name.endswith(".other")})
    assert all(flags[name] == one.requires_grad for name, one in model.named_parameters() if name in flags)
    assert "default" not in layers["model.layers.0.mlp.up_proj"].trex_A
    model.set_adapter("other")
    assert torch.equal(_logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(_logits(model), expected)


def _trained():
    """A small model that has learned to say prompts backwards, as far as it goes, and batches that it has not seen."""
    torch.manual_seed(0)
    model = get_peft_model(make_llama(), TRexConfig(r_a=4, r_b=8, num_clusters=32, task_type="CAUSAL_LM"))
    initialize_trex_prior(model, batches(128), progress=False)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 3e-3)

    def batch(seed):
        ids = prompts(16, seed=seed)
        ids[:, 5:] = ids[:, :4].flip(1)
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 5, -100)}

    model.train()
    for seed in range(150):
        model(**batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [batch(1000 + index) for index in range(4)], [batch(2000 + index) for index in range(4)]


@pytest.mark.slow
def test_the_curve_of_size_against_kl():
    model, calibration, test = _trained()
    report, before = _report(model, calibration), _state(model)
    shares = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)
    curve = pruning_curve(model, report, test, shares, progress=False)
    assert _same(before, _state(model)) and model.peft_config["default"].expert_pattern == {}
    assert all(point.share <= share == point.keep for point, share in zip(curve, shares, strict=True))
    kls, errors = [point.kl for point in curve], [point.error for point in curve]
    assert kls == sorted(kls) and errors == sorted(errors)
    answers = [batch["labels"][:, 1:] != -100 for batch in test]
    with torch.no_grad():
        whole = [model(**batch).logits[:, :-1].log_softmax(-1) for batch in test]
        with model.disable_adapter():
            bare = [model(**batch).logits[:, :-1].log_softmax(-1) for batch in test]

        def kl(others):
            parts = zip(whole, others, answers, strict=True)
            return float(torch.cat([(p.exp() * (p - q)).sum(-1)[kept] for p, q, kept in parts]).mean())

        nothing = kl(bare)
        # At most what carries nothing goes at first; nine tenths cost next to nothing, half of them little.
        assert errors[0] < 1e-6 and kls[0] < 1e-4 * nothing
        assert kls[1] < 1e-3 * nothing and kls[3] < 0.05 * nothing
        pruned = prune_trex(model, report, 0.5)
        assert kl([model(**batch).logits[:, :-1].log_softmax(-1) for batch in test]) == pytest.approx(kls[3], rel=1e-4)
    assert (pruned.parameters, pruned.error) == (curve[3].parameters, curve[3].error)


@pytest.mark.parametrize("forwards", [2, 8])
def test_a_curve_that_breaks_off_leaves_the_model_as_it_was(forwards):
    model = adapted().train()
    report, before = _report(model), _state(model)
    flags = [one.requires_grad for one in model.parameters()]

    def tire(*_):  # of two forwards for each batch the second is the pruned adapter's
        left.pop()

    left = list(range(forwards - 1))
    handle = model.base_model.model.register_forward_pre_hook(tire)
    with pytest.raises(IndexError):
        pruning_curve(model, report, _data(count=64), (0.5,), progress=False)
    handle.remove()
    assert _same(before, _state(model)) and flags == [one.requires_grad for one in model.parameters()]
    assert all(module.training for module in model.modules())


def test_a_curve_counts_tokens_that_are_attended_to():
    model = adapted()
    report = _report(model)
    rows = _data()[0]
    padded = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in rows.items()}
    plain, filled = (pruning_curve(model, report, [batch], (0.3,), progress=False)[0] for batch in (rows, padded))
    assert filled.kl == pytest.approx(plain.kl, rel=1e-4) and plain.kl > 0


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, True, "0.5", float("nan")])
def test_a_share_is_a_share(keep):
    model = adapted()
    with pytest.raises(ValueError, match=r"keep=.* must be a share of the parameters, above 0 and at most 1"):
        prune_trex(model, _report(model), keep)


def test_errors_say_what_to_do_and_change_nothing():
    model = adapted()
    report = _report(model)
    before = _state(model)
    with pytest.raises(ValueError, match=r"keep=1e-06 leaves less than a layer of one expert, which has \d+ of"):
        prune_trex(model, report, 1e-6)
    with pytest.raises(TypeError, match="report is a dict; expected what routing_report returned"):
        prune_trex(model, report.to_dict(), 0.5)
    with pytest.raises(ValueError, match="no batch with a token to predict from"):
        pruning_curve(model, report, [], progress=False)
    assert _same(before, _state(model))
    _layers(model)[ONE].trex_gate["default"].data += 1e-4
    with pytest.raises(ValueError, match=rf"does not fit the adapter 'default' in the layer {ONE}: .* anew"):
        prune_trex(model, report, 0.5)
    with pytest.warns(UserWarning):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) before pruning"):
        prune_trex(model, report, 0.5)


def test_an_adapter_that_adds_nothing_is_not_pruned_to_nothing():
    model = get_peft_model(make_llama(), TRexConfig(r_a=2, r_b=3, use_prior=False, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="Nothing would be left of the adapter 'default'"):
        prune_trex(model, _report(model))


def test_layers_that_the_report_has_not_seen_stay_and_count():
    model = adapted("t5")
    encoder = model.base_model.model.encoder
    model.base_model.model.forward = lambda input_ids, **_: encoder(input_ids=input_ids)
    with pytest.warns(UserWarning, match=r"20 adapted layers were never called"):
        report = _report(model)
    size = _parameters(model)
    unseen = {name: layer for name, layer in _layers(model).items() if name not in report.layers}
    pruned = prune_trex(model, report, 0.8)
    assert pruned.parameters_before == size and pruned.parameters == _parameters(model) <= 0.8 * size
    assert set(pruned.layers) == set(report.layers) and not set(pruned.sizes) & set(unseen)
    assert all(_layers(model)[name] is layer for name, layer in unseen.items())
    assert all(layer.trex_A["default"].shape[0] == 2 for layer in unseen.values())


def test_a_single_expert_may_be_all_that_is_left():
    model = adapted()
    report = _report(model)
    least = min(
        sum(
            parameter[:1].numel()
            for parameter in (layer.trex_A["default"], layer.trex_router["default"], layer.trex_map["default"])
        )
        + layer.out_features
        + 2
        for layer in _layers(model).values()
    )
    pruned = prune_trex(model, report, 2.1 * least / _parameters(model))
    assert list(pruned.sizes.values()) == [(1, 1)] or len(pruned.sizes) <= 2
    assert torch.isfinite(_logits(model)).all() and _parameters(model) <= 2.1 * least


ENTRY = {"inputs": [0, 1], "outputs": [0, 2]}


@pytest.mark.parametrize(
    ("entry", "settings", "error", "message"),
    [
        ([0], {}, ValueError, r"expert_pattern\['x'\]=\[0\] must be a dict of 'inputs' and 'outputs'"),
        ({"inputs": [0]}, {}, ValueError, "must be a dict of 'inputs' and 'outputs'"),
        ({**ENTRY, "rank": 3}, {}, ValueError, "must be a dict of 'inputs' and 'outputs'"),
        (
            {**ENTRY, "inputs": []},
            {},
            ValueError,
            r"inputs \[\]; expected a list of at least one of the numbers 0",
        ),
        ({**ENTRY, "inputs": [1, 0]}, {}, ValueError, "0 to 3, ascending"),
        ({**ENTRY, "outputs": [0, 8]}, {}, ValueError, "0 to 7, ascending"),
        ({**ENTRY, "outputs": [0.5]}, {}, ValueError, "0 to 7, ascending"),
        ({**ENTRY, "token_scale": 0.0}, {}, ValueError, "=0.0 must be a positive, finite number"),
        ({**ENTRY, "token_scale": "much"}, {}, TypeError, "='much' must be a positive, finite number"),
        ({**ENTRY, "token_scale": 2.0}, {"use_router": False}, ValueError, "scales the token router, which"),
        (
            ENTRY,
            {"expert_layout": "paired", "r_a": 8},
            ValueError,
            "with expert_layout='paired' they must be the same",
        ),
    ],
)
def test_a_wrong_entry_is_refused_by_name(entry, settings, error, message):
    with pytest.raises(error, match=message):
        TRexConfig(expert_pattern={"x": entry}, **settings)


def test_a_pattern_that_is_no_dict_or_names_other_modules():
    with pytest.raises(TypeError, match="expert_pattern is a list; expected a dict of entries"):
        TRexConfig(expert_pattern=[ENTRY])
    base = make_llama()
    with pytest.raises(ValueError, match=r"names 1 modules that the adapter is not in, such as 'up_proj'; it takes"):
        get_peft_model(base, TRexConfig(expert_pattern={"up_proj": ENTRY}))
    assert not any(isinstance(module, TRexLayer) for module in base.modules())
    model = get_peft_model(base, TRexConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="names 1 modules that the adapter is not in"):
        model.add_adapter("other", TRexConfig(target_modules=["q_proj"], expert_pattern={ONE: ENTRY}))
    assert list(model.peft_config) == ["default"]


def test_sizes_of_layers_may_be_configured_from_the_start(tmp_path):
    config = TRexConfig(expert_pattern={ONE: ENTRY}, token_scale=None)
    assert config.experts_of(ONE) == [0, 2, 8, 10] and config.token_scale_of(ONE) == 4.0
    assert config.experts_of("another") == list(range(32)) and config.token_scale_of("another") == 32.0
    layer = _layers(get_peft_model(make_llama(), config))[ONE]
    assert layer.trex_A["default"].shape == (2, 32) and layer.trex_B["default"].shape == (48, 2)
    assert layer.trex_router["default"].shape == (4, 32) and layer.trex_chosen["default"].tolist() == [0, 2, 8, 10]
    with torch.device("meta"):
        empty = get_peft_model(make_llama(), copy.deepcopy(config))
    assert _layers(empty)[ONE].trex_A["default"].is_meta
    assert _layers(empty)[ONE].trex_chosen["default"].tolist() == [0, 2, 8, 10]
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).expert_pattern == {ONE: ENTRY}
