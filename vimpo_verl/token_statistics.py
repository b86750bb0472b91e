"""What the joint pass keeps of two logits tensors: four numbers a token, from one read of each.

One function in front. On a GPU it runs the Triton kernel (vimpo_verl.token_statistics_triton), elsewhere the chunked
torch version below; both give the same numbers to float32 accuracy. `linear_token_statistics` does the same from hidden
states and output matrices, where there are no logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one [chunk, V] buffer of the torch version. Fewer, and the calls cost more than the work; more (4 MiB in
# float64), and the buffers leave a CPU's cache. Between the two an eighth of the tokens, which bounds the buffers
# against the logits.
_SMALL_CHUNK, _LARGE_CHUNK, _CHUNKS = 2**16, 2**19, 8
# Beyond these, in nats, the torch version takes the plain formula in float64: there float32 weights could lose mass.
_MAX_LOG_RATIO, _MAX_LOG_NORMALISER_RATIO = 30.0, 10.0
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


class _Buffers(NamedTuple):
    """[rows, V] each, made once a call: on a CPU, fresh memory costs more than the arithmetic in it."""

    shifted: Tensor  # dtype of the results, like w
    w: Tensor
    weights: Tensor  # float64, like the next two
    log_ratio: Tensor
    ratio: Tensor


def _torch_token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> TokenStatistics:
    tokens, vocab_size = policy_logits.shape
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    out = TokenStatistics(*(policy_logits.new_empty(tokens, dtype=dtype) for _ in TokenStatistics._fields))
    step = _chunk_rows(tokens, vocab_size)
    kinds = (dtype, dtype, torch.float64, torch.float64, torch.float64)
    buffers = _Buffers(*(policy_logits.new_empty(step, vocab_size, dtype=kind) for kind in kinds))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        z, u, label = policy_logits[rows], ref_logits[rows], labels[rows].unsqueeze(-1)
        scale = None if temperature is None else temperature[rows].unsqueeze(-1).to(dtype)
        results, safe = _chunk_statistics(z, u, label, scale, _Buffers(*(buffer[: len(z)] for buffer in buffers)))
        if not safe.all():
            odd = ~safe
            plain = _plain_statistics(z[odd], u[odd], label[odd], None if scale is None else scale[odd])
            for result, value in zip(results, plain, strict=True):
                result[odd] = value
        for target, result in zip(out, results, strict=True):
            target[rows] = result
    return out


def _chunk_rows(tokens: int, vocab_size: int) -> int:
    smallest, largest = (elements // max(vocab_size, 1) for elements in (_SMALL_CHUNK, _LARGE_CHUNK))
    return max(1, min(tokens, largest, max(smallest, tokens // _CHUNKS)))


def _chunk_statistics(
    z: Tensor, u: Tensor, label: Tensor, scale: Tensor | None, buffers: _Buffers
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The four numbers of each row of a chunk of logits [n, V], float64 [n], and where this way is safe, bool [n].

    With w = exp(z - max z), s = sum w (so p = w / s) and the log-ratio r = u - z:

        log p(y) = z_y - max z - log s                   entropy = log s - sum p (z - max z)
        L = log sum p e^r = logsumexp(u) - logsumexp(z)  log q(y) = log p(y) + r_y - L
        KL = L - sum p r

    The weights may be float32: relative errors of at most e in them change the KL by at most 2 e KL. r, e^r and the
    sums may not, because L and sum p r agree to second order in r.
    """
    r = buffers.log_ratio.copy_(u).sub_(buffers.weights.copy_(z))
    z = z if z.dtype == buffers.shifted.dtype else buffers.shifted.copy_(z)
    shifted = torch.sub(z, z.amax(-1, keepdim=True), out=buffers.shifted)
    if scale is not None:
        r.div_(scale), shifted.div_(scale)
    label_shifted, label_r = (x.gather(-1, label).squeeze(-1).double() for x in (shifted, r))
    largest_r = r.amax(-1)

    w = torch.exp(shifted, out=buffers.w)
    sum_w_shifted = shifted.mul_(w).sum(-1).double()  # all terms of one sign: safe in float32
    w = buffers.weights.copy_(w)
    s = w.sum(-1)
    log_normaliser_ratio = (torch.exp(r, out=buffers.ratio).mul_(w).sum(-1) / s).log()  # L
    mean_r = r.mul_(w).sum(-1) / s

    log_prob = label_shifted - s.log()
    ref_log_prob = log_prob + label_r - log_normaliser_ratio
    kl = log_normaliser_ratio - mean_r
    entropy = s.log() - sum_w_shifted / s
    # Comparisons with NaN are false: entries that are impossible (-inf) or not finite are for the plain formula too.
    safe = (largest_r < _MAX_LOG_RATIO) & (log_normaliser_ratio.abs() < _MAX_LOG_NORMALISER_RATIO) & kl.isfinite()
    return (log_prob, ref_log_prob, kl, entropy), safe


def _plain_statistics(
    z: Tensor, u: Tensor, label: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by the formula, in float64: an entry that the policy holds impossible contributes nothing."""
    z, u = z.double(), u.double()
    if scale is not None:
        z, u = z / scale, u / scale
    log_p, log_q = torch.log_softmax(z, dim=-1), torch.log_softmax(u, dim=-1)
    p = log_p.exp()
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1), kl, torch.special.entr(p).sum(-1)


def _require_shapes(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None) -> None:
    tokens = policy_logits.shape[:1]
    fits = policy_logits.dim() == 2 and policy_logits.shape == ref_logits.shape and labels.shape == tokens
    if not fits or (temperature is not None and temperature.shape != tokens):
        raise ValueError(
            "expected policy_logits and ref_logits [N, V], labels and temperature [N], got "
            f"{tuple(policy_logits.shape)}, {tuple(ref_logits.shape)}, {tuple(labels.shape)} and "
            f"{None if temperature is None else tuple(temperature.shape)}"
        )
