"""The Triton kernel behind `token_statistics`: one program a token, one read of its logits, or two.

All entries of a token's vocabulary are taken relative to the sampled token y, in bits (base 2 is what a GPU has):

    w = p/p_y    v = q/q_y    delta = log2 (w/v)    p, q the probabilities of policy and reference
    s = sum w         log p_y = -log s
    s' = sum v        log q_y = -log s'    log p_y - log q_y = log(s'/s)
    t = sum w log2 w  entropy = log s - ln2 t/s
    D = sum w delta   G = sum w g(delta),  g(x) = 2^-x - 1 + x ln2 >= 0

Since v = w 2^-delta, s' = s - ln2 D + G, and with a = ln2 D/s, b = G/s

    KL = sum p ln2 log2(p/q) = a + log(s'/s) = a + log(1 + b - a) = b - h(b - a),   h(x) = x - log(1 + x) >= 0.

Nothing is lost of a small KL, because G is of second order in delta, as long as h does not nearly cancel b: as long as delta is
measured from somewhere near its mean under the policy. The sampled token is such a place, since (E_p[delta])^2 is Var_p[delta] on
average over samples. It is a good reference for the exponents, too: nothing can overflow unless policy or reference hold it next
to impossible. So the loop over the vocabulary needs no running maximum and no rescaling. A row whose sampled token is too far
from the mean is read once more with delta measured from the mean, D/s, which changes ref_shift alone. A row for which the
exponents are at fault, or with an infinite entry, is marked and done again by `careful_token_statistics_kernel`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimpo_verl.token_statistics.triton_careful import CAREFUL_BLOCK, CAREFUL_WARPS, careful_token_statistics_kernel

# Vocabulary entries read at a time, warps that share them, blocks whose loads are under way: what was fastest on an H200 of
# benchmarks/kernel_settings.py, whose results are in docs/performance.md.
BLOCK = 2048
WARPS = 4
STAGES = 3
# Products are fused with sums where the code says so: elsewhere it would make a difference of equals something else than 0.
COMPILER_OPTIONS = {"enable_fp_fusion": False}


def triton_token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> Tensor:
    """log_prob, ref_log_prob, token_kl, entropy, log_ratio; arguments as for `token_statistics`, logits of at most float32.

    Args:
        policy_logits, ref_logits: [N, V], bf16, fp16 or fp32, the last dimension contiguous.
        labels: [N], int64.
        temperature: [N] or None.

    Returns:
        [5, N], float32.
    """
    tokens, vocab_size = policy_logits.shape
    policy_logits, ref_logits = _rows_contiguous(policy_logits), _rows_contiguous(ref_logits)
    out = policy_logits.new_empty(5, tokens, dtype=torch.float32)
    if tokens:
        redo = torch.empty_like(labels, dtype=torch.int8)
        scale = labels if temperature is None else temperature.float().contiguous()  # labels: a pointer never read
        inputs = policy_logits, ref_logits, labels.contiguous(), scale, redo, out
        sizes = policy_logits.stride(0), ref_logits.stride(0), tokens, vocab_size
        block = min(BLOCK, triton.next_power_of_2(vocab_size))
        careful_block = min(CAREFUL_BLOCK, triton.next_power_of_2(vocab_size))
        arguments = (*inputs, *sizes, temperature is not None)
        with torch.cuda.device_of(policy_logits):  # Triton launches on the current device
            token_statistics_kernel[(tokens,)](*arguments, block, STAGES, num_warps=WARPS, **COMPILER_OPTIONS)
            careful_token_statistics_kernel[(tokens,)](
                *arguments, careful_block, num_warps=CAREFUL_WARPS, **COMPILER_OPTIONS
            )
    return out


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@triton.jit
def _g_over_x(x):
    """(2^-x - 1 + x ln2) / x for |x| < 1, to 2e-7: x times the polynomial that meets g(x)/x^2 at six Chebyshev points."""
    inner = tl.fma(x, -1.5406158e-5, 1.5602958e-4)
    inner = tl.fma(x, inner, -1.3332982e-3)
    inner = tl.fma(x, inner, 9.6173799e-3)
    inner = tl.fma(x, inner, -5.5504113e-2)
    return x * tl.fma(x, inner, 2.4022655e-1)


@triton.jit
def _with_entries(s, s_ref, t, dev, gain, z, u, bits, shift, ref_shift):
    """The five sums with the entries z, u added, each in its own lane: logits times bits, less the shifts, are logs of w, v."""
    log_w = tl.fma(z, bits, -shift)
    log_v = tl.fma(u, bits, -ref_shift)
    # Not log_w - log_v, which have been rounded at the size of the logits.
    delta = tl.fma(z - u, bits, ref_shift - shift)
    w = tl.exp2(log_w)
    v = tl.exp2(log_v)
    w_delta = w * delta
    near = w_delta * _g_over_x(delta)
    far = tl.fma(w_delta, 0.6931471805599453, v - w)
    s += w
    s_ref += v
    t = tl.fma(w, log_w, t)
    dev += w_delta
    gain += tl.where(tl.abs(delta) < 1.0, near, far)
    return s, s_ref, t, dev, gain


@triton.jit
def _row_sums(policy_row, ref_row, vocab_size, bits, shift, ref_shift, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """s, s', t, D and G of one token, float64: from one read of its logits."""
    s = tl.zeros([BLOCK], tl.float32)
    s_ref = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    dev = tl.zeros([BLOCK], tl.float32)
    gain = tl.zeros([BLOCK], tl.float32)
    offsets = tl.arange(0, BLOCK)
    whole = vocab_size // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        z = tl.load(policy_row + start + offsets).to(tl.float32)
        u = tl.load(ref_row + start + offsets).to(tl.float32)
        s, s_ref, t, dev, gain = _with_entries(s, s_ref, t, dev, gain, z, u, bits, shift, ref_shift)
    inside = whole + offsets < vocab_size
    z = tl.load(policy_row + whole + offsets, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(ref_row + whole + offsets, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z, -1e30)  # of no weight, and finite, because 0 times infinity is not 0
    u = tl.where(inside, u, -1e30)
    s, s_ref, t, dev, gain = _with_entries(s, s_ref, t, dev, gain, z, u, bits, shift, ref_shift)
    return (
        tl.sum(s, axis=0).to(tl.float64),
        tl.sum(s_ref, axis=0).to(tl.float64),
        tl.sum(t, axis=0).to(tl.float64),
        tl.sum(dev, axis=0).to(tl.float64),
        tl.sum(gain, axis=0).to(tl.float64),
    )


@triton.jit
def _good(a, b, h, wide, kl, entropy, log_s, log_ratio, shift, ref_shift, reads, IN_FLOAT32: tl.constexpr):
    """Whether the KL has the digits that it is to have, and whether all else has.

    Of the seven digits of b, a and the logs five are to be left in the results, and four of half precision's, which have
    fewer to begin with. b has fewer where `far` has added to it, and where the label is so unlikely that the log_w of what is
    likely are large. z - u keeps them all where z and u are of like size. All are False for what is not a number.
    """
    least_wide_kl = 0.1 if IN_FLOAT32 else 0.02
    likely = log_s < entropy + 4.0
    bound = tl.where(b < 0.03, tl.where(likely, 8.0, 3.0), tl.where(likely, 3.0, 0.0))
    bound = tl.where(reads > 0, 3.0, bound)  # from its mean h is of fourth order, and does not cancel b
    good_kl = tl.where(wide, kl > least_wide_kl * (1.0 + tl.abs(a)), h <= bound * kl + 1e-8)
    good_entropy = log_s <= 4.0 * (entropy + 1.0)
    apart = tl.abs(shift - ref_shift)
    heaviest = log_s / 0.6931471805599453  # entries of weight are at most log2 s above the label
    of_like_size = apart <= 0.5 * (tl.abs(shift) - heaviest)
    good_delta = (apart < 8.0) & (of_like_size | (apart * apart <= 4096.0 * kl))
    return good_kl, good_entropy & good_delta & (tl.abs(log_ratio) < 1e30) & (kl < 1e30)


@triton.jit
def token_statistics_kernel(
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
    STAGES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    policy_row = policy_ptr + token * policy_stride
    ref_row = ref_ptr + token * ref_stride
    bits = 1.4426950408889634  # of one unit of a logit
    if HAS_TEMPERATURE:
        bits = bits / tl.load(temperature_ptr + token)

    # Whole numbers for the policy, so that what rounding does to the other shift is in their difference, exactly.
    label = tl.load(labels_ptr + token)
    z_label = tl.load(policy_row + label).to(tl.float32)
    u_label = tl.load(ref_row + label).to(tl.float32)
    shift = tl.floor(z_label * bits + 0.5)
    ref_shift = shift - (z_label - u_label) * bits

    reads = 0
    far_from_mean = 1
    while far_from_mean > 0:
        s, s_ref, t, dev, gain = _row_sums(policy_row, ref_row, vocab_size, bits, shift, ref_shift, BLOCK, STAGES)

        # A few numbers a token: float64 costs nothing here, and the formulas above can be used as they stand.
        ln2 = tl.full([], 0.6931471805599453, tl.float64)
        a = ln2 * dev / s
        b = gain / s
        log_s = tl.log(s)
        log_s_ref = tl.log(s_ref)
        log_ratio = log_s_ref - log_s
        wide = tl.abs(b - a) > 0.5
        log_mean = tl.log(1.0 + (b - a))
        h = (b - a) - log_mean
        kl = tl.where(wide, a + log_ratio, b - h)
        entropy = log_s - ln2 * (t / s)
        # log2 w and log2 v of the sampled token, which are not quite 0, because the shifts are rounded.
        log_w = tl.fma(z_label, bits, -shift).to(tl.float64)
        log_v = tl.fma(u_label, bits, -ref_shift).to(tl.float64)
        delta = tl.fma(z_label - u_label, bits, ref_shift - shift).to(tl.float64)
        label_ratio = ln2 * delta + tl.where(wide, log_ratio, log_mean)

        good_kl, good_rest = _good(
            a,
            b,
            h,
            wide,
            kl,
            entropy,
            log_s,
            log_ratio,
            shift,
            ref_shift,
            reads,
            policy_ptr.dtype.element_ty == tl.float32,
        )
        tl.store(redo_ptr + token, tl.where(good_kl & good_rest, 0, 1).to(tl.int8))
        tl.store(out_ptr + token, (ln2 * log_w - log_s).to(tl.float32))
        tl.store(out_ptr + tokens + token, (ln2 * log_v - log_s_ref).to(tl.float32))
        tl.store(out_ptr + 2 * tokens + token, kl.to(tl.float32))
        tl.store(out_ptr + 3 * tokens + token, entropy.to(tl.float32))
        tl.store(out_ptr + 4 * tokens + token, label_ratio.to(tl.float32))

        reads += 1
        far_from_mean = tl.where((reads == 1) & good_rest & (good_kl == 0), 1, 0)
        ref_shift -= (a / ln2).to(tl.float32)
