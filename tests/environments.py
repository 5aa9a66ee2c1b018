"""Run the fast tests with the lowest or the newest releases that `pyproject.toml` allows.

`make test-lowest` and `make test-newest` call it.

The environment is made anew where `pyproject.toml` is newer than it, beside this checkout's own. Both targets take the
Python that suits them, where this machine has one, and the one that runs this script otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CANNOT_BE_MADE = 75  # exit status, as EX_TEMPFAIL of sysexits.h: no test has run


class Target(NamedTuple):
    resolution: str  # of uv
    pythons: tuple[str, ...]  # minor versions, the best first
    extra: str


TARGETS = {
    "lowest": Target("lowest-direct", ("3.10", "3.11"), "test"),
    "newest": Target("highest", ("3.13", "3.12", "3.11"), "dev"),
}


def interpreters(version: str) -> list[str]:
    """Interpreters of a version such as "3.10" that run on this machine, those of pyenv and uv included."""
    homes = [Path.home() / ".pyenv" / "versions", Path.home() / ".local" / "share" / "uv" / "python"]
    found = [shutil.which(f"python{version}")]
    for home in homes:
        found += [str(path) for path in sorted(home.glob(f"*{version}.*/bin/python{version}"))]
    return [path for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


def make(target: Target, folder: Path) -> Path:
    """Make the environment, unless it is newer than `pyproject.toml`; return its interpreter."""
    python, done = folder / "bin" / "python", folder / "made"
    if done.exists() and done.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime:
        return python
    base = next((path for version in target.pythons for path in interpreters(version)), sys.executable)
    print(f"making {folder.name} with {base}", flush=True)
    subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    install = [folder / "bin" / "uv", "pip", "install", "--quiet", "--python", python]
    install += ["--resolution", target.resolution, "--editable", f".[{target.extra}]"]
    # where the CPU builds of torch can be reached they save gigabytes, and the tests need no more
    attempts = ([*install, "--torch-backend", "cpu"], install)
    if not any(subprocess.run(attempt, cwd=ROOT).returncode == 0 for attempt in attempts):
        raise OSError(f"No set of the {target.resolution} releases could be installed.")
    done.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest")
    arguments = parser.parse_args()
    try:
        python = make(TARGETS[arguments.target], ROOT / f".venv-{arguments.target}")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The {arguments.target} releases were not tested: {error}", file=sys.stderr)
        return CANNOT_BE_MADE
    shown = (
        "import sys, torch, transformers, peft, accelerate; print(f'Python {sys.version.split()[0]}', *("
        "f'{package.__name__} {package.__version__}' for package in (torch, transformers, peft, accelerate)))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-c", shown], env=environment, check=True)
    runs = [["-n", "2", "--dist", "loadfile", "-m", "not slow", *arguments.pytest]]
    if arguments.target == "lowest" and not arguments.pytest:
        # PEFT's own tests of its oldest release run nowhere else. They start processes of their own.
        runs.append(["-m", "slow", "tests/peft_suite"])
    results = [subprocess.run([python, "-m", "pytest", *run], cwd=ROOT, env=environment) for run in runs]
    return max(result.returncode for result in results)


if __name__ == "__main__":
    sys.exit(main())
