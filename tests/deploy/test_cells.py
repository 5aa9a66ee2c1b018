"""calibrate_trex_merge(per_cluster=n): static weights for groups of prompts, finer than the prior's clusters."""

import warnings

import pytest
import torch
from conftest import adapted, batches, exact_model, prompts
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_trex import SemanticRouter, TRexLayer, calibrate_trex_merge, initialize_trex_prior, save_trex_as_lora

STATIC = {"use_router": False, "shared_core": True}


def calibrated(model, per_cluster, data=None, **settings):
    data = batches(64) if data is None else data
    return calibrate_trex_merge(model, data, per_cluster=per_cluster, fit="core", progress=False, **settings)


def prior_of(model):
    return model.base_model.prior_of("default")


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, TRexLayer)]


@pytest.mark.parametrize("settings", [STATIC, {**STATIC, "prior_whitening": 3}, {}])
def test_more_groups_miss_less_and_the_router_sends_prompts_to_theirs(tmp_path, settings):
    model = exact_model(**settings)
    by_cluster = calibrated(model, True)
    assert prior_of(model).cells is None
    report = calibrated(model, 16)
    assert len(report.cluster_tokens) == 16 and all(report.cluster_tokens)
    # What a token router chooses is lost however many groups there are.
    assert report.cluster_error < (0.7 if settings else 0.95) * by_cluster.cluster_error
    assert all(len(layer.trex_static["default"]) == 17 for layer in layers_of(model))
    exported = save_trex_as_lora(model, tmp_path / "lora")
    assert len(exported.adapters) == 17
    router, table, prior = (
        SemanticRouter.from_pretrained(tmp_path / "lora"),
        model.get_input_embeddings(),
        prior_of(model),
    )
    new = prompts(200, length=7, seed=9)
    groups = prior.group_of(prior.score(table(new).mean(1)))
    assert len(groups.unique()) > 10
    assert [router.route(ids.tolist()).cluster for ids in new] == groups.tolist()
    # A group's LoRA holds the weights that were fitted to its tokens.
    layer, name = (
        layers_of(model)[0],
        next(n for n, m in model.base_model.model.named_modules() if m is layers_of(model)[0]),
    )
    lora = load_file(tmp_path / "lora" / "cluster_05" / "adapter_model.safetensors")
    down, up = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = layer.static_factors("default", {5: 1.0})
    torch.testing.assert_close(up @ down, (expected[1] @ expected[0]).to(up.dtype), rtol=1e-5, atol=1e-7)


def test_as_many_groups_as_prompts_leave_nothing_without_a_router():
    model, data = exact_model(**STATIC), batches(12, size=4) * 40
    report = calibrated(model, 12, data)
    # What is left is the pull to the weights of all tokens, which counts as r_a tokens.
    assert report.cluster_error < 1e-3 < calibrated(model, True, data).cluster_error


def test_they_are_saved_and_loaded(tmp_path):
    model = adapted(**STATIC)
    calibrated(model, 10)
    model.save_pretrained(tmp_path / "adapter")
    base = adapted(**STATIC).unload()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(prior_of(again).cells, prior_of(model).cells)
    for one, other in zip(layers_of(model), layers_of(again), strict=True):
        assert torch.equal(one.trex_static["default"], other.trex_static["default"])
    for each, folder in ((model, "one"), (again, "other")):
        save_trex_as_lora(each, tmp_path / folder)
    one, other = ((tmp_path / folder / "router.safetensors").read_bytes() for folder in ("one", "other"))
    assert one == other
    # A file without cells takes them away.
    plain = adapted(**STATIC)
    calibrated(plain, True)
    plain.save_pretrained(tmp_path / "plain")
    again.load_adapter(tmp_path / "plain", adapter_name="default")
    assert prior_of(again).cells is None and len(layers_of(again)[0].trex_static["default"]) == 5


@pytest.mark.parametrize(
    "wrong", [torch.ones(10), torch.ones(10, 3), torch.ones(7, 4), torch.full((10, 4), torch.nan)]
)
def test_a_damaged_file_is_refused(tmp_path, wrong):
    model = adapted(**STATIC)
    calibrated(model, 10)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (key,) = (key for key in tensors if key.endswith(".cells"))
    save_file({**tensors, key: wrong}, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"cells has shape|trex_static has shape|cells .*NaN"):
        PeftModel.from_pretrained(adapted(**STATIC).unload(), tmp_path)


def test_what_changes_the_adapter_drops_them():
    model = adapted(**STATIC)
    calibrated(model, 10)
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**batches(8)[0])
    assert any("static weights were dropped" in str(each.message) for each in caught)
    assert prior_of(model).cells is None and not layers_of(model)[0].trex_static
    model.eval()
    calibrated(model, 10)
    initialize_trex_prior(model, batches(seed=3), progress=False)
    assert prior_of(model).cells is None


@pytest.mark.parametrize("number", [0, -1, 2.5, "many", 65])
def test_what_cannot_be_leaves_what_was_there(number):
    model = adapted(**STATIC)
    calibrated(model, 6)
    cells, static = prior_of(model).cells, layers_of(model)[0].trex_static["default"]
    with pytest.raises(ValueError, match="per_cluster="):
        calibrated(model, number)
    assert prior_of(model).cells is cells and layers_of(model)[0].trex_static["default"] is static


def test_a_failure_on_the_way_leaves_what_was_there(monkeypatch):
    model = adapted(**STATIC)
    calibrated(model, 6)
    cells = prior_of(model).cells

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_trex.deploy.calibration._solve_all", fail)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, 10)
    assert prior_of(model).cells is cells


def test_an_iterator_and_polishing(tmp_path):
    model = adapted(**STATIC)
    report = calibrated(model, 10, iter(batches(64)))
    assert len(report.cluster_tokens) == 10
    report = calibrated(model, 10, iter(batches(64)), distill_steps=2)
    assert len(report.polished) == 2
    assert len(save_trex_as_lora(model, tmp_path / "few", max_adapters=3).adapters) == 4
