"""PEFT's own tests pass with TREX, but for a list of failures that are the method's nature.

The list is exact, down to the line that fails: a new failure, an old one at another place, and one that went away are
all errors of this test. It runs with the PEFT that is installed; `make test-lowest` runs it with the oldest declared.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft_suite import (
    INSTALLED,
    MODULES,
    Outcome,
    build_suite,
    fetch_peft_tests,
    run_suite,
)
from peft_suite_expected import EXCLUDED, EXPECTED, applies
from peft_suite_rows import CONFIGS, PAIRS, ROWS

README = Path(__file__).parents[1] / "README.md"
STATUSES = ("passed", "skipped", "failed", "excluded")


@pytest.mark.slow
def test_peft_own_tests(tmp_path: Path) -> None:
    release = INSTALLED
    excluded = [(entry.pattern, entry.reason) for entry in EXCLUDED if applies(entry, release)]
    package = build_suite(fetch_peft_tests(release), tmp_path, excluded)
    outcomes = run_suite(package)

    lines = {
        (module, entry.function, case): entry.line
        for module, entries in EXPECTED.items()
        for entry in entries
        for case in entry.cases
        if applies(entry, release)
    }
    failures = {(one.module, one.function, one.case): one for one in outcomes if one.status == "failed"}
    unexpected = [one.report for key, one in failures.items() if not one.line.startswith(lines.get(key, "\0"))]
    assert not unexpected, f"{len(unexpected)} of PEFT's tests fail with TREX:\n\n" + "\n".join(unexpected[:10])
    gone = sorted(set(lines) - set(failures))
    assert not gone, f"expected to fail, but passed or did not run; take them off the list: {gone}"

    reasons = {one.line for one in outcomes if one.status == "excluded"}
    unused = {reason for _, reason in excluded} - reasons
    assert not unused, f"nothing was excluded for these reasons: {unused}"
    reached = " ".join(one.case for one in outcomes if one.status == "passed")
    assert all(name in reached for name, *_ in [*ROWS, *PAIRS, *CONFIGS])
    if not torch.cuda.is_available():  # where fewer are skipped
        missing = [row for row in table(release, outcomes) if row not in README.read_text(encoding="utf-8")]
        assert not missing, "tests/README.md tells other figures; these rows belong there:\n" + "\n".join(missing)


def table(release: str, outcomes: list[Outcome]) -> list[str]:
    """Rows of the table in tests/README.md: what became of the tests of each file."""
    count = Counter((one.module, one.status) for one in outcomes)
    rows = []
    for module in MODULES:
        passed, skipped, failed, excluded = (count[module, status] for status in STATUSES)
        selected = passed + skipped + failed
        rows.append(f"| `{module}` | {release} | {selected} | {passed} | {skipped} | {failed} | {excluded} |")
    return rows


def test_upstream_tables_not_found(tmp_path: Path) -> None:
    for module in (*MODULES, "testing_common.py", "testing_utils.py"):
        (tmp_path / module).write_text("import pytest\n\nCASES = [\n]\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"'TEST_CASES = \[' 0 times, expected once"):
        build_suite(tmp_path, tmp_path / "copy", [])
