"""PEFT's own test matrix with TREX in it: fetch PEFT's tests, add rows to a copy of them, run it, read the outcomes.

PEFT's tests come with its source distribution only, so that of the installed release is downloaded once, into .cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import peft_trex

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODULES = ("test_custom_models.py", "testing_common.py", "testing_utils.py")

# name, model of PEFT's test file, arguments of TRexConfig. No name may be a part of another.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("Vanilla MLP 1 TRex", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2 TRex", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3 TRex", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4 TRex", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5 TRex", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "Vanilla MLP 6 TRex",
        "MLP",
        {"target_modules": ["lin0"], "r_a": 2, "r_b": 3, "num_clusters": 5, "prior_map": "learned"},
    ),
    (
        "Vanilla MLP 7 TRex",
        "MLP",
        {"target_modules": ["lin0"], "expert_layout": "paired", "r_a": 4, "r_b": 4, "num_clusters": 4},
    ),
    ("Vanilla MLP 8 TRex", "MLP", {"target_modules": ["lin0"], "use_router": False}),
    ("Vanilla MLP 9 TRex", "MLP", {"target_modules": ["lin0", "lin1"], "use_prior": False}),
    ("Vanilla MLP 10 TRex", "MLP", {"target_modules": ["lin0"], "trex_dropout": 0.1}),
    # a single expert has the weight 1 whatever the input, so that what merging adds is what the adapter adds
    ("Vanilla MLP 11 TRex", "MLP", {"target_modules": ["lin0", "lin1"], "r_a": 1, "r_b": 1, "num_clusters": 1}),
    ("Embedding + transformers Conv1D 1 TRex", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + transformers Conv1D 2 TRex", "EmbConv1D", {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    (
        "Embedding + transformers Conv1D 3 TRex",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "r_a": 1, "r_b": 1, "num_clusters": 1},
    ),
]

# name, arguments of the first and of the second adapter, both on an MLP
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "TRex Same",
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "TRex Different",
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
    (
        "TRex one expert Same",
        {"target_modules": ["lin0"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
        {"target_modules": ["lin0"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
    ),
    (
        "TRex one expert Different",
        {"target_modules": ["lin0"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
        {"target_modules": ["lin1"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
    ),
]

CONFTEST = '''"""Stands in for upstream's conftest, which the source distribution lacks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    # several upstream tests draw weights without a seed; what passes must not hang on the order of the tests
    torch.manual_seed({seed})
'''

PYTEST_INI = """[pytest]
markers =
    single_gpu_tests: of upstream
    multi_gpu_tests: of upstream
    regression: of upstream
    bitsandbytes: of upstream
"""


class Outcome(NamedTuple):
    """What became of one upstream test: `function` and the name of our row, or `TRexConfig` where it takes none."""

    function: str
    row: str
    status: str  # passed, failed or skipped
    line: str  # the line of source that failed, empty otherwise
    report: str  # pytest's account of a failure


def fetch_peft_tests() -> Path:
    """Folder with the tests of the installed PEFT release, downloaded on first use.

    Raises:
        RuntimeError: if the source distribution cannot be downloaded (pip's own words are in the message).
    """
    release = version("peft")
    target = CACHE / f"peft-{release}"
    tests = target / "tests"
    if tests.is_dir():
        return tests
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as scratch:
        archive = _download_sdist(release, Path(scratch))
        unpacked = Path(scratch, "unpacked")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if Path(member.name).parts[1:2] == ("tests",)]
            if not members:
                raise RuntimeError(f"{archive.name} holds no tests/; PEFT {release} ships its tests elsewhere.")
            tar.extractall(unpacked, members, filter="data")
        try:
            # a folder appears whole or not at all, however the process ends
            next(unpacked.iterdir()).rename(target)
        except OSError:
            if not tests.is_dir():  # otherwise another process was faster
                raise
    return tests


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


def build_suite(tests: Path, folder: Path, seed: int = 0) -> Path:
    """Copy PEFT's custom model tests to a package in `folder`, with our rows in their tables; returns the package."""
    package = folder / "peft_tests"
    package.mkdir(parents=True)
    for module in MODULES:
        shutil.copyfile(tests / module, package / module)
    (package / "__init__.py").touch()
    (package / "conftest.py").write_text(CONFTEST.format(seed=seed), encoding="utf-8")
    (folder / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")

    rows = "".join(f"    ({name!r}, {model!r}, TRexConfig, {kwargs!r}),\n" for name, model, kwargs in ROWS)
    pairs = "".join(f"    ({name!r}, 'trex', TRexConfig, {first!r}, {second!r}),\n" for name, first, second in PAIRS)
    matrix = package / MODULES[0]
    text = matrix.read_text(encoding="utf-8")
    # in front, so that the ids that pytest numbers do not depend on upstream's own rows
    text = _insert_after(text, "TEST_CASES = [\n", rows)
    text = _insert_after(text, "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [\n", pairs)
    text = _insert_after(text, "import pytest\n", "import peft_trex\nfrom peft_trex import TRexConfig\n")
    matrix.write_text(text, encoding="utf-8")

    # imported at the top for tests that are not run here
    for module, line, name in (
        ("testing_common.py", "from diffusers import StableDiffusionPipeline\n", "StableDiffusionPipeline"),
        ("testing_utils.py", "from datasets import load_dataset\n", "load_dataset"),
    ):
        text = (package / module).read_text(encoding="utf-8")
        (package / module).write_text(text.replace(line, f"{name} = type('{name}', (), {{}})\n"), encoding="utf-8")
    return package


def _insert_after(text: str, line: str, addition: str) -> str:
    found = list(re.finditer(f"^{re.escape(line)}", text, flags=re.MULTILINE))
    if len(found) != 1:
        raise RuntimeError(
            f"PEFT's {MODULES[0]} has the line {line.strip()!r} {len(found)} times, expected once; rows for "
            f"TREX cannot be added to the tests of PEFT {version('peft')} this way, see tests/peft_suite.py."
        )
    end = found[0].end()
    return text[:end] + addition + text[end:]


def run_suite(package: Path, workers: int = 2) -> list[Outcome]:
    """Run the tests of our rows in a process of its own, `workers` at a time if pytest-xdist is there.

    Raises:
        RuntimeError: if pytest did not get as far as running tests.
    """
    folder = package.parent
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "TRex", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-c", "pytest.ini", f"--rootdir={folder}", f"--junitxml={report}", package.name]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    # what an outer pytest has set there (options, the name of an xdist worker) is not meant for this one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    source = str(Path(peft_trex.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    environment["OMP_NUM_THREADS"] = "1"
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode not in (0, 1) or not report.is_file():
        raise RuntimeError(
            f"pytest on PEFT's tests ended with code {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return [_outcome(case) for case in ET.parse(report).iter("testcase")]


def _outcome(case: ET.Element) -> Outcome:
    function, _, parameters = case.get("name", "").partition("[")
    row = next((name for name, *_ in [*ROWS, *PAIRS] if name in parameters), "TRexConfig")
    for child in case:
        if child.tag == "skipped":
            return Outcome(function, row, "skipped", "", "")
        if child.tag in ("failure", "error"):
            report = f"{case.get('name')}\n{child.text or child.get('message', '')}"
            # --tb=short indents source by four blanks, the innermost frame last
            source = re.findall(r"^    (?=\S)(.*)$", report, flags=re.MULTILINE)
            return Outcome(function, row, "failed", source[-1] if source else "", report)
    return Outcome(function, row, "passed", "", "")
