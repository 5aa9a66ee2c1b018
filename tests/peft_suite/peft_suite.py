"""PEFT's own tests with TREX in them: fetch PEFT's tests, add rows to a copy of them, run it, read the outcomes.

PEFT's tests come with its source distribution only, so that of a release is downloaded once, into .cache.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from peft_suite_models import make_hub
from peft_suite_rows import COMPILED, CONFIGS, LORA_TO_TREX, PAIRS, REPLACED, ROWS, TABLES

import peft_trex

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
INSTALLED = version("peft")

MODULES = ("test_custom_models.py", *TABLES, *REPLACED, "test_torch_compile.py")
HELPERS = ("testing_common.py", "testing_utils.py")

CONFTEST = '''"""Stands in for upstream's conftest, which the source distribution lacks."""

import re

import pytest
import torch
import transformers.integrations.peft

EXCLUDED = {excluded!r}
ROWS = {rows!r}
# transformers 5.24 asks for a release of PEFT that is not out, and works with those before
transformers.integrations.peft.MIN_PEFT_VERSION = "0.21.0"


@pytest.fixture(autouse=True)
def seed():
    # several upstream tests draw weights without a seed; what passes must not hang on the order of the tests
    torch.manual_seed({seed})


def pytest_collection_modifyitems(items):
    items[:] = [
        item
        for item in items
        if not any(name in item.name and not re.search(tests, item.originalname) for name, tests in ROWS)
    ]
    for item in items:
        for pattern, reason in EXCLUDED:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason="excluded: " + reason), append=False)
                break
'''

PYTEST_INI = """[pytest]
markers =
    single_gpu_tests: of upstream
    multi_gpu_tests: of upstream
    regression: of upstream
    bitsandbytes: of upstream
"""

IMPORTS = """
import peft_trex
from peft_trex import TRexConfig, TRexLayer
"""

# LoRA's arguments in T-REX's terms, for files in which the text `lora_` has become `trex_`
REPLACEMENTS = """

def LoraConfig(**kwargs):
    for name in ("r", "trex_alpha"):
        kwargs.pop(name, None)
    if "init_trex_weights" in kwargs:
        kwargs["init_weights"] = kwargs.pop("init_trex_weights")
    return TRexConfig(**kwargs)


LoraLayer = TRexLayer
"""

# the models lie beside the tests, so that no release has to be told when to ask a hub
OFFLINE = """

@contextmanager
def hub_online_once(model_id):
    yield
"""


class Outcome(NamedTuple):
    """What became of one upstream test."""

    module: str  # the test file
    function: str  # with its class
    case: str  # its parameters: of custom models the name of our row, otherwise as pytest tells them
    status: str  # passed, failed, skipped (by upstream) or excluded (by us)
    line: str  # the line of source that failed, or the reason of a skip
    report: str  # pytest's account of a failure
    seconds: float


def fetch_peft_tests(release: str) -> Path:
    """Folder with the tests of a PEFT release, downloaded on first use.

    Raises:
        RuntimeError: if the source distribution cannot be downloaded (pip's own words are in the message).
    """
    target = CACHE / f"peft-{release}"
    tests = target / "tests"
    if tests.is_dir():
        return tests
    with _scratch() as scratch:
        archive = _download_sdist(release, Path(scratch))
        unpacked = Path(scratch, "unpacked")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if Path(member.name).parts[1:2] == ("tests",)]
            if not members:
                raise RuntimeError(f"{archive.name} holds no tests/; PEFT {release} ships its tests elsewhere.")
            tar.extractall(unpacked, members, filter="data")
        _move(next(unpacked.iterdir()), target)
    return tests


def _scratch() -> tempfile.TemporaryDirectory[str]:
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n", encoding="utf-8")
    return tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-")


def _move(source: Path, target: Path) -> None:
    """A folder appears whole or not at all, however the process ends."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster
            raise


def _download_sdist(release: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    errors = []
    # pip builds the metadata of what it downloads; with the installed setuptools that takes a second, not a minute
    for extra in (["--no-build-isolation"], []):
        done = subprocess.run(
            [*command, *extra, "--dest", str(folder), f"peft=={release}"], capture_output=True, text=True, timeout=600
        )
        found = sorted(folder.glob("peft-*.tar.gz"))
        if done.returncode == 0 and len(found) == 1:
            return found[0]
        errors.append(done.stderr.strip())
    raise RuntimeError(
        f"The source distribution of PEFT {release}, which holds PEFT's own tests, could not be downloaded. "
        "pip said:\n" + "\n".join(errors)
    )


def build_suite(tests: Path, folder: Path, excluded: list[tuple[str, str]], seed: int = 0) -> Path:
    """Copy PEFT's tests to a package in `folder`, with our rows in their tables; returns the package.

    Args:
        tests: PEFT's folder of tests.
        folder: where to; it also gets the models that the tests ask a hub for.
        excluded: regular expressions on pytest's node ids of tests not to run, each with the reason.
        seed: of torch, before each test.
    """
    package = folder / "peft_tests"
    package.mkdir(parents=True)
    texts = {name: (tests / name).read_text(encoding="utf-8") for name in (*MODULES, *HELPERS)}
    make_hub(folder, texts.values())
    for name in texts:
        # of diffusers, which is not needed by what is run here
        texts[name] = re.sub(
            r"^from diffusers import (\w+)\n|^import (diffusers)\n", _absent, texts[name], flags=re.MULTILINE
        )
    for name in MODULES:
        texts[name] = _add_rows(name, texts[name])
    texts["testing_utils.py"] += OFFLINE
    for name, text in texts.items():
        (package / name).write_text(text, encoding="utf-8")
    (package / "__init__.py").touch()
    rows = [(name, tests) for name, _, tests in CONFIGS]
    (package / "conftest.py").write_text(CONFTEST.format(seed=seed, excluded=excluded, rows=rows), encoding="utf-8")
    (folder / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")
    return package


def _absent(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    return f"{name} = type({name!r}, (), {{'__version__': '0'}})\n"


def _add_rows(module: str, text: str) -> str:
    # in front, so that the ids that pytest numbers do not depend on upstream's own rows
    if module == "test_custom_models.py":
        rows = "".join(f"    ({name!r}, {model!r}, TRexConfig, {kwargs!r}),\n" for name, model, kwargs in ROWS)
        pairs = "".join(f"    ({name!r}, 'trex', TRexConfig, {one!r}, {two!r}),\n" for name, one, two in PAIRS)
        text = _insert_after(module, text, "TEST_CASES = [\n", rows)
        text = _insert_after(module, text, "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [\n", pairs)
        if "\nPREFIXES = {\n" in text:  # of releases before 0.19
            text = _insert_after(module, text, "PREFIXES = {\n", "    TRexConfig: 'trex_',\n")
    elif module in TABLES:
        rows = "".join(
            f"    pytest.param(TRexConfig, {{'task_type': {TABLES[module]!r}, **{kwargs!r}}}, id={name!r}),\n"
            for name, kwargs, _ in CONFIGS
        )
        text = _insert_after(module, text, "ALL_CONFIGS = [\n", rows)
    elif module == "test_torch_compile.py":
        settings = "".join(
            f"    {name!r}: (TRexConfig(task_type='CAUSAL_LM', **{kwargs!r}), {compiled!r}),\n"
            for name, kwargs, compiled in COMPILED
        )
        text = _insert_after(module, text, "SETTINGS = {\n", settings)
    else:
        for pattern, replacement in REPLACED[module]:
            text = re.sub(pattern, replacement, text)
    last = max(node.end_lineno or 0 for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom)))
    lines = text.splitlines(keepends=True)
    addition = IMPORTS + (REPLACEMENTS if LORA_TO_TREX[0] in REPLACED.get(module, []) else "")
    return "".join([*lines[:last], addition, *lines[last:]])


def _insert_after(module: str, text: str, line: str, addition: str) -> str:
    found = list(re.finditer(f"^{re.escape(line)}", text, flags=re.MULTILINE))
    if len(found) != 1:
        raise RuntimeError(
            f"PEFT's {module} has the line {line.strip()!r} {len(found)} times, expected once; rows for TREX cannot "
            "be added to the tests of this release of PEFT this way, see tests/peft_suite/peft_suite.py."
        )
    end = found[0].end()
    return text[:end] + addition + text[end:]


def run_suite(package: Path, workers: int = 2) -> list[Outcome]:
    """Run the tests of our rows in a process of its own, `workers` at a time if pytest-xdist is there.

    Args:
        package: what `build_suite` returned.
        workers: number of processes.

    Raises:
        RuntimeError: if pytest did not get as far as running tests.
    """
    folder = package.parent
    report = folder / "report.xml"
    selected = " or ".join(["TRex", *REPLACED])
    command = [sys.executable, "-m", "pytest", "-q", "-k", selected, "--tb=short", "-p", "no:cacheprovider"]
    command += [
        "-c",
        "pytest.ini",
        f"--rootdir={folder}",
        f"--junitxml={report}",
        f"--basetemp={folder / 'temporary'}",
    ]
    command += [package.name]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    # what an outer pytest has set there (options, the name of an xdist worker) is not meant for this one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [Path(peft_trex.__file__).parents[1], environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    environment["OMP_NUM_THREADS"] = "1"
    environment["HF_HUB_OFFLINE"] = "1"
    environment["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode not in (0, 1) or not report.is_file():
        raise RuntimeError(
            f"pytest on PEFT's tests ended with code {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    broken = [case for case in ET.parse(report).iter("testcase") if not case.get("classname")]
    if broken:
        raise RuntimeError(f"PEFT's tests cannot be imported:\n{''.join(broken[0].itertext())[-4000:]}")
    return [_outcome(case) for case in ET.parse(report).iter("testcase")]


def _outcome(case: ET.Element) -> Outcome:
    function, _, parameters = case.get("name", "").partition("[")
    _, stem, *classes = case.get("classname", "").split(".")
    module, function = f"{stem}.py", ".".join([*classes, function])
    parameters = re.sub(
        r"(\w+-internal-testing|\w+)/", "", parameters.removesuffix("]")
    )  # releases take the same models from various places
    if module == "test_custom_models.py":
        parameters = next((name for name, *_ in [*ROWS, *PAIRS] if name in parameters), parameters)
    status, line, report = "passed", "", ""
    for child in case:
        if child.tag == "skipped":
            status, line = "skipped", child.get("message", "")
            if line.startswith("excluded: "):
                status, line = "excluded", line.removeprefix("excluded: ")
        if child.tag in ("failure", "error"):
            report = f"{module}::{case.get('name')}\n{child.text or child.get('message', '')}"
            # --tb=short indents source by four blanks, the innermost frame last, and underlines parts of it
            source = re.findall(r"^    (?=[^\s^~])(.*)$", report, flags=re.MULTILINE)
            status, line = "failed", source[-1] if source else ""
    return Outcome(module, function, parameters, status, line, report, float(case.get("time", 0)))
