"""A file that is refused changes nothing, what is hostile costs nothing, and what is of a later release is told so."""

import importlib
import json
import re
import time

import peft
import pytest
import torch
from conftest import adapted, batches, make_llama, prompts
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from processes import in_child
from safetensors.torch import load_file, save_file
from torch import nn

import peft_trex
from peft_trex import TRexConfig, calibrate_trex_merge, targets, trex_from_lora
from peft_trex.version import VERSION

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"


def calibrated(**settings):
    model = adapted(base=make_llama(), **settings)
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of an adapter with static weights, by name."""
    folder = tmp_path_factory.mktemp("saved")
    model = calibrated()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trex_" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}


@pytest.fixture
def folder(saved, tmp_path):
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change_tensors(folder, change):
    # The file is written anew while what was read would still lie in it.
    tensors = {name: each.clone() for name, each in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS)


def change_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def everything(model):
    """All that a model holds and is: tensors, modules, hooks, attributes, and what is trained."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    modules = [
        (name, type(each), each.training, *(len(vars(each)[kind]) for kind in hooks), sorted(vars(each)))
        for name, each in model.named_modules()
    ]
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return tensors, modules, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def assert_unchanged(model, before):
    after = everything(model)
    assert after[1:] == before[1:] and after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])


def put(key, value):
    """A change of one tensor: `value` is the new one, or makes it of the one that is there."""
    return lambda tensors: {**tensors, key: (value(tensors[key]) if callable(value) else value).contiguous()}


def first(value):
    return lambda tensor: tensor.clone().flatten().index_fill(0, torch.tensor([0]), value).reshape(tensor.shape)


DAMAGES = {
    "fewer rows": (put(f"{LAYER}.trex_A", lambda t: t[:1]), r"q_proj.trex_A has shape \(1, 32\).*asks for \(2, any\)"),
    "wider": (put(f"{LAYER}.trex_A", lambda t: t[:, :31]), r"q_proj.trex_A.*\(2, 31\) in the file and \(2, 32\)"),
    "a prior of another width": (
        put("base_model.trex_prior.mean", lambda t: t[:31]),
        r"trex_prior.\w+.mean.*\(31,\) in the file and \(32,\)",
    ),
    "static of another shape": (
        put(f"{LAYER}.trex_static", lambda t: t[:, :2]),
        r"trex_static has shape \(5, 2, 2\)",
    ),
    "NaN": (put(f"{LAYER}.trex_router", first(float("nan"))), r"trex_router.* holds NaN or infinity"),
    "infinity": (put("base_model.trex_prior.mean", first(float("inf"))), "mean.* holds NaN or infinity"),
    "minus infinity": (put(f"{LAYER}.trex_static", first(float("-inf"))), "trex_static.* holds NaN or infinity"),
    "whole numbers": (put(f"{LAYER}.trex_B", lambda t: t.long()), "trex_B.* has the dtype torch.int64; expected"),
    "truth values": (put(f"{LAYER}.trex_map", lambda t: t > 0), "trex_map.* has the dtype torch.bool; expected"),
    "eight bits": (put(f"{LAYER}.trex_gate", lambda t: t.to(torch.float8_e4m3fn)), "trex_gate.*float8.*expected"),
    "static whole numbers": (put(f"{LAYER}.trex_static", lambda t: t.int()), "trex_static.*torch.int32; expected"),
    "the base model's norm": (put(NORM, torch.full((32,), 7.0)), "norm.weight, which is the base model's"),
    "the base model's layer": (
        put(f"{LAYER}.base_layer.weight", torch.zeros(32, 32)),
        "base_layer.weight, which is the base model's",
    ),
    "the base model's head": (
        put("base_model.model.lm_head.base_layer.weight", torch.zeros(64, 32)),
        "lm_head.*which is",
    ),
    "another embedding": (
        put("base_model.model.model.embed_tokens.weight", torch.full((64, 32), 7.0)),
        "embed_tokens.weight, with 64 of 64 rows that are others than here.*modules_to_save",
    ),
    "another adapter's tensor": (put(f"{LAYER}.trex_A.beside", torch.zeros(1, 32)), "trex_A.beside"),
    "a name of nothing": (
        put("classifier.weight", torch.zeros(2, 32)),
        "classifier.weight, which is not in the model",
    ),
}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_refused_file_changes_nothing(folder, name):
    """Whichever way it comes: neither the base model, nor the adapter that it was for, nor the one beside it."""
    damage, message = DAMAGES[name]
    if name == "the base model's head":
        change_config(folder, target_modules=[*json.loads((folder / CONFIG).read_text())["target_modules"], "lm_head"])
        message = "lm_head.trex_static is not in the file|lm_head.base_layer.weight, which is"
    change_tensors(folder, damage)
    base, model = make_llama().train(), calibrated()
    model.add_adapter("beside", TRexConfig(r_a=1, r_b=2, num_clusters=3, task_type="CAUSAL_LM"))
    roads = [
        (base, lambda: PeftModel.from_pretrained(base, folder)),
        (model, lambda: model.load_adapter(folder, "default")),
        (model, lambda: model.load_adapter(folder, "new")),
        (model, lambda: set_peft_model_state_dict(model, load_file(folder / WEIGHTS))),
    ]
    for number, (changed, load) in enumerate(roads):
        before = everything(changed)
        # The configuration is compared where it is read; else the model is.
        read = number in (0, 2)
        with pytest.raises(ValueError, match=r"(?s)" + message if read or "asks for" not in message else "trex_A"):
            load()
        assert_unchanged(changed, before)
        assert "new" not in model.peft_config


def test_what_torch_calls_a_runtime_error_is_one(folder):
    change_tensors(folder, DAMAGES["wider"][0])
    model = calibrated()
    before = everything(model)
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match=r"size mismatch for .*trex_A"):
            model.load_adapter(folder, "default")
    state = {
        key: tensor[:1] if key.endswith("q_proj.trex_A.default") else tensor * 2 for key, tensor in before[0].items()
    }
    with pytest.raises(RuntimeError, match=r"size mismatch for .*trex_A"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_a_loaded_file_brings_its_static_weights_or_takes_them_away(folder, saved):
    model, expected = adapted(base=make_llama()), load_file(folder / WEIGHTS)
    model.load_adapter(folder, "default")
    static = {key: tensor for key, tensor in model.state_dict().items() if "trex_static" in key}
    assert static and all(torch.equal(static[key], expected[key.removesuffix(".default")]) for key in static)
    change_tensors(folder, lambda tensors: {key: each for key, each in tensors.items() if "static" not in key})
    model.load_adapter(folder, "default")
    assert not model.base_model.calibrated_adapters()


class Masked(nn.Module):
    """A head with a mask of minus infinity and a counter, as models have them in buffers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("mask", torch.full((4,), float("-inf")))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.linear(x)


def masked():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Masked())


def test_what_is_trained_beside_the_adapter_is_its_own(tmp_path):
    """Modules in full, whatever they hold, and biases."""
    config = {"target_modules": ["0"], "modules_to_save": ["1"], "use_prior": False, "init_weights": False}
    model = get_peft_model(masked(), TRexConfig(bias="all", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(masked(), tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    head = "base_model.model.1"
    for key, tensor, message in (
        (f"{head}.linear.weight", torch.full((4, 8), float("nan")), "linear.weight.* holds NaN"),
        (f"{head}.steps", torch.tensor(2.5), "steps.* has the dtype|steps"),
        (f"{head}.linear.weight", torch.zeros(4, 9), "size mismatch for .*linear.weight"),
    ):
        # The file is written anew while these would still lie in it.
        tensors = {name: each.clone() for name, each in load_file(tmp_path / WEIGHTS).items()}
        base = masked()
        before = everything(base)
        save_file({**tensors, key: tensor}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert_unchanged(base, before)
        save_file(tensors, tmp_path / WEIGHTS)
    change_tensors(
        tmp_path, lambda tensors: {key: each for key, each in tensors.items() if "linear.weight" not in key}
    )
    with pytest.raises(ValueError, match=r"lacks the tensor .*1.linear.weight"):
        PeftModel.from_pretrained(masked(), tmp_path)


def test_a_pickle_is_not_read(folder):
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "adapter_model.bin")
    # Beside safetensors, PEFT does not look at it.
    PeftModel.from_pretrained(make_llama(), folder)
    (folder / WEIGHTS).unlink()
    base, model = make_llama(), calibrated()
    for load in (
        lambda: PeftModel.from_pretrained(base, folder),
        lambda: model.load_adapter(folder, "default"),
        lambda: model.load_adapter(folder, "new"),
        lambda: TRexConfig.from_pretrained(str(folder)),
    ):
        with pytest.raises(ValueError, match=r"adapter_model.bin.*Pickles can run code.*convert it"):
            load()
    assert_unchanged(base, everything(make_llama()))


HUGE = {
    "r": {"r_a": 10**6, "r_b": 10**6},
    "whole numbers beyond a machine's": {"r_a": 10**30},
    "clusters": {"num_clusters": 10**9},
    "identity": {"num_clusters": 10**12, "prior_map": "identity", "r_a": 10**6, "r_b": 10**6},
    "external": {"prior_encoder": "external", "prior_dim": 10**9},
    "whitening": {"prior_whitening": 10**9},
    "rank": {"router_rank": 10**9},
    "paired": {"expert_layout": "paired", "r_a": 10**9, "r_b": 10**9},
    "pattern": {
        "r_a": 10**6,
        "r_b": 10**6,
        "expert_pattern": {LAYER.removeprefix("base_model.model."): {"inputs": [0], "outputs": list(range(20_000))}},
    },
}


@pytest.mark.parametrize("name", HUGE)
def test_a_hostile_configuration_costs_nothing(folder, name):
    change_config(folder, **HUGE[name])

    def load():
        base = make_llama()
        start = time.process_time()
        with pytest.raises(ValueError) as error:
            PeftModel.from_pretrained(base, folder)
        assert_unchanged(base, everything(make_llama()))
        return [str(error.value), time.process_time() - start]

    result, grown, status = in_child(load)
    assert status == 0 and grown < 100 and result[1] < 20
    assert re.search(
        "T-REX tensor|prior_whitening=1000000000 is more than 32|r_a=1000000000000000000000000000000 must", result[0]
    )


def test_a_core_that_the_file_lacks_is_missed_before_anything_is_made(folder):
    change_config(folder, shared_core=True)
    with pytest.raises(ValueError, match=r"lacks .*\.trex_core"):
        TRexConfig.from_pretrained(str(folder))


def test_counts_are_not_listed():
    config = TRexConfig(r_a=10**9, r_b=10**9)
    assert config.num_experts_of("layer") == 10**18 == config.token_scale_of("layer")
    assert [len(vectors) for vectors in config.vectors_of("layer")] == [10**9, 10**9]


BLOW_UP = [r"(\w+\.?)+!", "(a|a|b|.)*(.*)*x", r"([a-z_.0-9]+)*$!", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*x"]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"])
def test_patterns_that_would_never_end_are_refused(folder, monkeypatch, field):
    monkeypatch.setattr(targets, "SECONDS", 1)
    base = make_llama()
    before = everything(base)
    for pattern in BLOW_UP[: 4 if field == "target_modules" else 1]:
        listed = [pattern] if field in ("modules_to_save", "layers_pattern") else pattern
        extra = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if field == "layers_pattern" else {}
        change_config(folder, **{field: listed, **extra})
        with pytest.raises(ValueError, match=r"regular expressions .* cannot be matched.*more than 1 s"):
            PeftModel.from_pretrained(base, folder)
        assert_unchanged(base, before)
    change_config(folder, **{field: ["((q"] if isinstance(listed, list) else "((q"})
    with pytest.raises(ValueError, match=r"cannot be matched .*error.*unterminated subpattern|missing"):
        PeftModel.from_pretrained(base, folder)


# What PEFT's documentation and other libraries write.
USUAL = [
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\.self_attn\.(?:q_proj|v_proj)$",
    r".*(model).*(layers|blocks)\..*(self_attn|attention).*(q_proj|k_proj|v_proj).*",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attn|mlp|ffn).*?(?:q_proj|k_proj|v_proj|o_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_matched(pattern):
    model = get_peft_model(make_llama(), TRexConfig(target_modules=pattern, exclude_modules=r".*\.(k|o)_proj"))
    assert {name.rpartition(".")[2] for name, _ in model.base_model.trex_layers()} == {"q_proj", "v_proj"}


def test_a_loras_patterns_are_tried_too(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1)
    lora = get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    for fields, message in (
        ({"alpha_pattern": {BLOW_UP[0]: 2}}, "cannot be matched"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": "many"}, "lora_alpha='many'"),
    ):
        before = (tmp_path / CONFIG).read_bytes()
        change_config(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            trex_from_lora(make_llama(), [tmp_path], progress=False)
        (tmp_path / CONFIG).write_bytes(before)
    change_tensors(tmp_path, lambda tensors: {key: (9 * each).long() for key, each in tensors.items()})
    with pytest.raises(ValueError, match="no floating-point numbers"):
        trex_from_lora(make_llama(), [tmp_path], progress=False)


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"expert_pattern": {}', f'"expert_pattern": {nested(20)}'), "nests deeper than 16"),
        (
            lambda text: text.replace('"expert_pattern": {}', f'"expert_pattern": {nested(10**5)}'),
            "is damaged .*recursion",
        ),
        (lambda text: f"[{text}]", "holds a list; expected the object"),
        (lambda text: text[:-2], "adapter_config.json is damaged"),
        (lambda text: text[:-1] + " " * 2**24 + "}", "bytes; expected at most 16777216"),
        (lambda text: text.replace('"r_a": 2', '"r_a": ' + "9" * 5000), "is damaged .*digits"),
    ],
)
def test_json_that_would_do_harm_is_refused(folder, change, message):
    text = change((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(text)
    base, model = make_llama(), adapted(fit=False)
    for load in (
        lambda: PeftModel.from_pretrained(base, folder),
        lambda: model.load_adapter(folder, "new"),
        lambda: TRexConfig.from_pretrained(str(folder)),
    ):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"])
@pytest.mark.parametrize("value", [5, {"q_proj": 1}, [["q_proj"]], [1]])
def test_names_are_names(field, value):
    with pytest.raises(TypeError, match=f"{field}=.* must be a name or a list of names"):
        TRexConfig(**{field: value})


def test_the_writer_is_told(folder):
    assert json.loads((folder / CONFIG).read_text())["peft_trex_version"] == VERSION == peft_trex.__version__
    change_config(folder, peft_trex_version="0.0.1")
    model = PeftModel.from_pretrained(make_llama(), folder)
    assert model.peft_config["default"].peft_trex_version == "0.0.1"
    model.save_pretrained(folder)
    assert json.loads((folder / CONFIG).read_text())["peft_trex_version"] == VERSION


def test_what_a_later_release_wrote_is_told_so(folder):
    before = (folder / CONFIG).read_text()
    upgrade = r"peft-trex 99.1 wrote the file, and this is .*: upgrade it"
    change_config(folder, peft_trex_version="99.1", router_activation="sigmoid")
    with pytest.warns(UserWarning, match=f"fields router_activation, .*{upgrade}") as told:
        PeftModel.from_pretrained(make_llama(), folder)
    assert not [each for each in told if "upgrade the PEFT version" in str(each.message)]
    (folder / CONFIG).write_text(before)
    change_config(folder, router_activation="sigmoid")
    with pytest.warns(
        UserWarning, match="router_activation, .*newer peft-trex or PEFT .upgrade it then., or the file was changed"
    ):
        PeftModel.from_pretrained(make_llama(), folder)
    (folder / CONFIG).write_text(before)
    change_config(folder, peft_trex_version="99.1", prior_map="quadratic")
    with pytest.raises(ValueError, match=f"prior_map='quadratic' is unknown.*{upgrade}"):
        PeftModel.from_pretrained(make_llama(), folder)
    (folder / CONFIG).write_text(before)
    change_config(folder, peft_trex_version="99.1")
    # What a later release adds need not be used.
    PeftModel.from_pretrained(make_llama(), folder)
    change_tensors(folder, put(f"{LAYER}.trex_C", torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=f"holds unknown 1 T-REX tensors, such as .*trex_C.*{upgrade}"):
        PeftModel.from_pretrained(make_llama(), folder)


@pytest.mark.parametrize("version", [None, "0", "0.0.9", VERSION, "no.1", 7, ["99.1"], "9" * 10_000 + ".1"])
def test_other_writers_are_not_told_to_upgrade(version):
    assert not peft_trex.loading.newer_writer(version)


def test_importing_again_replaces_nothing_twice():
    for _ in range(3):
        importlib.reload(peft_trex)
    for name in ("load_adapter", "_update_offload", "create_or_update_model_card", "from_pretrained"):
        method, depth = getattr(peft.PeftModel, name), 0
        while hasattr(method, "__wrapped__"):
            method, depth = method.__wrapped__, depth + 1
        assert depth == 1, name


def test_other_methods_load_as_before(tmp_path):
    lora = get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path, safe_serialization=True)
    ids = prompts(2)
    torch.testing.assert_close(PeftModel.from_pretrained(make_llama(), tmp_path)(ids).logits, lora.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute", "ignore:You are trying to modify")
@pytest.mark.parametrize("first", ["T-REX", "LoRA"])
def test_the_adapters_of_another_model_stay_when_a_file_is_refused(folder, first):
    """The base model is in a PeftModel already, and a second one is loaded around it in vain."""
    base = make_llama()
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = adapted(base=base) if first == "T-REX" else get_peft_model(base, lora).eval()
    ids = prompts(3, seed=5)
    with torch.no_grad():
        expected, written = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    before = everything(model)
    for name in ("NaN", "the base model's norm", "fewer rows"):
        original = (folder / WEIGHTS).read_bytes()
        change_tensors(folder, DAMAGES[name][0])
        with pytest.raises(ValueError, match=r"(?s)" + DAMAGES[name][1]):
            PeftModel.from_pretrained(base, folder, "second")
        (folder / WEIGHTS).write_bytes(original)
        assert_unchanged(model, before)
        assert set(model.peft_config) == {"default"}
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
