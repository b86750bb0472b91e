"""Claim: PACS trains through stock verl by the one switch, in a whole run: Ray, FSDP2 and a real vLLM server on the CPU.

Two updates a step, no reference, one forward without gradient for the second update; a run that is resumed goes on as the
uninterrupted one did, bit for bit. Also on two data-parallel ranks, which share the groups of a mini-batch. Not claimed: that it
learns (three steps are too few) and anything about GPUs.
"""

import math

import pytest
from test_end_to_end import REPRODUCIBLE, SEQUENCES, _results, run_tiny

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

METRICS = {"pacs/loss", "pacs/score_std", "pacs/update_skipped", "pacs/missing_responses"}
STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_tiny(tmp_path_factory.mktemp("pacs"), "pacs", STEPS, "trainer.save_freq=2", **REPRODUCIBLE)


def test_three_steps(run):
    assert run.log.count("PACS in force on verl") == 1 and sorted(run.steps) == [1, 2, 3]
    for step in run.steps.values():
        assert step.keys() >= METRICS and not any(name.startswith("vimpo/") for name in step)
        assert all(math.isfinite(step[name]) for name in METRICS) and step["pacs/score_std"] > 0
        assert step["pacs/missing_responses"] == step["pacs/update_skipped"] == 0
    assert any(step["actor/grad_norm"] > 0 for step in run.steps.values())


def test_forwards(run):
    half = STEPS * SEQUENCES // 2
    assert run.forwards == {("policy", "infer"): 3 * half, ("policy", "train"): 2 * half}


def test_resume_goes_on_from_the_checkpoint(run):
    checkpoint = f"trainer.resume_from_path={run.folder}/checkpoints/global_step_2"
    expected = _results(run.steps[3])
    resumed = run_tiny(run.folder, "pacs", STEPS, "trainer.resume_mode=resume_path", checkpoint, **REPRODUCIBLE)
    assert sorted(resumed.steps) == [3] and _results(resumed.steps[3]) == expected


def test_two_data_parallel_ranks(tmp_path):
    run = run_tiny(tmp_path, "pacs", 2, RANKS="2")
    assert all(step["pacs/score_std"] > 0 for step in run.steps.values())
