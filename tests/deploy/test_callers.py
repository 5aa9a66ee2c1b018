"""Trainers that merge before each generation get the calibrated weights, or are refused by name."""

import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import adapted, answered, batches
from peft import LoraConfig, get_peft_model

from peft_trex import TRexLayer, calibrate_trex_merge


def _layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}


def _caller(name):
    """A function that merges an adapter, as a module of this name has it."""
    module = types.ModuleType(name)
    exec("def merge(model):\n    model.merge_adapter()\n", module.__dict__)
    return module.merge


@pytest.mark.parametrize("name", ["trl.trainer.grpo_trainer", "verl.workers", "openrlhf.utils"])
def test_a_trainer_is_refused_by_name_until_the_adapter_is_calibrated(name):
    model, merge = adapted().train(), _caller(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name} merges the adapters \['default'\].*use_vllm=False.*on_step_end"):
        merge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    calibrate_trex_merge(model, batches(), progress=False)
    expected = {n: layer.base_layer.weight + layer.get_delta_weight("default") for n, layer in _layers(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(model)
    for path, layer in _layers(model).items():
        torch.testing.assert_close(layer.base_layer.weight, expected[path])
    model.unmerge_adapter()
    # A step of training makes the static weights stale.
    with pytest.warns(UserWarning, match="trained again"):
        model(**answered(4))
    with pytest.raises(ValueError, match=name):
        merge(model)


@pytest.mark.parametrize("name", ["trlx", "mine", "peft_trex_user"])
def test_others_are_warned_as_ever(name):
    with pytest.warns(UserWarning, match="approximately"):
        _caller(name)(adapted())


def test_other_adapters_are_let_alone():
    lora = get_peft_model(adapted(fit=False).unload(), LoraConfig(r=2, target_modules=["q_proj"]))
    _caller("trl.trainer.grpo_trainer")(lora)


def test_trls_own_way_to_vllm():
    generation = pytest.importorskip("trl.generation.vllm_generation", reason="this release of TRL has no such module")
    model = adapted().train()
    there = generation.VLLMGeneration.__new__(generation.VLLMGeneration)
    there.model = model
    there._dist = types.SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False)
    if not hasattr(there, "_iter_named_params"):
        pytest.skip("this release of TRL sends its weights in another way")
    with pytest.raises(ValueError, match=r"trl\.generation\.vllm_generation merges"):
        dict(there._iter_named_params())
    calibrate_trex_merge(model, batches(), progress=False)
    sent = {name: weight.clone() for name, weight in there._iter_named_params()}
    model.merge_adapter()
    for name, layer in _layers(model).items():
        assert torch.equal(sent[f"{name}.weight"], layer.base_layer.weight)
