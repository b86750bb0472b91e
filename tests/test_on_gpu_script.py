"""Claim: benchmarks/on_gpu.sh runs to its end with shapes for a CPU and writes what it says; keeps to the time that it is
allowed; and does not end with 0 where a part failed or was not done.

The first with this environment's Python; the others with a Python of the test's, because the shapes are a GPU's. Not claimed: the
times and figures of a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RECIPES = ["grpo", "grpo_kl", "vimpo", "vimpo_one_pass"]
STEPS = [f"a step, qwen3-{size}b, fused {fused}" for fused in (0, 1) for size in ("0.6", "1.7")]


def run(out: Path, **variables: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(out)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def parts(done: subprocess.CompletedProcess) -> list[str]:
    """Names of the parts that were begun, in order."""
    return [
        line.split(", at ")[0][3:]
        for line in done.stdout.splitlines()
        if line.startswith("== ") and not any(word in line for word in ("done", "left out", "ended"))
    ]


@pytest.fixture
def python(tmp_path) -> Path:
    """A Python whose benchmarks do nothing but what the variables TAKES (seconds) and FAILS (part of the arguments) say."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/bash\n[[ $1 == -c ]] && exit\nsleep "${TAKES:-0}"\n[[ -z ${FAILS:-} || "$*" != *"$FAILS"* ]]\n'
    )
    path.chmod(0o755)
    return path


def test_with_shapes_for_a_cpu_it_runs_to_its_end(tmp_path):
    done = run(tmp_path, SMALL="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert parts(done) == ["token statistics", "a step, tiny, fused 0", "a step, tiny, fused 1"]
    assert done.stdout.splitlines()[-1].startswith("== done, at ")
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {row["dtype"] for row in written.pop("kl_function_gpu.json")["rows"]} == {"bfloat16", "float32"}
    assert sorted(written) == [f"engine_step_gpu_tiny_fused_{fused}.json" for fused in (0, 1)]
    for step in written.values():
        rows = {row["recipe"]: row for row in step["rows"]}
        assert list(rows) == RECIPES
        # what a user pays: one policy and one reference forward, as many as GRPO has without a reference
        assert rows["vimpo_one_pass"]["forwards a sequence"] == rows["grpo"]["forwards a sequence"] == 2
        assert rows["vimpo"]["forwards a sequence"] == rows["grpo_kl"]["forwards a sequence"] == 3
        assert all(row["step s"] > 0 and row["update MB"] > 0 for row in rows.values())


def test_the_benchmarks_do_without_what_the_tests_are_written_with():
    """As a machine may have neither: they are imported in a process that cannot import pytest and hypothesis."""
    modules = "engine_step, kl_function, kernel_settings"
    program = f"import sys; sys.modules.update(pytest=None, hypothesis=None); import {modules}"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_parts_of_a_gpu_in_the_order_of_what_they_are_worth(tmp_path, python):
    done = run(tmp_path, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert parts(done) == ["tests", "token statistics", *STEPS, "launch settings"]


def test_where_less_than_a_minute_is_left_the_launch_settings_are(tmp_path, python):
    done = run(tmp_path, PYTHON=str(python), ALLOWED="50")
    assert done.returncode == 0, done.stderr
    assert parts(done) == ["tests", "token statistics", *STEPS]
    assert "== launch settings: left out" in done.stdout


def test_a_part_that_fails_is_named_and_does_not_end_the_others(tmp_path, python):
    done = run(tmp_path, PYTHON=str(python), FAILS="--shape qwen3-0.6b --fused 1")
    assert done.returncode == 1
    assert parts(done) == ["tests", "token statistics", *STEPS, "launch settings"]
    assert done.stderr.splitlines() == ["on_gpu.sh: failed: a step, qwen3-0.6b, fused 1: exit status 1"]


def test_the_time_that_is_allowed_is_kept_and_what_it_costs_is_named(tmp_path, python):
    done = run(tmp_path, PYTHON=str(python), ALLOWED="6", TAKES="60")
    assert done.returncode == 1
    assert parts(done) == ["tests"]
    assert "failed: tests: not done when 6 seconds were over" in done.stderr
    assert all(f"failed: {part}: not begun, 6 seconds are over" in done.stderr for part in ["token statistics", *STEPS])


@pytest.mark.parametrize(
    "variable, value, said",
    [
        ("ALLOWED", "590s", "ALLOWED=590s is not a number of seconds"),
        ("SMALL", "true", "SMALL=true is neither 1 nor 0"),
        ("BUNDLE", "nowhere", "no wheels in BUNDLE=nowhere; bash benchmarks/gpu_bundle.sh FOLDER collects them"),
        ("PYTHON", "/bin/false", "PYTHON=/bin/false has no torch"),
        ("PYTHON", "nowhere/python", "PYTHON=nowhere/python is not there"),
    ],
)
def test_a_wrong_variable_is_named_before_anything_runs(tmp_path, variable, value, said):
    ends_before_it_begins(tmp_path / "out", said, **{"SMALL": "1", variable: value})
    assert not (tmp_path / "out").exists()


def test_wheels_of_another_python_are_named_with_what_collects_the_right_ones(tmp_path):
    (tmp_path / "ray-2.55.1-cp27-cp27m-manylinux2014_x86_64.whl").touch()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    said = f"are not for Python {version}; bash benchmarks/gpu_bundle.sh FOLDER {version} collects those"
    ends_before_it_begins(tmp_path / "out", said, SMALL="1", BUNDLE=str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(tmp_path):
    ends_before_it_begins(tmp_path / "out", "torch sees no GPU; SMALL=1 shows on a CPU that the script runs")


def test_a_folder_that_cannot_be_made_ends_it(tmp_path, python):
    (tmp_path / "file").touch()
    ends_before_it_begins(tmp_path / "file" / "out", "file/out cannot be made", PYTHON=str(python))


def ends_before_it_begins(out: Path, said: str, **variables: str) -> None:
    done = run(out, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert not parts(done)
