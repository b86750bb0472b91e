"""Claim: vimpo_verl.functional reproduces the authors' public implementation, in float64, to 1e-9 relative.

Every case and every quantity recorded in reference_vectors/ is compared: values, losses and gradients. The tolerance is
relative to the largest entry of a tensor; elementwise relative agreement cannot be had near zero, because the authors'
masked mean divides by n + 1e-8.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vimpo_verl import baselines
from vimpo_verl import functional as F

TOLERANCE = 1e-9
CASES = sorted((Path(__file__).parent / "reference_vectors").glob("*.npz"))
INPUTS = {"policy_logits", "ref_logits", "old_log_prob", "responses", "response_mask", "token_level_rewards", "group"}
RECORDED = {
    "log_prob", "ref_log_prob", "token_kl_exact", "token_kl_k2", "token_kl_k3", "token_kl_topk", "baseline",
    "value_loss", "implied_values", "advantages_raw", "advantages_whitened", "actor_loss", "total_loss",
    "grad_value_loss_logits", "grad_total_loss_logits", "soft_baseline", "soft_value_loss",
    "grad_soft_value_loss_log_prob",
}  # fmt: skip


@pytest.fixture(params=CASES, ids=[path.stem for path in CASES])
def case(request):
    """One recorded case: tensors under their names, `params`, and the inputs of the equations computed here."""
    with np.load(request.param) as archive:
        tensors = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "params"}
        params = json.loads(str(archive["params"]))
    assert set(tensors) == INPUTS | RECORDED, "a recorded quantity is not compared, or is missing"
    return SimpleNamespace(**tensors, params=SimpleNamespace(**params))


def log_prob_of(logits, responses):
    return torch.log_softmax(logits, dim=-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)


def assert_agrees(actual, recorded, scale=1e-300):
    """Relative to the largest entry recorded, or to `scale` where that is larger."""
    assert actual.shape == recorded.shape
    scale = recorded.abs().max().clamp(min=scale)
    assert ((actual - recorded).abs().max() / scale).item() <= TOLERANCE


def mask_of(case):
    return case.response_mask.bool()


def on_valid(case, tensor):
    return tensor * case.response_mask


def value_loss_of(case, log_prob, target=None, kl=None):
    outcome = (case.token_level_rewards * case.response_mask).sum(-1)
    baseline = F.group_baseline(outcome, case.group.tolist(), cap=case.params.cap_v0)
    return F.value_loss(
        log_prob,
        case.ref_log_prob,
        F.exact_kl(case.policy_logits, case.ref_logits) if kl is None else kl,
        outcome - baseline if target is None else target,
        case.response_mask,
        case.params.beta,
        loss_type=case.params.value_loss_type,
        huber_delta=case.params.huber_delta,
    ).mean()


def actor_loss_of(case, log_prob, advantages):
    """verl's own PPO-clip loss, with the case's clip ratios."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=case.params.clip_ratio_low,
        clip_ratio_high=case.params.clip_ratio_high,
        clip_ratio_c=case.params.clip_ratio_c,
    )
    return compute_policy_loss_vanilla(
        old_log_prob=case.old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=case.response_mask,
        loss_agg_mode=case.params.loss_agg_mode,
        config=config,
    )[0]


def td_of(case):
    kl = F.exact_kl(case.policy_logits, case.ref_logits)
    return F.td_residual(case.log_prob, case.ref_log_prob, kl, case.response_mask, case.params.beta)


def test_all_five_cases_are_there():
    assert len(CASES) == 5


def test_log_probs(case):
    # The recorded log-probs are verl's; the cases are consistent with the plain formula.
    assert_agrees(log_prob_of(case.policy_logits, case.responses), case.log_prob)
    assert_agrees(log_prob_of(case.ref_logits, case.responses), case.ref_log_prob)


def test_token_kl(case):
    exact = F.exact_kl(case.policy_logits, case.ref_logits)
    topk = F.topk_kl(case.policy_logits, case.ref_logits, case.params.topk)
    assert_agrees(exact, case.token_kl_exact)
    assert_agrees(topk, case.token_kl_topk)
    assert_agrees(F.sampled_kl(case.log_prob, case.ref_log_prob, "k2"), case.token_kl_k2)
    assert_agrees(F.sampled_kl(case.log_prob, case.ref_log_prob, "k3"), case.token_kl_k3)


def test_baseline(case):
    outcome = (case.token_level_rewards * case.response_mask).sum(-1)
    assert_agrees(F.group_baseline(outcome, case.group.tolist(), cap=case.params.cap_v0), case.baseline)


def test_values_and_advantages(case):
    td, mask = td_of(case), mask_of(case)
    advantages = F.implied_advantages(td, mask, case.params.lam)
    assert_agrees(F.implied_values(td, mask), on_valid(case, case.implied_values))
    assert_agrees(advantages, on_valid(case, case.advantages_raw))
    assert_agrees(F.whiten(advantages, mask), on_valid(case, case.advantages_whitened))


def test_losses(case):
    advantages = F.whiten(F.implied_advantages(td_of(case), mask_of(case), case.params.lam), mask_of(case))
    value_loss, actor_loss = value_loss_of(case, case.log_prob), actor_loss_of(case, case.log_prob, advantages)
    assert_agrees(value_loss, case.value_loss)
    # Where old and current policy agree, the actor loss is a mean of whitened advantages, so all of it cancels: the
    # agreement is relative to the terms of that mean.
    terms = advantages.abs().sum().item() / case.response_mask.sum().item()
    assert_agrees(actor_loss, case.actor_loss, scale=terms)
    coeff = case.params.actor_coeff
    assert_agrees(value_loss + coeff * actor_loss, case.total_loss, scale=case.value_loss.item() + coeff * terms)


def test_gradient_of_the_value_loss(case):
    """kappa takes part in the loss and not in its gradient, although it is computed from the same logits."""
    logits = case.policy_logits.clone().requires_grad_()
    kl = F.exact_kl(logits, case.ref_logits)
    value_loss_of(case, log_prob_of(logits, case.responses), kl=kl).backward()
    assert_agrees(logits.grad, case.grad_value_loss_logits)


def test_gradient_of_the_total_loss(case):
    logits = case.policy_logits.clone().requires_grad_()
    log_prob = log_prob_of(logits, case.responses)
    advantages = F.whiten(F.implied_advantages(td_of(case), mask_of(case), case.params.lam), mask_of(case))
    loss = value_loss_of(case, log_prob) + case.params.actor_coeff * actor_loss_of(case, log_prob, advantages)
    loss.backward()
    assert_agrees(logits.grad, case.grad_total_loss_logits)


def test_soft_variant(case):
    """soft_baseline = group mean of R - beta sum KL; its value loss has no kappa: 1/2 (sum rho - (R - soft_baseline))^2."""
    outcome = (case.token_level_rewards * case.response_mask).sum(-1)
    kl = F.exact_kl(case.policy_logits, case.ref_logits)
    sequence_kl = (kl * case.response_mask).sum(-1)
    soft_baseline = baselines.soft_baseline(
        outcome, case.group.tolist(), sequence_kl, case.params.beta, cap=case.params.cap_v0
    )
    assert_agrees(soft_baseline, case.soft_baseline)

    log_prob = case.log_prob.clone().requires_grad_()
    loss = value_loss_of(case, log_prob, target=outcome - soft_baseline, kl=torch.zeros_like(kl))
    loss.backward()
    assert_agrees(loss.detach(), case.soft_value_loss)
    assert_agrees(log_prob.grad, case.grad_soft_value_loss_log_prob)
