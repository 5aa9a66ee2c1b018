"""The command line: each command on a tiny model, exit codes, and what a user's mistakes are told."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import TASKS, generate
from texts import make_chat_tokenizer
from transformers import AutoModelForCausalLM

from peft_trex import SemanticRouter, TRexConfig, __version__
from peft_trex.cli import main, make_parser

COMMANDS = ["info", "fit-prior", "report", "calibrate", "merge", "export"]
ALL = [*COMMANDS, "serve-router"]
ROOT = Path(__file__).resolve().parents[2]


def save_base(folder):
    tokenizer = make_chat_tokenizer()
    tokenizer.save_pretrained(folder)
    make_llama(vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=256).save_pretrained(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, training rows, and an adapter whose prior is fitted by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    save_base(folder / "base")
    train, _ = generate(3, 0)
    write_rows(folder / "train.jsonl", train)
    data = ["--data", f"{folder}/train.jsonl", "--chat", "--quiet"]
    assert main(["fit-prior", f"{folder}/base", "--clusters", "4", "--out", f"{folder}/adapter", *data]) == 0
    return folder


@pytest.fixture
def adapter(place, tmp_path):
    """A copy of the adapter whose B is not zero, and the arguments that name the data."""
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, place / "adapter", is_trainable=True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "trex_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), ["--data", f"{place}/train.jsonl", "--chat", "--quiet"]


def facts_of(adapter, capsys):
    capsys.readouterr()
    assert main(["info", adapter, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_new_adapter_has_the_recommended_form_and_a_fitted_prior(place, capsys):
    facts = facts_of(f"{place}/adapter", capsys)
    assert facts["Experts"] == "8 x 8 in each of 14 layers"
    assert facts["Clusters"] == "4, fitted, by the latest user message"
    assert facts["Token router"] == "none"
    assert facts["Calibrated"].startswith("no")
    assert facts["Written by"] == f"peft-trex {__version__}"
    assert facts["Base model"] == f"{place}/base"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "adapter")
    parameters = sum(p.numel() for name, p in model.named_parameters() if "trex_" in name)
    assert facts["Parameters"] == f"{parameters:,}"
    card = (place / "adapter" / "README.md").read_text()
    assert f"| Tasks | {', '.join(sorted(TASKS))} |" in card


def test_the_papers_form(place, tmp_path, capsys):
    data = ["--data", f"{place}/train.jsonl", "--quiet", "--max-batches", "4"]
    out = str(tmp_path / "paper")
    assert main(["fit-prior", f"{place}/base", "--form", "paper", "--clusters", "8", "--out", out, *data]) == 0
    facts = facts_of(out, capsys)
    assert (facts["Experts"], facts["Token router"]) == ("4 x 8 in each of 14 layers", "whole")
    # Without --chat the prompts do not follow the template.
    assert facts["Clusters"] == "8, fitted, by the prompt"


def test_a_fitted_prior_stays_unless_it_is_asked_for_again(adapter, capsys):
    folder, data = adapter
    before = Path(folder, "adapter_model.safetensors").read_bytes()
    assert main(["fit-prior", folder, *data]) == 1
    assert "--again" in capsys.readouterr().err
    assert Path(folder, "adapter_model.safetensors").read_bytes() == before
    assert main(["fit-prior", folder, "--again", "--max-batches", "3", *data]) == 0
    assert Path(folder, "adapter_model.safetensors").read_bytes() != before


def test_report(adapter, tmp_path, capsys):
    folder, data = adapter
    assert (
        main(
            [
                "report",
                folder,
                "--group-by",
                "task",
                "--plot",
                str(tmp_path / "routing.png"),
                "--max-batches",
                "2",
                *data,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "# Routing of `default`" in printed and "| group |" in printed
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    report = ["report", folder, "--out", str(tmp_path / "routing.md"), "--max-batches", "1", *data]
    assert main([*report, "--plot", str(tmp_path / "few.svg")]) == 0
    assert main([*report, "--plot", str(tmp_path / "all.svg"), "--detail"]) == 0
    drawn = [(tmp_path / f"{name}.svg").read_text() for name in ("few", "all")]
    assert ["dead experts" in text for text in drawn] == [False, True]
    assert "| group |" not in (tmp_path / "routing.md").read_text()


def test_calibrate_keeps_the_static_weights_and_what_they_miss(adapter, capsys):
    folder, data = adapter
    assert main(["calibrate", folder, "--per-cluster", *data]) == 0
    missed = re.search(r"misses (\S+) of what the adapter adds", capsys.readouterr().out)[1]
    found = facts_of(folder, capsys)["Calibrated"]
    assert re.fullmatch(
        r"for all prompts and for each of 4 clusters, by the fit to (input or leading|core) in \d+ layers.*", found
    )
    assert f"| Merged | misses {missed} of what the adapter adds" in Path(folder, "README.md").read_text()
    assert not list(Path(folder).glob(".part-*"))


def test_merge(adapter, place, tmp_path, capsys):
    folder, data = adapter
    assert main(["merge", folder, "--fit", "input", "--out", str(tmp_path / "merged"), *data]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    ids = torch.arange(40).reshape(2, 20)
    assert not torch.allclose(merged(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-3)
    # A merge without data or an earlier calibration is the mean routing, of which it warns.
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["merge", folder, "--out", str(tmp_path / "mean"), "--quiet"]) == 0
    assert "peft-trex: warning: T-REX depends on its input" in capsys.readouterr().err


def test_export(adapter, tmp_path, capsys):
    folder, data = adapter
    assert main(["export", folder, "--out", str(tmp_path / "lora"), "--quiet"]) == 1
    assert "has no static weights for each cluster" in capsys.readouterr().err
    assert main(["export", folder, "--out", str(tmp_path / "lora"), *data]) == 0
    router = SemanticRouter.from_pretrained(tmp_path / "lora")
    assert len(set(router.clusters)) == 4
    assert main(["export", folder, "--max-adapters", "2", "--out", str(tmp_path / "two"), *data]) == 0
    assert len(set(SemanticRouter.from_pretrained(tmp_path / "two").clusters)) == 2
    assert main(["export", folder, "--groups", "6", "--out", str(tmp_path / "six"), *data]) == 0
    assert len(set(SemanticRouter.from_pretrained(tmp_path / "six").clusters)) == 6
    capsys.readouterr()
    assert main(["export", folder, "--groups", "6", "--out", str(tmp_path / "none"), "--quiet"]) == 1
    assert "--groups is found among the prompts of --data" in capsys.readouterr().err
    assert main(["calibrate", folder, "--groups", "5", *data]) == 0
    assert "for each of 5 clusters" in capsys.readouterr().out
    assert main(["calibrate", folder, "--per-cluster", *data]) == 0
    capsys.readouterr()
    assert main(["export", folder, "--max-adapters", "2", "--out", str(tmp_path / "none"), "--quiet"]) == 1
    assert "or give `peft-trex export` the data, too (--data)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["export", folder, "--overall", "--out", str(tmp_path / "one"), *data]) == 0
    assert not (tmp_path / "one" / "router.json").exists()


@pytest.mark.filterwarnings("ignore:Some rows hold no user's message")
def test_rows_may_be_chats_or_text(place, tmp_path, capsys):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    counts = []
    for rows, chat in (
        ([{"prompt": "hello", "answer": "world"}], ["--chat"]),
        ([{"messages": turns}], []),
        ([{"prompt": turns[:1], "completion": turns[1:]}], []),
        ([{"prompt": "hello", "answer": "world"}], []),
        ([{"prompt": "hello"}], []),
    ):
        write_rows(tmp_path / "rows.jsonl", rows)
        data = ["--data", str(tmp_path / "rows.jsonl"), "--quiet", *chat]
        assert main(["report", f"{place}/adapter", *data]) == 0
        counts.append(int(re.search(r"\((\d+) tokens", capsys.readouterr().out)[1]))
    assert counts[0] == counts[1] == counts[2] > counts[3] > counts[4]


MISTAKES = {
    "no adapter": (["info", "nowhere/at/all"], "There is no folder nowhere/at/all"),
    "an empty folder": (["info", "empty"], "has no adapter_config.json"),
    "another method": (["info", "lora"], "of the method LORA"),
    "a damaged file": (["info", "damaged"], "is damaged"),
    "no data": (["report", "adapter", "--data", "absent.jsonl"], "absent.jsonl"),
    "no rows": (["report", "adapter", "--data", "empty.jsonl"], "holds no row"),
    "no JSON": (["report", "adapter", "--data", "text.jsonl"], "text.jsonl, line 2: this is no JSON"),
    "no prompt": (["report", "adapter", "--data", "other.jsonl"], "other.jsonl, line 1: expected"),
    "no object": (["report", "adapter", "--data", "list.jsonl"], "this is a list"),
    "no field": (["report", "adapter", "--data", "rows.jsonl", "--group-by", "topic"], "no 'topic'"),
    "no folder for a new adapter": (["fit-prior", "base", "--data", "rows.jsonl"], "--out FOLDER"),
    "a form for an old one": (["fit-prior", "adapter", "--data", "rows.jsonl", "--form", "paper"], "--form"),
    "too few prompts": (["fit-prior", "base", "--data", "rows.jsonl", "--out", "new"], "distinct prompts"),
    "something is there": (["merge", "adapter", "--out", "lora"], "There is something at lora already"),
    "half of the answers": (["report", "adapter", "--data", "half.jsonl"], "some rows have an answer"),
}


@pytest.fixture(scope="module")
def mistakes(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("adapter", "base"):
        shutil.copytree(place / name, folder / name)
    (folder / "empty").mkdir()
    lora = get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained(folder / "lora")
    shutil.copytree(place / "adapter", folder / "damaged")
    file = folder / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for name, text in {
        "empty": "\n",
        "text": '{"prompt": "hello"}\nhello\n',
        "other": '{"question": "hello"}\n',
        "list": "[1]\n",
        "rows": '{"prompt": "hello"}\n{"prompt": "world"}\n',
        "half": '{"prompt": "hello"}\n{"prompt": "world", "answer": "hello"}\n',
    }.items():
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_line(mistake, mistakes, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    arguments, words = MISTAKES[mistake]
    assert main([*arguments, *([] if arguments[0] == "info" else ["--quiet"])]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-trex: error: ")]
    assert len(said) == 1 and words in said[0]


def test_an_interrupt_and_a_fault_of_ours(monkeypatch, capsys):
    def interrupted(adapter):
        raise KeyboardInterrupt

    def broken(adapter):
        raise AttributeError("ours")

    monkeypatch.setattr("peft_trex.files.facts_of_files", interrupted)
    assert main(["info", "adapter"]) == 130
    monkeypatch.setattr("peft_trex.files.facts_of_files", broken)
    with pytest.raises(AttributeError):
        main(["info", "adapter"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_the_parser_takes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    example = re.search(r"example:\n  peft-trex (.+)", printed)[1]
    assert example.split()[0] == command
    make_parser().parse_args(example.split())


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert re.findall(r"^    ([a-z-]+)(?: |$)", printed, re.M) == ALL


def test_the_router_is_handed_its_arguments(capsys):
    pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    with pytest.raises(SystemExit) as ended:
        main(["serve-router", "nowhere", "--upstream", "http://127.0.0.1:9"])
    assert "nowhere" in str(ended.value.code)


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["report", "adapter"], ["info", "a", "--batch-size", "0"]])
def test_wrong_arguments_end_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: peft-trex")


def test_the_console_script_is_there():
    script = re.search(r'^peft-trex = "(\S+):(\w+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert callable(getattr(import_module(script[1]), script[2]))


@pytest.mark.slow
def test_in_a_process(place):
    def run(*arguments):
        command = [sys.executable, "-m", "peft_trex.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    fine, failed = run("info", f"{place}/adapter"), run("info", f"{place}/base")
    assert fine.returncode == 0 and "Clusters" in fine.stdout, fine.stderr
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "peft-trex: error: " in failed.stderr


def test_an_adapter_without_a_base_model(tmp_path, capsys):
    get_peft_model(make_llama(), TRexConfig(use_prior=False, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 1
    assert "--base" in capsys.readouterr().err
