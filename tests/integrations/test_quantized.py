"""Adapters on quantised base layers: bitsandbytes, HQQ, torchao and quanto, and GPTQ, AWQ and EETQ where they run."""

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import adapted, answered, batches, make_llama, prompts, randomize
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

from peft_trex import TRexConfig, calibrate_trex_merge, initialize_trex_prior, save_trex_as_lora
from peft_trex.layer import TRexLayer

WIDTH = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def exact_kernels(monkeypatch):
    """bitsandbytes as on a CPU without AVX512-BF16: with it, a bare 4-bit layer in eval mode computes in bfloat16."""
    if find_spec("bitsandbytes"):
        for module in ("functional", "nn.modules"):
            monkeypatch.setattr(f"bitsandbytes.{module}.has_avx512bf16", lambda: False, raising=False)


def bnb_4bit(linear, **kwargs):
    bnb = pytest.importorskip("bitsandbytes")
    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32, **kwargs)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def bnb_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def hqq(linear):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def torchao(linear, config, **kwargs):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear)
    quantization.quantize_(model, getattr(quantization, config)(**kwargs))
    return model[0]


def unpack(packed, bits):
    """The numbers of so many bits that bytes hold, the lowest bits first, one part below the other."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def quanto(linear, weights):
    quanto = pytest.importorskip("optimum.quanto")
    # quanto compiles this function at the first use, which takes a minute and a half
    extension = importlib.import_module("optimum.quanto.library.extensions").get_extension("quanto_cpp")
    extension._lib = SimpleNamespace(unpack=unpack)
    model = nn.Sequential(linear)
    quanto.quantize(model, weights=weights)
    quanto.freeze(model)
    return model[0]


def granularity(name, *args):
    return getattr(pytest.importorskip("torchao.quantization.granularity"), name)(*args)


def int4():
    return {"config": "IntxWeightOnlyConfig", "weight_dtype": torch.int4, "granularity": granularity("PerGroup", 32)}


def asymmetric():
    return pytest.importorskip("torchao.quantization").MappingType.ASYMMETRIC


def gptqmodel(linear, module, name):
    """Rounded to nearest, since calibration changes nothing for what comes after."""
    reason = "gptqmodel is not importable here: see test_layers_of_a_library_that_is_kept_apart"
    kind = getattr(pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{module}", reason=reason), name)
    groups = linear.weight.detach().unflatten(1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / 15
    shape = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    settings = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "pack_dtype": torch.int32}
    new = kind(**shape, **settings, register_buffers=True)
    pack = getattr(new, "pack_original", new.pack)
    pack(linear, scales, torch.round(-low / scales), torch.arange(linear.in_features, dtype=torch.int32) // 32)
    new.optimize = lambda *args, **kwargs: None  # compiles each layer
    new.post_init()
    return new


MERGEABLE = {
    "nf4": lambda linear: bnb_4bit(linear, quant_type="nf4", compress_statistics=False),
    "nf4 double": lambda linear: bnb_4bit(linear, quant_type="nf4"),
    "fp4": lambda linear: bnb_4bit(linear, quant_type="fp4", quant_storage=torch.bfloat16),
    "int8": bnb_8bit,
    "hqq": hqq,
    "torchao int8": lambda linear: torchao(linear, "Int8WeightOnlyConfig"),
    "torchao dynamic": lambda linear: torchao(linear, "Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda linear: torchao(linear, **int4()),
    "torchao asym": lambda linear: torchao(linear, **int4(), mapping_type=asymmetric()),
    "torchao groups": lambda linear: torchao(linear, "Int8WeightOnlyConfig", granularity=granularity("PerGroup", 32)),
    "torchao tensor": lambda linear: torchao(linear, "Int8WeightOnlyConfig", granularity=granularity("PerTensor")),
    "torchao float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig", weight_dtype=torch.float8_e5m2),
    "quanto int8": lambda linear: quanto(linear, "qint8"),
    "quanto int4": lambda linear: quanto(linear, "qint4"),
}
UNMERGEABLE = {
    "gptq": lambda linear: gptqmodel(linear, "torch", "TorchLinear"),
    "awq": lambda linear: gptqmodel(linear, "torch_awq", "AwqTorchLinear"),
}
KINDS = {**MERGEABLE, **UNMERGEABLE}
ROUNDED_INPUTS = {"int8": 0.05, "torchao dynamic": 0.1, "awq": 0.05}  # of activations, which the twin does not round


def make_quantized(kind):
    """A tiny Llama whose linear layers, but the head, are quantised."""
    model = make_llama(attention_bias=True, mlp_bias=True, **WIDTH)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, KINDS[kind](module))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def effective_weight(layer):
    """What a layer multiplies by, seen from outside, and its bias."""
    zero, one = torch.zeros(1, layer.in_features), torch.eye(layer.in_features)
    bias = layer(zero)
    if hasattr(layer, "weight") and "Int8Tensor" in type(layer.weight).__name__:  # rounds a one to 0.996
        return layer.weight.dequantize(), bias[0]
    return (layer(one) - bias).T.contiguous(), bias[0]


def stored(layer):
    """The form a layer is saved in: what there is, of which type and shape."""
    state = {key: value for key, value in layer.state_dict().items() if ".quant_state." not in key}  # numbers as text
    return {
        key: (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value for key, value in state.items()
    }


def make_twin(model):
    """The same model with plain layers that hold the dequantised weights."""
    plain = make_llama(attention_bias=True, mlp_bias=True, **WIDTH)
    plain.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "_proj" not in key}, strict=False
    )
    for name, module in plain.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            weight, bias = effective_weight(model.get_submodule(name))
            module.weight.data, module.bias.data = weight, bias
    return plain.requires_grad_(False)


def on(base, **kwargs):
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return adapted(base=base, **{"target_modules": targets, **kwargs})


def gradients(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(found, wanted, tolerance):
    error = (found - wanted).norm() / wanted.norm()
    assert error <= tolerance, f"relative error {error}"


def logits(model):
    with torch.no_grad():
        return model(input_ids=prompts(3, seed=5)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_on_the_dequantised_weight(kind):
    base = make_quantized(kind)
    twin, model = on(make_twin(base)), on(base)  # in this order, since `on` changes its base
    logits(model)  # an evaluation before must not matter
    batch = answered(4, seed=3)
    found, found_gradients = gradients(model.train(), batch)
    wanted, wanted_gradients = gradients(twin.train(), batch)
    tolerance = ROUNDED_INPUTS.get(kind, 1e-5)
    assert_close(found, wanted, tolerance)
    assert found_gradients.keys() == wanted_gradients.keys() and len(found_gradients) == 60
    if kind in ROUNDED_INPUTS:  # a small gradient may be rounding alone
        found_gradients, wanted_gradients = (
            {"all": torch.cat([gradient.flatten() for gradient in some.values()])}
            for some in (found_gradients, wanted_gradients)
        )
    for name, gradient in wanted_gradients.items():
        # an omega's gradient is a small difference of large sums: float32 holds two digits of some
        assert_close(found_gradients[name], gradient, 0.4 if kind in ROUNDED_INPUTS else 1e-2)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merging_quantises_the_sum_as_the_base_was_and_unmerging_restores_every_bit(kind):
    model = on(make_quantized(kind))
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}
    with model.disable_adapter():
        base = logits(model)
    weights = {name: effective_weight(layer.get_base_layer()) for name, layer in layers.items()}
    forms = {name: stored(layer.get_base_layer()) for name, layer in layers.items()}
    wanted = {}
    for name, layer in layers.items():
        weight, bias = weights[name]
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.weight.data, plain.bias.data = weight + layer.get_delta_weight("default"), bias
        wanted[name] = effective_weight(KINDS[kind](plain))
    with pytest.warns(UserWarning, match="quantised anew"), pytest.warns(UserWarning, match="mean routing"):
        model.merge_adapter(safe_merge=True)
    assert {name: stored(layer.get_base_layer()) for name, layer in layers.items()} == forms
    for name, layer in layers.items():
        weight, bias = effective_weight(layer.get_base_layer())
        # a rounding may fall on the other side where the sum was read with the last bit off
        assert ((weight - wanted[name][0]).abs() > 1e-3 * weight.abs().max()).float().mean() < 0.02, name
        assert_close(weight, wanted[name][0], 0.02)
        assert torch.equal(bias, wanted[name][1])
    merged = logits(model)
    assert not torch.allclose(merged, base, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    for name, layer in layers.items():
        assert not layer.merged
        assert all(
            torch.equal(*pair) for pair in zip(effective_weight(layer.get_base_layer()), weights[name], strict=True)
        )
    with pytest.warns(UserWarning):
        unloaded = model.merge_and_unload()
    assert torch.equal(logits(unloaded), merged)
    assert {name: stored(unloaded.get_submodule(name)) for name in layers} == forms


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq", "torchao int8", "quanto int8"])
def test_two_adapters_merge_and_a_broken_one_leaves_the_base_alone(kind):
    model = on(make_quantized(kind))
    model.add_adapter("other", TRexConfig(r_a=2, r_b=2, target_modules=["q_proj"], use_prior=False))
    randomize(model, "other", seed=9)
    with model.disable_adapter():
        base = logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = effective_weight(layer.base_layer)[0]
    layer.merge(adapter_names=["default", "other"])
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert_close(effective_weight(layer.base_layer)[0], before + delta, 0.2)
    layer.unmerge()
    assert torch.equal(effective_weight(layer.base_layer)[0], before)
    layer.trex_B["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8", *UNMERGEABLE])
def test_a_calibrated_adapter_merges_or_leaves_as_lora(kind, tmp_path):
    model = on(make_quantized(kind))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, mean = effective_weight(layer.base_layer)[0], layer.get_delta_weight("default")
    report = calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    delta = layer.get_delta_weight("default")
    assert report.error < report.mean_routing_error and (delta - mean).norm() > 0.1 * mean.norm()
    save_trex_as_lora(model, tmp_path / "lora")
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (lora[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"] for part in "AB")
    assert_close(B @ A, delta, 1e-5)
    if kind in UNMERGEABLE:
        with pytest.raises(ValueError, match="cannot take up an adapter"):
            model.merge_adapter()
    else:
        with pytest.warns(UserWarning, match="quantised anew") as caught:
            model.merge_adapter()
        assert not any("mean routing" in str(warning.message) for warning in caught)
        assert_close(effective_weight(layer.base_layer)[0], before + delta, 0.2)
        model.unmerge_adapter()
    assert torch.equal(effective_weight(layer.base_layer)[0], before)


def test_gradients_pass_layers_whose_kernels_compute_none():
    """As torchao's where they round activations too, in adapted layers as in others, until the adapters leave."""
    torch.manual_seed(0)
    base = nn.Sequential(*(KINDS["torchao dynamic"](nn.Linear(64, 64)) for _ in range(2))).requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    assert not base(x).requires_grad
    model = get_peft_model(base, TRexConfig(target_modules=["0"], use_prior=False))
    model(x).sum().backward()
    first, second = (layer.weight.dequantize() for layer in (base[0].base_layer, base[1]))
    assert_close(x.grad, torch.ones(5, 64) @ second @ first, 1e-5)
    assert not model.unload()(x).requires_grad


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_merging_where_it_cannot_be_done_is_refused_by_name(kind):
    model = on(make_quantized(kind))
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.q_proj, .*\({kind.upper()}\): .*calibration"):
            merge()
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(model.unload()), plain)


def test_eetq_is_adapted_and_not_merged():
    """Its kernel needs a GPU; what comes before it does not."""
    eetq = pytest.importorskip("transformers.integrations.eetq")
    if not hasattr(eetq, "EetqLinear"):
        pytest.skip("transformers had no layer of its own for EETQ before 5")
    layer = eetq.EetqLinear(64, 96, bias=True)
    layer.weight.data.zero_()
    model = get_peft_model(nn.Sequential(layer), TRexConfig(target_modules=["0"], use_prior=False))
    adapter = model.base_model.model[0]
    assert (adapter.in_features, adapter.out_features) == (64, 96)
    assert adapter.trex_A["default"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"0, a EetqLinear, cannot take up an adapter \(EETQ\)"):
        model.merge_and_unload()
    assert model.unload()[0] is layer


def test_codes_in_three_dimensions_are_no_experts():
    """AQLM's layer by its name and its shapes, for want of a kernel that runs here."""

    class QuantizedLinear(nn.Module):
        in_features, out_features = 64, 96
        __module__ = "aqlm.inference"

        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(96, 8, 1, dtype=torch.int8), requires_grad=False)

    model = get_peft_model(nn.Sequential(QuantizedLinear()), TRexConfig(target_modules=["0"], use_prior=False))
    with pytest.raises(ValueError, match=r"0, a QuantizedLinear, cannot take up an adapter \(AQLM\)"):
        model.merge_and_unload()


class OtherTensor(torch.Tensor):
    pass


def float8(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def subclass(layer):
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(OtherTensor))


STRANGE = {
    "float8_e4m3fn": float8,
    "OtherTensor": subclass,
    "no parameter called weight": nn.utils.parametrizations.weight_norm,
    "no parameter called weight ": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("found", STRANGE)
def test_weights_that_a_merge_would_miss_are_refused(found):
    layer = nn.Linear(64, 64)
    STRANGE[found](layer)
    model = get_peft_model(nn.Sequential(layer, nn.Linear(64, 64)), TRexConfig(use_prior=False, target_modules=r"\d"))
    with pytest.raises(ValueError, match=rf"^0, .*found .*{found.strip()}"):
        model.merge_and_unload()
    for name in ("merge", "unmerge"):
        tuner = model.base_model.model[0]
        tuner.merged_adapters = ["default"] if name == "unmerge" else []
        with pytest.raises(ValueError, match="cannot take up an adapter"):
            getattr(tuner, name)()


def test_integers_of_an_unknown_kind_are_refused():
    layer = nn.Linear(8, 8).requires_grad_(False)
    layer.weight.data = torch.zeros(8, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="0 is a Linear; T-REX adapts"):
        get_peft_model(nn.Sequential(layer), TRexConfig(target_modules=["0"], use_prior=False))


def test_other_modules_with_quantised_weights_are_refused():
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    quanto.quantize(model, weights="qint8")
    quanto.freeze(model)
    with pytest.raises(ValueError, match="0 is a QConv2d that has a forward of its own"):
        get_peft_model(model, TRexConfig(target_modules=["0"], use_prior=False))
    found = get_peft_model(model, TRexConfig(target_modules="all-linear", use_prior=False)).targeted_module_names
    assert found == ["1"]


def test_a_merge_into_weights_that_are_quantised_on_the_fly_is_seen_in_eval_mode():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear8bitLt(64, 64)).requires_grad_(False).eval()
    x = torch.randn(5, 64)
    before = base(x)  # the quantised weight is kept from now on
    model = get_peft_model(base, TRexConfig(target_modules=["0"], use_prior=False, init_weights=False)).eval()
    base[0].trex_B["default"].data *= 4  # so that the update is far larger than what rounding to 8 bits takes
    wanted = before + x @ base[0].get_delta_weight("default").T
    with pytest.warns(UserWarning, match="bitsandbytes 8-bit"):
        model.merge_adapter()
    assert_close(model(x), wanted, 0.05)
    assert (wanted - before).norm() > 0.2 * before.norm()
    with model.disable_adapter():
        assert torch.equal(model(x), before)


def packed(model):
    """The 4-bit layers as bitsandbytes leaves them on a CPU with AVX512-BF16 after a forward in eval mode."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this release of bitsandbytes packs no weights")
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.weight.data, state = functional._convert_weight_packed_for_cpu(
                layer.weight.data, layer.weight.quant_state
            )
            assert state.packing_format_for_cpu
    return model


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_weights_packed_by_an_evaluation_are_unpacked(kind):
    base, wanted = on(packed(make_quantized(kind))).unload(), make_quantized(kind)
    for layer, other in zip(base.modules(), wanted.modules(), strict=True):
        if type(layer).__name__ == "Linear4bit":
            assert_close(effective_weight(layer)[0], effective_weight(other)[0], 0.004)  # the scales became bfloat16
    twin, found = on(make_twin(base)), on(packed(base))
    batch = answered(4, seed=3)
    wanted_logits, wanted_gradients = gradients(twin.train(), batch)
    found_logits, found_gradients = gradients(found.train(), batch)
    assert_close(found_logits, wanted_logits, 1e-5)
    for name, gradient in wanted_gradients.items():
        assert_close(found_gradients[name], gradient, 1e-3)
    before = logits(found.eval())
    found.state_dict()  # which unpacks what bitsandbytes thinks is packed
    assert torch.equal(logits(found), before)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_an_evaluation_packs_nothing_and_training_after_it_is_right(targets, monkeypatch):
    base = make_quantized("nf4")
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    model = on(base, target_modules=targets)
    batch = answered(4, seed=3)
    wanted = gradients(model.train(), batch)[1]
    logits(model.eval())
    found = gradients(model.train(), batch)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            assert layer.support_avx512bf16_for_cpu is False
            assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True, raising=False)
    for layer in model.unload().modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            assert layer.support_avx512bf16_for_cpu is True


def loading_config(kind):
    """What `from_pretrained` takes to quantise."""
    if kind == "torchao int8":
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    if kind == "quanto int8":
        pytest.importorskip("optimum.quanto")
        return QuantoConfig(weights="int8")
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_llama(**WIDTH).save_pretrained(path)
    return path


def load(folder, kind, auto=AutoModelForCausalLM, **kwargs):
    config = loading_config(kind)
    settings = {"device_map": {"": "cpu"}, "dtype": torch.float32, "quantization_config": config, **kwargs}
    return auto.from_pretrained(folder, **settings)


def train(model, steps=4, batch=None):
    """Losses of a few steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(**(batch or answered(8, seed=3))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao int8", "quanto int8"])
def test_a_loaded_model_is_trained_evaluated_trained_saved_loaded_and_merged(kind, folder, tmp_path):
    base = prepare_model_for_kbit_training(load(folder, kind), gradient_checkpointing_kwargs={"use_reentrant": False})
    config = TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    initialize_trex_prior(model, batches(), progress=False)
    with model.disable_adapter():
        untouched = logits(model)
    first = train(model)
    logits(model)
    second = train(model)
    assert second[-1] < second[0] < first[0]
    assert not torch.allclose(logits(model), untouched, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder, kind), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        tokens = again.generate(input_ids=prompts(2), max_new_tokens=4, do_sample=False)
        assert tokens.shape == (2, 13)
    with pytest.warns(UserWarning, match="quantised anew"):
        merged = again.merge_and_unload()
    assert not torch.allclose(logits(merged), untouched, atol=1e-2)
    assert torch.equal(logits(model.unload()), untouched)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao dynamic"])
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    model = on(make_quantized(kind)).train()
    batch = answered(4, seed=3)
    wanted = gradients(model, batch)[1]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, batch)[1]
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-4)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_adapters_in_bfloat16_train_as_trl_casts_them(kind):
    model = on(make_quantized(kind)).train()
    batch = answered(4, seed=3)
    wanted, _ = gradients(model, batch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    found, found_gradients = gradients(model, batch)
    assert found.dtype == torch.float32
    assert_close(found, wanted, 0.2)
    assert all(gradient.dtype == torch.bfloat16 for gradient in found_gradients.values())
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in found_gradients.values())


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype_is_obeyed(autocast, folder):
    base = load(folder, "nf4", dtype=torch.bfloat16)
    config = TRexConfig(r_a=2, r_b=3, task_type="CAUSAL_LM", use_prior=False, init_weights=False)
    for layer in base.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.bfloat16
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
    output, found = gradients(model.train(), answered(4))
    assert output.dtype == torch.bfloat16
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_a_head_is_trained_and_saved_beside_an_adapter_on_a_quantised_base(folder, tmp_path):
    def classifier():
        torch.manual_seed(7)
        return load(folder, "nf4", AutoModelForSequenceClassification, num_labels=3)

    model = get_peft_model(classifier(), TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="SEQ_CLS"))
    initialize_trex_prior(model, batches(), progress=False)
    head = model.base_model.model.score.modules_to_save["default"].weight
    before = head.detach().clone()
    ids = prompts(8)
    losses = train(model, steps=6, batch={"input_ids": ids, "labels": torch.arange(8) % 3})
    assert losses[-1] < losses[0]
    assert not torch.equal(head, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["nf4", "hqq", "torchao int8", *UNMERGEABLE])
def test_all_linear_is_every_quantised_layer_but_the_head(kind):
    base = make_quantized(kind)
    base.lm_head = KINDS[kind](base.lm_head)
    wanted = {name for name, _ in base.named_modules() if name.endswith("_proj")}
    model = get_peft_model(base, TRexConfig(r_a=2, r_b=3, num_clusters=4, exclude_modules=["k_proj"]))
    found = {name for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}
    assert found == {name for name in wanted if not name.endswith("k_proj")} and len(found) == 12
    model.add_adapter("other", TRexConfig(r_a=2, r_b=3, use_prior=False, task_type="CAUSAL_LM"))
    assert all("other" in base.get_submodule(name).trex_A for name in wanted)
    assert not any("base_layer" in name for name in model.peft_config["other"].target_modules)


@pytest.mark.parametrize("kind", ["nf4", "hqq"])
def test_all_quantised_layers_of_some_blocks(kind):
    settings = {"r_a": 2, "r_b": 3, "use_prior": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_quantized(kind), TRexConfig(layers_to_transform=[1], **settings))
    names = [name for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)]
    assert len(names) == 7 and all(name.startswith("model.layers.1.") for name in names)


def test_layers_of_a_library_that_is_kept_apart():
    """GPTQ and AWQ. gptqmodel pins an older numpy, and changes the environment when it is imported by PEFT."""
    folder = Path(sys.prefix) / "gptq"
    if not folder.is_dir():
        pytest.skip(f"gptqmodel is not in {folder.name}/ of the virtual environment, where `make test` puts it")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GPTQMODEL_CPU_WORKERS": "2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gptq or awq", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert re.search(r"^8 passed, \d+ deselected", done.stdout, re.MULTILINE), (
        done.stdout[-4000:] + done.stderr[-2000:]
    )
