"""The pages say the truth: their code runs, their commands parse, and the errors they explain are in the source.

Blocks of a page run one after the other, as a reader would run them, in a folder that holds a tiny model under the
name of the real one and a file of training rows.
"""

import ast
import json
import re
import shlex
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import make_llama, randomize
from peft import PeftModel
from tasks import generate
from texts import make_chat_tokenizer

import peft_trex
from peft_trex.cli import make_parser

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "docs" / "guide" / "index.md"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
README = ROOT / "README.md"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), README])
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Pages may need these, which not every environment of the tests has.
OPTIONAL = ("bitsandbytes", "matplotlib", "trl")
# These errors are Python's or no error at all.
NOT_OURS = {"KeyError: 'TREX'", "ModuleNotFoundError: No module named 'peft_trex'"}


def blocks(path, language="python"):
    """The blocks of a language in a page, each with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield text[: match.start(1)].count("\n"), match[1]


def run(path, namespace):
    for line, block in blocks(path):
        exec(compile("\n" * line + block, str(path), "exec"), namespace)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the pages read: a model under its name, and rows."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = make_chat_tokenizer()
    tokenizer.save_pretrained(folder / NAME)
    base = make_llama(vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=256)
    base.save_pretrained(folder / NAME)
    return folder, generate(4, 0)[0]


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    folder, rows = made
    (tmp_path / NAME).parent.mkdir(parents=True)
    (tmp_path / NAME).symlink_to(folder / NAME)
    write(tmp_path / "train.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    # What a page trains runs on the CPU, in float32, whatever the machine offers.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # transformers asks for a later PEFT than the newest one, in the methods that put adapters into a model itself.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    if find_spec("trl"):
        trl = import_module("trl")
        monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True, bf16=False))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def need(path):
    for name in OPTIONAL:
        if re.search(rf"^(from|import) {name}\b|{name}.*4bit", "".join(code for _, code in blocks(path)), re.M):
            pytest.importorskip(name)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDE, ids=lambda path: path.stem)
def test_the_code_of_the_guide_runs(page, place):
    if page != START and not any(blocks(page)):
        pytest.skip("The page has no code.")
    need(page)
    namespace = {"__name__": "page"}
    run(START, namespace)
    # The other pages go on with an adapter that has learned something.
    randomize(namespace["model"])
    if page != START:
        run(page, namespace)
    assert isinstance(namespace["model"], PeftModel)


@pytest.mark.slow
def test_the_program_of_the_readme_runs(place, monkeypatch, capsys):
    need(README)
    [(_, program)] = blocks(README)
    assert len(program.splitlines()) <= 27
    rows = re.search(r'^`(\{"prompt": .+\})`\.$', README.read_text(encoding="utf-8"), re.M)
    row = json.loads(rows[1])
    answers = [{**row, "prompt": [{"role": "user", "content": f"{i} + {j}?"}]} for i in range(8) for j in range(8)]
    write(place / "train.jsonl", [row, *answers])
    pushed = []
    monkeypatch.setattr(PeftModel, "push_to_hub", lambda model, name: pushed.append(name))
    torch.manual_seed(0)
    run(README, {"__name__": "readme"})
    assert pushed == ["me/adapter"]
    assert "<|im_start|>user\n2 + 3?" in capsys.readouterr().out
    # The prior is fitted, and is that of the user's message alone.
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert config["chat_markers"] and config["shared_core"]


def test_there_is_code_to_run():
    counts = {page.stem: len(list(blocks(page))) for page in GUIDE}
    assert counts.pop("command-line") == counts.pop("serving") == counts.pop("troubleshooting") == 0
    assert all(counts.values()), counts
    texts = [page.read_text(encoding="utf-8") for page in (*GUIDE, README)]
    languages = {fence for text in texts for fence in re.findall(r"^```(.*)$", text, re.M)[::2]}
    # A block of code under another name would not run.
    assert languages == {"bash", "json", "python", "text"}


COMMANDS = [
    (f"{page.relative_to(ROOT)}:{line}", command)
    for page in PAGES
    for line, block in blocks(page, "bash")
    for command in re.findall(r"^peft-trex .+$", block, re.M)
]


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_the_commands_are_those_of_the_parser(place, command):
    # This one hands its arguments on to a parser of its own.
    _, rest = make_parser().parse_known_args(shlex.split(command)[1:])
    assert not rest or command.startswith("peft-trex serve-router ")


def test_there_are_commands():
    assert len(COMMANDS) >= 5


def messages():
    """All texts of the source: literals, where each value that a literal is formatted with is a hole."""
    for path in (ROOT / "src" / "peft_trex").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def explained():
    text = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    return [error for line in re.findall(r"^`(.+)`\n:   ", text, re.M) for error in line.split("`, `")]


def test_the_errors_that_are_explained_are_ours():
    texts = list(messages())
    assert len(explained()) > 20
    for error in set(explained()) - NOT_OURS:
        parts = map(re.escape, error.split("..."))
        pattern = re.compile("[^.]*\0[^.]*".join(parts))
        assert any(pattern.search(text) for text in texts), f"No error or warning of this package has {error!r}."


def test_all_public_names_are_in_the_reference():
    reference = "".join((ROOT / "docs" / "reference" / name).read_text() for name in ("index.md", "configuration.md"))
    assert sorted(set(re.findall(r"^::: peft_trex\.(\w+)$", reference, re.M))) == sorted(peft_trex.__all__)


def test_the_readme_is_short_and_its_badges_are_true():
    readme = README.read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"badge/(\w+)-([\w.-]+?)(?:%2B)?-\w+\)", readme) == [
        ("arXiv", re.search(r"arxiv.org/abs/([\d.]+)", pyproject)[1]),
        ("python", re.search(r'requires-python = ">=([\d.]+)"', pyproject)[1]),
        ("peft", re.search(r'"peft>=([\d.]+)"', pyproject)[1]),
        ("license", re.search(r'license = "(.+)"', pyproject)[1].replace("-", "--")),
    ]
