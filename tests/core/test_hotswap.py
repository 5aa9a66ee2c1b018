"""`hotswap_adapter`: the tensors of a file take the place of an adapter's, and all that would not fit is refused."""

import pytest
import torch
from conftest import adapted, batches, make_llama, prompts, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from safetensors.torch import load_file, save_file

from peft_trex import calibrate_trex_merge, initialize_trex_prior

IDS = prompts(3, seed=5)
TENSORS = "adapter_model.safetensors"


def swap(model, folder, name="default"):
    hotswap.hotswap_adapter(model, folder, name, torch_device="cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS.masked_fill(torch.arange(9) < 5, -100)).logits


def saved(folder, seed, **config):
    """An adapter with parameters and a prior of its own, in a folder."""
    model = randomize(adapted(fit=False, **config), seed=seed)
    if config.get("use_prior", True):
        initialize_trex_prior(model, batches(seed=seed), seed=seed, progress=False)
    model.save_pretrained(folder)
    return model


def test_a_swapped_adapter_is_the_other_one(tmp_path):
    first, second = saved(tmp_path / "first", 1), saved(tmp_path / "second", 2)
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "first").eval()
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert torch.equal(logits(model), logits(first)) and not torch.equal(logits(model), logits(second))
    swap(model, tmp_path / "second")
    assert torch.equal(logits(model), logits(second))
    settings = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**settings), second.generate(**settings))
    # Not every tensor shows in the logits, such as the prior's mean scores.
    model.save_pretrained(tmp_path / "again")
    again, expected = (load_file(tmp_path / name / TENSORS) for name in ("again", "second"))
    assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in again)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("calibrated", ["first", "second"])
def test_static_weights_come_and_go_with_their_adapter(tmp_path, calibrated):
    models = {name: saved(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    calibrate_trex_merge(models[calibrated], batches(), per_cluster=True, progress=False)
    models[calibrated].save_pretrained(tmp_path / calibrated)
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "first").eval()
    swap(model, tmp_path / "second")
    assert model.base_model.calibrated_adapters() == ({"default"} if calibrated == "second" else set())
    if calibrated == "second":
        model.merge_adapter()
        models["second"].merge_adapter()
    assert torch.equal(logits(model), logits(models["second"]))


def test_another_adapter_and_the_mode_stay(tmp_path):
    saved(tmp_path / "first", 1)
    second = saved(tmp_path / "second", 2)
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "first", is_trainable=True)
    model.load_adapter(tmp_path / "first", "other")
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    swap(model, tmp_path / "second", "other")
    assert model.training and model.active_adapters == ["default"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.eval().set_adapter("other")
    assert torch.equal(logits(model), logits(second))


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    def base():
        return make_llama(num_hidden_layers=1)

    saved(tmp_path / "first", 1, base=base())
    second, compilations = saved(tmp_path / "second", 2, base=base()), []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(PeftModel.from_pretrained(base(), tmp_path / "first").eval(), backend=backend)
    before, count = logits(compiled), len(compilations)
    swap(compiled, tmp_path / "second")
    after = logits(compiled)
    assert count and len(compilations) == count
    torch.testing.assert_close(after, logits(second), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


MARKERS = {"before": [5], "after": [6], "assistant": [7]}
UNLIKE = {
    "sizes": ({"r_b": 4}, r"differ in r_b \(3 and 4\)"),
    "clusters": ({"num_clusters": 5}, r"differ in num_clusters \(4 and 5\)"),
    "scale": ({"token_scale": 3.0}, r"differ in token_scale \(None and 3.0\)"),
    "markers": ({"chat_markers": MARKERS}, r"differ in chat_markers \(None and "),
    "scope": ({"prior_scope": "answer"}, r"differ in prior_scope \('prompt' and 'answer'\)"),
    "layers": ({"target_modules": ["q_proj"]}, "lacks 72 T-REX tensors"),
}


@pytest.mark.filterwarnings("ignore:Some rows hold no user's message")
@pytest.mark.parametrize("case", UNLIKE)
def test_an_adapter_of_another_form_is_refused(tmp_path, case):
    config, said = UNLIKE[case]
    saved(tmp_path / "first", 1)
    saved(tmp_path / "second", 2, **config)
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "first").eval()
    before = logits(model)
    with pytest.raises(ValueError, match=said) as caught:
        swap(model, tmp_path / "second")
    assert "load_adapter" in str(caught.value) or case == "layers"
    assert torch.equal(logits(model), before)


def test_a_damaged_file_leaves_the_adapter(tmp_path):
    saved(tmp_path / "first", 1)
    saved(tmp_path / "second", 2)
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "first").eval()
    before, tensors = logits(model), load_file(tmp_path / "second" / TENSORS)
    tensors[max(tensors)].fill_(float("nan"))
    save_file(tensors, tmp_path / "second" / TENSORS)
    with pytest.raises(ValueError, match="NaN or infinity"):
        swap(model, tmp_path / "second")
    assert torch.equal(logits(model), before)


def test_a_merged_adapter_is_refused(tmp_path):
    model = saved(tmp_path, 1)
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged; call unmerge_adapter\(\) before it is swapped"):
        swap(model, tmp_path)


def test_other_methods_are_peft_s(tmp_path):
    """LoRA is swapped by PEFT, and neither takes the other's place."""
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    lora, other = (get_peft_model(make_llama(), config).eval() for _ in range(2))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            parameter.mul_(-3.0 if "lora_B" in name else 1.0)
    lora.save_pretrained(tmp_path / "lora")
    assert not torch.allclose(logits(lora), logits(other))
    swap(other, tmp_path / "lora")
    assert torch.equal(logits(lora), logits(other))
    trex = saved(tmp_path / "trex", 1)
    with pytest.raises(ValueError, match="is a LORA adapter, and 'default' is TREX; load it under another name"):
        swap(trex, tmp_path / "lora")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and TREX"):
        swap(other, tmp_path / "trex")
    with pytest.raises(ValueError, match=r"no adapter 'absent' to swap; the model has \['default'\]"):
        swap(trex, tmp_path / "trex", "absent")
