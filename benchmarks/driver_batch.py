"""What the driver computes once a batch (vimpo_verl.batch): time, and memory in float32 tensors of the batch's size.

Two passes: compute_batch, of log-probs and kappa. One pass: compute_targets, of rewards and mask alone. "extra tensors" is the
largest sum of the tensors alive beyond the inputs, the three results included, over a float32 tensor [B, T]. The last row of a
recipe is extrapolated by tokens to 1,024 prompts x 16 responses x 32,768 tokens. --clock cpu counts processor seconds, for a
machine that others use, too. --whole: the same tensors of the trainer's whole _compute_advantage, what it fetches included,
beside those of verl's own with GRPO.

    OMP_NUM_THREADS=1 python benchmarks/driver_batch.py --clock cpu --json benchmarks/results/driver_batch_cpu.json
    OMP_NUM_THREADS=1 python benchmarks/driver_batch.py --whole --tokens 1048576 8388608 \\
        --json benchmarks/results/driver_whole_cpu.json
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from report import arguments, interleaved, show
from tensor_memory import extra_bytes

from vimpo_verl.batch import compute_batch, compute_targets
from vimpo_verl.config import VimpoConfig
from vimpo_verl.one_pass import Statistics

SCALE = 1024 * 16 * 32768  # tokens
BEFORE = Statistics(advantage_mean=0.0, advantage_std=0.1, residual_rms=0.5, outcome_correlation=0.5)


def functions(tokens: int, length: int) -> dict[str, Callable[[], object]]:
    """Recipe -> what to call, on a batch of this many tokens in responses of up to `length`, eight a prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = max(8, tokens // length)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    old, ref = (torch.rand(rows, length, generator=generator).neg_() for _ in range(2))
    of_the_batch = {
        "response_mask": (torch.arange(length) < lengths.unsqueeze(1)),
        "outcome": torch.randint(0, 2, (rows,), generator=generator).float(),
        "group": [str(row // 8) for row in range(rows)],
        "config": VimpoConfig(beta=5e-4),
    }
    log_probs = {"old_log_prob": old, "ref_log_prob": ref, "token_kl": torch.rand(rows, length, generator=generator)}
    return {
        "two passes, lambda 1": lambda: compute_batch(**of_the_batch, **log_probs, lam=1.0),
        "two passes, lambda 0.95": lambda: compute_batch(**of_the_batch, **log_probs, lam=0.95),
        "one pass": lambda: compute_targets(**of_the_batch, before=BEFORE),
    }


def whole_method(options: Namespace) -> list[dict[str, Any]]:
    """The tensors of each recipe's whole method, all responses of one length and of half of it at least."""
    from driver_method import FIELDS, tensors_alive

    rows = []
    for tokens, full, recipe in product(options.tokens, (True, False), FIELDS):
        alive = tensors_alive(recipe, tokens // options.length, options.length, full)
        lengths = f"{options.length:,}" if full else f"{options.length // 2:,} to {options.length:,}"
        rows.append({"recipe": recipe, "tokens": tokens, "lengths": lengths, "tensors": alive})
    return rows


def main() -> None:
    defaults = {"tokens": [2**20, 2**23, 2**26], "length": 4096, "repeats": 3, "clock": "wall", "whole": False}
    options = arguments(__doc__.splitlines()[0], **defaults)
    if options.whole:
        show("The whole of _compute_advantage", whole_method(options), options.json)
        return
    rows = []
    for tokens in options.tokens:
        calls = functions(tokens, options.length)
        taken = interleaved(calls, options.repeats, options.clock)
        for recipe, call in calls.items():
            rows.append(
                {
                    "recipe": recipe,
                    "tokens": tokens,
                    "s": median(taken[recipe]),
                    "s a million tokens": median(taken[recipe]) / tokens * 1e6,
                    "extra tensors": extra_bytes(call, "cpu") / (4 * tokens),
                }
            )
            print(rows[-1], flush=True)
    for largest in [row for row in rows if row["tokens"] == max(options.tokens)]:
        rows.append({**largest, "tokens": SCALE, "s": largest["s"] * SCALE / largest["tokens"], "extrapolated": True})
    for row in rows:
        row.setdefault("extrapolated", False)
    show("The driver's part of a batch", rows, options.json)


if __name__ == "__main__":
    main()
