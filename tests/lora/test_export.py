"""Adapters that leave as plain LoRA: what stock PEFT makes of the folder, what is in it, and when there is none."""

import copy
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from conftest import MAKERS, VOCAB, adapted, batches, make_llama, prompts, randomize
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

from peft_trex import (
    SemanticRouter,
    TRexConfig,
    TRexLayer,
    calibrate_trex_merge,
    save_trex_as_lora,
)
from peft_trex.lora import export, semantic_router

CLUSTERS = ["cluster_00", "cluster_01", "cluster_02", "cluster_03"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
ROUTER = ["SHA256SUMS", "router.json", "router.safetensors", "semantic_router.py"]
FOLDERS = [*CLUSTERS, "overall"]
EVERYTHING = sorted([*ADAPTER, *ROUTER, *FOLDERS, *(f"{folder}/{name}" for folder in FOLDERS for name in ADAPTER)])


def inputs(kind="llama", seed=7, count=8):
    ids = prompts(count, seed=seed)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if kind == "t5" else {})}


def calibrated(kind="llama", fit="core", per_cluster=True, **settings):
    return calibrate(adapted(kind, **settings), kind, fit, per_cluster)


def calibrate(model, kind="llama", fit="core", per_cluster=True, **kwargs):
    data = [{**batch, "labels": batch["input_ids"]} if kind == "t5" else batch for batch in batches()]
    calibrate_trex_merge(model, data, fit=fit, per_cluster=per_cluster, progress=False, **kwargs)
    return model


@torch.no_grad()
def run(model, kind="llama"):
    return model.double()(**inputs(kind)).logits  # else rounding, in models with large weights, is all that is seen


def layers_of(model, kind=TRexLayer):
    tuner = model.base_model.model
    return {name: layer for name, layer in tuner.named_modules() if isinstance(layer, kind)}


@torch.no_grad()
def with_static_weights(base, model, cluster=None, adapter_name="default"):
    """A base model with the calibrated weights added: gate * B U, with U = C A or of its own."""
    base.double()
    for name, layer in layers_of(model).items():
        A, B = layer.trex_A[adapter_name].double(), layer.trex_B[adapter_name].double()
        static = layer.trex_static[adapter_name][0 if cluster is None else 1 + cluster].double()
        wide = static if static.shape[1] == A.shape[1] else static @ A
        delta = torch.sigmoid(100 * layer.trex_gate[adapter_name].double()) * B @ wide
        target = base.get_submodule(name)
        target.weight += delta.T if isinstance(target, Conv1D) else delta
    return base


def load(base, folder, adapters=()):
    """What stock PEFT reads, and nothing that it found missing or did not expect."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(folder), adapter_name="overall")
        for name in adapters:
            result = model.load_adapter(str(folder / name), adapter_name=name)
            assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    assert not [str(warning.message) for warning in told if "keys" in str(warning.message)]
    return model.eval()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def adapter_of(folder):
    return json.loads((folder / ADAPTER[0]).read_text()), load_file(folder / ADAPTER[1])


def close(one, other, share=1e-5):
    return (one - other).abs().max() <= share * other.abs().max()


@pytest.fixture(scope="module")
def llama():
    return calibrated()


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    save_trex_as_lora(llama, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "fit", "rank", "settings"),
    [
        ("llama", "core", 2, {}),
        ("llama", "core", 2, {"r_a": 3, "r_b": 2}),
        ("llama", "core", 3, {"r_a": 3, "r_b": 3, "expert_layout": "paired"}),
        ("llama", "input", 3, {}),
        ("gpt2", "core", 2, {}),
        ("gpt2", "input", 3, {"r_a": 4}),
        ("t5", "core", 1, {"r_a": 1}),
        ("t5", "input", 3, {}),
    ],
)
def test_stock_peft_gives_the_static_weights(tmp_path, monkeypatch, kind, fit, rank, settings):
    monkeypatch.setattr(torch.linalg, "svd", None)  # the factors are known, and need none
    model = calibrated(kind, fit, **settings)
    save_trex_as_lora(model, tmp_path / "out")
    loaded = load(MAKERS[kind](), tmp_path / "out", CLUSTERS)
    results = []
    for name, cluster in [("overall", None), *((name, k) for k, name in enumerate(CLUSTERS))]:
        loaded.set_adapter(name)
        results.append(run(loaded, kind))
        assert close(results[-1], run(with_static_weights(MAKERS[kind](), model, cluster), kind))
        config, tensors = adapter_of(tmp_path / "out" / (name if cluster is not None else "."))
        assert (config["r"], config["lora_alpha"], config["peft_type"]) == (rank, rank, "LORA")
        assert config["fan_in_fan_out"] == (kind == "gpt2")
        assert {min(tensor.shape) for tensor in tensors.values()} == {rank}
    for i, one in enumerate([run(MAKERS[kind](), kind), *results]):  # or else being close would mean little
        assert not any(close(one, other, share=1e-3) for other in results[i:])
    model.merge_adapter()
    assert close(results[0], run(model, kind))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pefts_own_conversion_gives_the_same_weights(tmp_path, kind):
    model = calibrated(kind)
    save_trex_as_lora(model, tmp_path / "out")
    tensors, (_, converted) = adapter_of(tmp_path / "out")[1], convert_to_lora(model, rank=2)
    assert set(tensors) == set(converted)
    for name in (key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key):
        one, other = (part[f"{name}.lora_B.weight"] @ part[f"{name}.lora_A.weight"] for part in (tensors, converted))
        assert one.any() and close(one, other)


class Narrow(nn.Module):
    """Layers whose static weights are of two kinds: in the second, D_in = r_a."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 2), nn.Linear(2, 5)

    def forward(self, x):
        return self.second(self.first(x))


def test_layers_of_different_rank_are_filled_up(tmp_path):
    targets = {"target_modules": ["first", "second"]}
    model = randomize(get_peft_model(Narrow(), TRexConfig(r_a=2, r_b=3, use_prior=False, **targets)))
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    calibrate_trex_merge(model, [{"x": x}], progress=False)
    save_trex_as_lora(model, tmp_path / "out", per_cluster=False)
    assert len(layers_of(model)["first"].static_factors("default")[0]) == 2
    assert adapter_of(tmp_path / "out")[0]["r"] == 3
    expected = with_static_weights(Narrow(), model)(x.double())
    assert close(load(Narrow(), tmp_path / "out")(x), expected) and not close(Narrow()(x), expected, share=1e-2)


# Runs where peft_trex cannot be imported: the folder is all there is, and a copy of the router's code.
STOCK = """
import importlib.util, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_trex":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, folder, work, code = sys.argv[1:]
spec = importlib.util.spec_from_file_location("semantic_router", code)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
router = module.SemanticRouter.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), router.adapters["overall"], "overall")
for name in router.clusters:
    model.load_adapter(router.adapters[name], name)
ids = load_file(work + "/ids.safetensors")["ids"]
names = [router.default, *router.adapter_names(ids[1:])]
model.double().eval()
with torch.no_grad():
    mixed = model(input_ids=ids, adapter_names=names).logits
    alone = []
    for row, name in zip(ids, names):
        model.set_adapter(name)
        alone.append(model(input_ids=row[None]).logits[0])
assert "peft_trex" not in sys.modules
save_file({"mixed": mixed, "alone": torch.stack(alone)}, work + "/logits.safetensors")
print(json.dumps(names))
"""


@torch.no_grad()
def test_exported_adapters_can_be_averaged(tmp_path):
    """As docs/guide/deploy.md says: "cat" is the average of the weights, and "linear" another thing."""
    models = {}
    for seed, name in enumerate(("first", "second")):
        models[name] = randomize(calibrated(), seed=seed)
        save_trex_as_lora(calibrate(models[name]), tmp_path / name)
    base = make_llama().double()
    expected = {name: 0.0 for name in layers_of(models["first"])}
    for name, share in (("first", 0.7), ("second", 0.3)):
        static = with_static_weights(make_llama(), models[name])
        for layer in expected:
            expected[layer] = expected[layer] + share * (
                static.get_submodule(layer).weight - base.get_submodule(layer).weight
            )
    averaged = PeftModel.from_pretrained(make_llama(), tmp_path / "first", "first").double()
    averaged.load_adapter(tmp_path / "second", "second")
    for kind, exact in (("cat", True), ("linear", False)):
        averaged.add_weighted_adapter(["first", "second"], [0.7, 0.3], kind, combination_type=kind)
        found = {name: layer.get_delta_weight(kind).double() for name, layer in layers_of(averaged, LoraLayer).items()}
        assert found.keys() == expected.keys()
        errors = [(found[name] - expected[name]).norm() / expected[name].norm() for name in expected]
        assert max(errors) < 1e-4 if exact else min(errors) > 0.05


@pytest.mark.slow
def test_a_program_without_this_package_serves_the_folder(tmp_path, llama, folder):
    model, work = llama, tmp_path
    make_llama().save_pretrained(work / "base")
    ids = prompts(12, seed=11)
    save_file({"ids": ids}, work / "ids.safetensors")
    command = [sys.executable, "-I", "-c", STOCK, str(work / "base"), str(folder), str(work)]
    command.append(semantic_router.__file__)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=work)
    assert result.returncode == 0, result.stderr
    names, logits = json.loads(result.stdout.splitlines()[-1]), load_file(work / "logits.safetensors")
    prior, embedding = model.base_model.prior_of("default"), model.get_input_embeddings()
    clusters = prior.score(embedding(ids).mean(1)).argmax(1).tolist()
    assert names == ["overall", *(CLUSTERS[cluster] for cluster in clusters[1:])]
    assert set(names) == {"overall", *CLUSTERS}
    assert close(logits["mixed"], logits["alone"])
    with torch.no_grad():
        for row, got, cluster in zip(ids, logits["mixed"], [None, *clusters[1:]], strict=True):
            expected = with_static_weights(make_llama(), model, cluster)(input_ids=row[None]).logits[0]
            assert close(got, expected)
        # a prompt's own cluster stands for the adapter better than the others do
        wanted, error = copy.deepcopy(model).double()(input_ids=ids).logits, {}
        for shift in range(4):
            shifted = [
                with_static_weights(make_llama(), model, (cluster + shift) % 4)(input_ids=row[None]).logits[0]
                for row, cluster in zip(ids, clusters, strict=True)
            ]
            error[shift] = (torch.stack(shifted) - wanted).pow(2).mean().item()
    assert min(error, key=error.get) == 0


def test_what_lies_in_the_folder(llama, folder):
    assert files(folder) == EVERYTHING
    assert os.listdir(folder.parent) == ["out"]
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in lines] == [name for name in EVERYTHING if name not in ("SHA256SUMS", *FOLDERS)]
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for digest, name in lines)
    assert SemanticRouter.from_pretrained(folder).adapters == {
        "overall": folder,
        **{name: folder / name for name in CLUSTERS},
    }
    assert json.loads((folder / "router.json").read_text()) == {
        "version": 1,
        "base_model_name_or_path": None,
        "prior_encoder": "input_embeddings",
        "default": "overall",
        "adapters": {"overall": ".", **{name: name for name in CLUSTERS}},
        "clusters": CLUSTERS,
        "hashes": "SHA256SUMS",
    }
    prior, tensors = llama.base_model.prior_of("default"), load_file(folder / "router.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(
        ("centroids", "mean", "token_scores"), torch.float32
    )
    assert torch.equal(tensors["centroids"], prior.centroids) and torch.equal(tensors["mean"], prior.mean)
    table = llama.get_input_embeddings().weight.detach()
    assert close(tensors["token_scores"], table @ prior.centroids.T) and len(table) == VOCAB
    for name in (".", *CLUSTERS):
        config, tensors = adapter_of(folder / name)
        assert (config["task_type"], config["bias"], config["modules_to_save"]) == ("CAUSAL_LM", "none", None)
        assert config["inference_mode"] is True and config["use_rslora"] is False
        expected = {f"base_model.model.{layer}.lora_{part}.weight" for layer in layers_of(llama) for part in "AB"}
        assert set(tensors) == expected and {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_tokens_are_scored_as_the_model_embeds_them(tmp_path):
    model = calibrated()
    embedding, noise = model.get_input_embeddings(), torch.ones(32)
    table = embedding.weight.detach()
    # some models scale what they look up, and in training NEFTune adds noise to it
    embedding.register_forward_hook(lambda module, _, output: 3 * output + noise * module.training)
    save_trex_as_lora(model.train(), tmp_path / "out")
    scores = load_file(tmp_path / "out" / "router.safetensors")["token_scores"]
    assert close(scores, 3 * table @ model.base_model.prior_of("default").centroids.T) and embedding.training


def test_the_base_models_name_travels(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = calibrated(base=type(make_llama()).from_pretrained(tmp_path / "base"))
    save_trex_as_lora(model, tmp_path / "out")
    for part in (ADAPTER[0], f"{CLUSTERS[2]}/{ADAPTER[0]}", "router.json"):
        assert json.loads((tmp_path / "out" / part).read_text())["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}, {"q_proj", "up_proj"}),
        (
            {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
            {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"},
        ),
        ({"exclude_modules": ["down_proj"]}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        (
            {"exclude_modules": ["layers.0.self_attn.k_proj"], "target_modules": ["k_proj", "v_proj"]},
            {f"model.layers.{name}" for name in ("0.self_attn.v_proj", "1.self_attn.k_proj", "1.self_attn.v_proj")},
        ),
        ({"target_modules": r".*\.0\..*gate_proj"}, {"model.layers.0.mlp.gate_proj"}),
        ({"target_modules": r".*_proj", "exclude_modules": ".*[kvo]_proj|.*mlp.*"}, {"q_proj"}),
    ],
)
def test_stock_peft_finds_the_same_layers(tmp_path, settings, targets):
    model = adapted(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is approximate
        save_trex_as_lora(model, tmp_path / "out", per_cluster=False)
    assert set(adapter_of(tmp_path / "out")[0]["target_modules"]) == targets
    assert set(layers_of(load(make_llama(), tmp_path / "out"), LoraLayer)) == set(layers_of(model))


def make_classifier():
    torch.manual_seed(0)
    config = make_llama().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("make", "head", "settings"),
    [
        (make_classifier, "score", {"task_type": "SEQ_CLS"}),
        (make_llama, "lm_head", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}),
    ],
)
def test_a_trained_head_travels(tmp_path, make, head, settings):
    model = adapted(base=make(), **settings)
    trained = getattr(model.base_model.model, head).modules_to_save["default"].weight
    trained.data = torch.randn(trained.shape, generator=torch.Generator().manual_seed(3))
    save_trex_as_lora(calibrate(model), tmp_path / "out")
    loaded = load(make(), tmp_path / "out", CLUSTERS)
    for name, cluster in [("overall", None), *((name, k) for k, name in enumerate(CLUSTERS))]:
        assert head in loaded.peft_config[name].modules_to_save  # or else it would take the base model's place
        loaded.set_adapter(name)
        base = with_static_weights(make(), model, cluster)
        assert not close(run(loaded), run(base), share=0.1)
        getattr(base, head).weight.data = trained.data
        assert close(run(loaded), run(base))


def test_a_bfloat16_adapter_stays_one(tmp_path):
    model = calibrate(adapted().to(torch.bfloat16))
    save_trex_as_lora(model, tmp_path / "out")
    for name in (".", *CLUSTERS):
        assert {tensor.dtype for tensor in adapter_of(tmp_path / "out" / name)[1].values()} == {torch.bfloat16}
    SemanticRouter.from_pretrained(tmp_path / "out")
    loaded = load(make_llama(), tmp_path / "out")
    expected = run(with_static_weights(make_llama(), model.float()))
    assert (run(loaded) - expected).norm() < 0.02 * (expected - run(make_llama())).norm()


def test_one_adapter_without_a_calibration(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"no static weights for each cluster; call calibrate_trex_merge\(.*per_c"):
        save_trex_as_lora(model, tmp_path / "out")
    assert not files(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is approximate
        save_trex_as_lora(model, tmp_path / "out", per_cluster=False)
        model.merge_adapter()
    assert files(tmp_path / "out") == ["SHA256SUMS", *ADAPTER]
    assert close(run(load(make_llama(), tmp_path / "out")), run(model))
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="no static weights for each cluster"):
        save_trex_as_lora(calibrate(model, per_cluster=False), tmp_path / "other")
    assert files(tmp_path) == ["out", *(f"out/{name}" for name in ("SHA256SUMS", *ADAPTER))]
    save_trex_as_lora(model, tmp_path / "other", per_cluster=False)
    assert close(run(load(make_llama(), tmp_path / "other")), run(with_static_weights(make_llama(), model)))


def test_a_server_finds_an_adapter_by_its_name(tmp_path):
    """A server compares the base model's name with its own."""
    save_trex_as_lora(calibrated(), tmp_path / "named", base_model="org/base")
    for part in (ADAPTER[0], f"overall/{ADAPTER[0]}", f"{CLUSTERS[2]}/{ADAPTER[0]}", "router.json"):
        assert json.loads((tmp_path / "named" / part).read_text())["base_model_name_or_path"] == "org/base"
    for name in ADAPTER:
        one, other = (tmp_path / "named" / folder / name for folder in (".", "overall"))
        assert one.read_bytes() == other.read_bytes()


def test_a_calibration_that_was_saved_is_exported_all_the_same(tmp_path, llama, folder):
    llama.save_pretrained(tmp_path / "adapter")
    save_trex_as_lora(PeftModel.from_pretrained(make_llama(), tmp_path / "adapter"), tmp_path / "out")
    assert files(tmp_path / "out") == EVERYTHING
    for name in EVERYTHING:
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("merged", [False, True])
def test_one_of_several_adapters_and_nothing_changes(tmp_path, merged):
    model, head = calibrated(target_modules=["q_proj", "up_proj"]), {"modules_to_save": ["lm_head"]}
    model.add_adapter("other", TRexConfig(r_a=2, r_b=4, use_prior=False, target_modules=["v_proj"], **head))
    own_head = model.base_model.model.lm_head.modules_to_save["other"].weight.data.mul_(2)
    randomize(model, "other", seed=1).train()
    calibrate(model, per_cluster=False, adapter_name="other")
    if merged:
        model.merge_adapter()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(module.training, getattr(module, "merged_adapters", None)) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    save_trex_as_lora(model, tmp_path / "out")
    save_trex_as_lora(model, tmp_path / "other", adapter_name="other", per_cluster=False)
    assert model.active_adapters == ["default"]
    assert flags == [(module.training, getattr(module, "merged_adapters", None)) for module in model.modules()]
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert set(adapter_of(tmp_path / "out")[0]["target_modules"]) == {"q_proj", "up_proj"}
    assert set(adapter_of(tmp_path / "other")[0]["target_modules"]) == {"v_proj"}
    for name, adapter in (("out", "default"), ("other", "other")):
        base = make_llama().double()
        with torch.no_grad():
            for path, layer in layers_of(model).items():
                if adapter in layer.trex_A:
                    base.get_submodule(path).weight += layer.get_delta_weight(adapter)
        if adapter == "other":
            base.lm_head.weight.data = own_head.double()
        assert close(run(load(make_llama(), tmp_path / name)), run(base))


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_is_there_already_is_left_as_it_is(tmp_path, llama, what):
    path = tmp_path / "out"
    kept = path if what == "file" else (path if what == "folder" else tmp_path / "real") / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    if what == "link":
        path.symlink_to(kept.parent)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"something at .* already.*give another path, or remove it first"):
        save_trex_as_lora(llama, path)
    assert files(tmp_path) == before and kept.read_text() == "mine"


@pytest.mark.parametrize("form", ["out/", "./out", "a/b/c/out", "a/../out", "empty", Path("out")])
def test_forms_of_a_path(tmp_path, monkeypatch, llama, form):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").mkdir()
    save_trex_as_lora(llama, form)
    assert files(tmp_path / form) == EVERYTHING
    there = {path for path in files(tmp_path) if not set(path.split("/")) & {*EVERYTHING, *ADAPTER}}
    assert there == {"a", "empty", *{"a/b/c/out": ["a/b", "a/b/c", "a/b/c/out"], "empty": []}.get(str(form), ["out"])}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("function", "calls"), [("save_file", 2), ("save_file", 6), ("_save_router", 1)])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, llama, there, error, function, calls):
    original, counted = getattr(export, function), []

    def failing(*args, **kwargs):
        counted.append(args)
        if len(counted) == calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(export, function, failing)
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(type(error)):
        save_trex_as_lora(llama, tmp_path / "out")
    assert len(counted) == calls and files(tmp_path) == ["out"] * there
    monkeypatch.undo()
    save_trex_as_lora(llama, tmp_path / "out")
    assert files(tmp_path / "out") == EVERYTHING


@pytest.mark.parametrize("wrong", ["nan", "inf"])
@pytest.mark.parametrize("part", ["trex_A", "trex_B", "trex_gate", "trex_static"])
def test_weights_that_are_not_finite_are_refused(tmp_path, part, wrong):
    model = calibrated()
    layer = layers_of(model)["model.layers.1.mlp.up_proj"]
    if part == "trex_static":  # of the last cluster alone, when all the others are written
        layer.trex_static["default"][-1, 0, 0] = float(wrong)
    else:
        getattr(layer, part)["default"].data.view(-1)[0] = float(wrong)
    if (part, wrong) == ("trex_gate", "inf"):  # a gate that is wide open
        return save_trex_as_lora(model, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"in base_model.model.model.layers.1.mlp.up_proj.lora_.*of the adapter 'default'"
    ):
        save_trex_as_lora(model, tmp_path / "out")
    assert not files(tmp_path)


def test_what_is_refused(tmp_path, llama):
    path = tmp_path / "a" / "out"
    with pytest.raises(ValueError, match=r"no adapter 'other'; the model has \['default'\]"):
        save_trex_as_lora(llama, path, adapter_name="other")
    with pytest.raises(ValueError, match="a LlamaForCausalLM, has no T-REX adapter; make one"):
        save_trex_as_lora(make_llama(), path)
    with pytest.raises(TypeError, match="model is a str"):
        save_trex_as_lora("model", path)
    for bias in ("all", "trex_only"):
        with pytest.raises(ValueError, match=f"'default' trains biases .bias='{bias}'.*train with bias='none'"):
            save_trex_as_lora(adapted(bias=bias, fit=False), path, per_cluster=False)
    with pytest.raises(ValueError, match="no static weights for each cluster"):
        save_trex_as_lora(adapted(fit=False, use_prior=False), path)
    assert not files(tmp_path)


def test_what_lora_would_save_with_other_values_is_refused(tmp_path):
    model = calibrate(adapted().half())  # what is finite in float32 need not be so in the adapter's dtype
    for layer in layers_of(model).values():
        layer.trex_B["default"].data.fill_(3e4)
        layer.trex_gate["default"].data.fill_(1)
        layer.trex_static["default"].fill_(3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_trex_as_lora(model, tmp_path / "half")
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lm_head"), pytest.warns(UserWarning, match="merged approximately"):
        save_trex_as_lora(model, tmp_path / "head", per_cluster=False)
    model = calibrated()
    model.base_model.prior_of("default").mean[0] = float("nan")
    with pytest.raises(ValueError, match="in mean of"):
        save_trex_as_lora(model, tmp_path / "parents" / "router")
    assert not files(tmp_path)


class Nested(nn.Module):
    """A layer whose name is the end of another one's, and a head that is called as if it were ours."""

    def __init__(self):
        super().__init__()
        self.lin, self.sub, self.trex_head = nn.Linear(4, 4), nn.Sequential(), nn.Linear(4, 4)
        self.sub.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.trex_head(self.sub.lin(self.lin(x)))


@pytest.mark.filterwarnings("error:.*missing adapter keys")
def test_names_that_are_like_others(tmp_path):
    config = TRexConfig(r_a=2, r_b=3, use_prior=False, target_modules="lin", modules_to_save=["trex_head"])
    model = randomize(get_peft_model(Nested(), config))
    head = model.base_model.model.trex_head.modules_to_save["default"]
    head.weight.data = torch.arange(16.0).view(4, 4).T  # not contiguous, which safetensors refuses
    with pytest.warns(UserWarning, match="merged approximately"):
        save_trex_as_lora(model, tmp_path / "out", per_cluster=False)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path / "out")
    assert set(layers_of(loaded, LoraLayer)) == {"lin"}
    assert torch.equal(loaded.base_model.model.trex_head.modules_to_save["default"].weight, head.weight)


class Around(nn.Module):  # as DistributedDataParallel
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Around, torch.compile])
def test_a_wrapped_model_leaves_as_it_would_without(tmp_path, wrap):
    model = adapted(base=make_classifier(), task_type="SEQ_CLS")
    calibrate(wrap(model))
    save_trex_as_lora(model, tmp_path / "plain")
    save_trex_as_lora(wrap(model), tmp_path / "wrapped")
    plain, wrapped = (adapter_of(tmp_path / name)[1] for name in ("plain", "wrapped"))
    assert "base_model.model.score.weight" in plain and plain.keys() == wrapped.keys()


@pytest.mark.parametrize("what", ["link", "cwd", "mode", "nowhere"])
def test_a_folder_that_is_there_stays_itself(tmp_path, monkeypatch, what, llama):
    real = tmp_path / "real"
    if what != "nowhere":
        real.mkdir()
        real.chmod(0o2770)
    path = real
    if what in ("link", "nowhere"):
        path = tmp_path / "link"
        path.symlink_to(real)
    if what == "cwd":
        monkeypatch.chdir(real)
        path = "."
    save_trex_as_lora(llama, path)
    assert files(real) == EVERYTHING
    assert os.getcwd() and (what == "nowhere" or stat.S_IMODE(real.stat().st_mode) == 0o2770)


def test_embeddings_that_were_resized_travel(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    base = type(make_llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB + 6)
    model = calibrate(adapted(base=base, revision="abc"))
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        save_trex_as_lora(model, tmp_path / "out")
    config, tensors = adapter_of(tmp_path / "out")
    assert sum("embed_tokens" in key or "lm_head" in key for key in tensors) == 2 and config["revision"] == "abc"
    save_trex_as_lora(model, tmp_path / "without", save_embedding_layers=False)
    assert not any("embed_tokens" in key for key in adapter_of(tmp_path / "without")[1])


def test_the_configuration_comes_last(tmp_path, monkeypatch):
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: moved.append(Path(to).name) or rename(self, to))
    save_trex_as_lora(calibrated(), tmp_path / "out")
    assert moved[-1] == "adapter_config.json" and len(moved) == 11


def test_files_are_written_on_the_same_disk(tmp_path, monkeypatch):
    model = calibrated()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    save_trex_as_lora(model, tmp_path / "out")


class Dotted(nn.Module):
    """A layer's name as a pattern would find `axlin`; as a name it is the end of another's."""

    def __init__(self):
        super().__init__()
        self.a, self.sub, self.axlin = nn.Sequential(), nn.Sequential(), nn.Linear(4, 4)
        self.a.lin = nn.Linear(4, 4)
        self.sub.a = nn.Sequential()
        self.sub.a.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.axlin(self.sub.a.lin(self.a.lin(x)))


def test_names_are_no_patterns(tmp_path):
    model = get_peft_model(Dotted(), TRexConfig(r_a=2, r_b=3, use_prior=False, target_modules=r"a\.lin"))
    with pytest.warns(UserWarning, match="merged approximately"):
        save_trex_as_lora(randomize(model), tmp_path / "out", per_cluster=False)
    loaded = PeftModel.from_pretrained(Dotted(), tmp_path / "out")
    assert {key.rpartition(".lora_")[0] for key in loaded.state_dict() if "lora" in key} == {"base_model.model.a.lin"}


def test_the_routers_table_is_not_rounded_under_autocast(tmp_path):
    model = calibrated()
    save_trex_as_lora(model, tmp_path / "out")
    with torch.autocast("cpu", torch.bfloat16):
        save_trex_as_lora(model, tmp_path / "cast")
    one, other = (load_file(tmp_path / name / "router.safetensors")["token_scores"] for name in ("out", "cast"))
    assert torch.equal(one, other)


def test_an_interrupt_while_the_files_move_leaves_nothing(tmp_path, monkeypatch, llama):
    renamed, rename = [], Path.rename

    def interrupted(self, to):
        renamed.append(to)
        if len(renamed) == 3:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_trex_as_lora(llama, tmp_path / "a" / "out")
    assert not files(tmp_path)


@pytest.mark.filterwarnings("ignore:Already found", "ignore:You are trying")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"]])
def test_an_adapter_beneath_is_not_dropped(tmp_path, targets):
    beneath = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = calibrate(adapted(base=beneath.base_model.model, target_modules=targets))
    with pytest.raises(ValueError, match=r"Another method's adapter lies in the model .*q_proj"):
        save_trex_as_lora(model, tmp_path / "out")
    assert not files(tmp_path)
