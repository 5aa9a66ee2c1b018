"""The demo, from its first line to its last, on a tiny model; and the tasks it generates."""

import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tasks import MONTHS, TASKS, WORDS, generate, load
from texts import save_tiny_model

from peft_trex import SemanticRouter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _quickstart(*arguments):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


# A model with a chat template, and one without.
TEMPLATE = """{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}\
{% if add_generation_prompt %}<s>assistant {% endif %}"""
RUNS = {"--bf16": TEMPLATE, "--no-bf16": None}


@pytest.fixture(scope="module", params=RUNS)
def template(request):
    return RUNS[request.param]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, template):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory, template):
    """The demo's folder when it has run through, and the process."""
    folder = tmp_path_factory.mktemp("demo")
    precision = next(name for name, one in RUNS.items() if one == template)
    result = _quickstart("--model", tiny_model, "--steps", 3, "--test", 2, "--out", folder, precision)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


@pytest.mark.slow
def test_quickstart_runs_through(finished, template):
    folder, result = finished
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    words = "the latest user message alone, which stands between '<s>user ' and '</s>'"
    assert (words in result.stdout) == bool(template) == bool(config["chat_markers"])
    for words in (
        "8 tasks, 4800 training rows, 16 held-out prompts",
        "32 clusters",
        "bitwise equal",
        "one for each of 32 clusters",
        "exported as 33 plain LoRA adapters",
        "KL(adapter || merged) = ",
        "mean ",
    ):
        assert words in result.stdout, result.stdout
    for task in TASKS:
        assert f"\n{task} " in result.stdout
    assert (folder / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "last word" in (folder / "routing.md").read_text()
    assert (folder / "adapter" / "adapter_config.json").exists()
    router = SemanticRouter.from_pretrained(folder / "lora")
    assert all((adapter / "adapter_model.safetensors").exists() for adapter in router.adapters.values())


@pytest.mark.slow
def test_a_changed_adapter_is_noticed_when_it_is_reloaded(finished, tmp_path, tiny_model):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "trex_B" in key)
    tensors[key] += 1e-3
    save_file(tensors, file)
    result = _quickstart("--model", tiny_model, "--out", tmp_path, "--reload")
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


def test_generated_tasks_are_right_and_held_out():
    train, test = generate(50, 8, seed=3)
    assert len(TASKS) >= 6
    assert {row["task"] for row in train} == {row["task"] for row in test} == set(TASKS)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert generate(50, 8, seed=3) == (train, test) != generate(50, 8, seed=4)
    for row in train + test:
        assert _solve(row["task"], row["prompt"]) == row["answer"], row


def _solve(task, prompt):
    """Each task once more, from the text of its prompt."""
    words = prompt.replace("?", "").replace(".", "").replace(",", "").split()
    listed = [word for word in words if word in WORDS]
    numbers = [int(word) for word in words if word.isdigit()]
    if task == "last word":
        return words[-1]
    if task == "reverse":
        return " ".join(words[:-4:-1])
    if task == "capitals":
        return listed[0].upper()
    if task == "count":
        return str(len(prompt.partition(": ")[2].split()))
    if task == "larger":
        return str(max(numbers))
    if task == "add":
        return str(sum(numbers))
    if task == "weekday":
        weekdays = {date(2024, 1, day).strftime("%A"): day for day in range(1, 8)}
        return date(2024, 1, weekdays[words[3]] + numbers[0]).strftime("%A")
    return date(numbers[1], MONTHS.index(words[4]) + 1, numbers[0]).isoformat()
