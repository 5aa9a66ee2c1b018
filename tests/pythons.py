"""Every Python at hand, for what has to run on each of them."""

import shutil
import subprocess
import sys
from pathlib import Path


def _pythons(minors):
    """Interpreters beside this one, those of pyenv included: versions that are named but not there are left out."""
    found = {}
    candidates = [sys.executable] + [shutil.which(f"python3.{minor}") for minor in minors]
    home = Path.home() / ".pyenv" / "versions"
    candidates += [str(path) for minor in minors for path in sorted(home.glob(f"3.{minor}.*/bin/python"))]
    for path in filter(None, candidates):
        probe = subprocess.run([path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
        if probe.returncode == 0:
            found.setdefault(probe.stdout.strip(), path)
    return found


PYTHONS = _pythons(range(10, 15))
# What travels with an export also runs on versions that the package itself does not support.
OLDER_PYTHONS = {version: path for version, path in _pythons((8, 9)).items() if version not in PYTHONS}
