"""`token_statistics` on a CPU: chunks of tokens in float64, shared out to threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Elements of one [chunk, V] buffer of the torch version. Fewer, and the calls cost more than the work; more (4 MiB in
# float64), and the buffers leave a CPU's cache. Between the two, the chunks at work together hold an eighth of the
# tokens, which bounds the buffers against the logits.
_SMALL_CHUNK, _LARGE_CHUNK, _PARTS = 2**16, 2**19, 8
# The softmax of a label loses its digits near the smallest float64, exp(-708): there its log is taken another way.
_LEAST_LOG_PROB = -700.0


def cpu_token_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None
) -> Tensor:
    """log_prob, ref_log_prob, token_kl, entropy, log_ratio; arguments as for `token_statistics`.

    Args:
        policy_logits, ref_logits: [N, V], any float dtype.
        labels: [N], int64.
        temperature: [N] or None.

    Returns:
        [5, N], float32, or float64 for float64 logits.
    """
    tokens, vocab_size = policy_logits.shape
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    out = policy_logits.new_empty(5, tokens, dtype=dtype)
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
            out[:, rows] = _chunk_statistics(*chunk, logits, probs)

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
    """The five numbers of a chunk, [5, n], in float64, in which a KL, a small difference of sums, is safe.

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
        log_prob, ref_log_prob, kl, entropy, log_ratio, [5, n]. Not finite where an entry is not, or p_y or q_y is 0 in float64.
    """
    labels = label.expand(2, -1, 1)
    log_probs = torch.softmax(logits, dim=-1, out=probs).gather(-1, labels).squeeze(-1).log()
    log_sums = logits.gather(-1, labels).squeeze(-1) - log_probs
    entropy, cross_entropy = log_sums - logits.mul_(probs[:1]).sum(-1)
    return torch.stack([*log_probs, cross_entropy - entropy, entropy, log_probs[0] - log_probs[1]])


def _plain_statistics(z: Tensor, u: Tensor, label: Tensor) -> Tensor:
    """The same where an entry or a label is impossible: what the policy holds impossible contributes nothing."""
    log_p, log_q = torch.log_softmax(z, dim=-1), torch.log_softmax(u, dim=-1)
    log_prob, ref_log_prob = log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1)
    p = log_p.exp()
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return torch.stack([log_prob, ref_log_prob, kl, torch.special.entr(p).sum(-1), log_prob - ref_log_prob])
