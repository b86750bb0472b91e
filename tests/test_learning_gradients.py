"""Claim: the study's cosines are to the gradient of the expected reward, of batches that every arm has in common."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.learning import gradients
from benchmarks.learning.run import start_policy
from benchmarks.learning.settings import Setting
from benchmarks.learning.tasks import RunningSums

ROOT = Path(__file__).parents[1]


def test_the_exact_gradient_is_that_of_the_reward_over_all_answers(monkeypatch):
    """REINFORCE in float64 with every answer to every prompt, weighed by its probability."""
    monkeypatch.setattr(gradients, "PROMPTS", 24)
    monkeypatch.setattr(gradients, "CHUNK", 10)
    task = RunningSums(2)
    torch.manual_seed(0)
    policy = task.make_policy().double()
    found = gradients.exact_gradient(policy, task)
    policy.zero_grad()
    answers = torch.tensor(list(product(range(task.vocabulary), repeat=2)))
    for prompt in task.prompts(24, torch.Generator().manual_seed(78)):
        asked = prompt.expand(len(answers), -1)
        log_prob = policy.score(torch.cat([asked, answers], 1), 2)[0].sum(1)
        reward = task.judge(asked, answers)[0].double()
        (-(log_prob.detach().exp() * reward * log_prob).sum() / 24).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert expected.norm() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_gradients_of_a_large_batch_point_where_the_exact_one_does(tmp_path, monkeypatch):
    """Those of arms without a tie: the mean over batches comes near it; one that flips every reward points the other way."""
    monkeypatch.setattr("benchmarks.learning.run.STARTS", tmp_path)
    monkeypatch.setattr(gradients, "BATCHES", 30)
    settings = {
        "GRPO": Setting("grpo", tokens=3),
        "RLOO": Setting("rloo", tokens=3),
        "oracle": Setting("oracle", tokens=3),
    }
    policy = start_policy(settings["GRPO"])
    exact = gradients.exact_gradient(policy, RunningSums(3))
    batches = list(gradients.batch_gradients(policy, settings, seed=1))
    for label in settings:
        of_all = sum(found[label] for found in batches)
        of_one = [torch.cosine_similarity(found[label], exact, dim=0) for found in batches]
        assert torch.cosine_similarity(of_all, exact, dim=0) > max(0.9, max(of_one))
    flipped = {label: Setting(setting.arm, tokens=3, flip_prob=1.0) for label, setting in settings.items()}
    found = next(gradients.batch_gradients(policy, flipped, seed=1))
    torch.testing.assert_close(found["RLOO"], -batches[0]["RLOO"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["oracle"], batches[0]["oracle"])  # which knows no noise


@pytest.mark.parametrize("condition", gradients.CONDITIONS)
def test_the_page_has_the_table(condition):
    found = json.loads(gradients.FILE.read_text())
    page = (ROOT / "docs/study.md").read_text()
    assert gradients.table(found, condition) in page and gradients.nearer(found, condition) in page
