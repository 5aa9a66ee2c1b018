"""Adapters that were saved before the package was divided into folders load, and compute what they did then.

`data/adapters` holds two adapters and an exported folder as commit b5d1505 wrote them, and what it computed with them:
the logits of fixed tokens, and the cluster that the router chose for fixed prompts. The base model's weights follow
a formula, so that they do not depend on how a release of torch draws random numbers.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from peft import PeftModel
from safetensors.torch import load_file

import peft_trex

ADAPTERS = Path(__file__).parents[1] / "data" / "adapters"
EXPECTED = load_file(ADAPTERS / "expected.safetensors")
CLUSTERS = 6  # of the adapter called "grid", and so of the exported folder


def make_base():
    """The tiny Llama with weights that are sines: the same on every machine, and as good as random."""
    base = make_llama()
    for index, parameter in enumerate(base.parameters()):
        steps = torch.arange(parameter.numel(), dtype=torch.float64)
        values = torch.sin(0.01 * steps**2 + index).reshape(parameter.shape)
        parameter.data = (1 + 0.1 * values if parameter.dim() == 1 else 0.4 * values).float()
    return base


@torch.no_grad()
def logits_of(model):
    """In float64, because another release of torch may round float32 otherwise, by up to 1e-5 here."""
    return model.double().eval()(input_ids=EXPECTED["tokens"]).logits.float()


def load(folder):
    return PeftModel.from_pretrained(make_base(), ADAPTERS / folder)


def assert_as_before(model, name):
    torch.testing.assert_close(logits_of(model), EXPECTED[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["grid", "paired"])
def test_an_old_adapter_computes_the_same_logits(name):
    model = load(name)
    assert_as_before(model, name)
    with model.disable_adapter():
        assert_as_before(model, "base")


@pytest.mark.parametrize("name", ["grid", "paired"])
def test_an_old_adapter_is_loaded_and_saved_by_transformers(tmp_path, monkeypatch, name):
    # transformers 5.24 asks for a release of PEFT that is not out, and works with those before.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    model = make_base()
    model.load_adapter(str(ADAPTERS / name))
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (ADAPTERS / name, tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert_as_before(model, name)


@pytest.mark.filterwarnings("error:T-REX depends on its input:UserWarning")
def test_an_old_adapter_merges_with_the_static_weights_of_its_file():
    model = load("grid")
    assert model.base_model.calibrated_adapters() == {"default"}
    assert_as_before(model.double().merge_and_unload(), "grid merged")


def test_an_old_adapter_is_saved_as_it_was(tmp_path):
    load("grid").save_pretrained(tmp_path)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (ADAPTERS / "grid", tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("folder", [".", *(f"cluster_{index:02d}" for index in range(CLUSTERS))])
def test_an_old_export_computes_the_same_logits(folder):
    assert_as_before(load(f"export/{folder}"), f"export {folder}")


def test_an_old_export_is_written_again_as_it_was(tmp_path):
    peft_trex.save_trex_as_lora(load("grid"), tmp_path / "export")
    for before in (ADAPTERS / "export").rglob("*.safetensors"):
        after = tmp_path / "export" / before.relative_to(ADAPTERS / "export")
        torch.testing.assert_close(load_file(after), load_file(before), rtol=1e-5, atol=1e-6)
    after, before = (json.loads((each / "export" / "router.json").read_text()) for each in (tmp_path, ADAPTERS))
    # Exports had no hashes then.
    assert after == {**before, "hashes": "SHA256SUMS"}


def test_an_old_exports_router_chooses_the_same_clusters():
    router = peft_trex.SemanticRouter.from_pretrained(ADAPTERS / "export")
    assert router.clusters == tuple(f"cluster_{index:02d}" for index in range(CLUSTERS))
    routes = [router.route(prompt.tolist()).cluster for prompt in EXPECTED["prompts"]]
    assert routes == EXPECTED["routes"].tolist() and len(set(routes)) == CLUSTERS
