"""What a release needs before it is tagged; `make release-check` builds and tries it, too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def problems(root: Path = ROOT) -> list[str]:
    """What stands in the way of a release, in sentences; nothing if it can be tagged."""
    version = re.search(r'^VERSION = "(.+)"$', (root / "src/peft_trex/version.py").read_text(encoding="utf-8"), re.M)[
        1
    ]
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = next(line for line in changes.splitlines() if line.startswith("## "))
    tags = re.findall(r"^v(\d+\.\d+\.\d+)$", git(root, "tag"), re.M)
    said = []
    if git(root, "status", "--porcelain"):
        said.append("The working tree has changes that are not committed.")
    if not re.fullmatch(rf"## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading):
        said.append(f"The newest heading of CHANGELOG.md is {heading!r}; expected '## {version} (year-month-day)'.")
    newest = max(tags, key=numbers, default=None)
    if newest is not None and numbers(version) <= numbers(newest):
        said.append(f"version.py says {version}, but v{newest} is tagged already; expected a later version.")
    return said


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or "Nothing stands in the way of a tag.")
    sys.exit(bool(found))
