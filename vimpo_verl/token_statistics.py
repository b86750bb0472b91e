"""What the joint pass keeps of two logits tensors: four numbers a token, from one read of each.

One function in front. On a GPU it runs the Triton kernel (vimpo_verl.token_statistics_triton), elsewhere the chunked
torch version below; both give the same numbers to float32 accuracy. `linear_token_statistics` does the same from hidden
states and output matrices, where there are no logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one [chunk, V] temporary of the torch version: 2 MiB in float64, to stay in a CPU's cache.
_CHUNK_ELEMENTS = 2**18
# Tokens whose logits `linear_token_statistics` makes at a time, as in verl's own fused output head.
_LINEAR_CHUNK_TOKENS = 512


class TokenStatistics(NamedTuple):
    """Per token, all [N] and float32 (float64 for float64 logits), in nats."""

    log_prob: Tensor  # log pi_theta(y_t|s_t)
    ref_log_prob: Tensor  # log pi_ref(y_t|s_t)
    token_kl: Tensor  # KL( pi_theta(.|s_t) || pi_ref(.|s_t) ), exact
    entropy: Tensor  # of pi_theta(.|s_t)


@torch.no_grad()
def token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None = None
) -> TokenStatistics:
    """Both log-probs of the sampled token, the exact KL and the policy's entropy.

    Args:
        policy_logits: [N, V], any float dtype. Not modified. -inf entries have probability zero.
        ref_logits: [N, V], likewise.
        labels: [N], int64: the sampled token of each position.
        temperature: [N] > 0, divides both logits; None if they are already divided.

    Returns:
        TokenStatistics. Where the logits are equal, token_kl is exactly 0 and the two log-probs are equal. A token
        that the reference holds impossible and the policy does not makes token_kl infinite.

    Raises:
        ValueError: the shapes do not fit.
    """
    _require_shapes(policy_logits, ref_logits, labels, temperature)
    if policy_logits.is_cuda and policy_logits.dtype != torch.float64:
        from vimpo_verl.token_statistics_triton import triton_token_statistics

        return TokenStatistics(*triton_token_statistics(policy_logits, ref_logits, labels, temperature))
    return _torch_token_statistics(policy_logits, ref_logits, labels, temperature)


@torch.no_grad()
def linear_token_statistics(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
) -> TokenStatistics:
    """`token_statistics` of hidden @ weight.T for both models, a chunk of tokens at a time: no logits tensor.

    Args:
        policy_hidden, ref_hidden: [N, D], last hidden states.
        policy_weight, ref_weight: [V, D], output matrices.
        labels: [N], int64.
        temperature: divides both logits.

    Returns:
        TokenStatistics; extra memory is two [512, V] tensors in the models' dtype.
    """
    chunks = []
    for start in range(0, labels.shape[0], _LINEAR_CHUNK_TOKENS):
        rows = slice(start, start + _LINEAR_CHUNK_TOKENS)
        policy_logits = policy_hidden[rows] @ policy_weight.t()
        ref_logits = ref_hidden[rows] @ ref_weight.t()
        scale = labels.new_full(labels[rows].shape, temperature, dtype=torch.float32) if temperature != 1.0 else None
        chunks.append(token_statistics(policy_logits, ref_logits, labels[rows], scale))
    return TokenStatistics(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _torch_token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> TokenStatistics:
    tokens, vocab_size = policy_logits.shape
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    out = TokenStatistics(*(policy_logits.new_empty(tokens, dtype=dtype) for _ in TokenStatistics._fields))
    step = max(1, _CHUNK_ELEMENTS // max(vocab_size, 1))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        z, u = policy_logits[rows].double(), ref_logits[rows].double()
        if temperature is not None:
            scale = temperature[rows].unsqueeze(-1)
            z, u = z / scale, u / scale
        for target, result in zip(out, _chunk_statistics(z, u, labels[rows].unsqueeze(-1)), strict=True):
            target[rows] = result.to(dtype)
    return out


def _chunk_statistics(z: Tensor, u: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four numbers of a chunk of logits [n, V] in float64, in which a KL, a small difference of large sums, is safe.

    With e = exp(z - max z) and s = sum e:  sum p z = (e . z) / s,  KL = (e . z - e . u) / s - lse(z) + lse(u).
    """
    log_sum_u = torch.logsumexp(u, dim=-1)
    label_z, label_u = z.gather(-1, label).squeeze(-1), u.gather(-1, label).squeeze(-1)
    peak = z.amax(-1, keepdim=True)
    e = (z - peak).exp_()
    s = e.sum(-1)
    log_sum_z = peak.squeeze(-1) + s.log()
    mean_z = torch.linalg.vecdot(e, z) / s
    mean_u = torch.linalg.vecdot(e, u) / s
    kl = (mean_z - mean_u) - (log_sum_z - log_sum_u)
    entropy = log_sum_z - mean_z
    odd = ~(torch.isfinite(kl) & torch.isfinite(entropy))  # 0 * inf: some entry is impossible
    if odd.any():
        kl[odd], entropy[odd] = _with_impossible_entries(z[odd], u[odd])
    return label_z - log_sum_z, label_u - log_sum_u, kl, entropy


def _with_impossible_entries(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """KL and entropy of rows in which an entry is -inf: it contributes nothing where the policy holds it impossible."""
    log_p, log_q = torch.log_softmax(z, dim=-1), torch.log_softmax(u, dim=-1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return torch.where(log_p.isnan().any(-1), torch.nan, kl), torch.special.entr(p).sum(-1)


def _require_shapes(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None) -> None:
    tokens = policy_logits.shape[:1]
    fits = policy_logits.dim() == 2 and policy_logits.shape == ref_logits.shape and labels.shape == tokens
    if not fits or (temperature is not None and temperature.shape != tokens):
        raise ValueError(
            "expected policy_logits and ref_logits [N, V], labels and temperature [N], got "
            f"{tuple(policy_logits.shape)}, {tuple(ref_logits.shape)}, {tuple(labels.shape)} and "
            f"{None if temperature is None else tuple(temperature.shape)}"
        )
