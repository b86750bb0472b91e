"""The statistics of logits over the whole vocabulary, by the version for their device."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStatistics(NamedTuple):
    """Per token, all [N] and float32 (on a CPU or GPU float64 for float64 logits), in nats."""

    log_prob: Tensor  # log pi_theta(y_t|s_t)
    ref_log_prob: Tensor  # log pi_ref(y_t|s_t)
    token_kl: Tensor  # KL( pi_theta(.|s_t) || pi_ref(.|s_t) ), exact
    entropy: Tensor  # of pi_theta(.|s_t)


def whole_vocabulary_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> TokenStatistics:
    """Arguments, results and errors as for `token_statistics`, without a shard."""
    return TokenStatistics(*statistics_rows(policy_logits, ref_logits, labels, temperature)[:4])


def statistics_rows(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None) -> Tensor:
    """The fields of TokenStatistics, and log_ratio = log p_y - log q_y, which keeps the digits that their difference lacks.

    Returns:
        [5, N].
    """
    require_shapes(policy_logits, ref_logits, labels, temperature)
    if policy_logits.is_cuda and policy_logits.dtype != torch.float64:
        from vimpo_verl.token_statistics.triton_kernel import triton_token_statistics as version
    elif policy_logits.device.type not in ("cpu", "cuda"):
        from vimpo_verl.token_statistics.float32 import float32_token_statistics as version
    else:
        from vimpo_verl.token_statistics.cpu import cpu_token_statistics as version
    return version(policy_logits, ref_logits, labels, temperature)


def require_shapes(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None) -> None:
    """Raises ValueError with all four shapes if they do not fit."""
    tokens = policy_logits.shape[:1]
    fits = policy_logits.dim() == 2 and policy_logits.shape == ref_logits.shape and labels.shape == tokens
    if not fits or (temperature is not None and temperature.shape != tokens):
        raise ValueError(
            "expected policy_logits and ref_logits [N, V], labels and temperature [N], got "
            f"{tuple(policy_logits.shape)}, {tuple(ref_logits.shape)}, {tuple(labels.shape)} and "
            f"{None if temperature is None else tuple(temperature.shape)}"
        )
