"""MkDocs hooks: pages that live elsewhere in the repository, and links that lead out of this folder.

Links are written as they work in the repository. On the site those to pages of it go there, and those to any other
file go to the repository's home.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages and pictures outside of docs/, which keep their places in the repository on the site.
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "tests/README.md")
RESULTS = ("*.md", "*.png", "quality/*.png")
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")


def on_files(files: Any, config: Any) -> Any:
    results = [path for pattern in RESULTS for path in sorted((ROOT / "benchmarks" / "results").glob(pattern))]
    for path in [*(ROOT / name for name in ELSEWHERE), *results]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = Path(page.file.abs_src_path).relative_to(ROOT)
    sites = {os.path.relpath(file.abs_src_path, ROOT): file.src_uri for file in files if file.abs_src_path}

    def moved(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        target = posixpath.normpath(f"{path.parent.as_posix()}/{link}")
        if "://" in link or not (ROOT / target).exists():
            return match[0]
        if target in sites:
            link = posixpath.relpath(sites[target], posixpath.dirname(page.file.src_uri) or ".")
        else:
            link = f"{config.repo_url}/blob/main/{target}"
        return f"{before}{link}{after}"

    return LINK.sub(moved, markdown)
