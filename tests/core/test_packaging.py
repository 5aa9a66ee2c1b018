"""What is published says the truth: declared needs, one version, links that lead somewhere from anywhere."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from release_check import git, problems

import peft_trex

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "peft_trex").rglob("*.py"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def imported(path):
    """The packages that a file imports, but for those that only a type checker reads or that are tried."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.Try) or (isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test))
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_what_is_imported_is_declared():
    # DeepSpeed is there wherever ZeRO-3 shards a weight, which is where it is imported
    packages = {name for path in SOURCES for name in imported(path)} - set(sys.stdlib_module_names) - {"deepspeed"}
    distributions = packages_distributions()
    # Python 3.10 does not find the distribution of every package; the name is then the same.
    needed = {distributions.get(name, [name])[0].lower().replace("-", "_") for name in packages}
    declared = {
        Requirement(line).name.lower().replace("-", "_") for line in re.findall(r'^    "(.+)",$', dependencies(), re.M)
    }
    assert needed - declared == set()
    # transformers' Trainer, and PEFT, behave differently with older ones
    assert declared - needed == {"accelerate"}


def dependencies():
    return PYPROJECT[PYPROJECT.index("\ndependencies = [") :].partition("\n]")[0]


def test_the_version_stands_in_one_place():
    assert '\ndynamic = ["version"]\n' in PYPROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", peft_trex.__version__)
    assert f"## {peft_trex.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_lead_somewhere_from_anywhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    home = re.search(r'^Homepage = "(.+)"$', PYPROJECT, re.M)[1]
    raw = home.replace("github.com", "raw.githubusercontent.com") + "/main/"
    references = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", readme, re.M))
    links = re.findall(r"\]\(([^)\s]+)\)", readme) + list(references.values())
    assert len(links) > 5 and all(link.startswith("https://") for link in links)
    ours = [link.removeprefix(f"{home}/blob/main/").removeprefix(raw) for link in links if "peft-trex/" in link]
    assert len(ours) > 4
    for link in ours:
        name, _, heading = link.partition("#")
        assert (ROOT / name).is_file(), link
        if heading:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            anchors = {
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in lines
                if line[:1] == "#"
            }
            assert heading in anchors, link
    used = set(re.findall(r"\]\[([^\]]+)\]", readme))
    assert used == set(references)


@pytest.mark.parametrize("name", ["Homepage", "Source", "Issues", "Changelog"])
def test_the_project_says_where_it_lives(name):
    assert re.search(rf'^{name} = "https://github.com/peft-trex/peft-trex', PYPROJECT, re.M)


def test_a_release_is_checked(tmp_path):
    """Each thing that stands in the way is told, and nothing else."""

    def write(version, heading):
        (tmp_path / "src/peft_trex").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src/peft_trex/version.py").write_text(f'VERSION = "{version}"\n')
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## 0.0.1 (2026-01-01)\n")

    def commit():
        author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        git(tmp_path, "add", "-A")
        git(tmp_path, *author, "commit", "-q", "-m", "one")

    git(tmp_path, "init", "-q")
    write("0.2.0", "0.2.0 (unreleased)")
    assert len(problems(tmp_path)) == 2
    commit()
    [heading] = problems(tmp_path)
    assert "'## 0.2.0 (unreleased)'" in heading
    write("0.2.0", "0.2.0 (2026-12-01)")
    commit()
    assert problems(tmp_path) == []
    git(tmp_path, "tag", "v0.10.0")
    git(tmp_path, "tag", "v0.9.0")
    [version] = problems(tmp_path)
    assert "v0.10.0 is tagged already" in version
    write("0.10.1", "0.10.1 (2026-12-02)")
    commit()
    assert problems(tmp_path) == []
