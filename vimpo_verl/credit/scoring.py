"""The numbers: per token through vimpo_verl.functional and token_statistics, per answer and over all of them.

Each answer goes through the models alone and unpadded, so its numbers do not depend on which others are there.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.baselines import OF_A_BATCH
from vimpo_verl.batch import outcome_auc, outcome_correlation
from vimpo_verl.config import VimpoConfig
from vimpo_verl.credit.answers import Answer
from vimpo_verl.credit.tokens import Encoded
from vimpo_verl.token_statistics import TokenStatistics, token_statistics


@dataclass(frozen=True)
class Credit:
    """One answer of T tokens; tensors are [T], float64, on the CPU."""

    log_prob: Tensor
    ref_log_prob: Tensor
    kl: Tensor
    td: Tensor
    value: Tensor  # V(s_t), before token t
    advantage: Tensor  # A_t, raw
    reward: float
    baseline: float  # V0

    @property
    def judgement(self) -> float:
        """S = sum_t td_t."""
        return self.td.sum().item()

    @property
    def residual(self) -> float:
        """S - (R - V0)."""
        return self.judgement - (self.reward - self.baseline)


@torch.no_grad()
def statistics_of(policy, reference, encoded: Encoded, temperature: float) -> TokenStatistics:
    """Log-probs, KL and entropy of an answer's tokens, [T] each, from one forward of each model.

    Raises:
        ValueError: a number is not finite, as where the reference holds a token impossible.
    """
    device = next(policy.parameters()).device
    ids = torch.tensor([encoded.prompt_ids + encoded.response_ids], device=device)
    tokens = len(encoded.response_ids)
    policy_logits, ref_logits = (
        model(input_ids=ids, logits_to_keep=tokens + 1, use_cache=False).logits[0, :-1] for model in (policy, reference)
    )
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    scale = None if temperature == 1.0 else torch.full((tokens,), temperature, device=device, dtype=dtype)
    statistics = token_statistics(policy_logits, ref_logits, ids[0, -tokens:], scale)
    for name, numbers in statistics._asdict().items():
        if not torch.isfinite(numbers).all():
            t = int((~torch.isfinite(numbers)).nonzero()[0]) + 1
            raise ValueError(f"{encoded.answer.where}: {name} of token {t} is {numbers[t - 1].item()}")
    return statistics


def credit_of(
    statistics: TokenStatistics, answer: Answer, mask: Sequence[int], config: VimpoConfig, lam: float
) -> Credit:
    """td, values and advantages of an answer, with kappa by the estimator that training used; for "topk" the whole KL."""
    log_prob, ref_log_prob, kl = (numbers.double().cpu().unsqueeze(0) for numbers in statistics[:3])
    if config.kl_estimator in F.SAMPLED_KL_ESTIMATORS:
        kl = F.sampled_kl(log_prob, ref_log_prob, config.kl_estimator)
    valid = torch.tensor([mask])
    td = F.td_residual(log_prob, ref_log_prob, kl, valid, config.beta)
    value, advantage = F.implied_values(td, valid), F.implied_advantages(td, valid, lam)
    per_token = (x[0] for x in (log_prob, ref_log_prob, kl, td, value, advantage))
    return Credit(*per_token, answer.reward, answer.baseline)


def baselines(rewards: Sequence[float], groups: Sequence[Hashable], config: VimpoConfig) -> list[float]:
    """V0 of each answer, over all answers of the file, also those that are not shown.

    A baseline with a prior is the group mean here: the file does not have the priors of its step.
    """
    outcome = torch.tensor(rewards, dtype=torch.float64)
    name = config.baseline if config.baseline in OF_A_BATCH else "group_mean"
    return OF_A_BATCH[name](outcome, groups, cap=config.baseline_cap).tolist()


def overall(groups: Sequence[Sequence[Credit]], masks: Sequence[Sequence[Sequence[int]]]) -> dict[str, float | None]:
    """The numbers of docs/metrics.md over the answers shown; None where they have no meaning."""
    credits = [credit for group in groups for credit in group]
    group = [number for number, members in enumerate(groups) for _ in members]
    valid = torch.tensor([bit for members in masks for mask in members for bit in mask], dtype=torch.bool)
    judgement = torch.tensor([credit.judgement for credit in credits], dtype=torch.float64)
    outcome = torch.tensor([credit.reward for credit in credits], dtype=torch.float64)
    return {
        "kl": torch.cat([credit.kl for credit in credits])[valid].mean().item() if valid.any() else None,
        "outcome_correlation": outcome_correlation(judgement, outcome, group),
        "outcome_auc": outcome_auc(judgement, outcome, group),
    }
