"""Adapters in a base model without a PeftModel: of PEFT's low-level functions, and of libraries that load them.

What they compute and save is held against a PeftModel, in float64.
"""

import copy
import json
import warnings

import pytest
import torch
from conftest import BEFORE_5, adapted, answered, batches, make_gpt2, make_llama, prompts, randomize
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.functional import delete_adapter, set_adapter
from safetensors.torch import load_file, save_file
from texts import make_tokenizer, text
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments, pipeline

from peft_trex import (
    TRexConfig,
    TRexPriorCallback,
    calibrate_trex_merge,
    initialize_trex_prior,
    prune_trex,
    routing_report,
    save_trex_as_lora,
    steer_trex,
)
from peft_trex.model import TRexModel, find_tuner
from peft_trex.prior.priors import Priors

SMALL = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM"}
IDS = prompts(4, seed=2)
TENSORS = "adapter_model.safetensors"
PRIOR = ["base_model.trex_prior.centroids", "base_model.trex_prior.mean", "base_model.trex_prior.mean_scores"]


@pytest.fixture(autouse=True)
def any_release_of_peft(monkeypatch):
    """transformers 5.24 asks for a release of PEFT that is not out, and works with those before."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


@torch.no_grad()
def computed(model):
    """Logits of labelled rows, and tokens that are generated."""
    model.eval()
    tokens = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    return [model(**answered(6, seed=3)).logits, tokens.double()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(computed(one), computed(other), strict=True))


def exact(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def base_of(folder):
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)


def saved(folder, name="adapter", seed=0, base=None, **config):
    """A PeftModel in float64, whose adapter is saved in the folder; its base model is, too."""
    if not (folder / "base").exists():
        make_llama().double().save_pretrained(folder / "base")
    model = exact(randomize(adapted(base=base or base_of(folder), fit=False, **config), seed=seed))
    if config.get("use_prior", True):
        initialize_trex_prior(model, batches(seed=seed), progress=False)
    model.save_pretrained(folder / name)
    return model


def injected(folder, name="adapter", model=None, adapter_name="default"):
    model = base_of(folder) if model is None else model
    inject_adapter_in_model(TRexConfig.from_pretrained(folder / name), model, adapter_name)
    result = set_peft_model_state_dict(model, load_file(folder / name / TENSORS), adapter_name)
    own = [key for key in result.missing_keys if "trex" in key and f".{adapter_name}" in key]
    assert not result.unexpected_keys and not own
    return exact(model)


def loaded(folder, name="adapter", model=None, adapter_name="default", **options):
    model = base_of(folder) if model is None else model
    model.load_adapter(str(folder / name), adapter_name, **options)
    return exact(model)


def from_folder(folder, name="adapter"):
    return exact(AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64))


def from_pipeline(folder, name="adapter"):
    pipe = pipeline("text-generation", str(folder / name), tokenizer=make_tokenizer(), dtype=torch.float64)
    assert pipe(text(IDS[0].tolist()), max_new_tokens=2)[0]["generated_text"]
    return exact(pipe.model)


def from_parts(folder, name="adapter"):
    """A configuration and tensors in memory, under the keys that a model without a PeftModel has."""
    tensors = get_peft_model_state_dict(injected(folder, name))
    assert {key for key in tensors if "prior" in key} == {key.removeprefix("base_model.") for key in PRIOR}
    model, config = base_of(folder), TRexConfig.from_pretrained(folder / name)
    model.load_adapter(peft_config=config, adapter_state_dict=tensors)
    return exact(model)


WAYS = [injected, loaded, from_folder, from_pipeline, from_parts]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_computes_and_saves_the_same(tmp_path, way):
    model = saved(tmp_path)
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    twin = way(tmp_path)
    assert same(twin, model) and not same(twin, base_of(tmp_path))
    before = load_file(tmp_path / "adapter" / TENSORS)
    assert sorted(key for key in before if "prior" in key) == PRIOR and any("trex_static" in key for key in before)
    after = {f"base_model.model.{key}": tensor for key, tensor in get_peft_model_state_dict(twin).items()}
    after = {key.replace("base_model.model.trex_prior", "base_model.trex_prior"): after[key] for key in after}
    if way is not injected:
        # transformers does not know of an adapter that PEFT has put into its model.
        twin.save_pretrained(tmp_path / "again")
        after = load_file(tmp_path / "again" / TENSORS)
        paths = [tmp_path / each / "adapter_config.json" for each in ("adapter", "again")]
        first, second = (json.loads(path.read_text()) for path in paths)
        # PEFT writes a set in any order.
        assert set(first.pop("target_modules")) == set(second.pop("target_modules")) and first == second
        assert same(PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "again"), model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_several_adapters_come_and_go(tmp_path):
    """Each has its own prior, which goes with it, and what is left computes as before."""
    models = {name: saved(tmp_path, name, seed) for seed, name in enumerate(("one", "two", "three"))}
    model = base_of(tmp_path)
    for name in models:
        loaded(tmp_path, name, model, name)
    assert model.active_adapters() == ["three"] and set(find_tuner(model).trex_prior) == set(models)
    for name in models:
        model.set_adapter(name)
        assert same(model, models[name])
    model.disable_adapters()
    assert same(model, base_of(tmp_path))
    model.enable_adapters()
    assert model.active_adapters() == ["three"] and same(model, models["three"])
    # Two at once, as a PeftModel adds them.
    both = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "one", "one")
    both.load_adapter(tmp_path / "two", "two")
    exact(both).base_model.set_adapter(["one", "two"])
    model.set_adapter(["one", "two"])
    assert same(model, both)
    model.set_adapter("one")
    model.delete_adapter("one")
    assert model.active_adapters() == ["two"] and set(find_tuner(model).trex_prior) == {"two", "three"}
    assert same(model, models["two"])
    model.delete_adapter(["two", "three"])
    assert not find_tuner(model).trex_prior and not hasattr(model, "peft_config") and same(model, base_of(tmp_path))
    model.add_adapter(TRexConfig(**SMALL), "two")
    loaded(tmp_path, "one", model, "one")
    assert same(model, models["one"])


def test_layers_agree_on_the_adapter_that_follows_a_deleted_one(tmp_path):
    """PEFT lets each layer choose among those that it has."""
    targets = {"one": ["q_proj"], "two": ["v_proj"], "three": ["q_proj"]}
    models = {name: saved(tmp_path, name, target_modules=targets[name]) for name in targets}
    model = base_of(tmp_path)
    for name in models:
        injected(tmp_path, name, model, name)
    set_adapter(model, "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delete_adapter(model, "one", prefix="trex_")
    model.peft_config.pop("one")
    assert {tuple(layer.active_adapters) for _, layer in find_tuner(model).trex_layers()} == {("two",)}
    assert same(model, models["two"])


def test_beside_another_method(tmp_path):
    """A LoRA that transformers has loaded is another adapter, and what it computes does not hang on ours."""
    ours, base = saved(tmp_path), base_of(tmp_path)
    lora = get_peft_model(base_of(tmp_path), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    for first, second in (("adapter", "lora"), ("lora", "adapter")):
        model = base_of(tmp_path)
        loaded(tmp_path, first, model, first)
        loaded(tmp_path, second, model, second)
        model.set_adapter("adapter")
        assert same(model, ours)
        model.set_adapter("lora")
        torch.testing.assert_close(computed(model), computed(exact(lora)))
        model.delete_adapter("adapter")
        torch.testing.assert_close(computed(model), computed(lora))
    assert not same(lora, base)


def test_trained_by_the_trainer(tmp_path):
    """`add_adapter`, a prior from the training data, training, saving: as a PeftModel."""
    make_llama().save_pretrained(tmp_path / "base")
    rows = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 5, -100)} for ids in prompts(16)]
    models, losses = {}, {}
    for kind in ("added", "PeftModel"):
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base").double()
        if kind == "added":
            model.add_adapter(TRexConfig(**SMALL))
        else:
            model = get_peft_model(model, TRexConfig(**SMALL))
        exact(randomize(model))
        options = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, seed=0, **options)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[TRexPriorCallback(progress=False)])
        losses[kind] = trainer.train().training_loss
        assert find_tuner(model).prior_of("default").fitted
        assert {name.rpartition(".trex")[1] for name, p in model.named_parameters() if p.requires_grad} == {".trex"}
        trainer.save_model(tmp_path / kind)
        models[kind] = model
    assert losses["added"] == losses["PeftModel"] and same(models["added"], models["PeftModel"])
    first, second = (load_file(tmp_path / kind / TENSORS) for kind in models)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert same(from_folder(tmp_path, "added"), models["added"])


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients(tmp_path, checkpoints):
    model, gradients = saved(tmp_path), []
    twin = loaded(tmp_path, is_trainable=True)
    for each in (model, twin):
        each.train()
        each.requires_grad_(False)
        for _, layer in find_tuner(each).trex_layers():
            layer.set_adapter("default")
        if checkpoints:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        # The second forward must not take the first one's prior to its recomputation.
        (each(**answered(6, seed=3)).loss + each(**answered(6, seed=4)).loss).backward()
        gradients.append(
            {name.rpartition("layers.")[2]: p.grad for name, p in each.named_parameters() if p.requires_grad}
        )
    first, second = gradients
    assert first.keys() == second.keys() and len(first) == 14 * 6
    assert all(first[name] is not None and torch.equal(first[name], second[name]) for name in first)


def test_all_that_takes_a_model_takes_this_one(tmp_path):
    """Fit, steering, report, calibration, export and pruning need no PeftModel."""
    model = saved(tmp_path)
    twin = loaded(tmp_path, is_trainable=True)
    for each in (model, twin):
        initialize_trex_prior(each, batches(seed=7), progress=False)
    reports = [routing_report(each, batches(), progress=False) for each in (model, twin)]
    assert str(reports[0]) == str(reports[1])
    with torch.no_grad():
        plain = computed(twin)[0]
        outputs = []
        for each in (model, twin):
            with steer_trex(each, 2):
                outputs.append(computed(each)[0])
            outputs.append(each(**answered(6, seed=3), semantic_prior=2).logits)
    assert all(torch.equal(each, outputs[0]) for each in outputs) and not torch.equal(plain, outputs[0])
    for each, name in ((model, "first"), (twin, "second")):
        calibrate_trex_merge(each, batches(), per_cluster=True, progress=False)
        save_trex_as_lora(each, tmp_path / name, per_cluster=True)
    for path in (tmp_path / "first").rglob("*.safetensors"):
        tensors = [load_file(tmp_path / name / path.relative_to(tmp_path / "first")) for name in ("first", "second")]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    for each, report in zip((model, twin), reports, strict=True):
        prune_trex(each, report, keep=0.8)
    assert same(model, twin)
    twin.save_pretrained(tmp_path / "pruned")
    assert same(from_folder(tmp_path, "pruned"), twin)


def test_modules_that_are_trained_in_full(tmp_path):
    """A head beside the adapter, and a trained embedding with the frozen rows that the prior reads."""
    model = saved(tmp_path, modules_to_save=["lm_head", "embed_tokens"], target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter[7:11] += 1
    # The next base model has other frozen rows for these tokens.
    other = base_of(tmp_path)
    with torch.no_grad():
        other.get_input_embeddings().weight[7:11] = 0
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "adapter")
    twin = loaded(tmp_path, model=LlamaForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float64))
    assert find_tuner(twin).trex_prior["default"].token_ids.tolist() == [7, 8, 9, 10]
    assert same(twin, model)
    twin.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / TENSORS) for name in ("adapter", "again"))
    rows = {key for key in before if "token_" in key}
    assert len(rows) == 2 and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def _without(key, tensors):
    return {name: tensor for name, tensor in tensors.items() if key not in name}


REFUSED = {
    "trex_prior.mean_scores": r"lacks 1 T-REX tensors, such as \S+trex_prior.default.mean_scores",
    "layers.1.mlp.up_proj.trex_omega": "lacks 1 T-REX tensors",
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("first", [True, False])
def test_a_refused_file_leaves_the_model_as_it_was(tmp_path, monkeypatch, key, first):
    model = saved(tmp_path)
    save_file(_without(key, load_file(tmp_path / "adapter" / TENSORS)), tmp_path / "adapter" / TENSORS)
    # The header tells that much before anything is made.
    monkeypatch.setattr("peft_trex.config.check_against_config", lambda *_: None)
    base = base_of(tmp_path)
    if not first:
        saved(tmp_path, "good")
        loaded(tmp_path, "good", base, "good")
    names, generate = list(base.state_dict()), base.generate
    before = computed(base)
    with pytest.raises(ValueError, match=REFUSED[key]):
        base.load_adapter(str(tmp_path / "adapter"))
    assert list(base.state_dict()) == names and base.generate == generate
    assert all(torch.equal(a, b) for a, b in zip(computed(base), before, strict=True))
    assert base._hf_peft_config_loaded is (not first) and "_load_pretrained_model" not in vars(base)
    assert first == (not hasattr(base, "peft_config"))
    model.save_pretrained(tmp_path / "adapter")
    assert same(loaded(tmp_path, model=base), model)


def test_a_pickle_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter" / TENSORS
    torch.save(load_file(path), path.with_name("adapter_model.bin"))
    path.unlink()
    base = base_of(tmp_path)
    with pytest.raises(ValueError, match="Pickles can run code"):
        base.load_adapter(str(tmp_path / "adapter"))
    assert Priors.within(base) is None


def test_an_adapter_that_cannot_be_added(tmp_path):
    model = make_llama()
    names = list(model.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match="nowhere"):
            model.add_adapter(TRexConfig(target_modules=["nowhere"]))
        assert list(model.state_dict()) == names and not model._hf_peft_config_loaded
    with pytest.raises(ValueError, match=r"a part of one that has T-REX adapters already.*LlamaForCausalLM"):
        model.add_adapter(TRexConfig(**SMALL))
        model.model.add_adapter(TRexConfig(**SMALL), "inner")
    assert list(find_tuner(model).trex_prior) == ["default"] and find_tuner(model.model).model is model


def test_a_part_first_and_then_the_whole(tmp_path):
    """The adapter of a backbone goes on when the whole model gets one."""
    model = saved(tmp_path)
    base = base_of(tmp_path)
    config = TRexConfig(**SMALL)
    inject_adapter_in_model(config, base.model, "inner")
    exact(randomize(base, "inner"))
    initialize_trex_prior(base.model, batches(), adapter_name="inner", progress=False)
    with torch.no_grad():
        alone = base(input_ids=IDS).logits
    whole = get_peft_model(base, copy.copy(config), "outer")
    exact(randomize(whole, "outer", seed=5))
    assert [set(module) for module in whole.modules() if isinstance(module, Priors)] == [{"inner", "outer"}]
    whole.set_adapter("inner")
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=IDS).logits, alone)
    assert same(whole, model)


def test_a_sequence_of_modules():
    """An nn.Sequential calls all of its modules, and nothing of an adapter's may be one of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 7)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    config = TRexConfig(r_a=2, r_b=2, num_clusters=4, target_modules=["0", "2"], use_prior=False)
    before = model(x)
    inject_adapter_in_model(config, model)
    assert len(model) == 3
    assert torch.equal(model(x), before)
    exact(randomize(model))
    assert not torch.allclose(model(x), before)


def test_a_copy_has_its_own(tmp_path):
    saved(tmp_path)
    model = loaded(tmp_path)
    twin = copy.deepcopy(model)
    assert same(twin, model)
    find_tuner(twin).trex_prior["default"].centroids.mul_(-1)
    assert not torch.equal(computed(twin)[0], computed(model)[0])
    assert find_tuner(twin).model is twin and find_tuner(model).model is model


def test_a_tuner_for_adapters_without_one(tmp_path):
    saved(tmp_path)
    model = loaded(tmp_path)
    tuner = find_tuner(torch.nn.ModuleList([model]))
    assert isinstance(tuner, TRexModel) and tuner.active_adapters == ["default"]
    assert same(tuner.unload(), base_of(tmp_path))
    assert not any("trex" in name for name, _ in model.named_modules()) and "generate" not in vars(model)
    with pytest.raises(ValueError, match="has no T-REX adapter"):
        find_tuner(model)


def test_offloaded_layers_are_refused(tmp_path):
    if BEFORE_5:
        pytest.skip("transformers before 5 dispatches a model anew after an adapter was loaded")
    saved(tmp_path)
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {"lm_head": "cpu", **{f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts}}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(ValueError, match=r"layers are offloaded, such as model.layers.1.*PeftModel.from_pretrained"):
        model.load_adapter(str(tmp_path / "adapter"))
    assert Priors.within(model) is None


def test_other_models_are_as_they_were(tmp_path):
    """LoRA's way through transformers is its own, and no model without T-REX is touched."""
    lora = get_peft_model(make_gpt2(), LoraConfig(init_lora_weights=False, fan_in_fan_out=True))
    lora.save_pretrained(tmp_path / "lora")
    model = make_gpt2()
    info = model.load_adapter(str(tmp_path / "lora"))
    assert BEFORE_5 or not info.missing_keys
    assert same(model, lora)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / TENSORS) for name in ("lora", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
