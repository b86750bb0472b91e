"""Claim: our functions agree with a second public implementation of VIMPO, TRL's pull request 6217 (commit a563fdb), but for the
differences that docs/method.md names, each of which is written out here.

reference_vectors/trl_vimpo.json was recorded by calling its trainer's own loss on float64 logits; it computes kappa and whitening
in float32, hence 1e-6. A response is one row of a batch; advantages there are R - mean of the group, as our targets.
"""

import json
from pathlib import Path

import pytest
import torch

from vimpo_verl import functional as F

CASES = json.loads((Path(__file__).parent / "reference_vectors/trl_vimpo.json").read_text())
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request):
    found = {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for name, value in request.param.items()
    }
    found["responses"], found["mask"] = found["responses"].long(), found["response_mask"].bool()
    found["target"] = found["reward"] - found["reward"].view(-1, found["group_size"]).mean(1).repeat_interleave(
        found["group_size"]
    )
    return found


def has_holes(case) -> bool:
    """Whether tool output stands in the middle of a response."""
    mask = case["mask"].int()
    return bool((mask.flip(-1).cumsum(-1).flip(-1).bool() & ~case["mask"]).any())


def log_probs(logits, responses):
    return torch.log_softmax(logits, -1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)


def td_of(case):
    return F.td_residual(case["log_prob"], case["ref_log_prob"], case["token_kl"], case["mask"], case["beta"])


def test_log_probs_and_kl(case):
    for name in ("policy", "ref"):
        recorded = case["log_prob" if name == "policy" else "ref_log_prob"]
        torch.testing.assert_close(log_probs(case[f"{name}_logits"], case["responses"]), recorded)
    torch.testing.assert_close(F.exact_kl(case["policy_logits"], case["ref_logits"]), case["token_kl"], **FLOAT32)


def test_targets_and_value_loss(case):
    groups = [i // case["group_size"] for i in range(len(case["reward"]))]
    torch.testing.assert_close(case["reward"] - F.group_baseline(case["reward"], groups), case["target"])
    loss = F.value_loss(
        case["log_prob"], case["ref_log_prob"], case["token_kl"], case["target"], case["mask"], case["beta"]
    ).mean()
    assert loss.item() == pytest.approx(case["value_loss"], rel=1e-6)


def test_advantages(case):
    """Tool output ends the recurrence there: a token before it sees nothing of what the policy wrote after it."""
    ours = F.implied_advantages(td_of(case), case["mask"], case["lam"])
    if not has_holes(case):
        torch.testing.assert_close(ours, case["advantages_raw"], **FLOAT32)
        return
    assert (ours - case["advantages_raw"]).abs().max() > 1e-3
    td, theirs = td_of(case), torch.zeros_like(ours)
    for i in range(len(td)):
        for t in range(td.shape[1]):
            for k in range(t, td.shape[1]):
                if not case["mask"][i, k]:
                    break
                theirs[i, t] += case["lam"] ** (k - t) * td[i, k]
    torch.testing.assert_close(theirs, case["advantages_raw"], **FLOAT32)


def whitened_as_theirs(advantages, mask):
    """The epsilon is added to the standard deviation, and not under the root; the variance is the biased one."""
    valid = advantages[mask]
    return torch.where(mask, (advantages - valid.mean()) / (valid.std(correction=0) + 1e-8), 0.0)


def test_whitening(case):
    """Where raw advantages are small, as with the paper's beta near the reference, theirs blows their noise up to unit size."""
    mask, raw = case["mask"], case["advantages_raw"]
    torch.testing.assert_close(whitened_as_theirs(raw, mask), case["advantages_whitened"], rtol=1e-4, atol=1e-5)
    n, valid = int(mask.sum()), raw[mask]
    biased, unbiased = valid.std(correction=0), valid.std()
    ours = F.whiten(raw, mask)
    theirs = ours * (unbiased.square() + 1e-8).sqrt() / (biased + 1e-8)
    torch.testing.assert_close(theirs, case["advantages_whitened"], rtol=1e-4, atol=1e-5)
    assert unbiased / biased == pytest.approx((n / (n - 1)) ** 0.5)
    if case["beta"] == 5e-4:
        assert ours.std() < 0.97 * case["advantages_whitened"].std()


def test_whitening_a_micro_batch_at_a_time(case):
    """There, every call of the loss whitens what it holds, so a token's advantage depends on its neighbours."""
    halves = [
        whitened_as_theirs(*half) for half in zip(case["advantages_raw"].chunk(2), case["mask"].chunk(2), strict=True)
    ]
    torch.testing.assert_close(torch.cat(halves), case["advantages_whitened_in_halves"], rtol=1e-4, atol=1e-5)
    assert (case["advantages_whitened_in_halves"] - case["advantages_whitened"]).abs().max() > 0.02


def test_total_loss_and_gradient(case):
    """With their advantages: c_A times PPO-clip over the tokens, without a dual clip; its gradient flows as ours does."""
    logits = case["policy_logits"].clone().requires_grad_()
    log_prob = log_probs(logits, case["responses"])
    value_loss = F.value_loss(
        log_prob, case["ref_log_prob"], case["token_kl"], case["target"], case["mask"], case["beta"]
    ).mean()
    ratio, advantage = (log_prob - case["old_log_prob"]).exp(), case["advantages_whitened"]
    clipped = ratio.clamp(1 - case["clip_low"], 1 + case["clip_high"])
    actor_loss = -torch.min(ratio * advantage, clipped * advantage)[case["mask"]].mean()
    loss = value_loss + case["actor_coeff"] * actor_loss
    loss.backward()
    assert loss.item() == pytest.approx(case["total_loss"], rel=1e-6, abs=1e-7)
    torch.testing.assert_close(logits.grad, case["grad_total_loss_logits"], rtol=1e-4, atol=1e-7)


def test_the_recorded_cases():
    """Paper's constants; off-policy with clipping; lam 0 with real rewards; tool output in the middle with lam 1."""
    assert [case["name"] for case in CASES] == [
        "paper_defaults", "off_policy_lam_half", "td_only_real_rewards", "tool_tokens_lam_one",
    ]  # fmt: skip
    assert CASES[0]["beta"] == 5e-4 and CASES[0]["actor_coeff"] == 5e-3
