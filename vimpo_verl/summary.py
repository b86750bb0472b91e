"""What is known of a batch as a whole: c_A, the trust factor and the metrics, from a few numbers a sequence. Torch only.

The driver has these numbers once a batch (vimpo_verl/batch.py); in one pass the ranks of the update have them, each for its
own sequences (vimpo_verl/one_pass.py). Either way they are put together here.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.beta import beta_fit
from vimpo_verl.config import VimpoConfig


class Moments(NamedTuple):
    """Of a quantity of every valid token."""

    count: int
    mean: float
    variance: float  # unbiased; 0 where there are fewer than two tokens


class Summary:
    """Statistics of the real sequences of a batch.

    On a sequence without a valid token the policy has passed no judgement: its S = 0 is none, and enters nothing here but
    the mean length. Its reward is in its group's baseline, and it counts in the mean of L_V, where it has no gradient.

    Args:
        judgement: [B], S_i = sum_t td_t = -V(s_1): the policy's own verdict on its answer.
        target: [B], R - V0.
        outcome: [B], R.
        length: [B], valid tokens.
        group: B hashables.
        real: [B] bool, False on placeholders.
    """

    def __init__(
        self,
        judgement: Tensor,
        target: Tensor,
        outcome: Tensor,
        length: Tensor,
        group: Sequence[Hashable],
        real: Tensor,
    ):
        judged = real & (length > 0)
        groups = [name for name, is_judged in zip(group, judged.tolist(), strict=True) if is_judged]
        self.judgement, self.target = judgement[judged], target[judged]
        self.residual = self.judgement - self.target
        self.lengths, self.sequences = length[judged].to(judgement.dtype), int(real.sum())
        self.correlation = outcome_correlation(self.judgement, outcome[judged], groups)
        self.auc = outcome_auc(self.judgement, outcome[judged], groups)

    @property
    def mean_length(self) -> float:
        """Over all real sequences, as the mean of L_V."""
        return self.lengths.sum().item() / self.sequences if self.sequences else 0.0

    def rms_over_tokens(self, per_sequence: Tensor) -> float:
        """Root mean square over tokens of a quantity that every token of a sequence shares."""
        tokens = self.lengths.sum()
        return ((self.lengths * per_sequence.square()).sum() / tokens).sqrt().item() if tokens > 0 else 0.0

    @property
    def residual_rms(self) -> float:
        return self.rms_over_tokens(self.residual)

    @property
    def explained_variance(self) -> float:
        """1 - var(residual) / var(target), over sequences; 0 where the targets do not vary."""
        variance = self.target.var(correction=0).item() if self.target.numel() else 0.0
        return 1.0 - self.residual.var(correction=0).item() / variance if variance > 0 else 0.0

    def metrics(self, kl: float, advantages: Moments, beta: float) -> dict[str, float]:
        """What is logged of a batch, under "vimpo/" (docs/metrics.md), but c_A and beta.

        Args:
            kl: mean over the valid tokens, in nats.
            advantages: the raw ones.
            beta: the one that is in the judgement.
        """
        fit = beta_fit(self.judgement.tolist(), self.target.tolist(), beta)
        metrics = {
            "vimpo/kl": kl,
            "vimpo/residual_rms": self.residual_rms,
            "vimpo/target_rms": self.rms_over_tokens(self.target),
            "vimpo/advantage_mean": advantages.mean,
            "vimpo/advantage_std": math.sqrt(advantages.variance),
            "vimpo/outcome_correlation": self.correlation,
            "vimpo/value_explained_variance": self.explained_variance,
        }
        metrics |= {"vimpo/outcome_auc": self.auc} if self.auc is not None else {}
        return metrics | ({"vimpo/beta_fit": fit} if fit is not None else {})


def actor_coeff(
    config: VimpoConfig,
    *,
    mean_length: float,
    residual_rms: float,
    correlation: float,
    actor_loss_weight: float,
    value_scale: float = 1.0,
    advantage_rms: float | None = None,
) -> float:
    """c_A: the number given or, for "auto", the same push at any length, times max(0, correlation).

        auto:      alpha * v * beta * mean_length * rms_over_tokens(residual) / actor_loss_weight   (docs/method.md, "Scale")
        gradient:  that over rms_over_tokens(A): alpha times the ratio of the two gradients on the tokens' log-probs

    Args:
        config: the knobs, with the number of beta.
        mean_length: valid tokens of a sequence.
        residual_rms: of sum_t td_t - (R - V0), over tokens.
        correlation: of the policy's judgement with the outcomes.
        actor_loss_weight: as for `batch.compute_batch`.
        value_scale: v, what L_V is multiplied by.
        advantage_rms: over tokens, of the advantages as L_A has them; for "gradient".
    """
    if not config.use_actor:
        return 0.0
    coeff = config.actor_coeff
    if coeff in ("auto", "gradient"):
        value_push = value_scale * config.beta * mean_length * residual_rms
        actor_push = actor_loss_weight * (1.0 if coeff == "auto" else advantage_rms)
        coeff = config.actor_alpha * value_push / actor_push if value_push > 0 and actor_push > 0 else 0.0
    trusted = config.actor_trust and config.actor_advantage == "implied"  # GRPO's is no judgement of the policy's
    return coeff * max(0.0, correlation) if trusted else coeff


def outcome_correlation(judgement: Tensor, outcome: Tensor, group: Sequence[Hashable]) -> float:
    """Correlation over the batch of S_i = sum_t td_t and R_i, both centred within the prompt's group.

    Args:
        judgement: [B], S_i.
        outcome: [B], R_i.
        group: B hashables.

    Returns:
        In [-1, 1]; 0 where either does not vary within any group, as at the first step, where S = 0.
    """
    s, r = _centred_in_group(judgement, group), _centred_in_group(outcome, group)
    scale = (s.square().sum() * r.square().sum()).sqrt().item()
    return (s * r).sum().item() / scale if scale > 0 else 0.0


def _centred_in_group(values: Tensor, group: Sequence[Hashable]) -> Tensor:
    """Minus the group's mean, in float64. What only rounding left over is no variation and becomes 0."""
    values = values.double()
    centred = values - F.group_baseline(values, group)
    rounding = 1e-12 * values.abs().max() if values.numel() else 0.0
    return torch.where(centred.abs() > rounding, centred, torch.zeros_like(centred))


def outcome_auc(judgement: Tensor, outcome: Tensor, group: Sequence[Hashable]) -> float | None:
    """How often S ranks the better of two answers to one prompt higher; ties count one half.

    Arguments as for `outcome_correlation`.

    Returns:
        In [0, 1], over all pairs of one prompt with different outcomes; None if there is no such pair.
    """
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(group):
        members.setdefault(name, []).append(i)
    won, pairs = 0.0, 0
    for rows in members.values():
        s, r = judgement[rows], outcome[rows]
        better = r.unsqueeze(1) > r.unsqueeze(0)
        lead = s.unsqueeze(1) - s.unsqueeze(0)
        won += (better & (lead > 0)).sum().item() + 0.5 * (better & (lead == 0)).sum().item()
        pairs += better.sum().item()
    return won / pairs if pairs else None
