"""Whole runs with rollouts on demand: real verl, Ray, FSDP2 and vLLM on the CPU, by examples/tiny/run_tiny.sh.

Claimed: with algorithm.adv_estimator=v05 every prompt of every step has as many answers as the published rule says, with priors
that follow from the run's own answers, worked out again here from verl's rollout dump; a run that is resumed goes on as the
uninterrupted one, metrics equal; VIMPO with a budget and a posterior mean runs with two updates a step on two ranks; so does GRPO
with a budget. Not claimed: that it learns, and anything about GPUs. Minutes a run.
"""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
from test_end_to_end import run_tiny
from test_prior import posterior
from test_rollout_budget import papers_rule

STEPS, PROMPTS = 5, 8
TWICE = f"data.train_max_samples={2 * PROMPTS}"  # every prompt comes again two steps later
MICRO = tuple(
    f"actor_rollout_ref.{key}_micro_batch_size_per_gpu=4" for key in ("actor.ppo", "rollout.log_prob", "ref.log_prob")
)
REPRODUCIBLE = {"VERL_USE_EXTERNAL_MODULES": "count_forwards,reproducible_rollout"}

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(2400)]


def run(folder: Path, algo: str, steps: int, *overrides: str, **environment: str):
    dump = f"trainer.rollout_data_dir={folder}/rollouts"
    return run_tiny(folder, algo, steps, dump, TWICE, *MICRO, *overrides, **environment)


def groups_of(folder: Path, step: int) -> dict[str, list[float]]:
    """Prompt's text -> rewards of its answers, in the order of their numbers; without placeholders."""
    found = defaultdict(dict)
    for line in (folder / f"rollouts/{step}.jsonl").read_text().splitlines():
        record = json.loads(line)
        uid, session, _ = record["uid"].rsplit("_", 2)
        if not uid.startswith("pad"):
            found[record["input"]][int(session)] = record["score"]
    for sessions in found.values():
        assert sorted(sessions) == list(range(len(sessions))), "numbered without gaps"
    return {prompt: [sessions[i] for i in sorted(sessions)] for prompt, sessions in found.items()}


def check_the_rule(folder: Path, steps: range, visits: list) -> list[int]:
    """The numbers of answers are the rule's; `visits` is filled with what they add to the past."""
    counts = []
    for step in steps:
        groups = groups_of(folder, step)
        assert len(groups) == PROMPTS
        for prompt, rewards in groups.items():
            prior, _ = posterior(visits, prompt, step, discount=0.99)
            more = [*rewards, *[0.5] * 16]  # the rule reads no more than it takes
            assert papers_rule(more, prior) == len(rewards), (step, prompt, rewards, prior)
            counts.append(len(rewards))
        visits.extend((prompt, rewards, step) for prompt, rewards in groups.items())
    return counts


@pytest.fixture(scope="module")
def v05_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v05")
    return folder, run(folder, "v05", STEPS, "trainer.save_freq=3", **REPRODUCIBLE)


def test_every_prompt_has_the_rollouts_that_the_rule_says(v05_run):
    folder, found = v05_run
    assert sorted(found.steps) == list(range(1, STEPS + 1)) and found.log.count("V0.5 in force on verl") == 1
    visits: list = []
    counts = check_the_rule(folder, range(1, STEPS + 1), visits)
    assert min(counts) == 4 < max(counts) <= 16 and len(set(counts)) > 2, counts
    for step, metrics in found.steps.items():
        rewards = groups_of(folder, step)
        flat = [reward for group in rewards.values() for reward in group]
        assert metrics["budget/rollouts"] == len(flat)
        assert metrics["budget/missing_responses"] == metrics["v05/missing_responses"] == 0
        assert metrics["critic/score/mean"] == pytest.approx(sum(flat) / len(flat)), "placeholders are in no metric"
        assert metrics["prior/share_seen"] == (0 if step <= 2 else 1)
        assert all(math.isfinite(v) for name, v in metrics.items() if name.startswith(("v05/", "prior/", "budget/")))
        assert metrics["actor/grad_norm"] > 0
    assert ("reference", "infer") not in found.forwards, "no reference is loaded"


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(v05_run):
    folder, uninterrupted = v05_run
    before = {step: groups_of(folder, step) for step in range(1, STEPS + 1)}
    checkpoint = f"trainer.resume_from_path={folder}/checkpoints/global_step_3"
    resumed = run(folder, "v05", STEPS, "trainer.resume_mode=resume_path", checkpoint, **REPRODUCIBLE)
    assert sorted(resumed.steps) == [4, 5]
    for step in (4, 5):
        assert groups_of(folder, step) == before[step]
        names = [
            n for n in uninterrupted.steps[step] if n.startswith(("v05/", "prior/", "budget/", "critic/", "actor/"))
        ]
        assert len(names) > 20
        for name in names:
            if not name.startswith("actor/perf"):
                assert resumed.steps[step][name] == uninterrupted.steps[step][name], (step, name)
    check_the_rule(folder, range(1, STEPS + 1), [])


def test_vimpo_with_a_budget_and_a_posterior_mean_on_two_ranks(tmp_path):
    """Two updates a step of groups of unequal size."""
    found = run(
        tmp_path, "vimpo", 3, "+algorithm.vimpo.baseline=posterior_mean", "+algorithm.rollout_budget.max_rollouts=16",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // 2}", RANKS="2",
    )  # fmt: skip
    counts = check_the_rule(tmp_path, range(1, 4), [])
    assert len(set(counts)) > 1 and found.log.count("VIMPO in force on verl") == 1
    for metrics in found.steps.values():
        assert metrics["vimpo/missing_responses"] == 0 and metrics["vimpo/update_skipped"] == 0
    assert found.steps[1]["vimpo/kl"] == 0.0 < found.steps[2]["vimpo/kl"]
    padded = [4 * math.ceil(sum(counts[i : i + PROMPTS]) / 16) * 4 for i in range(0, 3 * PROMPTS, PROMPTS)]
    assert found.forwards["policy", "train"] == sum(padded), "two mini-batches of two ranks of whole micro-batches of 4"


def test_two_batches_ahead_and_resumed(tmp_path):
    """colocate_async: prompts under way are in the checkpoint, with their priors."""
    asynchronous = ("trainer.v1.trainer_mode=colocate_async", "trainer.v1.colocate_async.num_warmup_batches=2")
    first = run(tmp_path, "v05", 3, "trainer.save_freq=2", *asynchronous)
    checkpoint = f"trainer.resume_from_path={tmp_path}/checkpoints/global_step_2"
    resumed = run(tmp_path, "v05", 4, "trainer.resume_mode=resume_path", checkpoint, *asynchronous)
    assert sorted(first.steps) == [1, 2, 3] and sorted(resumed.steps) == [3, 4]
    for found in (first, resumed):
        for step, metrics in found.steps.items():
            assert 4 <= metrics["budget/rollouts_per_prompt"] <= 16 and metrics["budget/missing_responses"] == 0
            assert metrics["actor/grad_norm"] > 0, step
    assert all(4 <= len(rewards) <= 16 for rewards in groups_of(tmp_path, 4).values())
    assert "has no prior" not in resumed.log and "without a past" not in resumed.log


def test_grpo_with_a_budget(tmp_path):
    found = run(tmp_path, "grpo", 2, "+algorithm.rollout_budget.round_size=3", "+algorithm.prior.discount=0.99")
    for step in (1, 2):
        counts = [len(rewards) for rewards in groups_of(tmp_path, step).values()]
        assert set(counts) <= {4, 7, 10, 13, 16} and found.steps[step]["budget/rollouts"] == sum(counts)
        assert found.steps[step]["actor/grad_norm"] > 0
