"""An adapter on disk: bitwise the same in a fresh process, refused with advice when it is damaged, never touched."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import adapted, make_llama, prompts
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

FRESH = """
import sys, peft_trex, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(base, folder + "/adapter")
ids = load_file(folder + "/ids.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits}, folder + "/logits.safetensors")
"""

VARIANTS = {
    "default": {},
    "identity map": {"num_clusters": 6},
    "paired": {"expert_layout": "paired", "r_a": 3, "r_b": 3, "num_clusters": 3},
    "no router": {"use_router": False},
    "no prior": {"use_prior": False},
    "whitened": {"prior_whitening": 5},
    "shared core": {"use_router": False, "shared_core": True, "prior_whitening": "auto"},
    "head and bias": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"], "bias": "trex_only"},
}


def _saved(tmp_path, **settings):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=make_llama(), fit=settings.get("use_prior", True), **settings)
    model.save_pretrained(tmp_path / "adapter")
    return model


def _digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "head and bias"])
def test_a_fresh_process_computes_the_same_bits(tmp_path, variant):
    model = _saved(tmp_path, **VARIANTS[variant])
    ids = prompts(4)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, timeout=300)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip_changes_nothing(tmp_path, variant, low_cpu_mem_usage):
    model = _saved(tmp_path, **VARIANTS[variant])
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    ids = prompts(3)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(
        loaded.generate(input_ids=ids, max_new_tokens=4), model.generate(input_ids=ids, max_new_tokens=4)
    )
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)


def test_beside_a_trained_one_and_under_another_name(tmp_path):
    model = _saved(tmp_path, num_clusters=6)
    ids = prompts(3)
    expected = model(input_ids=ids).logits
    other = adapted(base=make_llama(), r_a=1, r_b=2, num_clusters=3)
    other.load_adapter(tmp_path / "adapter", "second")
    before = other(input_ids=ids).logits
    other.set_adapter("second")
    torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=0, atol=0)
    other.set_adapter("default")
    torch.testing.assert_close(other(input_ids=ids).logits, before, rtol=0, atol=0)
    other.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_model.safetensors").exists()
    reloaded = PeftModel.from_pretrained(make_llama(), tmp_path / "both" / "second")
    torch.testing.assert_close(reloaded(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_auto_class_and_the_prior_in_the_file(tmp_path):
    model = _saved(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = prompts(3)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors if "trex_prior" in key} == {"centroids", "mean", "mean_scores"}
    assert not any("lora_" in key for key in tensors)


def test_an_unfitted_prior_stays_unfitted(tmp_path):
    model = adapted(fit=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert not loaded.base_model.trex_prior["default"].fitted


def test_loading_a_fit_over_an_unfitted_prior(tmp_path):
    model = _saved(tmp_path)
    other = adapted(base=make_llama(), fit=False)
    ids = prompts(3)
    with pytest.warns(UserWarning, match="not fitted"):
        other(input_ids=ids)
    other.load_adapter(tmp_path / "adapter", "default")
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(file):
    file.write_bytes(file.read_bytes()[:20])


def _empty(file):
    file.write_bytes(b"")


def _drop(part):
    def damage(file):
        tensors = load_file(file)
        key = next(key for key in tensors if part in key)
        del tensors[key]
        save_file(tensors, file)

    return damage


def _add(file):
    tensors = load_file(file)
    key = next(key for key in tensors if "trex_A" in key)
    save_file({**tensors, key.replace("trex_A", "trex_C"): tensors[key].clone()}, file)


def _reshape(file):
    tensors = load_file(file)
    key = next(key for key in tensors if "trex_A" in key)
    save_file({**tensors, key: torch.zeros(2, 7)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"adapter_model.safetensors is damaged .*restore it from where it came from"),
        (_cut_header, r"adapter_model.safetensors is damaged"),
        (_empty, r"adapter_model.safetensors is damaged .*0 bytes"),
        (_drop("trex_B"), r"lacks 1 T-REX tensors, such as .*trex_B.* restore it"),
        (_drop("centroids"), r"lacks 1 T-REX tensors, such as .*trex_prior"),
        (_add, r"holds unknown 1 T-REX tensors, such as .*trex_C"),
        (_reshape, r"trex_A.*\(2, 7\).*\(2, 48\).*saved for another base model"),
    ],
)
def test_damaged_files_are_refused_with_advice(tmp_path, damage, message):
    _saved(tmp_path)
    damage(tmp_path / "adapter" / "adapter_model.safetensors")
    before = _digest(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)" + message):
        PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    assert _digest(tmp_path) == before


def test_an_adapter_for_another_model_is_refused(tmp_path):
    _saved(tmp_path)
    before = _digest(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="saved for another base model"):
        PeftModel.from_pretrained(make_llama(num_hidden_layers=1), tmp_path / "adapter")
    with pytest.raises((ValueError, RuntimeError), match="saved for another base model"):
        PeftModel.from_pretrained(make_llama(hidden_size=16), tmp_path / "adapter")
    assert _digest(tmp_path) == before


def test_a_value_that_no_field_takes_is_refused(tmp_path):
    _saved(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"prior_map": "auto"', '"prior_map": "quadratic"'))
    before = _digest(tmp_path)
    with pytest.raises(
        ValueError, match="prior_map='quadratic' is unknown; it must be one of auto, identity, learned"
    ):
        PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    assert _digest(tmp_path) == before
