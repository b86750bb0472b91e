"""VIMPO where the update's own forward finds everything: what it takes from the batch before, and what it leaves. Torch only.

With one update a batch the policy of the old pass is the policy of the update, so kappa, the reference's log-probs and td can
come from the update's forward, and the pass before it can go. An update works on some of a batch's sequences at a time: what
belongs to the whole batch (the mean and variance that whiten the advantages, the residuals' root mean square and the
correlation with the outcomes in c_A) it cannot know before its last sequence. That comes from the batch before (`Statistics`);
each update leaves a few sums a sequence (`SequenceSums`), of which the next batch's statistics are made, over all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.config import VimpoConfig
from vimpo_verl.summary import Moments, Summary

Sums = TypeVar("Sums", bound=tuple)


@dataclass(frozen=True)
class Statistics:
    """Of a batch that is done, for the next one; the metrics of the same names (docs/metrics.md).

    Attributes:
        advantage_mean, advantage_std: of the raw advantages over all valid tokens, in units of reward.
        residual_rms: of sum_t td_t - (R - V0) over tokens, in units of reward.
        outcome_correlation: of sum_t td_t and R, both centred in the prompt's group, in [-1, 1].
    """

    advantage_mean: float
    advantage_std: float
    residual_rms: float
    outcome_correlation: float

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, float]) -> "Statistics":
        """From a step's metrics.

        Raises:
            KeyError: one is missing.
        """
        return cls(**{field.name: float(metrics[f"vimpo/{field.name}"]) for field in fields(cls)})

    @property
    def says_something(self) -> bool:
        """False where the policy was the reference, as in a run's first batch: there are no advantages to go by."""
        return self.advantage_std > 0.0


class Advantages(NamedTuple):
    """Of the sequences of a micro-batch."""

    td: Tensor  # [B, T]
    raw: Tensor  # [B, T]
    whitened: Tensor  # [B, T], with the mean and variance of the batch before, if so configured


def advantages(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    token_kl: Tensor,
    response_mask: Tensor,
    *,
    config: VimpoConfig,
    beta: float,
    lam: float,
    before: tuple[float, float] | None,
) -> Advantages:
    """td, raw and whitened advantages of whole sequences. Detached.

    Args:
        log_prob, ref_log_prob, token_kl: [B, T], in nats, of the policy of the update.
        response_mask: [B, T], 0/1 or bool.
        config: the knobs.
        beta: the run's number.
        lam: GAE's lambda, in [0, 1].
        before: mean and standard deviation of the raw advantages of the batch before; None: there is none, and what would be
            whitened with them is 0.
    """
    td = F.td_residual(log_prob.detach(), ref_log_prob, token_kl, response_mask, beta)
    raw = F.implied_advantages(td, response_mask, lam)
    if not config.whiten:
        return Advantages(td, raw, raw)
    if before is None:
        return Advantages(td, raw, torch.zeros_like(raw))
    mean, std = before
    return Advantages(td, raw, F.whiten_with(raw, response_mask, mean, std * std))


class SequenceSums(NamedTuple):
    """What an update leaves of each of its sequences, all [B] and float64; `cat` puts those of all ranks together."""

    group: Tensor  # the number of the prompt
    is_real: Tensor  # 0 on placeholders
    outcome: Tensor  # R
    target: Tensor  # R - V0
    tokens: Tensor  # valid ones
    judgement: Tensor  # sum_t td_t
    kl: Tensor  # sum over the valid tokens, in nats
    entropy: Tensor  # likewise
    mean: Tensor  # of the raw advantages of the valid tokens; 0 where there is none
    squares: Tensor  # sum of their squared distances from it
    largest: Tensor  # of them; -inf where there is none
    smallest: Tensor  # of them; inf where there is none


def sequence_sums(
    found: Advantages,
    response_mask: Tensor,
    *,
    group: Tensor,
    is_real: Tensor,
    outcome: Tensor,
    target: Tensor,
    token_kl: Tensor,
    entropy: Tensor,
) -> SequenceSums:
    """The sums of a micro-batch.

    Args:
        found: its advantages.
        response_mask, token_kl, entropy: [B, T]; the mask 0/1 or bool.
        group, is_real, outcome, target: [B].
    """
    mask = F.require_mask(response_mask)
    tokens = mask.sum(-1).double()

    def summed(per_token: Tensor) -> Tensor:
        return F.zero_where_masked(per_token, mask).sum(-1, dtype=torch.float64)

    mean = summed(found.raw) / tokens.clamp(min=1)
    none = torch.full_like(found.raw, torch.inf)
    deviation = F.zero_where_masked(found.raw.double() - mean.unsqueeze(-1), mask)
    return SequenceSums(
        group=group.double(),
        is_real=is_real.double(),
        outcome=outcome.double(),
        target=target.double(),
        tokens=tokens,
        judgement=summed(found.td),
        kl=summed(token_kl),
        entropy=summed(entropy),
        mean=mean,
        squares=deviation.square().sum(-1),
        largest=_extreme(torch.where(mask, found.raw, -none), torch.amax, -torch.inf),
        smallest=_extreme(torch.where(mask, found.raw, none), torch.amin, torch.inf),
    )


def _extreme(tensor: Tensor, of: Callable, where_empty: float) -> Tensor:
    if tensor.shape[-1] == 0:
        return torch.full(tensor.shape[:1], where_empty, dtype=torch.float64, device=tensor.device)
    return of(tensor, -1).double()


def cat(parts: Sequence[Sums]) -> Sums:
    """Those of several micro-batches or ranks as one, on the CPU: of SequenceSums or another tuple of tensors [B]."""
    return type(parts[0])(*(torch.cat([tensor.cpu() for tensor in column]) for column in zip(*parts, strict=True)))


def metrics(
    sums: SequenceSums, config: VimpoConfig, beta: float, before: tuple[float, float] | None
) -> dict[str, float]:
    """What `compute_batch` logs of a batch, and the statistics for the next, from the sums of all its sequences.

    Args:
        sums: of the whole batch.
        config: the knobs.
        beta: the run's number.
        before: what the advantages were whitened with, as for `advantages`.

    Returns:
        The metrics under "vimpo/", but c_A and beta; and under "critic/advantages/" mean, max and min of the advantages that
        were trained on, as verl logs them, where there is a valid token.
    """
    tokens = sums.tokens * sums.is_real
    count = int(tokens.sum())
    mean = (tokens * sums.mean).sum().item() / count if count else 0.0
    squares = (sums.is_real * sums.squares + tokens * (sums.mean - mean).square()).sum().item()
    moments = Moments(count, mean, squares / (count - 1) if count > 1 else 0.0)
    summary = Summary(sums.judgement, sums.target, sums.outcome, sums.tokens, sums.group.tolist(), sums.is_real.bool())
    kl = (sums.is_real * sums.kl).sum().item() / count if count else 0.0
    found = summary.metrics(kl, moments, beta)
    if count:
        real = sums.is_real.bool()
        raw = {"mean": mean, "max": sums.largest[real].max().item(), "min": sums.smallest[real].min().item()}
        found |= {f"critic/advantages/{name}": _trained(value, config, before) for name, value in raw.items()}
    return found


def _trained(raw: float, config: VimpoConfig, before: tuple[float, float] | None) -> float:
    if not config.whiten:
        return raw
    if before is None:
        return 0.0
    mean, std = before
    return (raw - mean) * (std * std + F.WHITEN_EPS) ** -0.5
