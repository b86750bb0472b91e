"""Seam: what verl logs of the distance between the rollout's log-probs and the policy's, from sums a sequence.

verl's trainer works it out of whole batches of log-probs of the pass before the update: verl.utils.debug.metrics.
calculate_debug_metrics (training/rollout_*) and verl.trainer.ppo.rollout_corr_helper.compute_offpolicy_metrics
(rollout_corr/*). In one pass the ranks of the update have those log-probs, a micro-batch at a time, and these sums stand for
them. Nothing of verl is changed; checked against verl 0.9.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gap(NamedTuple):
    """Sums over the valid tokens of each sequence, all [B] and float64. p, q: the policy's and the rollout's probability."""

    tokens: Tensor
    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor
    p_squared: Tensor
    q_squared: Tensor
    p_times_q: Tensor
    distance: Tensor  # |p - q|
    distance_squared: Tensor
    largest_distance: Tensor  # the largest, not a sum
    k3: Tensor  # p/q - log(p/q) - 1
    ratio_squared: Tensor  # (p/q)^2, the log-ratio within verl's SAFETY_BOUND


def gap(log_prob: Tensor, rollout_log_prob: Tensor, response_mask: Tensor) -> Gap:
    """Of a micro-batch.

    Args:
        log_prob, rollout_log_prob: [B, T], in nats.
        response_mask: [B, T] bool.
    """
    from verl.trainer.ppo.rollout_corr_helper import SAFETY_BOUND

    log_p, log_q = (torch.where(response_mask, x.double(), 0.0) for x in (log_prob, rollout_log_prob))
    p, q = (torch.where(response_mask, x.exp(), 0.0) for x in (log_p, log_q))
    log_ratio, distance = log_p - log_q, (p - q).abs()
    ratio_squared = log_ratio.clamp(-SAFETY_BOUND, SAFETY_BOUND).exp().square()
    per_token = {
        "tokens": response_mask,
        "log_p": log_p,
        "log_q": log_q,
        "p": p,
        "q": q,
        "p_squared": p.square(),
        "q_squared": q.square(),
        "p_times_q": p * q,
        "distance": distance,
        "distance_squared": distance.square(),
        "k3": log_ratio.exp() - log_ratio - 1,  # 0 where masked
        "ratio_squared": torch.where(response_mask, ratio_squared, 0.0),
    }
    sums = {name: tensor.sum(-1, dtype=torch.float64) for name, tensor in per_token.items()}
    padded = torch.nn.functional.pad(distance, (0, 1))  # of an empty response, 0
    return Gap(**sums, largest_distance=padded.amax(-1))


def metrics(found: Gap) -> dict[str, float]:
    """verl's metrics of a batch, under verl's names.

    Args:
        found: of all its sequences, verl's placeholders included.
    """
    tokens = found.tokens.sum()
    if tokens == 0:
        return {"training/rollout_probs_diff_valid": 0.0}
    return {
        **_debug(found, tokens),
        **{f"rollout_corr/{name}": value for name, value in _distance(found, tokens).items()},
    }


def _debug(found: Gap, tokens: Tensor) -> dict[str, float]:
    """calculate_debug_metrics."""
    mean = found.distance.sum() / tokens
    variance = (found.distance_squared.sum() - tokens * mean.square()).clamp(min=0.0) / (tokens - 1)  # of rounding only
    mean_p, mean_q = found.p.sum() / tokens, found.q.sum() / tokens
    covariance = found.p_times_q.sum() / tokens - mean_p * mean_q
    spreads = [
        (squared.sum() / tokens - mean_.square()).clamp(min=0.0)
        for squared, mean_ in ((found.p_squared, mean_p), (found.q_squared, mean_q))
    ]
    return {
        "training/rollout_probs_diff_valid": 1.0,
        "training/rollout_probs_diff_max": found.largest_distance.max().item(),
        "training/rollout_probs_diff_mean": mean.item(),
        "training/rollout_probs_diff_std": variance.sqrt().item(),
        "training/rollout_actor_probs_pearson_corr": (covariance / (spreads[0] * spreads[1]).sqrt()).item(),
    }


def _distance(found: Gap, tokens: Tensor) -> dict[str, float]:
    """compute_offpolicy_metrics."""
    from verl.trainer.ppo.rollout_corr_helper import SAFETY_BOUND

    of_policy, of_rollout = (log_probs / (found.tokens + 1e-8) for log_probs in (found.log_p, found.log_q))
    difference = of_rollout - of_policy
    log_ratio = (found.log_p - found.log_q).clamp(-SAFETY_BOUND, SAFETY_BOUND)
    values = {
        "training_ppl": (-of_policy).exp().mean(),
        "training_log_ppl": -of_policy.mean(),
        "kl": (found.log_q - found.log_p).sum() / tokens,
        "k3_kl": found.k3.sum() / tokens,
        "rollout_ppl": (-of_rollout).exp().mean(),
        "rollout_log_ppl": -of_rollout.mean(),
        "log_ppl_diff": difference.mean(),
        "log_ppl_abs_diff": difference.abs().mean(),
        "log_ppl_diff_max": difference.max(),
        "log_ppl_diff_min": difference.min(),
        "ppl_ratio": difference.exp().mean(),
        "chi2_token": found.ratio_squared.sum() / tokens - 1,
        "chi2_seq": (2 * log_ratio).exp().mean() - 1,
    }
    return {name: value.item() for name, value in values.items()}
