"""Claim: a run that is killed at ten moments and resumed each time computes what the uninterrupted run computes, bit for bit.

SIGKILL to the driver and all its processes, at an exact point of a step (plugins/incidents.py), then a start with
trainer.resume_mode=auto: every metric under vimpo/, critic/ and actor/ of every step is equal. The answers of both runs
have the same seeds (plugins/reproducible_rollout.py), because verl's own rollout is not repeatable. Checkpoints that were cut
off, and one that is truncated afterwards, are refused by name.

A checkpoint callback of verl's gets complete checkpoints and may move them; a model that is merged into
actor/huggingface leaves its checkpoint complete.

Not claimed: more than one rank, and GPUs. About a quarter of an hour on two cores: real verl, Ray, FSDP2 and vLLM, twelve starts.
"""

import subprocess
import sys
import time

import pytest
from tiny_process import TinyRun

from verl_patches.checkpoints import fault, latest_complete

STEPS = 6
ANSWERS = 32  # a step
PLUGINS = "reproducible_rollout,incidents"

# (point of plugins/incidents.py, the step it happens in, the step that the next start begins with); the first start begins
# with step 1. Step 4 is the last that is complete in the end, because global_step_5 is truncated before the last start.
KILLS = [
    ("generation", 1, 1),
    ("updated", 2, 2),  # the weights have changed already
    ("model_file", 2, 2),  # half of a shard is written
    ("joint_pass", 2, 2),
    ("optimizer_file", 3, 3),
    ("gradients", 3, 3),  # before the optimiser's step
    ("tracker", 3, 3),  # all files are there and verl's tracker is empty
    ("generation", 4, 4),
    ("joint_pass", 4, 4),
    ("dataloader_file", 6, 5),
]
# Kill -> what the next start says.
UNFINISHED = "is torn: the run ended while it was being written"
TORN = {
    2: f"global_step_2 {UNFINISHED}",
    4: f"global_step_3 {UNFINISHED}",
    6: "latest_checkpointed_iteration.txt is torn: it has ''",
}

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(2400)]


def start(folder, *overrides: str, **environment: str) -> TinyRun:
    return TinyRun(folder, "trainer.save_freq=1", *overrides, STEPS=str(STEPS), **environment)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    run = start(tmp_path_factory.mktemp("uninterrupted"), VERL_USE_EXTERNAL_MODULES="reproducible_rollout")
    assert run.wait(300) == 0, run.log[-4000:]
    return run.steps


def test_ten_kills_change_nothing(uninterrupted, tmp_path):
    assert sorted(uninterrupted) == list(range(1, STEPS + 1)) and len(uninterrupted[1]) > 30
    first, seen = 1, {}
    for number, (point, step, next_first) in enumerate(KILLS):
        passed = step - first
        count = passed * ANSWERS + 10 if point == "generation" else passed + 1
        run = start(
            tmp_path,
            "trainer.resume_mode=auto",
            VERL_USE_EXTERNAL_MODULES=PLUGINS,
            INCIDENT=f"{point}:{count}:stop",
        )
        run.kill_at_incident(300)
        assert sorted(run.steps) == list(range(first, step)), f"kill {number}: {point} in step {step}"
        check_equal(run, uninterrupted, seen)
        seconds = time.monotonic() - run.started
        print(f"kill {number + 1}: {point} in step {step}, after {seconds:.0f} s; steps {sorted(run.steps)} equal")
        if number - 1 in TORN:
            assert TORN[number - 1] in run.log, "the torn checkpoint of the kill before is refused by name"
        first = next_first

    shard = tmp_path / "checkpoints/global_step_5/actor/model_world_size_1_rank_0.pt"
    shard.write_bytes(shard.read_bytes()[:-1000])
    last = start(tmp_path, "trainer.resume_mode=auto", VERL_USE_EXTERNAL_MODULES="reproducible_rollout")
    assert last.wait(300) == 0, last.log[-4000:]
    assert f"global_step_6 {UNFINISHED}" in last.log
    assert "global_step_5 is torn: actor/model_world_size_1_rank_0.pt has" in last.log
    assert sorted(last.steps) == [5, 6]
    check_equal(last, uninterrupted, seen)
    assert sorted(seen) == sorted(uninterrupted), "every step was compared"
    print(f"each step was compared this often: {seen}, {len(uninterrupted[1])} metrics or more a step")


def test_a_callback_that_moves_checkpoints_and_a_merge_between_two_starts(tmp_path):
    """Two starts, some five minutes: step 1 is moved away, step 2 copied and merged in place, and resumed from."""
    store, checkpoints = tmp_path / "store", tmp_path / "run/checkpoints"
    store.mkdir()
    callback = ("trainer.checkpoint_callback_class=checkpoint_store.Store",)
    run = TinyRun(tmp_path / "run", "trainer.save_freq=1", *callback, STEPS="2", CHECKPOINT_STORE=str(store))
    assert run.wait(600) == 0, run.log[-4000:]
    assert (store / "seen.txt").read_text() == "1 None True\n2 None True\n"
    assert not (checkpoints / "global_step_1").exists() and fault(store / "global_step_1") is None
    assert latest_complete(checkpoints) == (checkpoints / "global_step_2", [])
    assert fault(store / "global_step_2") is None

    actor = checkpoints / "global_step_2/actor"
    before = {path.name: path.read_bytes() for path in (actor / "huggingface").iterdir()}
    merge = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    merge += ["--local_dir", str(actor), "--target_dir", str(actor / "huggingface")]
    subprocess.run(merge, check=True, timeout=400)
    changed = [path.name for path in (actor / "huggingface").iterdir() if before.get(path.name) != path.read_bytes()]
    print(f"the merger wrote or changed {sorted(changed)}")
    assert "model.safetensors" in changed

    again = ("trainer.save_freq=1", "trainer.resume_mode=auto", *callback)
    resumed = TinyRun(tmp_path / "run", *again, STEPS="3", CHECKPOINT_STORE=str(store))
    assert resumed.wait(600) == 0, resumed.log[-4000:]
    assert sorted(resumed.steps) == [3] and "is torn" not in resumed.log
    assert (store / "seen.txt").read_text().splitlines()[-1] == "3 None True"


def check_equal(run: TinyRun, uninterrupted: dict, seen: dict) -> None:
    for step, metrics in run.steps.items():
        assert metrics == uninterrupted[step], f"step {step}: {differences(metrics, uninterrupted[step])}"
        seen[step] = seen.get(step, 0) + 1


def differences(found: dict, expected: dict) -> dict:
    return {name: (found.get(name), expected.get(name)) for name in expected if found.get(name) != expected.get(name)}
