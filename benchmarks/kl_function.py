"""Token statistics of two logits tensors: ours against the plain formula, torch.compile of it, and a copy.

All side by side in one run, in turn. "vs plain" and "vs compiled" are their median time over ours, with the smallest
and largest ratio of a round. "of copy bandwidth" is the bytes of the two logits tensors over our time, over what
copying reaches (read and write counted). Extra memory is the largest sum of live tensors beside the inputs: from the
allocator on a GPU, counted by a dispatch mode on a CPU. What does not fit into --memory-gb is left out and said: the
plain formula, or the inputs themselves. --profile 1 also prints which operators our time goes to.

    python benchmarks/kl_function.py --memory-gb 8 --tokens 1024 --json benchmarks/results/kl_function_cpu.json
    python benchmarks/kl_function.py --json benchmarks/results/kl_function_gpu.json      (on a GPU)
"""

from statistics import median

import torch
from report import arguments, available_bytes, interleaved, save, show, spread
from tensor_memory import extra_bytes

from vimpo_verl.token_statistics import token_statistics

TITLE = "Token statistics of two logits tensors"
DOES_NOT_FIT = "does not fit"
# Bytes an element of the plain formula: five float32 tensors alive together; float32 copies of half inputs come and go.
PLAIN_BYTES = {"float32": 20, "bfloat16": 24, "float16": 24}
COPIED_TOKENS = 1024
DRAWN_TOKENS = 256


def plain(z, u, labels):
    """The formula as one would write it, in float32."""
    log_p, log_q = torch.log_softmax(z.float(), -1), torch.log_softmax(u.float(), -1)
    label, p = labels.unsqueeze(-1), log_p.exp()
    kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    return log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1), kl, entropy


def compiled(device: str):
    """torch.compile of the plain formula; None where there is no compiler."""
    torch._dynamo.reset()  # else the second shape compiles for any shape, and the ninth not at all
    function = torch.compile(plain, dynamic=False)
    try:
        function(*(torch.zeros(2, 8, device=device) for _ in range(2)), torch.zeros(2, dtype=torch.long, device=device))
    except Exception as error:
        print(f"torch.compile: {type(error).__name__}, not measured")
        return None
    return function


def draw(tokens: int, vocabulary: int, dtype: torch.dtype, device: str, distance: float):
    """Random logits of a policy, a reference at `distance`, sampled tokens; a few at a time, to hold no float32 copy."""
    generator = torch.Generator(device).manual_seed(0)
    z, u = (torch.empty(tokens, vocabulary, dtype=dtype, device=device) for _ in range(2))
    labels = torch.empty(tokens, dtype=torch.long, device=device)
    for rows in (slice(start, start + DRAWN_TOKENS) for start in range(0, tokens, DRAWN_TOKENS)):
        z[rows] = 3 * torch.randn(z[rows].shape, generator=generator, device=device)
        u[rows] = z[rows] + distance * torch.randn(z[rows].shape, generator=generator, device=device)
        probs = torch.softmax(z[rows].float(), -1)
        labels[rows] = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    return z, u, labels


def measure(dtype: str, vocabulary: int, tokens: int, options) -> dict:
    device, kind = options.device, getattr(torch, dtype)
    row = {"dtype": dtype, "V": vocabulary, "tokens": tokens}
    columns = ("ours ms", "plain ms", "vs plain", "vs plain, rounds", "vs compiled", "of copy bandwidth", "extra MB")
    if device == "cuda":
        torch.cuda.empty_cache()  # of the row before
    elements, limit = tokens * vocabulary, options.memory_gb * 1e9 or 0.8 * available_bytes(device)
    inputs = 2 * elements * kind.itemsize + 2 * COPIED_TOKENS * vocabulary * kind.itemsize
    if inputs > limit:
        return {**row, **dict.fromkeys((*columns, "plain extra MB", "memory ratio"), DOES_NOT_FIT)}
    plain_fits = inputs + elements * PLAIN_BYTES[dtype] <= limit

    z, u, labels = draw(tokens, vocabulary, kind, device, options.distance)
    source = z[:COPIED_TOKENS]
    copy = torch.empty_like(source)
    calls = {"ours": lambda: token_statistics(z, u, labels), "copy": lambda: copy.copy_(source)}
    if plain_fits:
        calls["plain"] = lambda: plain(z, u, labels)
    if compiled_plain := compiled(device) if options.compiled else None:
        calls["compiled"] = lambda: compiled_plain(z, u, labels)
    taken = interleaved(calls, options.repeats)
    if options.profile:
        with torch.profiler.profile() as profiler:
            calls["ours"]()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))
    ours = median(taken["ours"])
    ours_bytes = extra_bytes(calls["ours"], device)
    row["ours ms"] = 1e3 * ours
    row["plain ms"] = 1e3 * median(taken["plain"]) if plain_fits else DOES_NOT_FIT
    row["vs plain"] = median(taken["plain"]) / ours if plain_fits else DOES_NOT_FIT
    rounds = zip(taken.get("plain", ()), taken["ours"], strict=plain_fits)
    row["vs plain, rounds"] = spread(p / o for p, o in rounds) if plain_fits else DOES_NOT_FIT
    row["vs compiled"] = median(taken["compiled"]) / ours if compiled_plain else None
    row["of copy bandwidth"] = 2 * z.nbytes / ours / (2 * source.nbytes / median(taken["copy"]))
    row["extra MB"] = ours_bytes / 1e6
    plain_bytes = extra_bytes(calls["plain"], device) if plain_fits else None
    row["plain extra MB"] = plain_bytes / 1e6 if plain_fits else DOES_NOT_FIT
    row["memory ratio"] = ours_bytes / plain_bytes if plain_fits else DOES_NOT_FIT
    return row


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        dtype=["bfloat16", "float32"],
        vocabulary=[32_000, 128_000, 151_936],
        tokens=[1024, 8192, 32_768],
        device="cuda" if torch.cuda.is_available() else "cpu",
        repeats=5,
        distance=0.3,
        compiled=1,
        profile=0,
        memory_gb=0.0,
    )
    grid = [(d, v, t) for d in options.dtype for v in options.vocabulary for t in options.tokens]
    rows = []
    for dtype, vocabulary, tokens in grid:
        rows.append(measure(dtype, vocabulary, tokens, options))
        print(rows[-1], flush=True)
        save(TITLE, rows, options.json, distance=options.distance)
    show(TITLE, rows, options.json, distance=options.distance)


if __name__ == "__main__":
    main()
