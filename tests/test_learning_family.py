"""Claim: the study's arms PACS and V0.5 are their formulas, V0.5 with the published budget; each has as many trials as the
others, and PACS at least two updates a batch.
"""

import dataclasses

import torch
from one_file import Rollout
from test_rollout_budget import papers_rule

from benchmarks.learning.arms import ARMS
from benchmarks.learning.family import TRIALS, mean_of_others, rollouts_used
from benchmarks.learning.run import run
from benchmarks.learning.settings import Setting

PROMPTS, RESPONSES, TOKENS = 20, 16, 5


def rollout_of(seed=0) -> tuple[Rollout, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = PROMPTS * RESPONSES
    rates = torch.rand(PROMPTS, generator=generator).repeat_interleave(RESPONSES)
    outcome = (torch.rand(size, generator=generator) < rates).double()
    old = -torch.rand(size, TOKENS, generator=generator, dtype=torch.float64)
    new = (old + 0.1 * torch.randn(size, TOKENS, generator=generator, dtype=torch.float64)).requires_grad_()
    group = torch.arange(PROMPTS).repeat_interleave(RESPONSES).tolist()
    empty = torch.zeros(size, TOKENS)
    return Rollout(empty, torch.ones(size, TOKENS).double(), outcome, outcome, group, old, empty, empty), new


def test_v05_takes_the_rollouts_of_the_rule_and_no_others():
    rollout, _ = rollout_of()
    rewards = rollout.outcome.view(PROMPTS, RESPONSES).tolist()
    used = rollouts_used(rollout).view(PROMPTS, RESPONSES)
    for i, row in enumerate(rewards):
        others = [sum(other) / RESPONSES for j, other in enumerate(rewards) if j != i]
        prior = sum(others) / len(others)
        assert abs(mean_of_others(rollout)[i * RESPONSES].item() - prior) < 1e-12
        count = papers_rule(row, prior)
        assert used[i].tolist() == [k < count for k in range(RESPONSES)]
    assert len({row.sum().item() for row in used}) > 2


def test_v05_is_ppo_with_the_fused_baseline_on_them():
    rollout, log_prob = rollout_of()
    loss = ARMS["v05"](rollout, log_prob, None, Setting("v05"))
    used, expected, tokens = rollouts_used(rollout).view(PROMPTS, RESPONSES), 0.0, 0
    ratio = (log_prob - rollout.old_log_prob).exp().view(PROMPTS, RESPONSES, TOKENS)
    prior = mean_of_others(rollout).view(PROMPTS, RESPONSES)
    for i in range(PROMPTS):
        rewards = rollout.outcome.view(PROMPTS, RESPONSES)[i][used[i]]
        k, mean = len(rewards), rewards.mean()
        wrong = max(0.0, (mean - prior[i, 0]) ** 2 - 1 / (4 * k))
        w = wrong / (wrong + 1 / (4 * k))
        advantages = rewards - (w * mean + (1 - w) * prior[i, 0])
        for row, advantage in zip(ratio[i][used[i]], advantages, strict=True):
            expected = expected - torch.minimum(row * advantage, row.clamp(0.8, 1.28) * advantage).sum()
            tokens += TOKENS
    torch.testing.assert_close(loss, expected / tokens)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    (wanted,) = torch.autograd.grad(expected / tokens, log_prob)
    torch.testing.assert_close(gradient, wanted)


def test_pacs_is_its_formula():
    rollout, log_prob = rollout_of()
    for beta in (0.0, 0.5):  # a coeff of 0 is the authors' beta, 1
        r = (beta or 1.0) * (log_prob - rollout.old_log_prob).sum(1).view(PROMPTS, RESPONSES)
        y = rollout.outcome.view(PROMPTS, RESPONSES)
        psi = r - (r.sum(1, keepdim=True) - r) / (RESPONSES - 1)
        right = y.sum(1, keepdim=True)
        both = (right > 0) & (right < RESPONSES)
        weights = torch.where(both, RESPONSES / (2 * torch.where(y == 1, right, RESPONSES - right)), 1.0)
        expected = (weights * torch.nn.functional.binary_cross_entropy_with_logits(psi, y, reduction="none")).mean()
        found = ARMS["pacs"](rollout, log_prob, None, Setting("pacs", coeff=beta))
        torch.testing.assert_close(found, expected)


def test_trials():
    assert {len(trials) for trials in TRIALS.values()} == {6}
    assert all(setting.updates >= 2 for setting in TRIALS["PACS"])
    assert all(setting.responses == 16 for setting in TRIALS["V0.5"])


def test_both_run():
    for label, updates in (("PACS", 2), ("V0.5", 1)):
        setting = dataclasses.replace(TRIALS[label][0], batches=2, prompts=4, updates=updates, task="needles", tokens=8)
        found = run(setting)
        assert 0 < found["accuracy"] < 1 and len(found["rewards"]) == 2, label
