"""What the joint pass keeps of two logits tensors: four numbers a token, from one read of each.

One function in front. On a GPU it runs the Triton kernel (vimpo_verl.token_statistics_triton), on a CPU the chunked torch
version below, on other accelerators that of vimpo_verl.token_statistics_float32; all give the same numbers to float32
accuracy. `linear_token_statistics` does the same from hidden states and output matrices, where there are no logits.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one [chunk, V] buffer of the torch version. Fewer, and the calls cost more than the work; more (4 MiB in
# float64), and the buffers leave a CPU's cache. Between the two, the chunks at work together hold an eighth of the
# tokens, which bounds the buffers against the logits.
_SMALL_CHUNK, _LARGE_CHUNK, _PARTS = 2**16, 2**19, 8
# The softmax of a label loses its digits near the smallest float64, exp(-708): there its log is taken another way.
_LEAST_LOG_PROB = -700.0
# Tokens whose logits `linear_token_statistics` makes at a time, as in verl's own fused output head.
_LINEAR_CHUNK_TOKENS = 512


class TokenStatistics(NamedTuple):
    """Per token, all [N] and float32 (on a CPU or GPU float64 for float64 logits), in nats."""

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
    if policy_logits.device.type not in ("cpu", "cuda"):
        from vimpo_verl.token_statistics_float32 import float32_token_statistics

        return TokenStatistics(*float32_token_statistics(policy_logits, ref_logits, labels, temperature))
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
    for start in range(0, max(1, labels.shape[0]), _LINEAR_CHUNK_TOKENS):
        rows = slice(start, start + _LINEAR_CHUNK_TOKENS)
        policy_logits = policy_hidden[rows] @ policy_weight.t()
        ref_logits = ref_hidden[rows] @ ref_weight.t()
        scale = labels.new_full(labels[rows].shape, temperature, dtype=torch.float32) if temperature != 1.0 else None
        chunks.append(token_statistics(policy_logits, ref_logits, labels[rows], scale))
        del policy_logits, ref_logits  # before the next two are made
    return TokenStatistics(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _torch_token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> TokenStatistics:
    tokens, vocab_size = policy_logits.shape
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    out = TokenStatistics(*(policy_logits.new_empty(tokens, dtype=dtype) for _ in TokenStatistics._fields))
    threads, step = _threads_and_rows(policy_logits)
    # Made once: on a CPU, fresh memory costs more than the arithmetic in it. [thread, logits or probs, model, row, V]
    buffers = policy_logits.new_empty(threads, 2, 2, step, vocab_size, dtype=torch.float64)

    inference = torch.is_inference_mode_enabled()  # a mode is a thread's own

    @torch.inference_mode(inference)
    @torch.no_grad()
    def every_nth_chunk(thread: int) -> None:
        logits, probs = buffers[thread]
        for start in range(thread * step, tokens, threads * step):
            rows = slice(start, start + step)
            scale = None if temperature is None else temperature[rows].unsqueeze(-1)
            chunk = policy_logits[rows], ref_logits[rows], labels[rows].unsqueeze(-1), scale
            for target, result in zip(out, _chunk_statistics(*chunk, logits, probs), strict=True):
                target[rows] = result

    _in_threads(every_nth_chunk, threads)
    return out


def _threads_and_rows(logits: Tensor) -> tuple[int, int]:
    """Threads that work on chunks, and tokens of a chunk."""
    tokens, vocab_size = logits.shape
    smallest, largest = (elements // max(vocab_size, 1) for elements in (_SMALL_CHUNK, _LARGE_CHUNK))
    if tokens <= smallest or logits.device.type != "cpu":
        return 1, max(1, min(tokens, largest))
    threads = max(1, min(torch.get_num_threads(), tokens // _PARTS))
    return threads, max(1, min(largest, max(smallest // threads, tokens // (_PARTS * threads))))


def _in_threads(function: Callable[[int], None], threads: int) -> None:
    """function(i) for i < threads at once, each with one thread for its operators.

    Operators that share out their own work meet after each one. Where other processes want the cores, a meeting takes
    as long as the scheduler likes, and every chunk would have several.
    """
    if threads == 1:
        return function(0)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(function, range(threads)))
    finally:
        torch.set_num_threads(before)  # what a worker sets also holds for threads that start later


def _chunk_statistics(
    policy_logits: Tensor, ref_logits: Tensor, label: Tensor, scale: Tensor | None, logits: Tensor, probs: Tensor
) -> Tensor:
    """The four numbers of a chunk, [4, n], in float64, in which a KL, a small difference of sums, is safe.

    Args:
        policy_logits, ref_logits: [n, V].
        label: [n, 1].
        scale: temperature, [n, 1], or None.
        logits, probs: buffers, [2, at least n, V].
    """
    logits, probs = logits[:, : len(label)], probs[:, : len(label)]
    logits[0].copy_(policy_logits), logits[1].copy_(ref_logits)
    if scale is not None:
        logits.div_(scale)
    results = _ordinary_statistics(logits, label, probs)
    odd = ~(results.isfinite() & (results > _LEAST_LOG_PROB)).all(0)
    if odd.any():
        z, u = policy_logits[odd].double(), ref_logits[odd].double()
        if scale is not None:
            z, u = z / scale[odd], u / scale[odd]
        results[:, odd] = _plain_statistics(z, u, label[odd])
    return results


def _ordinary_statistics(logits: Tensor, label: Tensor, probs: Tensor) -> Tensor:
    """From one softmax of both models.

    For the policy's logits z and the reference's u:

        p = softmax(z)    logsumexp(z) = z_y - log p_y    entropy = logsumexp(z) - sum p z
        q = softmax(u)    logsumexp(u) = u_y - log q_y    cross entropy = logsumexp(u) - sum p u
        KL = cross entropy - entropy

    Args:
        logits: [2, n, V], z and u, float64. Overwritten.
        label: [n, 1], y.
        probs: [2, n, V]. Overwritten.

    Returns:
        log_prob, ref_log_prob, kl, entropy, [4, n]. Not finite where an entry is not, or p_y or q_y is 0 in float64.
    """
    labels = label.expand(2, -1, 1)
    log_probs = torch.softmax(logits, dim=-1, out=probs).gather(-1, labels).squeeze(-1).log()
    log_sums = logits.gather(-1, labels).squeeze(-1) - log_probs
    entropy, cross_entropy = log_sums - logits.mul_(probs[:1]).sum(-1)
    return torch.stack([*log_probs, cross_entropy - entropy, entropy])


def _plain_statistics(z: Tensor, u: Tensor, label: Tensor) -> Tensor:
    """The same where an entry or a label is impossible: what the policy holds impossible contributes nothing."""
    log_p, log_q = torch.log_softmax(z, dim=-1), torch.log_softmax(u, dim=-1)
    log_prob, ref_log_prob = log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1)
    p = log_p.exp()
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return torch.stack([log_prob, ref_log_prob, kl, torch.special.entr(p).sum(-1)])


def _require_shapes(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None) -> None:
    tokens = policy_logits.shape[:1]
    fits = policy_logits.dim() == 2 and policy_logits.shape == ref_logits.shape and labels.shape == tokens
    if not fits or (temperature is not None and temperature.shape != tokens):
        raise ValueError(
            "expected policy_logits and ref_logits [N, V], labels and temperature [N], got "
            f"{tuple(policy_logits.shape)}, {tuple(ref_logits.shape)}, {tuple(labels.shape)} and "
            f"{None if temperature is None else tuple(temperature.shape)}"
        )
