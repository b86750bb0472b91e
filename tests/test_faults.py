"""Claim: whatever of these breaks, a run stops within a bound and says what happened, or goes on where that is right.

Real verl, Ray, FSDP2 and vLLM on the CPU; the fault is injected at an exact moment by tests/plugins. Whatever happened, the
checkpoint that a restart would go on from is complete and has finite weights. Seconds are from the fault to the end of the
run, Ray's shutdown included. About a quarter of an hour; not claimed: several nodes, NCCL, GPUs.
"""

import os
import re
import shutil
import subprocess
import time

import pytest
import torch
from tiny_process import ROOT, TinyRun

from verl_patches.checkpoints import latest_complete

BOUND = 75  # algorithm.vimpo.stage_timeout of the runs that hang
BOUND_OF_TWO_RANKS = 150
SHUTDOWN = 45  # seconds that a run has to end after it has noticed
REWARD = (
    f"reward.custom_reward_function.path={ROOT}/tests/plugins/faulty_reward.py",
    "reward.custom_reward_function.name=compute_score",
)
SECOND_STEP = "40"  # the 8th answer of the second step

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(500)]


class Fault:
    """A run of three steps with a fault in it, to its end."""

    def __init__(self, folder, *overrides, incident=None, checkpoints=None, steps=3, bound=BOUND, **environment):
        if incident:
            environment |= {"INCIDENT": incident, "VERL_USE_EXTERNAL_MODULES": "incidents"}
        self.checkpoints = checkpoints or folder / "checkpoints"
        run = TinyRun(
            folder,
            "trainer.save_freq=1",
            f"trainer.default_local_dir={self.checkpoints}",
            f"+algorithm.vimpo.stage_timeout={bound}",
            *overrides,
            STEPS=str(steps),
            **environment,
        )
        self.status = run.wait(400)
        assert run.incident_file.exists(), f"no fault came about:\n{run.log[-3000:]}"
        self.seconds = time.time() - run.incident_file.stat().st_mtime
        self.log, self.steps = run.log, run.steps
        print(f"\n{folder.name}: status {self.status}, {self.seconds:.0f} s, steps {sorted(self.steps)}")

    def says(self, pattern: str) -> str:
        found = re.search(pattern, self.log)
        assert found, f"no {pattern!r} in the log:\n{self.log[-6000:]}"
        print(f"  {found[0]}")
        return found[0]

    def stopped(self, within: float) -> None:
        assert self.status not in (0, 124) and self.seconds < within

    def resumable_at(self, step: int | None) -> None:
        """The checkpoint that a restart would use is of this step, complete, and its weights are finite."""
        chosen, _ = latest_complete(self.checkpoints)
        assert (chosen and chosen.name) == (step and f"global_step_{step}")
        shards = sorted(chosen.glob("actor/model_*.pt")) if chosen else []
        assert bool(shards) == bool(chosen)
        for shard in shards:
            for name, weight in torch.load(shard, weights_only=False).items():
                local = weight.to_local() if hasattr(weight, "to_local") else weight
                assert torch.isfinite(local).all(), name


def test_a_vllm_server_that_hangs_in_the_weight_sync(tmp_path):
    """The sync at the end of the first step; the one at the start is the first. verl itself waits for ever."""
    run = Fault(tmp_path, incident="weight_sync:2:stop")
    run.stopped(within=BOUND + SHUTDOWN)
    run.says(r"step 1: the weight sync has been running for \d+ s, more than algorithm.vimpo.stage_timeout=75")
    run.resumable_at(1)


def test_a_vllm_engine_that_dies_in_the_weight_sync(tmp_path):
    run = Fault(tmp_path, incident="weight_sync:2:die")
    run.stopped(within=BOUND + SHUTDOWN)
    run.says(r"EngineDeadError.*|the weight sync has been running for \d+ s|died.*")
    run.resumable_at(1)


def test_a_vllm_server_that_dies_in_the_generation(tmp_path):
    run = Fault(tmp_path, incident=f"server:{SECOND_STEP}:die")
    run.stopped(within=BOUND + SHUTDOWN)
    run.says(r"The actor died unexpectedly.*|The actor is dead.*")
    run.resumable_at(1)


def test_a_worker_that_dies_in_the_update(tmp_path):
    """One of two ranks; the other waits for it in the gradient's all-reduce."""
    run = Fault(tmp_path, incident="gradients:2:die:rank-1", bound=BOUND_OF_TWO_RANKS, RANKS="2")
    run.stopped(within=BOUND_OF_TWO_RANKS + SHUTDOWN)
    run.says(r"The actor died unexpectedly.*|The actor is dead.*|ActorDiedError.*")
    run.resumable_at(1)


def test_a_reward_that_hangs(tmp_path):
    run = Fault(tmp_path, *REWARD, FAULTY_REWARD="hangs", FAULTY_CALL=SECOND_STEP)
    run.stopped(within=BOUND + SHUTDOWN)
    run.says(
        r"step 2: generation and rewards has been running for \d+ s, waiting for the answers and rewards of \d+ prompts"
    )
    run.resumable_at(1)


def test_a_reward_that_raises_once_and_a_gradient_that_is_nan_once(tmp_path):
    """Both are left out, said, and counted: a response of the second step, the update of the third."""
    incident = {"incident": "loss:3:nan", "FAULTY_REWARD": "raises", "FAULTY_CALL": SECOND_STEP}
    run = Fault(tmp_path, *REWARD, steps=4, **incident)
    assert run.status == 0 and sorted(run.steps) == [1, 2, 3, 4]
    run.says(r"step 2: 1 of 32 responses are missing: their generation or reward raised")
    run.says(r"step 3: the gradient is not finite")
    assert [run.steps[step]["vimpo/missing_responses"] for step in (1, 2, 3, 4)] == [0, 1, 0, 0]
    assert [run.steps[step]["vimpo/update_skipped"] for step in (1, 2, 3, 4)] == [0, 0, 1, 0]
    run.resumable_at(4)


def test_a_reward_that_always_raises(tmp_path):
    """From the 8th call of the second step on: that one goes on with 7 responses, the third has none."""
    run = Fault(tmp_path, *REWARD, FAULTY_REWARD="raises", FAULTY_CALL=SECOND_STEP, FAULTY_TIMES="1000")
    run.stopped(within=SHUTDOWN + 30)
    run.says(r"step 2: 25 of 32 responses are missing")
    run.says(r"ZeroDivisionError: the reward of this test raises|the reward of this test raises")
    run.says(r"Sync replay buffer selected terminal groups with no materializable trajectories")
    run.resumable_at(2)


def test_a_reward_that_is_nan(tmp_path):
    run = Fault(tmp_path, *REWARD, FAULTY_REWARD="nan", FAULTY_CALL=SECOND_STEP)
    run.stopped(within=SHUTDOWN)
    run.says(r"step 2: reward is nan at response token \d+ of sample \S+ on data-parallel rank 0 .*")
    run.resumable_at(1)


def test_logits_that_are_nan(tmp_path):
    """Those of the policy, in the pass before the update."""
    two_passes = "+algorithm.vimpo.passes=two"
    run = Fault(tmp_path, two_passes, incident="logits:2:nan:rank-1", bound=BOUND_OF_TWO_RANKS, RANKS="2")
    run.stopped(within=SHUTDOWN)
    run.says(r"step 2: (ref_log_prob|token_kl) is nan at response token \d+ of sample \S+ on data-parallel rank 1 .*")
    run.resumable_at(1)


def test_logits_of_the_reference_that_are_nan_in_one_pass(tmp_path):
    run = Fault(tmp_path, incident="joint_pass:2:nan:rank-1", bound=BOUND_OF_TWO_RANKS, RANKS="2")
    run.stopped(within=SHUTDOWN)
    run.says(r"step 2: ref_log_prob is nan at response token \d+ of sample number \d+ .*on rank 1 .*")
    run.resumable_at(1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system for one and a half checkpoints, which take about 1.35 MiB each."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2000k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_at_the_checkpoint(tmp_path, small_disk):
    """No plugin: the second checkpoint does not fit."""
    run = TinyRun(tmp_path / "run", "trainer.save_freq=1", f"trainer.default_local_dir={small_disk}", STEPS="3")
    assert run.wait(400) not in (0, 124)
    found = re.search(r"step 2: the checkpoint \S+ could not be written \(.*", run.log)
    assert found, run.log[-6000:]
    print(f"\n{found[0]}")
    assert latest_complete(small_disk)[0] == small_disk / "global_step_1"
