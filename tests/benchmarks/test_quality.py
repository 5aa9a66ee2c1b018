"""The quality benchmark: data, scoring, methods, the queue, and one experiment from its first run to its last."""

import copy
import gzip
import itertools
import json
import math
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama
from peft import LoraConfig, get_peft_model
from quality import corpora, scoring
from quality import run as quality
from quality.diagnosis import diagnose
from quality.methods import CONSTANT_WIDTH, METHODS, apply, embedding_of, fit_prior
from quality.scoring import Answers, Scored, Texts, score, summarise
from reporting import read
from speed.variants import BASE
from studies import pace, prior
from texts import save_tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_trex import initialize_trex_prior

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SMOKE = {
    "tier": "smoke",
    "data": {"family": "generated", "tasks": 4, "train": 10, "validation": 2, "test": 3},
    "methods": ["T-REX 4x8", "LoRA r=32", "base model"],
    "learning_rates": [0.001, 0.01],
    "steps": 4,
    "tune_steps": 2,
    "seeds": [1, 2],
    "rows_per_step": 4,
    "rows_at_once": 4,
    "checkpoint": 2,
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tiny_model):
    _, tokenizer = quality.load_model(str(tiny_model))
    return Texts(tokenizer)


def _write(folder, name="tiny", **changes):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SMOKE, **changes}))
    return path


def _run(folder, path, *arguments):
    return quality.main([str(path), "--results", str(folder / "rows"), "--work", str(folder / "work"), *arguments])


def _rows(folder, name="tiny"):
    return read(folder / "rows" / f"{name}.jsonl", dict)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """An experiment that is run through."""
    folder = tmp_path_factory.mktemp("quality")
    assert _run(folder, _write(folder, base=str(tiny_model))) == 0
    return folder, _rows(folder)


def test_every_run_gives_a_row(finished):
    folder, rows = finished
    runs = [(row["method"], row["phase"], row["learning_rate"], row["seed"]) for row in rows]
    for method in ("T-REX 4x8", "LoRA r=32"):
        tuned = {
            row["learning_rate"]: row["log_likelihood"]
            for row in rows
            if row["method"] == method and row["phase"] == "tune"
        }
        assert set(tuned) == {0.001, 0.01}
        best = max(tuned, key=tuned.get)
        assert [(seed, rate) for name, phase, rate, seed in runs if (name, phase) == (method, "final")] == [
            (1, best),
            (2, best),
        ]
    assert runs.count(("base model", "final", 0.0, 1)) == 1
    assert len(runs) == len(set(runs)) == 9
    assert not any((folder / "work" / "tiny").iterdir())  # checkpoints of what is done


def test_rows_say_what_was_done(finished):
    _, rows = finished
    for row in rows:
        assert row["experiment"] == "tiny" and row["tier"] == "smoke"
        assert len(row["tasks"]) == 4
        assert row["accuracy"] == pytest.approx(sum(one["accuracy"] for one in row["tasks"].values()) / 4)
        assert row["log_likelihood"] == pytest.approx(sum(one["log_likelihood"] for one in row["tasks"].values()) / 4)
        count = 12 if row["phase"] == "final" else 8
        assert all(len(values) == count for values in row["examples"].values())
        assert row["device"] == "cpu" and row["torch"] == torch.__version__
        if row["method"] != "base model":
            assert [step for step, _ in row["curve"]] == list(range(1, row["steps"] + 1))
            assert row["trainable"] > 0 and row["total_memory"] > row["peak_memory"] > 0
        trex_final = row["method"] == "T-REX 4x8" and row["phase"] == "final"
        assert (row["diagnosis"] is not None) == trex_final
    assert len({row["test_digest"] for row in rows if row["phase"] == "final"}) == 1
    seeds = {row["seed"]: row["curve"] for row in rows if row["method"] == "LoRA r=32" and row["phase"] == "final"}
    assert seeds[1][0] != seeds[2][0]  # where adapters have not changed anything yet: the rows differ


def test_nothing_is_done_twice(finished, capsys):
    folder, rows = finished
    assert _run(folder, folder / "tiny.yaml", "--list") == 0
    assert "9 rows, 0 runs known to be missing" in capsys.readouterr().out
    assert _run(folder, folder / "tiny.yaml") == 0
    assert _rows(folder) == rows


def test_only_what_a_change_touches_is_done_again(finished, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder / "rows", tmp_path / "rows")
    base = yaml.safe_load((folder / "tiny.yaml").read_text())["base"]
    for changes, missing in (
        ({"seeds": [1, 2, 3]}, 2),
        ({"steps": 5}, 4),
        ({"tune_steps": 3, "seeds": [1, 2, 3]}, 4),  # the final runs' learning rates are not known yet
        ({"rows_per_step": 8}, 5),
    ):
        _run(tmp_path, _write(tmp_path, base=base, **changes), "--list")
        assert f" {missing} runs known to be missing" in capsys.readouterr().out, changes
    for chosen, missing in (
        (("--method", "LoRA r=32"), 1),
        (("--seed", "2"), 0),
        (("--seed", "2", "3", "--method", "T-REX 4x8"), 1),
    ):
        _run(tmp_path, _write(tmp_path, base=base, seeds=[1, 2, 3]), "--list", *chosen)
        assert f" {missing} runs known to be missing" in capsys.readouterr().out, chosen
    _run(tmp_path, _write(tmp_path, base=base, rows_per_step=8), "--list", "--seed", "2")
    assert " 4 runs known to be missing" in capsys.readouterr().out  # learning rates are tuned for any seed


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path, tiny_model, finished):
    path = _write(tmp_path, base=str(tiny_model), methods=["T-REX 4x8"], learning_rates=[0.01], steps=60, seeds=[1])
    command = [sys.executable, str(BENCHMARKS / "quality" / "run.py"), str(path)]
    command += ["--results", str(tmp_path / "rows"), "--work", str(tmp_path / "work")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "work").glob("**/*final*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(_rows(tmp_path)) == 1  # that of the tuning
    cut_short = next((tmp_path / "work").glob("**/*final*")) / "checkpoint-1000"
    cut_short.mkdir()  # as if it were killed while it wrote one
    assert _run(tmp_path, path) == 0
    assert _run(tmp_path / "whole", path) == 0
    resumed, whole = _rows(tmp_path), _rows(tmp_path / "whole")
    assert resumed[1]["train_seconds"] is None and whole[1]["train_seconds"] > 0
    assert len(resumed) == len(whole) == 2
    assert len(resumed[1]["curve"]) == 30 and set(resumed[1]["loss_steps"]) == {"1", "0.3", "0.1"}
    for name in ("curve", "loss_steps", "examples", "diagnosis", "trainable"):
        assert resumed[1][name] == whole[1][name], name


def test_two_workers_share_the_runs(tmp_path, tiny_model):
    path = _write(tmp_path, base=str(tiny_model), methods=["LoRA r=32", "LoRA, equal parameters"], seeds=[1])
    command = [sys.executable, str(BENCHMARKS / "quality" / "run.py"), str(path)]
    command += ["--results", str(tmp_path / "rows"), "--work", str(tmp_path / "work")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert _run(tmp_path, path) == 0  # what a worker left because it ended before a learning rate was known
    runs = [(row["method"], row["phase"], row["learning_rate"]) for row in _rows(tmp_path)]
    assert len(runs) == len(set(runs)) == 6


def test_a_claim_is_refused_while_it_is_held(tmp_path):
    with quality.claim(tmp_path / "run") as first:
        with quality.claim(tmp_path / "run") as second:
            assert first and not second
    with quality.claim(tmp_path / "run") as third:
        assert third


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"metods": ["LoRA r=32"]}, "metods is unknown"),
        ({"methods": ["LoRA r=33"]}, "LoRA r=33"),
        ({"methods": []}, "methods=\\[\\]"),
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"steps": True}, "steps=True"),
        ({"learning_rates": []}, "learning rates of T-REX 4x8 are \\[\\]"),
        ({"learning_rates": ["1e-3"]}, "write positive numbers"),
        ({"learning_rates": [math.nan]}, "write positive numbers"),
        ({"rates": {"LoRA": [0.1]}}, "rates of some of"),
        ({"rows_at_once": 3}, "divisor of rows_per_step=4"),
        ({"seeds": [0]}, "at least 1"),
        ({"precision": "fp8"}, "one of fp32"),
        ({"tier": "large"}, "small, full or smoke"),
        ({"data": {"family": "generatd"}}, "family='generatd' is unknown"),
        ({"data": {"family": "folder"}}, "needs --data"),
        ({"data": {"family": "generated", "tests": 3}}, "tests is unknown"),
        ({"data": {"family": "generated", "train": 3, "test": 3, "conflict": 2.0}}, "conflict"),
    ],
)
def test_wrong_experiments_are_refused(tmp_path, capsys, changes, said):
    assert _run(tmp_path, _write(tmp_path, **changes)) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "rows").exists()


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    assert _run(tmp_path, tmp_path / "none.yaml") == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1")
    assert _run(tmp_path, tmp_path / "list.yaml") == 1
    assert "not list" in capsys.readouterr().err
    (tmp_path / "short.yaml").write_text("tier: smoke")
    assert _run(tmp_path, tmp_path / "short.yaml") == 1
    assert "an experiment missing" in capsys.readouterr().err
    path = _write(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "tiny.jsonl").write_text('{"method": ')
    assert _run(tmp_path, path) == 1
    assert "tiny.jsonl, line 1, is no row" in capsys.readouterr().err


def test_the_experiments_that_come_along_can_be_read():
    paths = sorted((BENCHMARKS / "quality" / "experiments").glob("*.yaml"))
    assert paths
    for path in paths:
        experiment = quality.read_experiment(path)
        assert experiment.tier in ("micro", "small", "full")


# scoring


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("Choose.\n\nAnswer format: a/b", ["a", "b"]),
        ("Answer format: x/y is told\n\nAnswer format: true/false\n", ["true", "false"]),
        ("Write 7.\n\nAnswer format: 7", None),
        ("Is it and/or?", None),
    ],
)
def test_candidates_are_those_that_the_prompt_names(prompt, named):
    assert corpora.candidates(prompt) == named


def test_contexts_are_as_few_as_can_be():
    assert Answers([(1, 2), (1, 3)]).contexts() == [(1,)]
    assert Answers([(1,), (2,), (1, 9)]).contexts() == [(1,)]
    assert Answers([(1, 2, 9), (1, 3, 4, 9)]).contexts() == [(1, 2), (1, 3, 4)]
    assert Answers([(5,)]).contexts() == [()]


def _row(answer, named=None, prompt="Do it"):
    return {"task": "t", "prompt": f"{prompt}\n\nAnswer format: {named}" if named else prompt, "answer": answer}


ROWS = [
    _row("answer2", "answer1/answer2/answer3"),
    _row("true", "true/false"),
    _row("c", "ab/abc/c", "Another, longer one"),
    _row("some words", prompt="x"),
    _row("7"),
]


def _by_hand(model, texts, row, text, ended):
    prompt, answer = texts.prompt(row), texts.answer(text) + ((texts.tokenizer.eos_token_id,) if ended else ())
    ids = torch.tensor([prompt + answer])
    logs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) + end - 1, token]) for end, token in enumerate(answer))


def _sharp(seed=0, kind="llama"):
    """A tiny model whose predictions differ clearly; only GPT-2 knows where a token stands in its row."""
    if kind == "llama":
        model = make_llama(seed, vocab_size=259, eos_token_id=2, max_position_embeddings=256)
    else:
        config = GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)
        model = GPT2LMHeadModel(config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("batch_rows", [1, 2, 32])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_equal_those_of_one_forward_for_each_answer(texts, batch_rows, kind):
    model = _sharp(kind=kind)
    scored = score(model, texts, ROWS, batch_rows)
    for row, one in zip(ROWS, scored, strict=True):
        assert one.log_likelihood == pytest.approx(_by_hand(model, texts, row, row["answer"], True), abs=1e-3)
        named = corpora.candidates(row["prompt"])
        if named:
            sums = {text: _by_hand(model, texts, row, text, False) for text in named}
            assert one.prediction == max(sums, key=sums.get)


def test_free_answers_are_those_of_greedy_decoding(texts):
    """Also where the model gives the gold answer, which random ones seldom do: so gold is what it says."""
    right = 0
    for seed in range(6):
        model = _sharp(seed)
        for prompt in ("x", "Write it down", "1 2 3"):
            ids = torch.tensor([texts.prompt(_row("", prompt=prompt))])
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
            )
            given = new[0, ids.shape[1] :].tolist()
            for length in (1, 2, 3):
                gold = tuple(given[:length])
                known = Answers([gold])
                logs = model(input_ids=torch.cat((ids, torch.tensor([gold[:-1]], dtype=torch.long)), 1)).logits[0]
                known.read(gold[:-1], logs[ids.shape[1] - 1 :].log_softmax(-1))
                assert known.greedy(gold) == gold
                other = (*gold[:-1], gold[-1] ^ 1)
                again = Answers([other])
                again.read(other[:-1], logs[ids.shape[1] - 1 :].log_softmax(-1))
                assert again.greedy(other) == gold
                right += 1
    assert right == 54


def test_an_answer_that_goes_on_is_wrong(texts):
    row = _row("a")
    gold = texts.gold(row)
    space = texts.answer("")[0]
    assert scoring._text(texts, gold, gold, row) == "a"
    for given in ((*gold[:-1], space), (*gold[:-1], gold[-2]), gold[:1]):
        assert scoring._text(texts, given, gold, row) != "a"


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_labels(texts, masked):
    """The head sees the completions only, rows are padded on the left; none of it may change the loss."""
    model = _sharp().train()
    own = Texts(texts.tokenizer, masked=masked)
    if masked:
        model, _ = apply(METHODS["T-REX 4x8"], model, 1)
        rows = [_row("ab", prompt=f"prompt {number}") for number in range(40)]
        loader = [own.collate([own.example(row) for row in rows])]
        initialize_trex_prior(model, loader, progress=False)
        for name, parameter in model.named_parameters():
            if "trex_B" in name or "trex_router" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    examples = [own.example(row) for row in ROWS]
    batch = own.collate(examples)
    loss = own.loss(model, batch)
    total = count = 0
    for example in examples:
        ids = torch.tensor([example["prompt"] + example["completion"]])
        labels = ids.clone()
        labels[:, : len(example["prompt"])] = -100
        total = total + model(input_ids=ids, labels=labels).loss * len(example["completion"])
        count += len(example["completion"])
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-4)


def test_summaries_count_tasks_alike():
    rows = [{"task": task, "prompt": "", "answer": "y"} for task in ("a", "a", "a", "b")]
    scored = [Scored(-1.0, "y"), Scored(-2.0, "n"), Scored(-3.0, "n"), Scored(-4.0, "y")]
    found = summarise(rows, scored)
    assert found["tasks"] == {
        "a": {"rows": 3, "accuracy": pytest.approx(1 / 3), "log_likelihood": -2.0},
        "b": {"rows": 1, "accuracy": 1.0, "log_likelihood": -4.0},
    }
    assert found["accuracy"] == pytest.approx(2 / 3) and found["log_likelihood"] == -3.0
    assert found["examples"]["correct"] == [1, 0, 0, 1]


# methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, texts):
    method = METHODS[name]
    base = make_llama(vocab_size=259, hidden_size=64, num_hidden_layers=2, eos_token_id=2, max_position_embeddings=256)
    tasks = ("t", "u")
    model, settings = apply(method, base, 1, tasks)
    assert settings
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert bool(trainable) == method.trained
    if not trainable:
        return
    sentences = lambda prompts: torch.randn(len(prompts), 384)  # noqa: E731
    is_trex = name.startswith("T-REX") or name == "oracle"
    own = Texts(texts.tokenizer, embedding_of(method, sentences, tasks), masked=is_trex)
    # more than any method has clusters, of so many letters that they vary in all directions that a prior may whiten
    words = [" ".join(random.Random(number).choices(string.ascii_letters, k=8)) for number in range(160)]
    examples = [own.example(_row("ab", prompt=word)) for word in words]
    if is_trex and model.active_peft_config.use_prior:
        fit_prior(method, model, [own.collate(examples)], 1)
    before = [parameter.detach().clone() for parameter in trainable]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):
        own.loss(model, own.collate(examples[:4])).backward()
        optimizer.step()
    assert any(not torch.equal(now, then) for now, then in zip(trainable, before, strict=True))
    if is_trex:
        found = diagnose(model, own, [_row("ab", prompt=f"prompt {number}") for number in range(8)])
        assert len(found["omega"]) == len(found["gate"]) == len(found["task_share"]) == 14
        assert (found["purity"] is None) == (not model.active_peft_config.use_prior)
        ranks = found["core_rank"]
        if model.active_peft_config.expert_layout == "paired":
            assert ranks is None
        elif model.active_peft_config.use_prior or model.active_peft_config.init_weights != "zero_router":
            # omega may shut the prior out, and without a router nothing is left then
            assert max(ranks) > 1.01 and min(ranks) >= model.active_peft_config.use_router
        else:  # nothing tells the output vectors apart
            assert ranks == pytest.approx([1] * 14, abs=1e-3)


def _prior_of(name, embeddings):
    method = METHODS[name]
    model, _ = apply(method, make_llama(num_hidden_layers=2), 1)
    fit_prior(method, model, [{"semantic_embeds": embeddings}], 1)
    return model.base_model.trex_prior["default"]


def test_a_constant_prior_says_the_same_of_every_prompt():
    embeddings = embedding_of(METHODS["T-REX constant prior"], None)(["a", "b"])
    prior = _prior_of("T-REX constant prior", embeddings)
    scores = prior.score(embeddings)
    assert torch.equal(scores[0], scores[1]) and torch.allclose(scores[0], prior.mean_scores)
    assert 0.2 < scores[0].std() < 0.5


def test_an_offset_adds_the_constant_prior_to_that_of_the_prompts():
    generator = torch.Generator().manual_seed(0)
    # As many groups as there are clusters, so that k-means finds the same ones with the offset and without.
    drawn = torch.randn(32, 384, generator=generator).repeat(3, 1) + 0.1 * torch.randn(96, 384, generator=generator)
    sentences = torch.nn.functional.normalize(drawn + 0.6, dim=-1)  # 0.86 long, once centred
    embed = embedding_of(METHODS["T-REX sentence encoder, offset"], lambda prompts: sentences)
    embeddings = embed([""] * 96)
    scores = _prior_of("T-REX sentence encoder, offset", embeddings).score(embeddings)
    constant = embeddings[:, -CONSTANT_WIDTH:]
    semantic = _prior_of("T-REX sentence encoder", sentences).score(sentences)
    offset = _prior_of("T-REX constant prior", constant).score(constant)
    torch.testing.assert_close(scores, (semantic + offset) / 2, atol=0.05, rtol=0)
    assert scores.mean(0).std() > 0.1 and scores.std(0).mean() > 0.01


def test_the_same_seed_starts_the_same_adapter():
    base = make_llama(num_hidden_layers=2)
    states = [apply(METHODS["T-REX 4x8"], copy.deepcopy(base), seed)[0].state_dict() for seed in (1, 1, 2)]
    name = next(name for name in states[0] if "trex_A" in name)
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])


def test_learning_rates_differ_where_a_method_says_so(tmp_path, texts):
    method = METHODS["T-REX 4x8, router rate x 10"]
    model, settings = apply(method, make_llama(), 1)
    assert "trex_router x 10" in settings
    arguments = quality.TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5, use_cpu=True, report_to=[])
    learner = quality.Learner(texts, method.factors, model=model, args=arguments, train_dataset=[])
    learner.create_optimizer()
    rates = {parameter: group["lr"] for group in learner.optimizer.param_groups for parameter in group["params"]}
    wanted = {p: 5.0 if "trex_router" in name else 0.5 for name, p in model.named_parameters() if p.requires_grad}
    assert rates == wanted


# data


def _folder(path, train=12, test=4, tasks=("a", "b"), zipped=False):
    path.mkdir(exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        rows = [
            {"task": task, "prompt": f"{name} {task} {number}", "answer": str(number)}
            for task, number in itertools.product(tasks, range(count))
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if zipped:
            (path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (path / f"{name}.jsonl").write_text(text)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_is_read_and_split(tmp_path, zipped):
    folder = _folder(tmp_path / "data", zipped=zipped)
    settings = {"family": "folder", "validation": 3, "train": 5, "test": 2}
    corpus = corpora.load(settings, folder)
    assert [len(rows) for rows in (corpus.train, corpus.validation, corpus.test)] == [10, 6, 4]
    prompts = [row["prompt"] for rows in (corpus.train, corpus.validation, corpus.test) for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert corpora.load(settings, folder) == corpus
    assert corpora.load({**settings, "seed": 1}, folder).train != corpus.train
    everything = corpora.load({"family": "folder"}, folder)
    assert [len(rows) for rows in (everything.train, everything.validation, everything.test)] == [24, 0, 8]
    one = corpora.load({**settings, "tasks": ["b"]}, folder)
    assert {row["task"] for row in one.train + one.validation + one.test} == {"b"}


def test_training_prompts_that_are_tested_are_left_out(tmp_path):
    folder = _folder(tmp_path / "data")
    tested = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(tested) + "\n")
    corpus = corpora.load({"family": "folder", "test": 1}, folder)
    assert tested["prompt"] not in {row["prompt"] for row in corpus.train}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"validation": 12}, "a has 12 training rows, too few for 12"),
        ({"tasks": ["c"]}, "no rows of c; there are a, b"),
        ({"conflict": 0.5}, "conflict is unknown in the family 'folder'"),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        corpora.load({"family": "folder", **settings}, _folder(tmp_path / "data"))


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no train\.jsonl"):
        corpora.load({"family": "folder"}, tmp_path)
    _folder(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"task": "a", "prompt": "b"}\n')
    with pytest.raises(ValueError, match="lacks answer"):
        corpora.load({"family": "folder"}, tmp_path)


HUB_ROWS = {
    "boolq": {"question": "is it", "answer": True, "passage": ""},
    "piqa": {"goal": "To do", "sol1": "this", "sol2": "that", "label": 1},
    "social_iqa": {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
    "winogrande": {"sentence": "The _ did.", "option1": "x", "option2": "y", "answer": "2"},
    "arc_easy": {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {"question_stem": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
    "gsm8k": {"question": "How many?", "answer": "Much thought.\n#### 1,234"},
}


@pytest.mark.parametrize(
    "task, answer, named",
    [
        ("boolq", "true", ["true", "false"]),
        ("piqa", "solution2", ["solution1", "solution2"]),
        ("social_iqa", "answer3", ["answer1", "answer2", "answer3"]),
        ("winogrande", "option2", ["option1", "option2"]),
        ("arc_easy", "answer2", ["answer1", "answer2"]),
        ("openbookqa", "answer1", ["answer1", "answer2"]),
        ("gsm8k", "1234", None),
    ],
)
def test_rows_of_the_hub_become_prompts(monkeypatch, task, answer, named):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        # another prompt in each split
        return [{key: f"{split} {value}" if key in ("question", "goal", "sentence", "question_stem") else value
                 for key, value in HUB_ROWS[task].items()}]  # fmt: skip

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    corpus = corpora.load({"family": "hub", "tasks": [task]})
    assert [one[:2] for one in asked] == [corpora.HUB[task][:2]] * 2
    assert corpus.test[0]["answer"] == answer and corpus.test[0]["task"] == task
    assert corpora.candidates(corpus.test[0]["prompt"]) == named


def test_names_are_those_of_the_speed_benchmark():
    assert BASE not in METHODS  # "alone" has no meaning where nothing is timed
    assert {"T-REX 4x8", "LoRA r=32", "LoRA, equal parameters"} <= set(METHODS)


def test_what_the_prior_sees_of_the_tasks(tmp_path, tiny_model, capsys, monkeypatch):
    def load_model(path):
        """As in larger models, one direction outweighs all others: without whitening it makes the tasks alike."""
        base, tokenizer = quality.load_model(path)
        table = base.get_input_embeddings().weight.data
        table[::2] += 30 * table.std() * torch.ones(table.shape[1])
        return base, tokenizer

    monkeypatch.setattr(prior, "load_model", load_model)
    monkeypatch.setattr(prior, "DIRECTIONS", (None, 8))
    data = {**SMOKE["data"], "train": 100}
    assert prior.main([str(_write(tmp_path, data=data, base=str(tiny_model)))]) == 0
    found = capsys.readouterr().out
    assert "tiny: 400 prompts of 4 tasks" in found
    lines = [line for line in found.splitlines() if line.startswith("|")]
    plain, whitened = ([float(cell.split()[0]) for cell in line.split("|")[2:-1]] for line in lines[-2:])
    assert plain[0] > 0.5 and plain[3] > 2 * whitened[3]


def test_overlap_purity_and_spread_of_a_clear_case():
    """Two tasks on opposite sides, and a third at a right angle."""
    # The third is so near the middle that the first two are opposite also as seen from the mean of all three.
    where = torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 2, 0]]).repeat_interleave(100, 0)
    embeddings = where + 0.1 * torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    tasks = ["a"] * 100 + ["b"] * 100 + ["c"] * 100
    words, purity, nmi, spread, overlap = prior.look(embeddings, tasks, None)
    assert words == "none" and purity == "1.00"
    assert 0.2 < float(nmi) < 1 and float(spread) > 0.3
    assert 0.3 < float(overlap.split()[0]) < float(overlap.split()[-1].strip(")")) > 0.8


def test_pace(tmp_path, tiny_model, capsys):
    data = {**SMOKE["data"], "train": 40}
    path = _write(tmp_path, data=data, base=str(tiny_model))
    methods = ["LoRA r=32", "T-REX 4x8", "T-REX 4x8, B rate x 4"]
    command = [str(path), "--method", *methods, "--rate", "0.0001", "0.001", "--steps", "4"]
    assert pace.main(command) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed]
    assert head == ["", "learning rate", *(f"added after {n}" for n in (1, 2, 4)), "loss of steps 3 to 4"]
    assert [line[:2] for line in lines] == [[name, rate] for name in methods for rate in ("0.0001", "0.001")]
    lora, lora_fast, trex, trex_fast, faster, _ = [[float(cell) for cell in line[2:5]] for line in lines]
    assert lora[0] < lora[1] < lora[2] and trex[0] < trex[1] < trex[2]
    # the first step of Adam moves B, and nothing else, by the learning rate
    for fast, slow, times in ((lora_fast, lora, 10), (trex_fast, trex, 10), (faster, trex, 4)):
        assert fast[0] == pytest.approx(times**2 * slow[0], rel=0.1)


@pytest.mark.parametrize(
    ("given", "message"), [(["--steps", "0"], "steps=0 must be from 1"), (["--rate", "-1", "--steps", "1"], "-1.0")]
)
def test_pace_of_nothing(given, message, tmp_path, tiny_model, capsys):
    path = _write(tmp_path, base=str(tiny_model))
    assert pace.main([str(path), "--method", "LoRA r=4", *given]) == 1
    assert message in capsys.readouterr().err


def test_added_energy_is_that_of_the_update():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    layer, x = model.base_model.model[0], torch.randn(5, 8)
    with pace._Energies(model) as found:
        model(x)
    delta = x @ layer.get_delta_weight("default").T
    assert list(found.values()) == [pytest.approx(float(delta.square().sum() / layer.base_layer(x).square().sum()))]
    model(2 * x)
    assert len(found) == 1 and not layer._forward_hooks
