"""The recipes for trainers that load adapters in ways of their own: their files and commands, as the page has them."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama
from peft import PeftModel
from tasks import generate
from texts import make_chat_tokenizer
from transformers import AutoModelForCausalLM

from peft_trex.model import find_tuner

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "recipes.md").read_text(encoding="utf-8")
# What the programs of the commands run; any other one is Python itself.
MODULES = {"swift": "swift.cli.main", "axolotl": "axolotl.cli.main"}
ROWS = generate(4, 0)[0]
SETTINGS = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 12}

pytestmark = pytest.mark.slow


def recipe(title):
    """A trainer's part of the page: its files by name, and its commands as lists of words."""
    part = re.search(rf"^### {title}\n(.*?)^##", PAGE, re.M | re.S)[1]
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", part, re.M | re.S))
    commands = re.findall(r"^```bash\n(.*?)^```$", part, re.M | re.S)
    return files, [shlex.split(line) for line in "".join(commands).replace("\\\n", "").splitlines()]


def messages(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]


@pytest.fixture
def place(tmp_path):
    """What the recipes read: a tiny model under the name of the real one, and rows of chat."""
    tokenizer = make_chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / NAME)
    base = make_llama(vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=256)
    base.save_pretrained(tmp_path / NAME)
    rows = [json.dumps({"messages": messages(row)}) + "\n" for row in ROWS]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    return tmp_path


def write(place, files, **settings):
    """The files of a recipe, with settings that make a YAML file's training short."""
    for name, text in files.items():
        short = yaml.safe_dump(yaml.safe_load(text) | settings) if name.endswith(".yaml") else text
        (place / name).write_text(short)


def run(place, package, command):
    folder = Path(sys.prefix) / package
    if not folder.is_dir() and find_spec(package) is None:
        pytest.skip(f"{package} is not importable, nor in {package}/ of the virtual environment")
    settings = dict(word.split("=") for word in command if re.match("[A-Z_]+=", word))
    program, *words = command[len(settings) :]
    paths = filter(None, [settings.pop("PYTHONPATH", None), str(folder), os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }  # fmt: skip
    program = ["-m", MODULES[program]] if program in MODULES else []
    done = subprocess.run(
        [sys.executable, *program, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def loss_of(model):
    """The mean loss of the rows' answers, one at a time."""
    tokenizer, losses = make_chat_tokenizer(), []
    for row in ROWS[:16]:
        ids = tokenizer.apply_chat_template(messages(row), return_tensors="pt", return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages(row)[:1], add_generation_prompt=True, return_dict=True)
        labels = ids.clone()
        labels[:, : len(prompt["input_ids"])] = -100
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return sum(losses) / len(losses)


def check(place, checkpoint):
    """The loss fell, the prior is fitted on the users' messages, and the folder holds what was learned."""
    history = json.loads((place / checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    assert len(losses) == 12 and all(map(math.isfinite, losses)), losses
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    base = AutoModelForCausalLM.from_pretrained(place / NAME)
    model = PeftModel.from_pretrained(base, place / checkpoint).eval()
    config, prior = model.peft_config["default"], find_tuner(model).prior_of("default")
    assert config.shared_core and prior.fitted and len(prior.centroids) == 32
    assert make_chat_tokenizer().decode(config.chat_markers["before"]) == "<|im_start|>user\n"
    with model.disable_adapter():
        before = loss_of(model)
    assert loss_of(model) < 0.9 * before
    return model


def test_ms_swift(place):
    files, [sft, infer] = recipe("ms-swift")
    write(place, files)
    # Without the last of them it asks a hub whether the model is the latest.
    short = [f"--{name}={value}" for name, value in SETTINGS.items()] + ["--gradient_accumulation_steps=1"]
    run(place, "swift", [*sft, *" ".join(short).replace("=", " ").split(), "--check_model", "false"])
    model = check(place, "trained/checkpoint-12")
    (place / "asked.jsonl").write_text("".join((place / "train.jsonl").read_text().splitlines(True)[:3]))
    greedy = "--val_dataset asked.jsonl --result_path answers.jsonl --temperature 0 --max_new_tokens 6 --stream false"
    run(place, "swift", [*infer, *greedy.split()])
    tokenizer, wanted = make_chat_tokenizer(), []
    for row in ROWS[:3]:
        prompt = tokenizer.apply_chat_template(
            messages(row)[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True))
    found = [json.loads(line)["response"] for line in (place / "answers.jsonl").read_text().splitlines()]
    # It shows fewer signs for bytes that are no letter.
    assert [text.replace("\ufffd", "") for text in found] == [text.replace("\ufffd", "") for text in wanted]
    assert any(found)


def test_llama_factory(place):
    files, [command] = recipe("LLaMA-Factory")
    write(place, files, use_cpu=True, **SETTINGS)
    run(place, "llamafactory", command)
    check(place, "trained")


def test_axolotl(place):
    files, [command] = recipe("axolotl")
    write(place, files, bf16=False, lr_scheduler="constant", logging_steps=1, max_steps=12, sequence_len=256)
    run(place, "axolotl", [*command, "--launcher", "python"])
    check(place, "trained/checkpoint-12")
