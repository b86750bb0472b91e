"""What VIMPO computes once a batch, at the old policy: values, advantages, targets, c_A and the metrics. Torch only.

Once a batch and over the whole batch, as every estimator of verl, so nothing here depends on micro-batching, dynamic
batch size or data-parallel size.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.baselines import baseline_of
from vimpo_verl.beta import Beta, auto_beta, beta_fit
from vimpo_verl.config import VimpoConfig


class VimpoBatch(NamedTuple):
    """Results for a batch of B sequences and T response tokens."""

    advantages: Tensor  # [B, T] A_t, whitened if so configured; zero where masked
    returns: Tensor  # [B, T] R - V0 on every valid token; zero where masked
    values: Tensor  # [B, T] implied values V(s_t); zero where masked
    actor_coeff: float  # c_A of this batch
    beta: Beta  # that this batch was computed with
    metrics: dict[str, float]  # under "vimpo/", see docs/metrics.md


def compute_batch(
    *,
    old_log_prob: Tensor,
    ref_log_prob: Tensor,
    token_kl: Tensor,
    response_mask: Tensor,
    outcome: Tensor,
    group: Sequence[Hashable],
    config: VimpoConfig,
    lam: float,
    is_padding: Tensor | None = None,
    actor_loss_weight: float = 1.0,
    session_end: Tensor | None = None,
    prior: Tensor | None = None,
    prior_weight: Tensor | None = None,
) -> VimpoBatch:
    """The driver's half of VIMPO for one batch.

    Args:
        old_log_prob, ref_log_prob, token_kl: [B, T], in nats, at the policy that starts the update.
        response_mask: [B, T], 0/1 or bool: 1 on the tokens that the policy wrote.
        outcome: [B], the reward R of each sequence.
        group: B hashables, equal for the responses to one prompt.
        config: the knobs. beta "auto" is measured over this batch: hand the number in the result's `beta` to those that
            follow, because one run has one beta.
        lam: GAE's lambda, in [0, 1].
        is_padding: [B] bool, placeholder sequences that verl added; they count nowhere. None: there are none.
        actor_loss_weight: what the actor loss's aggregation makes of a loss of 1 on every valid token of a mini-batch: 1
            for a mean over tokens. actor_coeff "auto" allows for it.
        session_end: [B] of row numbers: where a session has several sequences, the one that ended it. Its reward is that of
            all of them, and it alone counts in its group. None: every sequence is a session of its own.
        prior, prior_weight: [B], for a baseline that needs them (baselines.WITH_PRIOR): each prompt's prior, from 0 to 1, and
            the past answers that it counts for.

    Returns:
        VimpoBatch, in float32 (float64 for float64 inputs), on the inputs' device.

    Raises:
        ValueError: shapes do not fit, the mask has other values than 0 and 1, or beta is "auto" and no token is valid.
    """
    if outcome.shape != response_mask.shape[:1] or len(group) != len(outcome):
        raise ValueError(
            f"outcome and group must be [B] for response_mask {tuple(response_mask.shape)}, got {tuple(outcome.shape)} "
            f"and {len(group)}"
        )
    if is_padding is not None and is_padding.shape != outcome.shape:
        raise ValueError(f"is_padding must be [B] = {list(outcome.shape)}, got shape {list(is_padding.shape)}")
    real = torch.ones_like(outcome, dtype=torch.bool) if is_padding is None else ~is_padding.bool()
    mask = F.require_mask(response_mask) & real.unsqueeze(-1)
    rows = torch.arange(len(outcome), device=outcome.device)
    end = rows if session_end is None else session_end
    outcome = outcome[end]
    beta = _beta(config, mask, outcome, group, real)
    config = replace(config, beta=beta.value)
    td = F.td_residual(old_log_prob, ref_log_prob, token_kl, mask, config.beta)
    baseline = _baseline(outcome, group, real & (end == rows), config, prior, prior_weight)[end]
    target = torch.where(real, outcome.to(td.dtype) - baseline, 0.0).to(td.dtype)
    raw = F.implied_advantages(td, mask, lam)
    summary = _Summary(td, target, outcome, mask, group, real)
    coeff = _actor_coeff(config, summary, actor_loss_weight)
    return VimpoBatch(
        advantages=F.whiten(raw, mask) if config.whiten else raw,
        returns=torch.where(mask, target.unsqueeze(-1), 0.0).to(td.dtype),
        values=F.implied_values(td, mask),
        actor_coeff=coeff,
        beta=beta,
        metrics=_metrics(token_kl, raw, mask, coeff, beta.value, summary),
    )


def _beta(config: VimpoConfig, mask: Tensor, outcome: Tensor, group: Sequence[Hashable], real: Tensor) -> Beta:
    if config.beta != "auto":
        return Beta(config.beta)
    groups = [name for name, is_real in zip(group, real.tolist(), strict=True) if is_real]
    return auto_beta(mask[real].sum(-1).tolist(), outcome[real].tolist(), groups, config.beta_scale)


def _baseline(
    outcome: Tensor,
    group: Sequence[Hashable],
    real: Tensor,
    config: VimpoConfig,
    prior: Tensor | None,
    prior_weight: Tensor | None,
) -> Tensor:
    """V0 of the real sequences; 0 on placeholders, which belong to no group and no batch mean."""
    names = [name for is_real, name in zip(real.tolist(), group, strict=True) if is_real]
    given = {"prior": prior, "prior_weight": prior_weight}
    of_each = {name: tensor[real] for name, tensor in given.items() if tensor is not None}
    of_real = baseline_of(config.baseline, outcome[real], names, cap=config.baseline_cap, **of_each)
    return of_real.new_zeros(outcome.shape).masked_scatter(real, of_real)


class _Summary:
    """Statistics of the real sequences of a batch.

    On a sequence without a valid token the policy has passed no judgement: its S = 0 is none, and enters nothing here but
    the mean length. Its reward is in its group's baseline, and it counts in the mean of L_V, where it has no gradient.
    """

    def __init__(self, td: Tensor, target: Tensor, outcome: Tensor, mask: Tensor, group: Sequence, real: Tensor):
        judged = mask.any(-1)
        judgement = td.sum(-1)[judged]  # S_i = -V(s_1): the policy's own verdict on its answer
        groups = [name for name, is_judged in zip(group, judged.tolist(), strict=True) if is_judged]
        self.judgement, self.target, self.residual = judgement, target[judged], judgement - target[judged]
        self.lengths, self.sequences = mask[judged].sum(-1).to(td.dtype), int(real.sum())
        self.correlation = outcome_correlation(judgement, outcome[judged], groups)
        self.auc = outcome_auc(judgement, outcome[judged], groups)

    @property
    def mean_length(self) -> float:
        """Over all real sequences, as the mean of L_V."""
        return self.lengths.sum().item() / self.sequences if self.sequences else 0.0

    def rms_over_tokens(self, per_sequence: Tensor) -> float:
        """Root mean square over tokens of a quantity that every token of a sequence shares."""
        tokens = self.lengths.sum()
        return ((self.lengths * per_sequence.square()).sum() / tokens).sqrt().item() if tokens > 0 else 0.0

    @property
    def explained_variance(self) -> float:
        """1 - var(residual) / var(target), over sequences; 0 where the targets do not vary."""
        variance = self.target.var(correction=0).item() if self.target.numel() else 0.0
        return 1.0 - self.residual.var(correction=0).item() / variance if variance > 0 else 0.0


def _actor_coeff(config: VimpoConfig, summary: _Summary, actor_loss_weight: float) -> float:
    """c_A: `_same_push` or the number given, times max(0, correlation)."""
    if not config.use_actor:
        return 0.0
    coeff = _same_push(config, summary, actor_loss_weight) if config.actor_coeff == "auto" else config.actor_coeff
    return coeff * max(0.0, summary.correlation) if config.actor_trust else coeff


def _same_push(config: VimpoConfig, summary: _Summary, actor_loss_weight: float) -> float:
    """alpha * beta * mean_length * rms_over_tokens(residual) / actor_loss_weight (docs/method.md, "Scale")."""
    value_push = config.beta * summary.mean_length * summary.rms_over_tokens(summary.residual)
    return config.actor_alpha * value_push / actor_loss_weight if value_push > 0 else 0.0


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


def _metrics(
    token_kl: Tensor, raw: Tensor, mask: Tensor, coeff: float, beta: float, summary: _Summary
) -> dict[str, float]:
    valid = mask.sum().item()
    metrics = {
        "vimpo/kl": token_kl[mask].double().mean().item() if valid else 0.0,
        "vimpo/actor_coeff": coeff,
        "vimpo/beta": beta,
        "vimpo/residual_rms": summary.rms_over_tokens(summary.residual),
        "vimpo/target_rms": summary.rms_over_tokens(summary.target),
        "vimpo/advantage_std": raw[mask].double().std().item() if valid > 1 else 0.0,
        "vimpo/outcome_correlation": summary.correlation,
        "vimpo/value_explained_variance": summary.explained_variance,
    }
    fit = beta_fit(summary.judgement.tolist(), summary.target.tolist(), beta)
    metrics |= {"vimpo/outcome_auc": summary.auc} if summary.auc is not None else {}
    metrics |= {"vimpo/beta_fit": fit} if fit is not None else {}
    return metrics
