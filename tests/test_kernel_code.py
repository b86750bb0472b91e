"""Claim: what Triton compiles the token statistics' kernel to can keep up with a GPU's memory.

Compiled for GPUs that are not here, in a process of its own: test_triton_kernel.py interprets. Both tensors are read 16 bytes at
a time, the kernel that all rows go through spills nothing, and its instructions for an entry leave room for the budget of 0.70
of the copy bandwidth, which is below the data sheet's that is compared with here. Not claimed: that a GPU reaches it
(benchmarks/kl_function.py measures).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks/kernel_code.py"

nvidia = pytest.importorskip("triton.backends.nvidia")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, BENCHMARK, "--temperature", "0", "1", "--json", folder / "rows.json"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "rows.json").read_text())["rows"]


@pytest.mark.parametrize("dtype, loads", [("bfloat16", 4), ("float32", 8)])
def test_the_loop_reads_each_tensor_once_sixteen_bytes_at_a_time(rows, dtype, loads):
    """Sixteen entries a thread: two loads of a bfloat16 tensor, four of a float32 tensor."""
    mine = [row for row in rows if row["kernel"] == "usual" and row["dtype"] == dtype]
    assert len(mine) == 6
    assert {(row["loads in its loops"], row["bytes a load"]) for row in mine} == {(loads, 16)}


def test_nothing_is_spilled(rows):
    spilled = [row["spilled bytes"] for row in rows if row["kernel"] == "usual"]
    assert len(spilled) == 12 and not any(spilled)


def test_arithmetic_leaves_room_for_the_budget(rows):
    usual = [row["allows, of the memory bandwidth"] for row in rows if row["kernel"] == "usual"]
    assert len(usual) == 12 and min(usual) >= 0.9
