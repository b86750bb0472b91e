"""Switches of VIMPO's authors beside the paper's recipe, as far as they are decided once a batch. Torch only.

    value_scale   v = value_coeff / mean_i (R - V0)_i^2        L = v L_V + c_A L_A            value_scale
    soft value    V0 = mean of R - beta sum_t KL,              1/2 ( sum_t rho - (R - V0) )^2 soft_target
    GRPO's actor  A_i = (R_i - mean) / (std + 1e-6)            on every token of answer i      grpo_advantages
    gradient      c_A = alpha * rms_t(dL_V/dlog pi) / rms_t(dL_A/dlog pi)                     advantage_rms, summary.actor_coeff

What they are for is in docs/method.md, "The authors' switches".
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.baselines import soft_baseline
from vimpo_verl.config import VimpoConfig

GRPO_EPS = 1e-6  # added to the standard deviation of a group, as verl's GRPO does


def value_scale(config: VimpoConfig, target: Tensor, real: Tensor) -> float:
    """v, what L_V is multiplied by: value_coeff, over the mean square of the targets with value_normalised.

    Args:
        target: [B], R - V0.
        real: [B] bool, False on placeholders.

    Returns:
        value_coeff itself where all targets are 0: no scale can be seen in such a batch, and L_V has no reward in it.
    """
    if not config.value_normalised or not real.any():
        return config.value_coeff
    mean_square = target[real].double().square().mean().item()
    return config.value_coeff / mean_square if mean_square > 0 else config.value_coeff


def soft_target(
    outcome: Tensor, group: Sequence[Hashable], real: Tensor, sequence_kl: Tensor, config: VimpoConfig
) -> Tensor:
    """R - V0 with the soft V0, the mean of R - beta * sum_t KL over the group; 0 on placeholders.

    Args:
        outcome: [B]. group: B hashables. real: [B] bool.
        sequence_kl: [B], sum over the valid tokens of KL( old policy || reference ), in nats.
        config: the knobs, with the number of beta.
    """
    names = [name for is_real, name in zip(real.tolist(), group, strict=True) if is_real]
    of_real = soft_baseline(outcome[real], names, sequence_kl[real], config.beta, cap=config.baseline_cap)
    baseline = of_real.new_zeros(outcome.shape).masked_scatter(real, of_real)
    return torch.where(real, F.accumulating(outcome) - baseline, 0.0)


def grpo_advantages(outcome: Tensor, group: Sequence[Hashable], real: Tensor) -> Tensor:
    """[B]: GRPO's group-normalised reward; 0 on placeholders and in a group of one, which has nobody to compare with."""
    names = [name for is_real, name in zip(real.tolist(), group, strict=True) if is_real]
    rewards, index = F.grouped(outcome[real], names)
    size = F.group_sums(torch.ones_like(rewards), index)
    deviation = rewards - F.group_sums(rewards, index) / size
    std = (F.group_sums(deviation.square(), index) / (size - 1).clamp(min=1)).sqrt()
    return deviation.new_zeros(outcome.shape).masked_scatter(real, deviation / (std + GRPO_EPS))
