"""The Triton kernel for the rows that the one of `triton_kernel` cannot do: any logits, impossible entries.

It reads the row twice. First, for a token whose policy and reference have the logits z and u, and the sampled token y,

    m, m'  the maxima of z, u     s = sum w, w = exp(z - m)     log p_y = z_y - m - log s
    d = (z - u) - (z_y - u_y)     s' = sum exp(u - m')          log q_y = u_y - m' - log s'
    c = sum w d / s, E_p[d]       t = sum w (z - m)             entropy = log s - t/s

and then, with delta = d - c, whose mean under the policy is 0 but for rounding,

    D = sum w delta               G = sum w g(delta), g(x) = exp(-x) - 1 + x >= 0        a = D/s, b = G/s
    KL = a + log E_p[exp(-delta)] = a + log(1 + b - a)    log p_y - log q_y = log E_p[exp(-delta)] - c

which loses nothing of a small KL, because G is of second order in delta and a is next to nothing. w exp(-delta) is
exp(u + (z_y - u_y) + c - m), also where w = 0. Where G is very large, in a KL of more than 69, log E_p[exp(-delta)] is
log s' - log s + m' + (z_y - u_y) - m + c. Logits are subtracted in float64, wherever they lie. With the second reading it takes
five times the instructions of the other kernel.
"""

import triton
import triton.language as tl

CAREFUL_BLOCK = 2048  # vocabulary entries read at a time
CAREFUL_WARPS = 4


@triton.jit
def _g_of(x):
    """exp(-x) - 1 + x for |x| < 1, as x^2 (1/2! - x/3! + x^2/4! - ... - x^9/11!)."""
    inner = 1.0 / 40320 - x * (1.0 / 362880 - x * (1.0 / 3628800 - x * (1.0 / 39916800)))
    inner = 1.0 / 120 - x * (1.0 / 720 - x * (1.0 / 5040 - x * inner))
    return x * x * (1.0 / 2 - x * (1.0 / 6 - x * (1.0 / 24 - x * inner)))


@triton.jit
def _logits(row, offsets, vocab_size):
    """Of the entries that there are; the others are impossible."""
    return tl.load(row + offsets, mask=offsets < vocab_size, other=-float("inf")).to(tl.float64)


@triton.jit
def _weighted(w, x):
    """w x, and 0 where w is, whatever x. What is not a number is in the sum of the w."""
    return tl.where(w > 0.0, w * x, 0.0)


@triton.jit
def careful_token_statistics_kernel(
    policy_ptr,
    ref_ptr,
    labels_ptr,
    temperature_ptr,
    redo_ptr,
    out_ptr,
    policy_stride,
    ref_stride,
    tokens,
    vocab_size,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if tl.load(redo_ptr + token) == 0:
        return
    policy_row = policy_ptr + token * policy_stride
    ref_row = ref_ptr + token * ref_stride
    offsets = tl.arange(0, BLOCK)
    infinity = float("inf")
    unit = tl.full([], 1.0, tl.float64)
    if HAS_TEMPERATURE:
        unit = unit / tl.load(temperature_ptr + token)
    label = tl.load(labels_ptr + token)
    z_label = tl.load(policy_row + label).to(tl.float64)
    u_label = tl.load(ref_row + label).to(tl.float64)
    apart = z_label - u_label
    apart = tl.where(tl.abs(apart) < infinity, apart, 0.0)

    # A finite start: rows or blocks of impossible entries must not make -inf - -inf.
    m = tl.full([], -1e30, tl.float64)
    m_ref = tl.full([], -1e30, tl.float64)
    s = 0.0
    s_ref = 0.0
    t = 0.0
    sum_d = 0.0
    excluded = 0.0  # 1 where the reference holds impossible what the policy does not
    for start in range(0, vocab_size, BLOCK):
        z = _logits(policy_row, start + offsets, vocab_size)
        u = _logits(ref_row, start + offsets, vocab_size)
        in_policy = z > -infinity
        in_both = in_policy & (u > -infinity)
        m_new = tl.maximum(m, tl.max(z, axis=0))
        m_ref_new = tl.maximum(m_ref, tl.max(u, axis=0))
        rise = ((m - m_new) * unit).to(tl.float32)
        shrink = tl.exp(rise)
        s_ref = s_ref * tl.exp(((m_ref - m_ref_new) * unit).to(tl.float32))
        m = m_new
        m_ref = m_ref_new

        log_w = ((z - m) * unit).to(tl.float32)
        w = tl.exp(log_w)
        t = shrink * (t + rise * s) + tl.sum(_weighted(w, log_w), axis=0)
        s = shrink * s + tl.sum(w, axis=0)
        s_ref += tl.sum(tl.exp(((u - m_ref) * unit).to(tl.float32)), axis=0)
        d = tl.where(in_both, ((z - u) - apart) * unit, 0.0).to(tl.float32)
        sum_d = shrink * sum_d + tl.sum(_weighted(w, d), axis=0)
        excluded = tl.maximum(excluded, tl.max(tl.where(in_policy & (u == -infinity), 1.0, 0.0), axis=0))

    centre = (sum_d / s).to(tl.float64)
    dev = 0.0
    gain = 0.0
    for start in range(0, vocab_size, BLOCK):
        z = _logits(policy_row, start + offsets, vocab_size)
        u = _logits(ref_row, start + offsets, vocab_size)
        in_both = (z > -infinity) & (u > -infinity)
        w = tl.exp(((z - m) * unit).to(tl.float32))
        delta = tl.where(in_both, ((z - u) - apart) * unit - centre, 0.0).to(tl.float32)
        v = tl.exp(((u + apart - m) * unit + centre).to(tl.float32))
        far = _weighted(w, delta - 1.0) + v
        gain += tl.sum(tl.where(in_both & (tl.abs(delta) < 1.0), w * _g_of(delta), far), axis=0)
        dev += tl.sum(_weighted(w, delta), axis=0)

    log_s = tl.log(s.to(tl.float64))
    log_s_ref = tl.log(s_ref.to(tl.float64))
    a = dev.to(tl.float64) / s
    b = gain.to(tl.float64) / s
    log_mean = tl.where(b < 1e30, tl.log(1.0 + (b - a)), log_s_ref - log_s + (m_ref + apart - m) * unit + centre)
    kl = tl.where(excluded > 0.0, infinity, (a + log_mean).to(tl.float32))
    tl.store(out_ptr + token, ((z_label - m) * unit - log_s).to(tl.float32))
    tl.store(out_ptr + tokens + token, ((u_label - m_ref) * unit - log_s_ref).to(tl.float32))
    tl.store(out_ptr + 2 * tokens + token, kl)
    tl.store(out_ptr + 3 * tokens + token, (log_s - t / s).to(tl.float32))
    tl.store(out_ptr + 4 * tokens + token, (log_mean - centre).to(tl.float32))
