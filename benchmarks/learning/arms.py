"""The arms: what is compared. Each is a loss of one batch; sampling, optimiser and data are the same for all.

An arm takes a rollout, log-probabilities [B, T] with gradient, logits [B, T, V] and the run's setting.
"""

from collections.abc import Callable

from one_file import CLIP_LOW, Rollout, grpo_loss, ppo_loss, vimpo_loss
from torch import Tensor

from benchmarks.learning import family
from benchmarks.learning.settings import Setting
from vimpo_verl import functional as F
from vimpo_verl.batch import outcome_correlation

PAPER_BETA, PAPER_ACTOR_COEFF = 5e-4, 5e-3


def grpo(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """GRPO; with coeff > 0 verl's KL loss (low_var_kl, k3) beside it."""
    loss = grpo_loss(rollout, log_prob, logits)
    if setting.coeff > 0:
        loss = loss + setting.coeff * F.sampled_kl(log_prob, rollout.ref_log_prob, "k3").mean()
    return loss


def kl_in_reward(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """REINFORCE with a group baseline and the KL (k1) in the reward, no division by the standard deviation.

    With one update a batch L_V has this gradient in expectation: the rival that counts.
    """
    beta = setting.coeff / log_prob.shape[1]
    shaped = rollout.outcome - beta * (rollout.old_log_prob - rollout.ref_log_prob).sum(1)
    advantages = shaped - F.group_baseline(shaped, rollout.group)
    return ppo_loss(rollout, log_prob, advantages.unsqueeze(1))


def rloo(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """The reward above the mean of the group's others."""
    advantages = rollout.outcome - F.leave_one_out_baseline(rollout.outcome, rollout.group)
    return ppo_loss(rollout, log_prob, advantages.unsqueeze(1))


def vimpo_paper(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """VIMPO with the paper's constants, which are for answers of about 1,000 tokens."""
    return vimpo_loss(rollout, log_prob, logits, beta=PAPER_BETA, actor_coeff=PAPER_ACTOR_COEFF)


def vimpo(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """VIMPO with beta = coeff / T; alpha > 0 adds the actor loss at the push of actor_coeff=auto."""
    beta = setting.coeff / log_prob.shape[1]
    kappa_logits = logits
    if setting.kappa == "old":
        rollout.old_logits = kappa_logits = getattr(rollout, "old_logits", logits.detach())
    actor_coeff = 0.0
    if setting.alpha > 0:
        actor_coeff = setting.alpha * _auto_coeff(rollout, log_prob.detach(), kappa_logits, beta, setting.trust)
    if setting.form == "clipped":
        return _clipped_value_loss(rollout, log_prob, kappa_logits, beta)
    return vimpo_loss(rollout, log_prob, kappa_logits, beta=beta, actor_coeff=actor_coeff)


def _clipped_value_loss(rollout: Rollout, log_prob: Tensor, logits: Tensor, beta: float) -> Tensor:
    token_kl = F.exact_kl(logits.detach(), rollout.ref_logits)
    target = rollout.outcome - F.group_baseline(rollout.outcome, rollout.group)
    at_old = (rollout.old_log_prob, rollout.ref_log_prob, token_kl, target, rollout.mask, beta)
    return F.clipped_value_loss(log_prob, *at_old, clip=CLIP_LOW).mean()


def _auto_coeff(rollout: Rollout, log_prob: Tensor, logits: Tensor, beta: float, trust: str) -> float:
    token_kl = F.exact_kl(logits.detach(), rollout.ref_logits)
    judgement = F.td_residual(log_prob, rollout.ref_log_prob, token_kl, rollout.mask, beta).sum(1)
    residual = judgement - (rollout.outcome - F.group_baseline(rollout.outcome, rollout.group))
    coeff = beta * log_prob.shape[1] * residual.square().mean().sqrt().item()
    if trust == "none":
        return coeff
    return coeff * max(0.0, outcome_correlation(judgement, rollout.outcome, rollout.group))


def oracle(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """The ceiling of credit assignment: the exact advantage of every token, which knows no noise either."""
    return ppo_loss(rollout, log_prob, rollout.exact_advantages)


ARMS: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "kl_in_reward": kl_in_reward,
    "rloo": rloo,
    "vimpo_paper": vimpo_paper,
    "vimpo": vimpo,
    "oracle": oracle,
    **family.ARMS,
}
