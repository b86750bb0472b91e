"""Claim: docs/compatibility.md and TESTED_VERL say what tests/compatibility/matrix.py found, no more."""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "compatibility"
sys.path.insert(0, str(FOLDER))

import matrix  # noqa: E402
import page  # noqa: E402

from verl_patches.seams import TESTED_VERL  # noqa: E402

RESULTS = json.loads((FOLDER / "results.json").read_text())


def test_the_page_is_what_the_results_make():
    text = page.PAGE.read_text()
    assert page.BEGIN in text and page.END in text
    assert page.with_section(text, page.render(RESULTS)) == text, "run tests/compatibility/page.py"


def test_tested_releases_are_those_that_passed():
    assert list(TESTED_VERL) == [release["verl"] for release in RESULTS["releases"] if matrix.passed(release)]
    assert RESULTS["newest"] in [release["verl"] for release in RESULTS["releases"]]


def test_a_failure_is_named_on_the_page():
    failed = {"ok": False, "passed": 3, "failed": ["test_seam[reward noise]"]}
    release = {
        "verl": "9.9", "contract": failed, "check": {"ok": False, "failed": ["no plugin"]}, "formula": failed,
        "tiny_run": {"ok": False, "kl": [], "failed": ["ImportError"]},
    }  # fmt: skip
    text = page.render({**RESULTS, "releases": [release]})
    assert "| 9.9 | 3 passed, 1 failed: `test_seam[reward noise]` | no: no plugin |" in text and "ImportError" in text
    assert not matrix.passed(release)
