"""The demo, from its first line to its last, on a tiny model; and the tasks it generates."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_model import encode, load_model, prompt_ids, right_answers, shares
from tasks import TASKS, generate, load
from texts import save_tiny_model
from transformers import DataCollatorForSeq2Seq

from peft_trex import SemanticRouter, TRexConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _quickstart(*arguments):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


# A model with a chat template, and one without.
TEMPLATE = """{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}\
{% if add_generation_prompt %}<s>assistant {% endif %}"""
RUNS = {"--full": TEMPLATE, "--no-bf16": None}


@pytest.fixture(scope="module", params=RUNS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, form):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    if RUNS[form]:
        (folder / "chat_template.jinja").write_text(RUNS[form])
    return folder


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory, form):
    """The demo's folder when it has run through, and the process."""
    folder = tmp_path_factory.mktemp("demo")
    result = _quickstart("--model", tiny_model, "--steps", 8, "--test", 2, "--out", folder, form)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


@pytest.mark.slow
def test_quickstart_runs_through(finished, form):
    folder, result = finished
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    full = form == "--full"
    assert bool(config["chat_markers"]) == full and config["num_clusters"] == len(TASKS)
    for words in (
        "16 tasks, 128 training rows, 32 held-out prompts",
        "in 16 clusters",
        "16 prompts are bitwise equal",
        "one for each of 16 clusters",
        "T-REX export: 17 LoRA, 16 clusters",
        "the exported router sent 32 prompts to",
        "steps 1 to 2",
        "mean ",
    ):
        assert words in result.stdout, result.stdout
    [table] = re.findall(r"right answers to held-out prompts\n(.*?)\n\n", result.stdout, re.DOTALL)
    head, *lines = table.splitlines()
    columns = ["base", "LoRA", "T-REX", "served", "merged"] if full else ["LoRA", "T-REX", "served"]
    assert head.split() == columns
    assert [line.rsplit(None, len(columns))[0] for line in lines] == [*sorted(TASKS), "mean"]
    assert "arning" not in result.stderr, result.stderr
    for step in ("LoRA r=32", "T-REX: training", "a fresh process"):
        assert re.search(rf"\[{step}: \d+ s by the clock, \d+ s of processors\]", result.stdout)
    assert (folder / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "Halden gleeb" in (folder / "routing.md").read_text()
    router = SemanticRouter.from_pretrained(folder / "lora")
    assert all((adapter / "adapter_model.safetensors").exists() for adapter in router.adapters.values())


@pytest.mark.slow
def test_a_changed_adapter_is_noticed_when_it_is_reloaded(finished, tmp_path, tiny_model, form):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "trex_B" in key)
    tensors[key] += 1e-3
    save_file(tensors, file)
    result = _quickstart("--model", tiny_model, "--out", tmp_path, "--reload", *["--chat"] * (form == "--full"))
    assert result.returncode != 0
    assert "reloaded adapter differs" in result.stderr


def test_data_of_ones_own(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"task": f"t{i % 3}", "prompt": f"prompt {i // 2}", "answer": str(i)} for i in range(60)]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    train, test = load(file)
    assert len(train) + 2 * len(test) == 60 and test
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for bad, words in (
        ('{"task": "a", "prompt": "b"}', "line 1: expected a JSON object with task, prompt and answer"),
        ("no json", "line 1"),
        ("[1]", "line 1"),
        (json.dumps(rows[0]), "1 different prompts, too few"),
        ("", "0 different prompts"),
    ):
        file.write_text(bad)
        with pytest.raises(SystemExit, match=words):
            load(file)


def test_both_methods_get_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    save_tiny_model(tmp_path)
    base, tokenizer = load_model(str(tmp_path))
    seen = []

    class Watched(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            seen.append([len(row["input_ids"]) for row in features])
            return super().__call__(features, return_tensors)

    monkeypatch.setattr(quickstart, "DataCollatorForSeq2Seq", Watched)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--steps", "3", "--out", str(tmp_path), "--no-bf16"])
    options = quickstart.parse()
    data = Dataset.from_list([encode(tokenizer, {"prompt": "p" * size, "answer": "a"}) for size in range(1, 61)])
    orders = []
    for config in (LoraConfig(target_modules="all-linear"), TRexConfig(use_prior=False)):
        model = get_peft_model(base, config)
        torch.manual_seed(len(orders))
        assert len(quickstart.train(model, tokenizer, data, 1e-3, options, "")) == 3
        orders.append(seen[-3:])
        base = model.unload()
    assert orders[0] == orders[1] and len({size for step in orders[0] for size in step}) == 3 * quickstart.ROWS


def test_an_answer_is_right_if_greedy_decoding_writes_it(tmp_path):
    save_tiny_model(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    rows = [{"task": f"t{index % 2}", "prompt": "p" * (index + 1), "answer": "?"} for index in range(6)]
    for row in rows[:4]:
        ids = torch.tensor([prompt_ids(tokenizer, row["prompt"])])
        new = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :]
        row["tokens"] = new.tolist()

    # The tiny model's greedy tokens are no texts that could be encoded again, so they stand in the encoding.
    def encoded(tokenizer, row):
        prompt = prompt_ids(tokenizer, row["prompt"])
        answer = row.get("tokens", [5, 6, 7])
        return {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [-100] * len(prompt) + answer,
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("small_model.encode", encoded)
        hits = right_answers(model, tokenizer, rows)
    assert hits == [True] * 4 + [False] * 2
    assert shares(rows, hits) == {"t0": 2 / 3, "t1": 2 / 3, "mean": 2 / 3}
    assert encode(tokenizer, rows[0])["labels"][-1] == tokenizer.eos_token_id


def test_generated_tasks_are_held_out():
    train, test = generate(50, 8, seed=3)
    assert len(TASKS) == 16 and len(train) == 50 * 16 and len(test) == 8 * 16
    assert {row["task"] for row in train} == {row["task"] for row in test} == set(TASKS)
    assert not {_date(row) for row in train} & {_date(row) for row in test}
    assert generate(50, 8, seed=3) == (train, test) != generate(50, 8, seed=4)
    more, same = generate(90, 8, seed=3)
    assert same == test and {row["prompt"] for row in train} < {row["prompt"] for row in more}


def test_tasks_are_asked_the_same_and_each_wants_something_else():
    train, test = generate(50, 8, seed=3)
    by_date = {}
    for row in train + test:
        assert sorted(re.findall(r"\w+", row["answer"])) == sorted(_date(row).split())
        by_date.setdefault(_date(row), []).append(row)
    assert {len(rows) for rows in by_date.values()} == {16}
    for date, rows in by_date.items():
        # Where two of the date's parts are equal, so are some answers.
        assert len({row["answer"] for row in rows}) == 16 or len(set(date.split())) < 3
    # The first test rows are one date, as each task wants it.
    assert len({_date(row) for row in test[:16]}) == 1


def test_a_task_has_one_convention_which_neither_of_its_words_tells():
    conventions = {}
    train, test = generate(50, 8, seed=3)
    for row in train + test:
        said = _date(row).split()
        order = tuple(said.index(part) for part in re.findall(r"\w+", row["answer"]))
        between = re.sub(r"\w+", "", row["answer"])
        if len(set(said)) == 3:
            conventions.setdefault(row["task"], set()).add((order, between))
    assert {len(found) for found in conventions.values()} == {1}
    for place in (0, 1):
        tasks_of = {}
        for task, found in conventions.items():
            tasks_of.setdefault(task.split()[place], []).append(found)
        assert {len(found) for found in tasks_of.values()} == {2}
        assert all(first != second for first, second in tasks_of.values())


def _date(row):
    date, _, task = row["prompt"].partition(" for ")
    assert task == row["task"]
    return date
