"""The micro tier of the quality benchmark: its language, its base model, its methods, and one experiment."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import make_llama
from peft import LoraConfig, get_peft_model
from quality import corpora, micro_base, micro_tasks
from quality import run as quality
from quality.hydra import HydraConfig, HydraLinear
from quality.methods import METHODS, apply, embedding_of, fit_prior
from quality.micro_tasks import FILLERS, MAPS, ORDERS, SYMBOLS
from quality.scoring import Texts
from reporting import read
from torch import nn

RECIPE = micro_base.Recipe(steps=2, rows=4)
DATA = {"family": "conflict", "tasks": 8, "train": 12, "validation": 2, "test": 4}


def _words(row):
    words = row["prompt"].split()
    return words[:4], words[4:]


# the language


@pytest.mark.parametrize("family", ["conflict", "easy"])
def test_answers_follow_order_map_and_edits(family):
    parts = micro_tasks.generate(family, tasks=12, train=40, validation=3, test=5, edits=6)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [480, 36, 60]
    images = {}
    for row in itertools.chain(*parts.values()):
        told, symbols = _words(row)
        order, name, _ = row["task"].split()
        assert {order, name} <= set(told) and len(told) == 4 and len(symbols) == 6
        assert len([word for word in told if word in FILLERS]) == 2
        for place, answer in zip(ORDERS[order], row["answer"].split(), strict=True):
            images.setdefault(row["task"], {}).setdefault(symbols[place], set()).add(answer)
    assert len(images) == 12
    for task, found in images.items():
        assert len(found) == 16 and all(len(answers) == 1 for answers in found.values())
        kept = micro_tasks.value_map(task.split()[1])
        changed = [symbol for symbol in found if found[symbol] != {SYMBOLS[kept[SYMBOLS.index(symbol)]]}]
        assert len(changed) == 6


def test_in_conflict_the_fillers_alone_tell_tasks_apart():
    parts = micro_tasks.generate("conflict", tasks=16, pairs=4, train=10, test=20)
    told = {}
    for row in parts["train"]:
        words, _ = _words(row)
        order, name, _ = row["task"].split()
        told.setdefault((order, name), {}).setdefault(row["task"], set()).add(frozenset(set(words) - {order, name}))
    assert sorted(len(tasks) for tasks in told.values()) == [4, 4, 4, 4]
    for tasks in told.values():
        assert all(len(fillers) == 1 for fillers in tasks.values())
        assert len(set.union(*tasks.values())) == 4
    answers = {}
    for row in parts["test"]:
        answers.setdefault(tuple(_words(row)[1]), {})[row["task"]] = row["answer"]
    assert len(answers) == 20 and all(len(tasks) == 16 for tasks in answers.values())
    for a, b in itertools.combinations(told[next(iter(told))], 2):
        assert sum(tasks[a] != tasks[b] for tasks in answers.values()) > 10


def test_in_easy_each_task_has_a_pair_and_fillers_say_nothing():
    parts = micro_tasks.generate("easy", tasks=16, train=40)
    fillers = {}
    for row in parts["train"]:
        fillers.setdefault(row["task"], set()).add(frozenset(set(_words(row)[0]) & set(FILLERS)))
    assert len({tuple(task.split()[:2]) for task in fillers}) == 16
    assert all(len(found) > 10 for found in fillers.values())


def test_no_input_of_one_part_stands_in_another():
    parts = corpora.load({**DATA, "train": 100}).__dict__
    inputs = {name: {tuple(_words(row)[1]) for row in parts[name]} for name in ("train", "validation", "test")}
    assert len(inputs["validation"]) == 2 and len(inputs["test"]) == 4
    assert not any(inputs[a] & inputs[b] for a, b in itertools.combinations(inputs, 2))


def test_the_same_settings_give_the_same_rows():
    assert corpora.load(DATA) == corpora.load(DATA)
    assert corpora.load(DATA).test != corpora.load({**DATA, "seed": 1}).test


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pairs": 0}, "pairs=0 must be at least 1"),
        ({"pairs": 9}, "pairs=9 must be .* at most tasks=8"),
        ({"tasks": 200, "pairs": 4}, "tasks=200 must be at most 36 for each of 4 pairs"),
        ({"tasks": 65, "pairs": 65}, "the 64 pairs"),
        ({"edits": 1}, "edits=1 must be from 2 to 16"),
        ({"orders": ["sideways"]}, "the orders sideways are unknown"),
        ({"conflict": 0.5}, "conflict is unknown in the family 'conflict'"),
        ({"family": "easy", "pairs": 2}, "pairs is unknown in the family 'easy'"),
        ({"family": "generated", "edits": 2}, "edits is unknown in the family 'generated'"),
    ],
)
def test_dials_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        corpora.load({**DATA, **changes})


# the base model


def test_pretraining_rows_are_what_tasks_without_edits_would_say():
    tokenizer, language = micro_base.make_tokenizer(), micro_base.Language()
    generator = torch.Generator().manual_seed(0)
    prompts, answers = language.draw(64, generator)
    seen = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        words = tokenizer.decode(prompt).split()
        order = next(word for word in words[:4] if word in ORDERS)
        name = next(word for word in words[:4] if word in MAPS)
        task = micro_tasks.Task("t", order, name, micro_tasks.value_map(name), tuple(FILLERS[:2]))
        row = task.row([SYMBOLS.index(symbol) for symbol in words[4:10]], random.Random(0))
        texts = Texts(tokenizer)
        assert texts.gold(row) == tuple(answer.tolist())
        assert texts.prompt(row)[4:] == tuple(prompt[4:].tolist()) and len(words) == 11
        seen.add((order, name))
    assert len(seen) > 30
    assert set(language.draw(20, generator, [3])[0][:, :4].flatten().tolist()) >= {
        list(micro_base.WORDS).index("halves")
    }


def test_a_word_that_the_language_lacks_is_an_error():
    with pytest.raises(Exception, match="UNK"):
        micro_base.make_tokenizer()("a sentence")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The micro tier with a base model that has hardly been trained, and is taken all the same."""
    monkeypatch.setattr(micro_base, "FOLDER", tmp_path / "cache")
    for name in ("make", "label", "check"):
        function = getattr(micro_base, name)
        monkeypatch.setattr(function, "__defaults__", (RECIPE,))
    monkeypatch.setattr(micro_base, "RECIPE", RECIPE)
    monkeypatch.setattr(micro_base, "WANTED", 0.0)
    return RECIPE


def test_the_base_is_made_once_and_known_by_its_weights(base, monkeypatch):
    assert micro_base.label() == "micro, not made yet"
    folder = micro_base.make()
    name = micro_base.label()
    assert set(json.loads((folder / micro_base.KNOWN).read_text())) == set(ORDERS)
    monkeypatch.setattr(micro_base, "pretrain", lambda recipe: pytest.fail("it is there already"))
    assert micro_base.make() == folder and micro_base.label() == name
    assert replace(base, seed=1).folder != folder and not list(folder.parent.glob("*.part"))
    model, tokenizer = quality.load_model(str(folder))
    assert tokenizer.pad_token == "<pad>" and model.config.eos_token_id == tokenizer.eos_token_id
    (folder / micro_base.WEIGHTS).write_bytes(b"others")
    assert micro_base.label() != name


def test_pretraining_depends_on_the_seed_alone():
    recipe = replace(RECIPE, rounds=1)
    states = [micro_base.pretrain(replace(recipe, seed=seed))[0].state_dict() for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])


def test_what_is_not_known_is_trained_again(monkeypatch):
    """The second round draws the missing order in half of the rows and some; a third is not wanted."""
    rounds = iter([{**dict.fromkeys(ORDERS, 1.0), "halves": 0.98}, dict.fromkeys(ORDERS, 1.0)])
    monkeypatch.setattr(micro_base, "exact", lambda model: next(rounds))
    seen = []
    logits = micro_base._logits
    monkeypatch.setattr(micro_base, "_logits", lambda *args: seen.append(args[1]) or logits(*args))
    _, known = micro_base.pretrain(replace(RECIPE, rows=64))
    assert known == dict.fromkeys(ORDERS, 1.0) and next(rounds, None) is None
    shares = [(prompts == micro_base.WORDS.index("halves")).any(1).double().mean().item() for prompts in seen]
    assert len(shares) == 4 and max(shares[:2]) < 0.4 < 0.5 <= min(shares[2:])


def test_a_base_that_has_not_learnt_an_order_is_refused(base, monkeypatch):
    folder = micro_base.make()
    known = {**dict.fromkeys(ORDERS, 1.0), "halves": 0.5}
    (folder / micro_base.KNOWN).write_text(json.dumps(known))
    monkeypatch.setattr(micro_base, "WANTED", 0.99)
    with pytest.raises(ValueError, match=r"halves.*0\.5"):
        micro_base.check(None)
    micro_base.check(["straight", "left"])


def test_exact_counts_whole_answers():
    class Perfect(nn.Module):
        """Gives the right answer, but for the last symbol of one order."""

        def forward(self, input_ids, use_cache):
            targets = torch.cat((input_ids[:, 1:], torch.full_like(input_ids[:, :1], 1)), 1)
            wrong = (input_ids[:, :4] == micro_base.WORDS.index("left")).any(1)
            targets[wrong, -2] = 0
            return type("Output", (), {"logits": torch.nn.functional.one_hot(targets, 44).float()})

    found = micro_base.exact(Perfect(), rows=8)
    assert found == {order: float(order != "left") for order in ORDERS}


# methods


def _layers(seed=0):
    torch.manual_seed(seed)
    return make_llama(vocab_size=44, num_hidden_layers=1)


def test_the_oracle_is_a_lora_for_each_task():
    tasks = ["x", "y", "z"]
    method = METHODS["oracle"]
    model, _ = apply(method, _layers(), 1, tasks)
    told = embedding_of(method, None, tasks)
    rows = [{"task": task, "prompt": "", "answer": ""} for task in ("z", "x", "y", "z")]
    fit_prior(method, model, [], 1)
    for name, parameter in model.named_parameters():
        if "trex_B" in name:
            nn.init.normal_(parameter)
    torch.manual_seed(3)
    ids = torch.randint(44, (4, 6))
    inputs = {"input_ids": ids, "completion_mask": (torch.arange(6) > 2).long().expand(4, 6)}
    model.train()
    logits = model(**inputs, semantic_embeds=told(rows)).logits
    logits.square().sum().backward()
    parameters = dict(model.named_parameters())
    for number, task in enumerate(tasks):
        base = _layers().requires_grad_(False)
        targets = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
        targets.remove("lm_head")
        lora = get_peft_model(base, LoraConfig(r=1, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
        pairs = []
        for name, parameter in lora.named_parameters():
            if "lora_A" in name:
                own = parameters[name.replace("lora_A.default.weight", "trex_A.default")]
                parameter.data.copy_(own.data[number : number + 1])
                pairs.append((parameter, own, slice(number, number + 1)))
            elif "lora_B" in name:
                own = parameters[name.replace("lora_B.default.weight", "trex_B.default")]
                parameter.data.copy_(own.data[:, number : number + 1])
                pairs.append((parameter, own, (slice(None), slice(number, number + 1))))
        mine = [place for place, row in enumerate(rows) if row["task"] == task]
        own_logits = lora(input_ids=ids[mine]).logits
        torch.testing.assert_close(own_logits, logits[mine].detach(), rtol=1e-4, atol=1e-4)
        own_logits.square().sum().backward()
        assert len(pairs) == 14
        for parameter, own, part in pairs:
            torch.testing.assert_close(parameter.grad, own.grad[part], rtol=1e-3, atol=1e-3)
    # what T-REX has besides stays as it is in training
    shared = [parameter for name, parameter in parameters.items() if "trex_omega" in name or "trex_gate" in name]
    optimizer = torch.optim.AdamW(shared, lr=0.01)
    optimizer.step()
    assert all(torch.sigmoid(1e-6 * parameter).item() == pytest.approx(0.5, abs=1e-6) for parameter in shared)


def test_hydra_weighs_its_heads_by_token():
    torch.manual_seed(0)
    layer = HydraLinear(nn.Linear(5, 7), r=2, heads=3, alpha=6)
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(layer(x), layer.base(x))
    nn.init.normal_(layer.hydra_B)
    nn.init.normal_(layer.hydra_router)
    weights = torch.softmax(x @ layer.hydra_router.T, -1)
    heads = [layer.hydra_B[:, 2 * head : 2 * head + 2] for head in range(3)]
    wanted = layer.base(x) + sum(
        3.0 * weights[..., head, None] * (x @ layer.hydra_A.T @ own.T) for head, own in enumerate(heads)
    )
    torch.testing.assert_close(layer(x), wanted)


def test_hydra_adapts_the_named_layers_of_a_frozen_model():
    base = _layers().requires_grad_(False)
    model = HydraConfig(["q_proj", "down_proj"], r=2, heads=3, alpha=4).attach(base)
    assert [name for name, module in model.named_modules() if isinstance(module, HydraLinear)] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
    ]
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"hydra_A", "hydra_B", "hydra_router"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("LoRA r=8", "lora_alpha=32.0"), ("T-REX 8x8 sharp", "prior_scale=32.0"), ("HydraLoRA", "alpha=32")],
)
def test_a_scale_is_a_factor_of_what_a_method_has(name, said):
    _, settings = apply(METHODS[name], _layers(), 1, scale=2.0)
    assert said in settings.split(", ")
    with pytest.raises(ValueError, match="LILY adapter has none"):
        apply(METHODS["Lily"], _layers(), 1, scale=2.0)


def test_a_map_can_start_larger_than_the_package_has_it():
    sizes = []
    for name, words in (("", "auto"), (", map start 1", "map start 1"), (", map start 3", "map start 3")):
        model, settings = apply(METHODS[f"T-REX recommended{name}"], micro_base.make_model(), 1)
        assert settings.endswith(words)
        drawn = [p.abs().max() for name, p in model.named_parameters() if ".trex_map." in name]
        sizes.append(float(max(drawn)) * 32**0.5)
    assert sizes == pytest.approx([0.3, 1, 3], rel=0.01)


def test_sizes_are_those_of_the_evidence():
    """Trainable parameters on the micro tier's model, in thousands."""
    found = {}
    for name in ("LoRA r=32", "LoRA, equal parameters", "LoRA r=6", "T-REX 4x8 sharp", "T-REX 8x8 sharp", "oracle"):
        model, _ = apply(METHODS[name], micro_base.make_model(), 1, [str(task) for task in range(32)])
        found[name] = round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1000)
    assert list(found.values()) == [104, 69, 20, 20, 69, 104]


# losses


def test_steps_to_a_loss():
    losses = [3.0, 1.0, 2.0, 0.5, 0.5, 0.0, 0.0]
    assert [quality.steps_to(losses, level, window=2) for level in (2.0, 1.5, 1.0, 0.5, 0.25, 0.0)] == [
        2,
        3,
        5,
        5,
        6,
        7,
    ]
    assert quality.steps_to(losses, 0.1, window=3) is None
    assert quality.steps_to(losses[:1], 5.0, window=2) is None
    assert quality.steps_to([float("nan")] * 5, 1.0, window=2) is None


def test_curves_are_means_of_what_lies_between_their_points():
    assert quality.curve([1.0, 2.0, 3.0, 5.0, 9.0], 2) == [[2, 1.5], [4, 4.0]]
    assert quality.curve([1.0, 2.0], 1) == [[1, 1.0], [2, 2.0]]


# an experiment


def _experiment(folder, **changes):
    said = {
        "tier": "smoke",
        "base": "micro",
        "data": DATA,
        "methods": ["T-REX 8x8 sharp, whitened 16", "LoRA r=4", "oracle", "HydraLoRA"],
        "learning_rates": [0.01],
        "scales": {"LoRA r=4": [1.0, 2.0]},
        "steps": 30,
        "tune_steps": 2,
        "seeds": [1],
        "rows_per_step": 16,
        "rows_at_once": 16,
        "checkpoint": 30,
        "memory": False,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**said, **changes}))
    return path


def _run(folder, path, *arguments):
    return quality.main([str(path), "--results", str(folder / "rows"), "--work", str(folder / "work"), *arguments])


def test_an_experiment_of_the_micro_tier(base, tmp_path, capsys):
    path = _experiment(tmp_path)
    assert _run(tmp_path, path, "--list") == 0
    assert "0 rows, 5 runs known to be missing" in capsys.readouterr().out and not base.folder.exists()
    assert _run(tmp_path, path) == 0
    rows = read(tmp_path / "rows" / "tiny.jsonl", dict)
    final = {row["method"]: row for row in rows if row["phase"] == "final"}
    tuned = [(row["scale"], row["log_likelihood"], row["settings"]) for row in rows
             if (row["method"], row["phase"]) == ("LoRA r=4", "tune")]  # fmt: skip
    assert [(scale, settings) for scale, _, settings in tuned] == [
        (1.0, "r=4, lora_alpha=8"),
        (2.0, "r=4, lora_alpha=16.0"),
    ]
    assert final["LoRA r=4"]["scale"] == max(tuned, key=lambda one: one[1])[0]
    assert len(final) == 4 and len({row["test_digest"] for row in final.values()}) == 1
    for row in final.values():
        assert row["base"] == micro_base.label() and row["peak_memory"] is None and len(row["curve"]) == 30
        assert set(row["loss_steps"]) == {"1", "0.3", "0.1"} and row["loss_window"] == 10
        assert row["loss_steps"]["0.1"] is None  # too few steps
    assert _run(tmp_path, path, "--list") == 0
    assert "9 rows, 0 runs known to be missing" in capsys.readouterr().out
    (base.folder / micro_base.WEIGHTS).write_bytes(b"of another machine")
    _run(tmp_path, path, "--list")
    assert "9 rows, 5 runs known to be missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scales", "said"),
    [({"LoRA": [2.0]}, "scales="), ({"LoRA r=4": []}, "scales="), ({"LoRA r=4": [0.0]}, "positive numbers")],
)
def test_wrong_scales_are_refused(tmp_path, capsys, scales, said):
    assert _run(tmp_path, _experiment(tmp_path, scales=scales)) == 1
    assert said in capsys.readouterr().err
