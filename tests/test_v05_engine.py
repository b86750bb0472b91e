"""Claim: steps of V0.5 and of VIMPO on verl's engine, with groups of unequal size, a budget's own mini-batches and placeholders,
are the formula in float64.

verl's trainer stages and worker in one process (in_process.py). Parameters after SGD steps are compared.
"""

from dataclasses import replace
from types import SimpleNamespace as Namespace

import engine_formula
import pytest
import torch
from engine_harness import parameters_of
from engine_samples import make_samples, placeholders
from in_process import make_config, make_trainer

SIZES = {"p0": 5, "p1": 2, "p2": 4}
PRIORS = {"p0": 0.2, "p1": 0.9, "p2": 0.4, "pad": 0.5}
BUDGET = ("+algorithm.rollout_budget.min_rollouts=2", "+algorithm.rollout_budget.max_rollouts=5")
# The recipe's own numbers would make one mini-batch of 4 * 2 = 8 of them; with two updates, of 4.
SPREAD = ("actor_rollout_ref.actor.clip_ratio_high=0.28", "actor_rollout_ref.actor.clip_ratio_c=10.0")


def uneven_samples():
    """Eleven samples of three prompts, tool output among them, the rewards of p2 all 1."""
    samples = make_samples(seed=3, prompts=11, group_size=1)[:-1] + make_samples(seed=4, prompts=1, group_size=1)
    uids = [uid for uid, size in SIZES.items() for _ in range(size)]
    outcomes = [1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1]
    return [replace(s, uid=u, outcome=float(o)) for s, u, o in zip(samples, uids, outcomes, strict=True)]


def run_step(trainer, queue, samples, monkeypatch, with_prior=True) -> dict:
    """verl's step from balancing to the update; what verl fills a batch up with is given here."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from verl_patches.group_switch import budget_of, prior_of
    from verl_patches.prior_state import PRIOR, PRIOR_WEIGHT, RunPrior

    trainer.rollout_budget, trainer.priors = budget_of(trainer.config)[0], RunPrior(prior_of(trainer.config)[0])
    trainer.replay_buffer, trainer.dp_size = Namespace(failure_keys={"train": set()}), 1
    added = -len(samples) % trainer._get_required_batch_multiple(1)
    whole = queue.start(samples + placeholders(added))
    whole.extra_info.pop("global_token_num")
    for row in queue.rows.values():
        row |= {"data_source": "s", "extra_info": {"index": row["uid"]}}
        row |= {PRIOR: PRIORS[row["uid"]], PRIOR_WEIGHT: 2.0} if with_prior else {}
    real = type(whole)(whole.keys[: len(samples)], whole.tags[: len(samples)], whole.partition_id)

    def the_stages(self, metrics, timing_raw, sample_batch_size):
        batch = self._balance_batch(real, metrics)
        batch = self._compute_old_log_prob(batch, metrics)
        if self.config.algorithm.adv_estimator == "vimpo":
            batch = self._compute_ref_log_prob(batch, metrics)
        return self._update_actor(self._compute_advantage(batch, metrics), metrics)

    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, batch, metrics: whole)
    monkeypatch.setattr(PPOTrainer, "_step_once", the_stages)
    trainer._step_once(metrics := {}, {}, len(SIZES))
    assert metrics["budget/rollouts"] == len(samples) and metrics["budget/missing_responses"] == 0
    return metrics


def fused(mean, prior, k):
    """The published rule in rewards of 0 and 1."""
    wrong = max(0.0, (mean - prior) ** 2 - 1 / (4 * k))
    w = wrong / (wrong + 1 / (4 * k))
    return w * mean + (1 - w) * prior


def steps_of_v05(models, samples, updates, size, lr):
    """PPO-clip, mean over the valid tokens of each mini-batch, with A = R - mu*, in loops and float64."""
    policy, old = engine_formula.load(models / "policy"), []
    with torch.no_grad():
        for s in samples:
            label = torch.tensor(s.response).unsqueeze(-1)
            old.append(engine_formula.log_distributions(policy, s, 1.0).gather(-1, label).squeeze(-1))
    advantages = []
    for s in samples:
        members = [other.outcome for other in samples if other.uid == s.uid]
        advantages.append(s.outcome - fused(sum(members) / len(members), PRIORS[s.uid], len(members)))
    for update in range(updates):
        rows = range(update * size, min((update + 1) * size, len(samples)))
        count, loss = sum(sum(samples[i].mask) for i in rows), 0.0
        for i in rows:
            label = torch.tensor(samples[i].response).unsqueeze(-1)
            new = engine_formula.log_distributions(policy, samples[i], 1.0).gather(-1, label).squeeze(-1)
            for t, valid in enumerate(samples[i].mask):
                if valid:
                    loss = loss + engine_formula.clipped(torch.exp(new[t] - old[i][t]), advantages[i]) / count
        policy.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in policy.parameters():
                p -= lr * p.grad
    return {name: p.detach() for name, p in policy.named_parameters()}


def assert_parameters(trainer, expected):
    found = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 2])
def test_v05_is_the_formula(models, monkeypatch, updates):
    """Twelve rows, one of them a placeholder: one mini-batch of 12, or two of 6."""
    mini = f"actor_rollout_ref.actor.ppo_mini_batch_size={4 // updates}"
    config = make_config(models / "policy", "algorithm.adv_estimator=v05", *BUDGET, *SPREAD, mini)
    trainer, queue = make_trainer(config, monkeypatch)
    samples = uneven_samples()
    metrics = run_step(trainer, queue, samples, monkeypatch)
    assert_parameters(trainer, steps_of_v05(models, samples, updates, 12 // updates, lr=0.1))
    assert metrics["v05/prior_accepted"] == 1 / 3 and metrics["budget/rollouts_per_prompt"] == 11 / 3
    assert metrics["prior/bias"] == pytest.approx(((0.2 - 0.4) + (0.9 - 0.5) + (0.4 - 1.0)) / 3)
    sizes = config.actor_rollout_ref
    assert sizes.actor.ppo_mini_batch_size == 4 // updates and sizes.rollout.n == 2


def test_vimpo_with_a_budget_is_the_formula(models, monkeypatch):
    config = make_config(models / "policy", *BUDGET, *SPREAD)
    trainer, queue = make_trainer(config, monkeypatch)
    samples = uneven_samples()
    metrics = run_step(trainer, queue, samples, monkeypatch)
    expected = engine_formula.step(models, samples, lr=0.1, equal=True)
    assert metrics["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-5)
    assert_parameters(trainer, expected["parameters"])


def test_rewards_that_no_prior_is_about_end_the_run(models, monkeypatch):
    config = make_config(models / "policy", "algorithm.adv_estimator=v05", *BUDGET)
    trainer, queue = make_trainer(config, monkeypatch)
    samples = [replace(s, outcome=2 * s.outcome) for s in uneven_samples()]
    with pytest.raises(ValueError, match="step 1: the reward of sample p0_0_0 is 2.0 .* not from 0 to 1"):
        run_step(trainer, queue, samples, monkeypatch)
    with pytest.raises(ValueError, match="step 1: the batch has answers without a prior"):
        run_step(trainer, queue, uneven_samples(), monkeypatch, with_prior=False)
