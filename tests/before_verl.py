"""Imported before verl and Triton: the environment that they read when they are imported, on a machine without a GPU above all.

For tests and for benchmarks, which run where there is no pytest.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("VERL_PLATFORM", "cpu")  # with it verl finds its platform in verl_patches.cpu
    # Read when Triton is first imported, which the tests of any module may do before those of the kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
