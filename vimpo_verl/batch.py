"""What VIMPO computes once a batch, at the old policy: values, advantages, targets, c_A and the metrics. Torch only.

Once a batch and over the whole batch, as every estimator of verl, so nothing here depends on micro-batching, dynamic
batch size or data-parallel size. A batch may have tens of millions of tokens, so whatever has one number a token is worked
on a few rows at a time: beside the inputs there are the three results, and nothing else of their size, no mask either.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.baselines import baseline_of
from vimpo_verl.beta import Beta, auto_beta
from vimpo_verl.config import VimpoConfig
from vimpo_verl.one_pass import Statistics
from vimpo_verl.summary import Moments, Summary, actor_coeff, outcome_auc, outcome_correlation
from vimpo_verl.switches import grpo_advantages, soft_target, value_scale

__all__ = ["VimpoBatch", "compute_batch", "compute_targets", "outcome_auc", "outcome_correlation"]

# Tokens worked on at a time: small enough for a CPU's cache to help, large enough for the calls not to matter.
_TOKENS_AT_A_TIME = 2**18


class VimpoBatch(NamedTuple):
    """Results for a batch of B sequences and T response tokens."""

    advantages: Tensor  # [B, T] A_t, whitened if so configured; zero where masked
    returns: Tensor  # [B, T] R - V0 on every valid token; zero where masked
    values: Tensor  # [B, T] implied values V(s_t); zero where masked
    actor_coeff: float  # c_A of this batch
    beta: Beta  # that this batch was computed with
    value_scale: float  # what L_V is multiplied by
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
    real = _require_sequences(response_mask, outcome, group, is_padding)
    F.require_fitting(
        response_mask=response_mask, old_log_prob=old_log_prob, ref_log_prob=ref_log_prob, token_kl=token_kl
    )
    mask = _Mask(response_mask, real)
    length = mask.length
    rows = torch.arange(len(outcome), device=outcome.device)
    end = rows if session_end is None else session_end
    outcome = outcome[end]
    beta = _beta(config, length, outcome, group, real)
    config = replace(config, beta=beta.value)
    advantages, values, judgement, kl = _raw(old_log_prob, ref_log_prob, token_kl, mask, config.beta, lam)
    moments = _moments(advantages, mask)
    if config.value_type == "soft":
        sequence_kl = _sequence_sums(token_kl, mask)
        target = soft_target(outcome, group, real, sequence_kl, config)
        judgement = judgement + config.beta * sequence_kl  # sum_t rho: the soft value loss has no kappa
    else:
        target = _target(outcome, group, real & (end == rows), config, prior, prior_weight)[end]
    target = torch.where(real, target, 0.0).to(advantages.dtype)
    scale = value_scale(config, target, real)
    if config.actor_advantage == "grpo":
        _spread(grpo_advantages(outcome, group, real), mask, out=advantages)
    elif config.whiten:
        _whiten(advantages, mask, moments)
    summary = Summary(judgement, target, outcome, length, group, real)
    coeff = actor_coeff(
        config,
        mean_length=summary.mean_length,
        residual_rms=summary.residual_rms,
        correlation=summary.correlation,
        actor_loss_weight=actor_loss_weight,
        value_scale=scale,
        advantage_rms=_rms(advantages, mask) if config.actor_coeff == "gradient" else None,
    )
    return VimpoBatch(
        advantages=advantages,
        returns=_spread(target, mask, out=target.new_empty(response_mask.shape)),
        values=values,
        actor_coeff=coeff,
        beta=beta,
        value_scale=scale,
        metrics={**summary.metrics(kl, moments, beta.value), "vimpo/actor_coeff": coeff, "vimpo/beta": beta.value},
    )


def compute_targets(
    *,
    response_mask: Tensor,
    outcome: Tensor,
    group: Sequence[Hashable],
    config: VimpoConfig,
    before: Statistics | None,
    is_padding: Tensor | None = None,
    actor_loss_weight: float = 1.0,
    prior: Tensor | None = None,
    prior_weight: Tensor | None = None,
) -> VimpoBatch:
    """The driver's half where the update itself finds the log-probs (one pass): beta, targets and c_A.

    Args:
        before: of the batch before; None: there is none, and the actor loss has no weight.
        others: as for `compute_batch`.

    Returns:
        VimpoBatch with the metrics that are known by now; advantages and values are zero, the update works out its own.

    Raises:
        ValueError: as for `compute_batch`.
    """
    real = _require_sequences(response_mask, outcome, group, is_padding)
    mask = _Mask(response_mask, real)
    beta = _beta(config, mask.length, outcome, group, real)
    config = replace(config, beta=beta.value)
    target = _target(outcome, group, real, config, prior, prior_weight)
    sequences, scale = int(real.sum()), value_scale(config, target, real)
    coeff = 0.0
    if before is not None and before.says_something:
        coeff = actor_coeff(
            config,
            mean_length=int(mask.length.sum()) / sequences if sequences else 0.0,
            residual_rms=before.residual_rms,
            correlation=before.outcome_correlation,
            actor_loss_weight=actor_loss_weight,
            value_scale=scale,
        )
    unknown = target.new_zeros(()).expand(response_mask.shape)
    return VimpoBatch(
        advantages=unknown,
        returns=_spread(target, mask, out=target.new_empty(response_mask.shape)),
        values=unknown,
        actor_coeff=coeff,
        beta=beta,
        value_scale=scale,
        metrics={"vimpo/actor_coeff": coeff, "vimpo/beta": beta.value},
    )


def _require_sequences(
    response_mask: Tensor, outcome: Tensor, group: Sequence[Hashable], is_padding: Tensor | None
) -> Tensor:
    """[B] bool: the sequences that are no placeholders, once everything that a sequence has one of fits."""
    if outcome.shape != response_mask.shape[:1] or len(group) != len(outcome):
        raise ValueError(
            f"outcome and group must be [B] for response_mask {tuple(response_mask.shape)}, got {tuple(outcome.shape)} "
            f"and {len(group)}"
        )
    if is_padding is not None and is_padding.shape != outcome.shape:
        raise ValueError(f"is_padding must be [B] = {list(outcome.shape)}, got shape {list(is_padding.shape)}")
    return torch.ones_like(outcome, dtype=torch.bool) if is_padding is None else ~is_padding.bool()


class _Mask:
    """The valid tokens of the real sequences, as bools, block by block: of the whole batch they would be a tensor of its size.

    Args:
        response_mask: [B, T], 0/1 or bool.
        real: [B] bool, False on placeholders.

    Raises:
        ValueError: the mask has other values than 0 and 1.
    """

    def __init__(self, response_mask: Tensor, real: Tensor):
        self._response_mask, self._real = response_mask, real
        counts = [valid.sum(-1) for _, valid in self._blocks(F.require_mask)]
        self.length = torch.cat(counts) if counts else torch.zeros_like(real, dtype=torch.long)  # [B], valid tokens

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of about _TOKENS_AT_A_TIME tokens, and their mask."""
        return self._blocks(Tensor.bool)

    def row(self, number: int) -> Tensor:
        """[T], of one sequence."""
        return self._response_mask[number].bool() & self._real[number]

    def _blocks(self, as_bools: Callable[[Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        count, length = self._response_mask.shape
        step = max(1, _TOKENS_AT_A_TIME // max(1, length))
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            yield rows, as_bools(self._response_mask[rows]) & self._real[rows].unsqueeze(-1)


def _raw(
    old_log_prob: Tensor, ref_log_prob: Tensor, token_kl: Tensor, mask: _Mask, beta: float, lam: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Raw advantages and values [B, T], S [B], and the mean KL of a valid token."""
    dtype = F.accumulating(old_log_prob[:0]).dtype
    advantages, values = (torch.empty_like(old_log_prob, dtype=dtype) for _ in range(2))
    judgement = old_log_prob.new_empty(len(old_log_prob), dtype=torch.float64)
    kl, count = 0.0, 0
    for rows, valid in mask:
        td = F.td_residual(old_log_prob[rows], ref_log_prob[rows], token_kl[rows], valid, beta)
        values[rows] = F.implied_values(td, valid)
        advantages[rows] = F.implied_advantages(td, valid, lam)
        judgement[rows] = td.sum(-1, dtype=torch.float64)
        kl += F.zero_where_masked(F.accumulating(token_kl[rows]), valid).sum(dtype=torch.float64).item()
        count += int(valid.sum())
    return advantages, values, judgement, kl / count if count else 0.0


def _moments(advantages: Tensor, mask: _Mask) -> Moments:
    """Of the valid tokens. Counted from one of them, so that a constant has variance 0 and large offsets cost no digits."""
    count = int(mask.length.sum())
    if count == 0:
        return Moments(0, 0.0, 0.0)
    row = int(mask.length.argmax())
    start = advantages[row][mask.row(row)][0].item()
    shifted = sum(_sum(advantages[rows] - start, valid) for rows, valid in mask) / count
    squares = sum(_sum((advantages[rows] - start - shifted).square(), valid) for rows, valid in mask)
    return Moments(count, start + shifted, squares / (count - 1) if count > 1 else 0.0)


def _rms(advantages: Tensor, mask: _Mask) -> float:
    """Root mean square over the valid tokens; 0 where there are none."""
    count = int(mask.length.sum())
    return math.sqrt(sum(_sum(advantages[rows].double().square(), valid) for rows, valid in mask) / max(1, count))


def _sequence_sums(tensor: Tensor, mask: _Mask) -> Tensor:
    """[B]: over the valid tokens of each sequence, in float64."""
    parts = [
        F.zero_where_masked(F.accumulating(tensor[rows]), valid).sum(-1, dtype=torch.float64) for rows, valid in mask
    ]
    return torch.cat(parts) if parts else tensor.new_zeros(0, dtype=torch.float64)


def _sum(tensor: Tensor, valid: Tensor) -> float:
    return F.zero_where_masked(tensor, valid).sum(dtype=torch.float64).item()


def _spread(of_sequence: Tensor, mask: _Mask, *, out: Tensor) -> Tensor:
    """A number a sequence [B] on each of its valid tokens [B, T], and 0 elsewhere; into `out`."""
    of_sequence = of_sequence.to(out.dtype)
    for rows, valid in mask:
        out[rows] = torch.where(valid, of_sequence[rows].unsqueeze(-1), 0.0)
    return out


def _whiten(advantages: Tensor, mask: _Mask, moments: Moments) -> None:
    """`functional.whiten`, in place. What is not finite spreads, for the caller to find."""
    scale = (moments.variance + F.WHITEN_EPS) ** -0.5
    for rows, valid in mask:
        advantages[rows] = F.zero_where_masked((advantages[rows] - moments.mean) * scale, valid)


def _beta(config: VimpoConfig, length: Tensor, outcome: Tensor, group: Sequence[Hashable], real: Tensor) -> Beta:
    if config.beta != "auto":
        return Beta(config.beta)
    groups = [name for name, is_real in zip(group, real.tolist(), strict=True) if is_real]
    return auto_beta(length[real].tolist(), outcome[real].tolist(), groups, config.beta_scale)


def _target(
    outcome: Tensor,
    group: Sequence[Hashable],
    real: Tensor,
    config: VimpoConfig,
    prior: Tensor | None,
    prior_weight: Tensor | None,
) -> Tensor:
    """[B]: R - V0 of the real sequences; 0 on placeholders."""
    outcome = F.accumulating(outcome)
    return torch.where(real, outcome - _baseline(outcome, group, real, config, prior, prior_weight), 0.0)


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
