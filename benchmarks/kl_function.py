"""Token statistics of two logits tensors: ours against the plain formula, against torch.compile of it, and against a copy.

All side by side in one run. Ratios: "vs plain" and "vs compiled" are their time over ours; "of copy bandwidth" is the bytes of
the two logits tensors over our time, over what copying one of them reaches (read and write counted). Extra memory is the
largest sum of live tensors beside the inputs: from the allocator on a GPU, counted by a dispatch mode on a CPU.

    python benchmarks/kl_function.py --vocabulary 32000 151936 --tokens 1024 --json benchmarks/results/kl_function.json
"""

import torch
from report import arguments, seconds, show
from tensor_memory import extra_bytes

from vimpo_verl.token_statistics import token_statistics


def plain(z, u, labels):
    """The formula as one would write it, in float32."""
    log_p, log_q = torch.log_softmax(z.float(), -1), torch.log_softmax(u.float(), -1)
    label, p = labels.unsqueeze(-1), log_p.exp()
    kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    return log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1), kl, entropy


def compiled():
    """torch.compile of the plain formula; None where there is no compiler."""
    try:
        function = torch.compile(plain)
        function(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))
    except Exception as error:
        print(f"torch.compile: {type(error).__name__}, not measured")
        return None
    return torch.compile(plain)


def measure(dtype: str, vocabulary: int, tokens: int, compiled_plain, device: str) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device, "dtype": torch.float32}
    kind = getattr(torch, dtype)
    z = (3 * torch.randn(tokens, vocabulary, **draw)).to(kind)
    u = (z.float() + 0.3 * torch.randn(tokens, vocabulary, **draw)).to(kind)
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    copy = torch.empty_like(z)
    ours_s, plain_s = seconds(lambda: token_statistics(z, u, labels)), seconds(lambda: plain(z, u, labels))
    compiled_s = seconds(lambda: compiled_plain(z, u, labels)) if compiled_plain else None
    copy_bandwidth = 2 * z.nbytes / seconds(lambda: copy.copy_(z))
    ours_bytes = extra_bytes(lambda: token_statistics(z, u, labels), device)
    plain_bytes = extra_bytes(lambda: plain(z, u, labels), device)
    return {
        "dtype": dtype,
        "V": vocabulary,
        "tokens": tokens,
        "ours ms": 1e3 * ours_s,
        "plain ms": 1e3 * plain_s,
        "vs plain": plain_s / ours_s,
        "vs compiled": compiled_s / ours_s if compiled_s else None,
        "of copy bandwidth": 2 * z.nbytes / ours_s / copy_bandwidth,
        "extra MB": ours_bytes / 1e6,
        "plain extra MB": plain_bytes / 1e6,
        "memory ratio": ours_bytes / plain_bytes,
    }


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        dtype=["bfloat16", "float32"],
        vocabulary=[32_000, 128_000, 151_936],
        tokens=[1024, 8192, 32_768],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    compiled_plain = compiled()
    grid = [(d, v, t) for d in options.dtype for v in options.vocabulary for t in options.tokens]
    rows = [measure(d, v, t, compiled_plain, options.device) for d, v, t in grid]
    show("Token statistics of two logits tensors", rows, options.json)


if __name__ == "__main__":
    main()
