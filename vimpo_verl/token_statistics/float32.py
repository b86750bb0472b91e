"""`token_statistics` for accelerators without Triton (Ascend): large chunks in float32, and not one wait for the device.

The CPU's version computes in float64 and looks at its results. Here float64 is slow or missing, and a look waits for
the device, so the digits of a small KL are kept by the formulas of the Triton kernels. With the logits z and u of policy
and reference, p and q their softmaxes and d = z - u,

    c = sum p d, delta = d - c       a = sum p delta, next to nothing
    g(x) = exp(-x) - 1 + x >= 0      b = sum p g(delta), of second order in delta
    KL = a + log(1 + b - a)

and where delta is far from 0, p exp(-delta) is exp(log q + k), k = logsumexp(u) - logsumexp(z) + c. A large KL is the plain
sum. Log-probs and entropy are torch's, in float32: to some 1e-6 nats, the entropy of 151,936 entries to some 1e-5 of it.
"""

import math

import torch
from torch import Tensor

CHUNK = 2**25  # elements of one [chunk, V] tensor: 128 MiB
LARGE_KL = 1.0  # nats from which on the plain sum has its digits
_SERIES = [1.0 / math.factorial(power) for power in range(2, 12)]  # of x^2, -x^3, ..., -x^11 in g


def float32_token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> Tensor:
    """log_prob, ref_log_prob, token_kl, entropy, log_ratio; arguments as for `token_statistics`.

    Args:
        policy_logits, ref_logits: [N, V], bf16, fp16 or fp32.
        labels: [N], int64.
        temperature: [N] or None.

    Returns:
        [5, N], float32. Extra memory is a dozen tensors of CHUNK elements.
    """
    tokens, vocab_size = policy_logits.shape
    out = policy_logits.new_empty(5, tokens, dtype=torch.float32)
    step = max(1, CHUNK // max(vocab_size, 1))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        unit = None if temperature is None else temperature[rows].float().unsqueeze(-1)
        out[:, rows] = chunk_statistics(policy_logits[rows], ref_logits[rows], labels[rows].unsqueeze(-1), unit)
    return out


def chunk_statistics(z: Tensor, u: Tensor, label: Tensor, temperature: Tensor | None) -> Tensor:
    """[n, V], [n, V], [n, 1], [n, 1] or None -> [5, n], float32. No step depends on a value on the device."""
    z, u = z.float(), u.float()
    if temperature is not None:
        z, u = z / temperature, u / temperature
    log_p, log_q = torch.log_softmax(z, dim=-1), torch.log_softmax(u, dim=-1)
    p = log_p.exp()
    plain_kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    log_probs = log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1)
    small_kl, small_log_ratio = _where_the_kl_is_small(z, u, label, log_p, log_q, p)
    is_large = plain_kl > LARGE_KL
    kl = torch.where(is_large, plain_kl, small_kl)
    log_ratio = torch.where(is_large, log_probs[0] - log_probs[1], small_log_ratio)
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    return torch.stack([*log_probs, kl, entropy, log_ratio])


def _where_the_kl_is_small(
    z: Tensor, u: Tensor, label: Tensor, log_p: Tensor, log_q: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """[n], [n]: the KL by its second-order terms; log p_y - log q_y, which is delta_y + log E_p[exp(-delta)]."""
    in_both = (z > -torch.inf) & (u > -torch.inf)
    d = torch.where(in_both, z - u, 0.0)
    centre = (p * d).sum(-1, keepdim=True)
    delta = torch.where(in_both, d - centre, 0.0)
    apart = (u.amax(-1, keepdim=True) - z.amax(-1, keepdim=True)) + centre
    k = log_p.amax(-1, keepdim=True) - log_q.amax(-1, keepdim=True) + apart
    near = in_both & (delta.abs() < 1.0)
    a = (p * delta).sum(-1)
    b = torch.where(near, p * _g_near_0(delta), p * (delta - 1.0) + (log_q + k).exp()).sum(-1)
    log_mean = torch.log1p(b - a)
    return a + log_mean, delta.gather(-1, label).squeeze(-1) + log_mean


def _g_near_0(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x for |x| < 1, by its series and Horner's rule."""
    inner = torch.zeros_like(x)
    for coefficient in reversed(_SERIES):
        inner = coefficient - x * inner
    return x * x * inner
