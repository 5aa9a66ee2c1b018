"""T-REX from LoRA: exact where it can be, its errors those of the dense matrices, and a router that learns alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MAKERS, PAD, TASKS, make_gpt2, make_llama, prompts
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, TRexLayer, trex_from_lora
from peft_trex.prior.inputs import Inputs

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "wo"]}


def make_lora(seed=0, kind="llama", base=None, **kwargs):
    """A loaded LoRA adapter whose weights are all random."""
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS[kind], "task_type": TASKS[kind], **kwargs}
    model = get_peft_model(MAKERS[kind]() if base is None else base, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def own_prompts(number, count=16):
    """Batches of the prompts of one adapter: one of the groups that `prompts` has."""
    # Long prompts have means that lie close together, so that no draw of them blurs the groups.
    return [{"input_ids": part} for part in prompts(4 * count, length=60)[number::4].split(8)]


def deltas(lora, adapter_name="default"):
    """The dense weights of a LoRA adapter, (D_out, D_in) each, float64."""
    return {
        path: module.get_delta_weight(adapter_name).detach().double().T
        if getattr(module, "fan_in_fan_out", False)
        else module.get_delta_weight(adapter_name).detach().double()
        for path, module in lora.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def trex_layers(model):
    named = model.base_model.model.named_modules()
    return {name: module for name, module in named if isinstance(module, TRexLayer)}


def dense(layer, weights):
    """The layer's weight (D_out, D_in) at these weights (E,) of its experts, float64."""
    A, B = layer.trex_A["default"].detach().double(), layer.trex_B["default"].detach().double()
    if layer.trex_settings["default"].layout == "paired":
        G = torch.diag(weights)
    else:
        G = weights.reshape(A.shape[0], B.shape[1]).T
    gate = torch.sigmoid(100 * layer.trex_gate["default"].detach().double())
    return gate * B @ G.double() @ A


def weights_of(model, layer, ids):
    """The experts' weights (P, E) for prompts, at a router that is zero."""
    tuner = model.base_model
    weights = torch.full((len(ids), layer.trex_router["default"].shape[0]), 0.5, dtype=torch.float64)
    if "default" in layer.trex_map:
        scores = tuner.trex_prior["default"].score(tuner.prompts.scorer.embed(Inputs.of({"input_ids": ids}))[0])
        weights = weights + 0.5 * 4 * (scores @ layer.trex_map["default"].T).detach().double()
    return weights


def energy(matrix):
    return float(matrix.square().sum())


@pytest.mark.parametrize("source", ["loaded", "folder"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "init_lora_weights": "gaussian"},
        {"r": 2, "rank_pattern": {"0.*": 4}, "alpha_pattern": {".*1.*": 3}},
    ],
    ids=["plain", "rank-stabilised", "patterns"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_one_lora_is_reproduced(kind, settings, source, tmp_path):
    lora = make_lora(kind=kind, **settings)
    given = lora
    if source == "folder":
        lora.save_pretrained(tmp_path)
        given = str(tmp_path)
    model, report = trex_from_lora(MAKERS[kind](), [given])
    batch = {"input_ids": prompts(3)}
    batch |= {"decoder_input_ids": prompts(3, 4)} if kind == "t5" else {}
    with torch.no_grad():  # in float64, as T5 makes much of a rounding in float32
        found, expected, base = (m.double().eval()(**batch).logits for m in (model, lora, MAKERS[kind]()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, base, atol=0.1)
    assert max(report.errors + report.start_errors) < 1e-12
    assert model.peft_config["default"].r_a == (4 if "rank_pattern" in settings else 3)
    assert set(trex_layers(model)) == set(deltas(lora))


def test_a_scaling_that_was_changed_in_a_loaded_model_counts():
    lora = make_lora()
    for module in lora.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.25)
    model, _ = trex_from_lora(make_llama(), [lora])
    ids = prompts(3)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, lora(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_named_adapter_of_a_loaded_model_is_taken():
    lora = make_lora()
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model, report = trex_from_lora(make_llama(), [(lora, "other"), lora])
    assert report.adapters == ("other", "default")
    assert {name.split(".")[-1] for name in trex_layers(model)} == {"q_proj", "down_proj", "v_proj"}
    for name, layer in trex_layers(model).items():
        mean = sum(deltas(lora, each).get(name, 0) for each in ("default", "other")) / 2
        torch.testing.assert_close(dense(layer, weights_of(model, layer, prompts(1))[0]), mean, rtol=1e-5, atol=1e-6)
        assert report.layers[name][0 if "v_proj" not in name else 1] is None


MANY = [
    {"seed": 1},
    {"seed": 2, "r": 2, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    {"seed": 3, "r": 4, "lora_alpha": 1, "rank_pattern": {"q_proj": 1}},
]


@pytest.mark.parametrize("layout", ["paired", "grid"])
@pytest.mark.parametrize("size", [3, 5, 8, 12])
def test_errors_are_those_of_the_dense_matrices(layout, size):
    """Fewer experts than the adapters' ranks, as many in some layers, and more."""
    loras = [make_lora(**settings) for settings in MANY]
    sizes = {"r_a": size, "r_b": size if layout == "paired" else size + 1}
    model, report = trex_from_lora(make_llama(), loras, expert_layout=layout, **sizes)
    found = [deltas(lora) for lora in loras]
    totals = torch.zeros(3, 3, dtype=torch.float64)  # energy, missed, missed at the start
    for name, layer in trex_layers(model).items():
        weights = [each.get(name, torch.zeros(layer.out_features, layer.in_features).double()) for each in found]
        singular = [torch.linalg.svdvals(weight) for weight in weights]
        shares = [(-float(s**2 / energy(w)), n) for n, w in enumerate(weights) if energy(w) for s in singular[n]]
        counts = [sum(n == number and share < -1e-12 for share, n in sorted(shares)[:size]) for number in range(3)]
        start = dense(layer, weights_of(model, layer, prompts(1))[0])
        begin = 0
        for number, weight in enumerate(weights):
            if layout == "paired":  # its own experts at n times the equal weight
                own = torch.zeros(size).double()
                own[begin : begin + counts[number]] = 3 * 0.5
                best = dense(layer, own)
                begin += counts[number]
                expected = float(singular[number][counts[number] :].square().sum())
                assert energy(weight - best) == pytest.approx(expected, rel=1e-4, abs=1e-9)
            else:
                A, B = layer.trex_A["default"].detach().double(), layer.trex_B["default"].detach().double()
                expected = energy(
                    weight - B @ torch.linalg.pinv(B, rtol=1e-6) @ weight @ torch.linalg.pinv(A, rtol=1e-6) @ A
                )
            missed = [expected, energy(weight - start)]
            if energy(weight) == 0:
                assert report.layers[name][number] is None is report.start_layers[name][number]
                missed[0] = 0.0
            else:
                shares = report.layers[name][number], report.start_layers[name][number]
                assert shares == pytest.approx([m / energy(weight) for m in missed], rel=1e-4, abs=1e-9)
            totals[number] += torch.tensor([energy(weight), *missed])
    torch.testing.assert_close(torch.tensor(report.errors).double(), totals[:, 1] / totals[:, 0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(torch.tensor(report.start_errors).double(), totals[:, 2] / totals[:, 0])
    exact = size == 12 or (size == 8 and layout == "paired") or (size == 8 and layout == "grid")
    assert (max(report.errors) < 1e-12) == exact


def test_equal_weights_make_the_mean_of_the_adapters():
    loras = [make_lora(**settings) for settings in MANY]
    model, _ = trex_from_lora(make_llama(), loras)
    for name, layer in trex_layers(model).items():
        mean = sum(deltas(lora).get(name, 0) for lora in loras) / 3
        torch.testing.assert_close(dense(layer, weights_of(model, layer, prompts(1))[0]), mean, rtol=1e-5, atol=1e-6)


def test_equal_weights_of_a_grid_make_the_best_of_rank_one():
    loras = [make_lora(**settings) for settings in MANY]
    model, _ = trex_from_lora(make_llama(), loras, expert_layout="grid", r_a=9, r_b=10)
    for name, layer in trex_layers(model).items():
        mean = sum(deltas(lora).get(name, 0) for lora in loras) / 3
        u, s, v = torch.linalg.svd(mean)
        best = s[0] * u[:, :1] @ v[:1]
        torch.testing.assert_close(dense(layer, weights_of(model, layer, prompts(1))[0]), best, rtol=1e-4, atol=1e-5)


def test_shared_bases_are_fitted_to_all():
    """Adapters that share their bases lose nothing in a grid of that size, and a random basis would."""
    torch.manual_seed(0)
    up, down = torch.randn(32, 3), torch.randn(2, 32)
    loras = [make_lora(seed=seed, r=4, target_modules=["q_proj"]) for seed in range(3)]
    for lora in loras:
        for module in lora.modules():
            if isinstance(module, LoraLayer):
                module.lora_A["default"].weight.data = torch.randn(4, 2) @ down
                module.lora_B["default"].weight.data = up @ torch.randn(3, 4)
    _, report = trex_from_lora(make_llama(), loras, expert_layout="grid", r_a=2, r_b=3)
    assert max(report.errors) < 1e-10
    _, narrower = trex_from_lora(make_llama(), loras, expert_layout="grid", r_a=2, r_b=2)
    assert min(narrower.errors) > 1e-3


def test_shared_bases_are_the_best_for_each_other():
    """Neither can be improved while the other stays; an adapter counts by its share, however large it is."""
    loras = [make_lora(seed=1), make_lora(seed=2, r=2, lora_alpha=40), make_lora(seed=3, r=4)]
    model, report = trex_from_lora(make_llama(), loras, expert_layout="grid", r_a=3, r_b=4)
    for name, layer in trex_layers(model).items():
        unit = [deltas(lora)[name] / energy(deltas(lora)[name]) ** 0.5 for lora in loras]
        missed = sum(report.layers[name])
        left = torch.linalg.qr(layer.trex_B["default"].detach().double())[0]
        right = torch.linalg.qr(layer.trex_A["default"].detach().double().T)[0]
        for beside in ([left.T @ weight for weight in unit], [right.T @ weight.T for weight in unit]):
            rank = 3 if beside[0].shape[0] == 4 else 4
            best = 3 - float(torch.linalg.svdvals(torch.cat(beside))[:rank].square().sum())
            assert 0.05 < best <= missed + 1e-6
            assert missed == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("settings", [{}, {"expert_layout": "grid", "r_a": 5, "r_b": 6}], ids=["paired", "grid"])
def test_start_with_prompts(settings):
    """The errors at the start are the mean over each adapter's prompts, and far less than with equal weights."""
    loras = [make_lora(seed=1), make_lora(seed=2, r=2, lora_alpha=9)]
    batches = [own_prompts(0), iter(own_prompts(1, 40))]
    model, report = trex_from_lora(make_llama(), loras, prompts=batches, num_clusters=5, progress=False, **settings)
    assert model.peft_config["default"].learned_map  # also where there are as many clusters as experts
    _, without = trex_from_lora(make_llama(), loras, **settings)
    assert report.errors == pytest.approx(without.errors)
    for number, ids in enumerate((own_prompts(0), own_prompts(1, 40))):
        ids = torch.cat([batch["input_ids"] for batch in ids])
        total, missed = 0.0, 0.0
        for name, layer in trex_layers(model).items():
            weight = deltas(loras[number])[name]
            errors = [energy(weight - dense(layer, weights)) for weights in weights_of(model, layer, ids)]
            mean = sum(errors) / len(errors)
            assert report.start_layers[name][number] == pytest.approx(mean / energy(weight), rel=1e-3, abs=1e-9)
            total, missed = total + energy(weight), missed + mean
        assert report.start_errors[number] == pytest.approx(missed / total, rel=1e-3)
        if not settings:
            assert report.start_errors[number] < 0.1 < 0.2 < without.start_errors[number]
        assert report.start_errors[number] < without.start_errors[number]


def test_adapters_that_cancel_out_still_make_a_grid():
    """Their mean is zero, yet the prior needs experts to tell them apart by."""
    loras = [make_lora(seed=1), make_lora(seed=1)]
    for name, parameter in loras[1].named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()
    settings = {"expert_layout": "grid", "r_a": 3, "r_b": 3, "num_clusters": 4, "progress": False}
    model, report = trex_from_lora(make_llama(), loras, prompts=[own_prompts(0), own_prompts(1)], **settings)
    assert max(report.errors) < 1e-12 and max(report.start_errors) < 0.1
    for layer in trex_layers(model).values():
        assert layer.trex_map["default"].abs().max() < 100


def test_start_with_embeddings_of_ones_own():
    loras = [make_lora(seed=1), make_lora(seed=2)]
    embeds = [sign + 0.3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(3)) for sign in (1, -1)]
    embeds[0][4] = 0  # a row without a prompt does not count
    batches = [[{"semantic_embeds": part}] for part in embeds]
    settings = {"prior_encoder": "external", "prior_dim": 6, "num_clusters": 2, "progress": False}
    model, report = trex_from_lora(make_llama(), loras, prompts=batches, **settings)
    assert max(report.start_errors) < 0.05
    batches[0] = [{"semantic_embeds": torch.cat([embeds[0][:4], embeds[0][5:]])}]
    _, without = trex_from_lora(make_llama(), loras, prompts=batches, **settings)
    assert report.start_errors == pytest.approx(without.start_errors, rel=1e-4)
    ids = prompts(2)
    for lora, each in zip(loras, embeds, strict=True):
        with torch.no_grad():
            found = model.eval()(input_ids=ids, semantic_embeds=each[:2]).logits
            expected = lora(input_ids=ids).logits
            base = make_llama()(input_ids=ids).logits
        assert energy(found - expected) < 0.15 * energy(base - expected)


def trainable(model):
    return {name.split(".trex_")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


ROUTER = {"router", "map", "omega", "gate"}


def test_only_the_router_is_trainable(tmp_path):
    settings = {"prompts": [own_prompts(0), own_prompts(1)], "num_clusters": 4, "progress": False}
    loras = [make_lora(seed=1), make_lora(seed=2)]
    model, _ = trex_from_lora(make_llama(), loras, trainable="router", router_rank=2, **settings)
    assert trainable(model) == ROUTER | {"router_down"}
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == ROUTER | {"router_down"}
    model.add_adapter("full", TRexConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.set_adapter("full")
    assert trainable(model) == {"A", "B", "router", "omega", "gate"}
    model.set_adapter("default")
    assert trainable(model) == ROUTER | {"router_down"}
    model.delete_adapter("full")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable"] == "router"
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert trainable(loaded) == ROUTER | {"router_down"}
    assert not trainable(PeftModel.from_pretrained(make_llama(), tmp_path))
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    loaded.set_adapter("second")
    assert trainable(loaded) == ROUTER | {"router_down"}
    ids = prompts(3)
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    other, _ = trex_from_lora(make_llama(), loras, **settings)
    assert trainable(other) == ROUTER | {"A", "B"}
    for each, names in ((model, ROUTER | {"router_down"}), (other, ROUTER | {"A", "B"})):  # each by itself
        each.set_adapter("default")
        assert trainable(each) == names


FRESH = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from conftest import make_llama, prompts
import peft_trex
from peft import PeftModel
model = PeftModel.from_pretrained(make_llama(), sys.argv[1], is_trainable=True)
names = sorted(name for name, p in model.named_parameters() if p.requires_grad)
with torch.no_grad():
    torch.save((names, model.eval()(input_ids=prompts(3)).logits), sys.argv[3])
"""


@pytest.mark.slow
def test_trainer_and_a_fresh_process_agree(tmp_path):
    settings = {"prompts": [own_prompts(0), own_prompts(1)], "num_clusters": 4, "progress": False}
    model, _ = trex_from_lora(make_llama(), [make_lora(seed=1), make_lora(seed=2)], trainable="router", **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]} for ids in prompts(16).tolist()]
    args = TrainingArguments(
        tmp_path / "run", max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-3, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=rows).train()
    changed = {
        name.split(".trex_")[-1].split(".")[0] for name, p in model.named_parameters() if not p.equal(before[name])
    }
    assert changed == ROUTER
    model.save_pretrained(tmp_path / "saved")
    tests, told = Path(__file__).parents[1], tmp_path / "told.pt"
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "saved", tests, told], check=True)
    names, logits = torch.load(told, weights_only=True)
    assert names == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(logits, model.eval()(input_ids=prompts(3)).logits)
    resumed = PeftModel.from_pretrained(make_llama(), tmp_path / "run" / "checkpoint-2", is_trainable=True)
    Trainer(model=resumed, args=args, train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], parameter)


def task_batch(task, seed, count=32):
    """Two tasks on the same words, told apart by the prompts' first tokens."""
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randint(24, 34, (count, 3), generator=generator) + 10 * task
    words = torch.randint(3, 7, (count, 2), generator=generator)
    answer = words[:, -1:] + (8 if task == 0 else 45)
    ids = torch.cat([marks, words, answer], 1)
    return {"input_ids": ids, "labels": torch.cat([torch.full((count, 5), -100), answer], 1)}


def train(model, batches, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step_batches in batches:
        optimizer.zero_grad()
        for batch in step_batches:
            model.train()(**batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def losses(model):
    return [model.eval()(**task_batch(task, 1000, 64)).loss.item() for task in (0, 1)]


@pytest.fixture(scope="module")
def two_tasks():
    """A LoRA trained for each of two tasks."""
    loras = []
    for task in (0, 1):
        lora = make_lora(seed=task, r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        train(lora, ([task_batch(task, step)] for step in range(60)), 1e-2)
        loras.append(lora.eval())
    return loras


@pytest.mark.parametrize("with_prompts", [False, True], ids=["router alone", "router and prior"])
def test_training_the_router_recovers_the_adapters(two_tasks, with_prompts):
    """Two adapters that ruin each other's task become one that does both, with the experts as they were."""
    settings = {}
    if with_prompts:
        batches = [[task_batch(task, step) for step in range(2)] for task in (0, 1)]
        settings = {"prompts": batches, "num_clusters": 4, "progress": False}
    base = losses(make_llama())
    alone = [losses(lora) for lora in two_tasks]
    goal = (alone[0][0] + alone[1][1]) / 2
    assert min(base) > 3 and goal < 1
    assert min(alone[0][1], alone[1][0]) > min(base)  # each alone is worse than none for the other's task
    model, report = trex_from_lora(make_llama(), two_tasks, trainable="router", **settings)
    assert max(report.errors) < 1e-10
    start = sum(losses(model)) / 2
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, ([task_batch(task, step) for task in (0, 1)] for step in range(100)), 3e-3)
    found = sum(losses(model)) / 2
    recovered = (sum(base) / 2 - found) / (sum(base) / 2 - goal)
    print(f"base {base}, each alone {alone}, start {start:.3f}, trained {found:.3f}, recovered {recovered:.1%}")
    assert recovered > 0.9
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


def _saved(folder, **kwargs):
    make_lora(**kwargs).save_pretrained(folder)
    return folder


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "a head": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "no factors of linear layers, such as .*embed_tokens",
    ),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base weights"),
    "a bias of B": ({"lora_bias": True}, "lora_bias=True"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["loaded", "folder"])
@pytest.mark.parametrize("settings", REFUSED)
def test_what_is_no_plain_lora_is_refused(settings, source, tmp_path):
    kwargs, message = REFUSED[settings]
    lora = make_lora(**kwargs)
    if source == "folder":
        lora.save_pretrained(tmp_path)
        lora = tmp_path
    base = make_llama()
    with pytest.raises(ValueError, match=message):
        trex_from_lora(base, [lora])
    assert not any(isinstance(module, TRexLayer) for module in base.modules())


def test_another_method_a_zero_one_and_what_is_not_finite():
    with pytest.raises(ValueError, match=r"is a .*IA3 adapter; expected LoRA"):
        trex_from_lora(make_llama(), [get_peft_model(make_llama(), IA3Config(task_type="CAUSAL_LM"))])
    zero = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'default' is zero, as before any training"):
        trex_from_lora(make_llama(), [zero])
    lora = make_lora()
    next(p for name, p in lora.named_parameters() if "lora_A" in name).data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        trex_from_lora(make_llama(), [lora])


def test_files_that_are_not_read(tmp_path):
    for name in ("pickle", "cut", "less"):
        _saved(tmp_path / name)
    weights = tmp_path / "pickle" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors.*pickles can run code"):
        trex_from_lora(make_llama(), [tmp_path / "pickle"])
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        trex_from_lora(make_llama(), [tmp_path / "cut"])
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "less" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: tensors[key] for key in list(tensors)[1:]}, weights)
    with pytest.raises(ValueError, match=r"has the factors \[None, .*expected"):
        trex_from_lora(make_llama(), [tmp_path / "less"])
    with pytest.raises(ValueError, match="is no folder with an adapter"):
        trex_from_lora(make_llama(), [tmp_path / "none"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_router": False, "use_prior": True}, ValueError, "use_router=False leaves no such start"),
        ({"router_top_k": 2}, ValueError, "router_top_k=2 leaves no such start"),
        ({"init_weights": "random_router"}, ValueError, "init_weights=random_router leaves no such start"),
        ({"use_prior": True, "prior_map": "identity", "num_clusters": 6}, ValueError, "use prior_map='learned'"),
        (
            {"expert_pattern": {"model.layers.0.self_attn.q_proj": {"inputs": [0], "outputs": [0]}}},
            ValueError,
            "expert_pattern is what prune_trex leaves",
        ),
        ({"rank": 3}, TypeError, "TRexConfig got an unexpected keyword argument: rank"),
        ({"prompts": [own_prompts(0)]}, ValueError, "for each of the 2 LoRA adapters, in their order; got 1"),
        ({"prompts": own_prompts(0)[0]}, ValueError, "for each of the 2"),
        ({"prompts": [own_prompts(0)] * 2, "use_prior": False}, ValueError, "use_prior=False drops"),
        ({"prompts": [own_prompts(0), []], "num_clusters": 4}, ValueError, "no prompts for the LoRA adapter 1"),
        ({"prompts": [own_prompts(0)] * 2, "num_clusters": 400}, ValueError, "num_clusters=400 is more than"),
        ({"target_modules": ["q_proj"]}, ValueError, "no layer at 2 modules .* model.layers.0.mlp.down_proj"),
    ],
)
def test_settings_that_leave_no_such_start(settings, error, message):
    base, ids = make_llama(), prompts(2)
    expected = base(input_ids=ids).logits
    with pytest.raises(error, match=message):
        trex_from_lora(base, [make_lora(seed=1), make_lora(seed=2)], progress=False, **settings)
    assert not any(isinstance(module, TRexLayer) for module in base.modules())
    assert torch.equal(base(input_ids=ids).logits, expected)
    trex_from_lora(base, [make_lora()])  # and it takes an adapter still


def test_models_that_do_not_fit():
    lora = make_lora()
    with pytest.raises(ValueError, match=r"for .*0.mlp.down_proj, where .* has no such module: it belongs to another"):
        trex_from_lora(make_gpt2(), [lora])
    with pytest.raises(
        ValueError, match=r"\(48, 32\) for .*down_proj, where .* has \(64, 32\): it belongs to another"
    ):
        trex_from_lora(make_llama(intermediate_size=64), [lora])
    with pytest.raises(ValueError, match="has an adapter already"):
        trex_from_lora(lora.get_base_model(), [lora])
    for adapters in ([], lora, "folder"):
        with pytest.raises(ValueError, match="a list of at least one"):
            trex_from_lora(make_llama(), adapters)
    with pytest.raises(TypeError, match="is a LlamaForCausalLM; expected a folder"):
        trex_from_lora(make_llama(), [make_llama()])
    with pytest.raises(ValueError, match="no adapter 'french' in the loaded model; it has"):
        trex_from_lora(make_llama(), [(lora, "french")])


def test_the_report_reads_well(tmp_path):
    folders = [_saved(tmp_path / name, seed=seed) for seed, name in enumerate(("french", "sql"))]
    _, report = trex_from_lora(make_llama(), folders, r_a=4)
    assert report.adapters == ("french", "sql")
    parts = [
        f"{name} misses {error:.2%}, {start:.2%} at the start"
        for name, error, start in zip(report.adapters, report.errors, report.start_errors, strict=True)
    ]
    worst, layer = max((max(errors), name) for name, errors in report.layers.items())
    assert str(report) == f"T-REX from LoRA (paired): {'; '.join(parts)}; worst layer {worst:.2%} ({layer})"


def test_layers_beyond_the_adapters_begin_at_zero():
    model, report = trex_from_lora(
        make_llama(), [make_lora()], target_modules=["q_proj", "down_proj", "v_proj"], prompts=[own_prompts(0)],
        num_clusters=3, progress=False,
    )  # fmt: skip
    more = [layer for name, layer in trex_layers(model).items() if "v_proj" in name]
    assert len(more) == 2 and not any(layer.trex_B["default"].any() for layer in more)
    assert not any("v_proj" in name for name in report.layers)


def test_padding_does_not_count_as_prompts():
    """Rows of padding alone have no scores to fit the map on."""
    loras = [make_lora(seed=1), make_lora(seed=2)]
    plain = [own_prompts(0), own_prompts(1)]
    padded = []
    for batches in plain:
        ids = batches[0]["input_ids"]
        ids = torch.cat([ids, torch.full((3, ids.shape[1]), PAD)])
        padded.append([{"input_ids": ids, "attention_mask": (ids != PAD).long()}, batches[1]])
    settings = {"num_clusters": 4, "progress": False}
    reports = [trex_from_lora(make_llama(), loras, prompts=each, **settings)[1] for each in (plain, padded)]
    assert reports[0].start_errors == pytest.approx(reports[1].start_errors, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": "experts"}, "trainable='experts' is unknown; it must be one of all, router"),
        (
            {"trainable": "router", "use_router": False},
            "nothing that does: use_router=False, shared_core=False, and",
        ),
    ],
)
def test_what_cannot_be_trained(settings, message):
    with pytest.raises(ValueError, match=message):
        TRexConfig(**settings)
    TRexConfig(trainable="router", use_router=False, prior_map="learned")


FORMS_WITH_CORE = [
    {},
    {"use_router": False},
    {"expert_layout": "grid", "r_a": 3, "r_b": 3, "use_router": False},
    {"expert_layout": "grid", "r_a": 4, "r_b": 5},
]


@pytest.mark.parametrize("form", FORMS_WITH_CORE, ids=str)
@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter:UserWarning")
def test_a_lora_is_a_shared_core(form):
    """Without a router the core is the usual start, half of the identity, with what it lacks in rank at zero."""
    lora = make_lora()
    ids = prompts(4)
    expected = lora(ids).logits
    model, report = trex_from_lora(make_llama(), [lora], shared_core=True, prior_scale=16.0, **form)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert max(*report.errors, *report.start_errors) < 1e-9
    if not form.get("use_router", True):
        for layer in trex_layers(model).values():
            identity = torch.ones(3) if "expert_layout" not in form else torch.eye(3).flatten()
            torch.testing.assert_close(layer.trex_core["default"], identity / 2, rtol=1e-5, atol=1e-5)
            assert not layer.trex_map["default"].any()


@pytest.mark.parametrize("form", FORMS_WITH_CORE[1:], ids=str)
@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter:UserWarning")
def test_a_shared_core_is_the_mean_and_prompts_add_the_rest(form):
    loras = [make_lora(seed) for seed in range(2)]
    form = {"r_a": 6, "r_b": 6, **form} if "expert_layout" not in form else {**form, "r_a": 6, "r_b": 6}
    settings = {"shared_core": True, "prior_scale": 16.0, "num_clusters": 4, **form}
    wanted = [deltas(lora) for lora in loras]
    model, _ = trex_from_lora(make_llama(), loras, **settings)
    for name, layer in trex_layers(model).items():
        mean = sum(delta[name] for delta in wanted) / 2
        torch.testing.assert_close(layer.get_delta_weight("default").double(), mean, rtol=1e-4, atol=1e-5)
    data = [own_prompts(number) for number in range(2)]
    model, report = trex_from_lora(make_llama(), loras, prompts=data, progress=False, **settings)
    scorer, prior = model.base_model.prompts.scorer, model.base_model.trex_prior["default"]
    for name, layer in trex_layers(model).items():
        for number, batches in enumerate(data):
            scores = torch.cat([prior.score(scorer.embed(Inputs.of(batch))[0]) for batch in batches])
            weights = 0.5 * 16 * (layer.trex_core["default"] + scores @ layer.trex_map["default"].T).detach().double()
            if form.get("use_router", True):
                weights = weights + 0.5
            missed = sum(energy(wanted[number][name] - dense(layer, row)) for row in weights) / len(weights)
            expected = report.start_layers[name][number] * energy(wanted[number][name])
            assert missed == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(report.errors) < 1e-9 and max(report.start_errors) < 0.1
