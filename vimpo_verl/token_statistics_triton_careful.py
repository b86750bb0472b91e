"""The Triton kernel for rows that `token_statistics_triton` cannot do in its way: any finite logits, impossible entries.

Notation, for one token: z, u the logits of policy and reference, m a running maximum of z, w = exp(z - m), and

    s = sum w              t = sum w (z - m)          entropy = log s - t/s
    m', s'  the same of u  r = sum w (u - m')         log p(y) = z_y - m - log s
    d = z - u              a centre c near E_p[d]     delta = d - c
    D = sum w delta        G = sum w g(delta), g(x) = x + expm1(-x) >= 0

The KL is (t - r)/s - log s + log s'. In float32 that loses a small KL, which is a difference of sums of order 10. There the
kernel uses KL = D/s + log1p((G - D)/s) instead: G is of second order in delta, and no normaliser enters. The centre follows the
running mean, which keeps D near zero; moving it by h turns G into

    e^h G - expm1(h) D + g(-h) s,   since g(x - h) = e^h g(x) + (1 - e^h) x + g(-h);   expm1(h) = h + g(-h).

It takes three times the instructions of the other kernel, for maxima, centres and what is infinite.
"""

import triton
import triton.language as tl

CAREFUL_BLOCK = 4096  # vocabulary entries read at a time
CAREFUL_WARPS = 8


@triton.jit
def _g_of(x):
    """x + expm1(-x) for |x| < 1/2, as x^2 (1/2! - x/3! + x^2/4! - ... + x^6/8!)."""
    inner = 1.0 / 120 + x * (-1.0 / 720 + x * (1.0 / 5040 - x * (1.0 / 40320)))
    inner = 1.0 / 2 - x * (1.0 / 6 - x * (1.0 / 24 - x * inner))
    return x * x * inner


@triton.jit
def _g_scalar(x):
    """x + expm1(-x) of a scalar of any size."""
    return tl.where(tl.abs(x) < 0.5, _g_of(x), x + tl.exp(-x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) of a scalar, without its loss of digits near 0."""
    # log(1 + x) = 2 artanh(x / (2 + x)); the series in r = x / (2 + x) is short for |x| < 1/4.
    r = x / (2.0 + x)
    r2 = r * r
    near = 2.0 * r * (1.0 + r2 * (1.0 / 3 + r2 * (1.0 / 5 + r2 * (1.0 / 7))))
    return tl.where(tl.abs(x) < 0.25, near, tl.log(1.0 + x))


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
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = tl.load(temperature_ptr + token)
    offsets = tl.arange(0, BLOCK)
    infinity = float("inf")

    # A finite start: rows or blocks of impossible entries must not make -inf - -inf.
    m = -1e30
    m_ref = -1e30
    s = 0.0
    s_ref = 0.0
    t = 0.0
    r = 0.0
    centre = 0.0
    dev = 0.0  # D
    gain = 0.0  # G
    excluded = 0.0  # > 0 where the reference holds impossible what the policy does not
    for start in range(0, vocab_size, BLOCK):
        inside = start + offsets < vocab_size
        z = tl.load(policy_row + start + offsets, mask=inside, other=-infinity).to(tl.float32)
        u = tl.load(ref_row + start + offsets, mask=inside, other=-infinity).to(tl.float32)
        in_policy = z > -infinity
        in_both = in_policy & (u > -infinity)
        d = tl.where(in_both, z - u, 0.0)  # before the division, which would round away what is left of it
        if HAS_TEMPERATURE:
            z = z / scale
            u = u / scale
            d = d / scale

        m_new = tl.maximum(m, tl.max(z, axis=0))
        m_ref_new = tl.maximum(m_ref, tl.max(u, axis=0))
        shrink = tl.exp(m - m_new)
        t = shrink * (t + (m - m_new) * s)
        r = shrink * (r + (m_ref - m_ref_new) * s)
        s = shrink * s
        dev = shrink * dev
        gain = shrink * gain
        s_ref = s_ref * tl.exp(m_ref - m_ref_new)
        m = m_new
        m_ref = m_ref_new

        w = tl.exp(z - m)
        v = tl.exp(u - m_ref)
        s_before = s
        s += tl.sum(w, axis=0)
        s_ref += tl.sum(v, axis=0)
        t += tl.sum(tl.where(in_policy, w * (z - m), 0.0), axis=0)
        r += tl.sum(tl.where(in_both, w * (u - m_ref), 0.0), axis=0)
        excluded += tl.sum(tl.where(in_policy & (u == -infinity), w, 0.0), axis=0)

        # Move the centre, and with it what the blocks before have summed, to the mean of all so far ...
        moved = centre + tl.sum(tl.where(in_both, w * (d - centre), 0.0), axis=0) / tl.maximum(s, 1e-30)
        h = moved - centre  # as rounded
        g_h = _g_scalar(-h)
        gain += (h + g_h) * (gain - dev) + g_h * s_before
        dev -= h * s_before
        centre = moved
        # ... and add this block; w expm1(-delta) is exp(u + c - m) - w. Where that overflows, the plain KL is taken below.
        delta = tl.where(in_both, d - centre, 0.0)
        exponent = tl.where(in_both & (tl.abs(delta) < 16.0), (z - m) - delta, (u - m) + centre)  # with the least rounding
        far = w * (delta - 1.0) + tl.exp(exponent)
        gain += tl.sum(tl.where(in_both & (tl.abs(delta) < 0.5), w * _g_of(delta), far), axis=0)
        dev += tl.sum(w * delta, axis=0)

    log_s = tl.log(s)
    log_s_ref = tl.log(s_ref)
    plain = (t - r) / s - (log_s - log_s_ref)
    fine = dev / s + _log1p((gain - dev) / s)
    kl = tl.where(plain < 0.5, fine, plain)
    kl = tl.where(excluded > 0.0, infinity, kl)

    label = tl.load(labels_ptr + token)
    z_label = tl.load(policy_row + label).to(tl.float32)
    u_label = tl.load(ref_row + label).to(tl.float32)
    if HAS_TEMPERATURE:
        z_label = z_label / scale
        u_label = u_label / scale
    tl.store(out_ptr + token, z_label - m - log_s)
    tl.store(out_ptr + tokens + token, u_label - m_ref - log_s_ref)
    tl.store(out_ptr + 2 * tokens + token, kl)
    tl.store(out_ptr + 3 * tokens + token, log_s - t / s)
