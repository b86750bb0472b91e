"""The token statistics' kernel on a GPU with other launch settings, against a copy in the same run.

Entries a program reads at a time, how many of them a thread has, blocks whose loads are under way (`STAGES`). "ms" is the
kernel that all rows go through, "careful ms" the other one after it, for the share of rows that it does again; their sum is
what "of copy bandwidth" is of.

    python benchmarks/kernel_settings.py --json benchmarks/results/kernel_settings_gpu.json      (on a GPU)
"""

from itertools import product

import torch
from kl_function import draw
from report import arguments, save, show
from triton.testing import do_bench

import vimpo_verl.token_statistics.triton_kernel as kernel

TITLE = "Launch settings of the token statistics' kernel"
COPIED_BYTES = 2 << 30


def copy_bandwidth() -> float:
    """Bytes a millisecond, read and written, of a copy that no cache holds."""
    source = torch.empty(COPIED_BYTES // 4, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / do_bench(lambda: target.copy_(source), return_mode="median")


def measure(inputs: tuple, block: int, warps: int, stages: int, bandwidth: float) -> dict:
    z, u, labels = inputs
    tokens, vocabulary = z.shape
    redo = torch.empty(tokens, dtype=torch.int8, device="cuda")
    out = torch.empty(5, tokens, device="cuda")
    common = (z, u, labels, labels, redo, out, vocabulary, vocabulary, tokens, vocabulary, False)
    options = kernel.COMPILER_OPTIONS

    def usual():
        kernel.token_statistics_kernel[(tokens,)](*common, block, stages, num_warps=warps, **options)

    def careful():
        kernel.careful_token_statistics_kernel[(tokens,)](
            *common, kernel.CAREFUL_BLOCK, num_warps=kernel.CAREFUL_WARPS, **options
        )

    usual_ms = do_bench(usual, warmup=5, rep=60, return_mode="median")
    careful_ms = do_bench(careful, warmup=5, rep=30, return_mode="median")
    return {
        "block": block,
        "warps": warps,
        "stages": stages,
        "ms": usual_ms,
        "careful ms": careful_ms,
        "rows done again": redo.float().mean().item(),
        "of copy bandwidth": 2 * z.nbytes / (usual_ms + careful_ms) / bandwidth,
    }


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], dtype=["bfloat16", "float32"], distance=[0.3, 0.03], tokens=8192, vocabulary=151_936,
        block=[1024, 2048, 4096], entries=[8, 16], stages=[1, 2, 3, 4],
    )  # fmt: skip
    bandwidth, rows = copy_bandwidth(), []
    for dtype, distance in product(options.dtype, options.distance):
        inputs = draw(options.tokens, options.vocabulary, getattr(torch, dtype), "cuda", distance)
        for block, entries, stages in product(options.block, options.entries, options.stages):
            row = measure(inputs, block, block // (32 * entries), stages, bandwidth)
            rows.append({"dtype": dtype, "distance": distance, **row})
            print(rows[-1], flush=True)
            save(TITLE, rows, options.json, copy_tb_s=bandwidth / 1e9)
    show(TITLE, rows, options.json, copy_tb_s=bandwidth / 1e9)


if __name__ == "__main__":
    main()
