"""The shared core: its start, and that every path of an adapter takes it as part of the prior."""

import copy

import pytest
import torch
from conftest import adapted, answered, batches, exact_model, make_llama, padded, prompts, randomize
from peft import PeftModel, get_peft_model

from peft_trex import (
    TRexConfig,
    TRexLayer,
    calibrate_trex_merge,
    initialize_trex_prior,
    prune_trex,
    rank_one_mixture,
    routing_report,
    save_trex_as_lora,
)
from peft_trex.analysis.routing import routing_parts


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, TRexLayer)}


@pytest.mark.parametrize(
    ("r_a", "r_b", "layout", "expected"),
    [
        (3, 3, "grid", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (2, 5, "grid", [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]),
        (5, 2, "grid", [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]),
        (3, 3, "paired", [[1, 1, 1]]),
    ],
)
def test_a_core_starts_as_half_the_identity(r_a, r_b, layout, expected):
    model = get_peft_model(make_llama(), TRexConfig(r_a=r_a, r_b=r_b, expert_layout=layout, shared_core=True))
    for layer in layers_of(model).values():
        assert layer.trex_core["default"].equal(torch.tensor(expected).flatten() / 2)


def test_the_map_beside_a_core_starts_small_and_the_adapter_at_zero():
    base, ids = make_llama(), prompts(4)
    expected = base(ids).logits
    model = get_peft_model(base, TRexConfig(num_clusters=4, shared_core=True, use_router=False))
    initialize_trex_prior(model, batches(), progress=False)
    for layer in layers_of(model).values():
        # A map of K columns is drawn from [-1 / sqrt(K), 1 / sqrt(K)] as a rule.
        assert 0.14 < layer.trex_map["default"].abs().max() <= 0.15
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


FORMS = {
    "no router": {"use_router": False},
    "router": {},
    "identity map": {"num_clusters": 6},
    "identity map, no router": {"num_clusters": 6, "use_router": False},
    "paired": {"r_a": 3, "r_b": 3, "expert_layout": "paired", "use_router": False},
    "answer": {"use_router": False, "prior_scope": "answer"},
    "answer, identity map": {"num_clusters": 6, "prior_scope": "answer"},
    "reference": {"use_router": False, "mixture_implementation": "reference"},
}


def formula(layer, x, scores):
    """The adapter's output from the layer's tensors, with the prior written out."""
    tensors = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names}
    tensors = {kind: values["default"] for kind, values in tensors.items() if "default" in values}
    prior = scores if "trex_map" not in tensors else scores @ tensors["trex_map"].T
    settings = layer.trex_settings["default"]._asdict()
    return rank_one_mixture(
        x,
        tensors["trex_A"],
        tensors["trex_B"],
        tensors.get("trex_router"),
        prior + tensors["trex_core"],
        tensors["trex_omega"],
        tensors["trex_gate"],
        **settings,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter:UserWarning")
def test_every_token_gets_the_core(form, fit):
    """In outputs and all gradients, with padding, and before and in the answer."""
    settings = {"shared_core": True, **FORMS[form]}
    model = exact_model(fit=fit, **settings).train()
    batch = {**padded(prompts(4), "right"), "labels": answered(4)["labels"]}
    channel = model.base_model.prompts.channel
    seen = {}

    def watch(name, layer, args, output):
        seen[name] = (args[0].detach(), output.detach(), channel.scores("default", args[0]))

    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda layer, args, output, name=name: watch(name, layer, args, output))
    model(**batch).loss.backward()
    for name, (x, output, scores) in seen.items():
        layer = layers_of(model)[name]
        clusters = model.peft_config["default"].num_clusters
        scores = torch.zeros(1, clusters) if scores is None else scores
        expected = layer.base_layer(x) + formula(layer, x, scores.double())
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    if fit and "answer" in form:
        assert scores.dim() == 3 and scores.any(-1).any() and not scores.any(-1).all()
    assert (scores.any().item()) is fit
    # The gradients are those of the readable formula, layer by layer.
    twin = copy.deepcopy(model)
    for layer in layers_of(twin).values():
        layer.trex_fused["default"] = False
        layer._forward_hooks.clear()
    twin.zero_grad()
    twin(**batch).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-10, msg=name)
            if fit or "trex_map" not in name:
                assert parameter.grad.any(), name


@pytest.mark.parametrize("form", ["no router", "identity map", "answer", "paired"])
def test_it_is_saved_loaded_and_merged(form, tmp_path):
    model = adapted(shared_core=True, **FORMS[form])
    ids = prompts(4, seed=3)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
    for layer in layers_of(loaded).values():
        assert layer.trex_core["default"].requires_grad is False
        layer.trex_core["default"].data += 1
    assert not torch.allclose(loaded(ids).logits, expected)


def test_without_a_router_and_a_prompt_a_merge_is_exact():
    """The core alone is static; an unfitted prior and a merge are then the same."""
    model = exact_model(fit=False, use_router=False, shared_core=True)
    ids = prompts(4)
    with pytest.warns(UserWarning, match="not fitted"):
        expected = model(ids).logits
    with pytest.warns(UserWarning, match="merged approximately"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["no router", "router", "identity map"])
def test_reports_calibration_export_and_pruning_know_it(form, tmp_path):
    model = exact_model(shared_core=True, **FORMS[form])
    data = [answered(16, seed=5), answered(16, seed=6)]
    layer = layers_of(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    weights = []

    def watch(layer, args):
        kept = torch.ones(args[0].shape[:-1], dtype=torch.bool)
        _, by_token, by_prior = routing_parts(layer, "default", args[0], kept)
        weights.append((by_token + by_prior, layer.expert_weights(args[0])[kept]))

    handle = layer.register_forward_pre_hook(watch)
    model(**data[0])
    handle.remove()
    torch.testing.assert_close(*weights[0], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.trex_core["default"].sub_(100)
        changed = routing_report(model, data, progress=False)
        assert changed.layers["model.layers.0.self_attn.q_proj"].token_share < 0.1
        layer.trex_core["default"].add_(100)
    report = routing_report(model, data, progress=False)
    merge = calibrate_trex_merge(model, data, per_cluster=True, progress=False)
    assert merge.cluster_error <= merge.error <= merge.mean_routing_error + 1e-9
    save_trex_as_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(make_llama().double(), tmp_path / "lora")
    down, up = layer.static_factors("default")
    lora = exported.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    torch.testing.assert_close(lora, (up @ down).double(), rtol=1e-4, atol=1e-5)
    expected = copy.deepcopy(model)(**data[0]).logits
    before = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    pruned = prune_trex(model, report, keep=0.6)
    after = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (pruned.parameters_before, pruned.parameters) == (before, after)
    for name, (r_a, r_b) in pruned.sizes.items():
        assert len(layers_of(model)[f"base_model.model.{name}"].trex_core["default"]) == r_a * r_b
    found = model(**data[0]).logits
    assert (found - expected).norm() < 0.9 * expected.norm()
    model.save_pretrained(tmp_path / "pruned")
    loaded = PeftModel.from_pretrained(make_llama().double(), tmp_path / "pruned")
    for parameter in loaded.parameters():
        parameter.data = parameter.data.double()
    torch.testing.assert_close(loaded(**data[0]).logits, found, rtol=1e-5, atol=1e-5)


def test_pruning_keeps_the_numbers_of_the_experts_that_stay():
    """Vectors that carry nothing go without a loss, and the core of those that stay is what it was."""
    model = exact_model(shared_core=True, use_router=False)
    for layer in layers_of(model).values():
        layer.trex_A["default"].data[0] = 0
        layer.trex_B["default"].data[:, 1] = 0
    batch = answered(16)
    expected = model(**batch).logits
    cores = {name: layer.trex_core["default"].clone() for name, layer in layers_of(model).items()}
    prune_trex(model, routing_report(model, [batch], progress=False))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)
    for name, layer in layers_of(model).items():
        assert layer.trex_core["default"].equal(cores[name][[3, 5]])


def test_training_the_router_trains_the_core():
    config = {"shared_core": True, "use_router": False, "num_clusters": 6, "trainable": "router"}
    model = adapted(**config)
    names = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"trex_core", "trex_omega", "trex_gate"}


def test_a_second_adapter_without_a_core_is_not_touched_by_it():
    model = adapted(shared_core=True)
    ids = prompts(4)
    model.add_adapter("other", TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    randomize(model, "other", seed=2)
    initialize_trex_prior(model, batches(), adapter_name="other", progress=False)
    model.set_adapter("other")
    expected = model(ids).logits
    for layer in layers_of(model).values():
        assert "other" not in layer.trex_core
        layer.trex_core["default"].data += 1
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
