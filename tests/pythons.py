"""Every Python at hand, for what has to run on each of them."""

import shutil
import subprocess
import sys
from pathlib import Path


def _pythons():
    """Interpreters beside this one, those of pyenv included: versions that are named but not there are left out."""
    found = {}
    candidates = [sys.executable] + [shutil.which(f"python3.{minor}") for minor in range(10, 15)]
    home = Path.home() / ".pyenv" / "versions"
    candidates += sorted(str(path) for path in home.glob("3.1[0-4]*/bin/python"))
    for path in filter(None, candidates):
        probe = subprocess.run([path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
        if probe.returncode == 0:
            found.setdefault(probe.stdout.strip(), path)
    return found


PYTHONS = _pythons()
