"""Claim: what the driver does once a batch, all of `_compute_advantage`, takes less memory than verl's own with GRPO.

Tensors are counted by a dispatch mode (benchmarks/tensor_memory.py), on a batch of equal responses, where nested and padded
tensors are of one size. What is worked on at a time is made small, as it is beside a large batch.
"""

import sys
from pathlib import Path

import pytest
import torch
from engine_samples import nested, padded

import vimpo_verl.batch as batch_module
from verl_patches import finite

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


def test_the_whole_method_takes_less_than_grpos(monkeypatch):
    """In float32 tensors [B, T]; verl's masks are of integers, two such tensors.

    Two passes: what verl has fetched and padded of rewards, mask, old and reference log-probs, 10, beside the three fields
    that the estimator is handed; and then, of verl's, 7 beside those three and three results. One pass: verl's own.
    """
    from driver_method import FIELDS, tensors_alive

    monkeypatch.setattr(batch_module, "_TOKENS_AT_A_TIME", 2**10)
    monkeypatch.setattr(finite, "_TOKENS_AT_A_TIME", 2**10)
    alive = {recipe: tensors_alive(recipe, rows=128, length=512) for recipe in FIELDS}
    assert 13 <= alive["VIMPO, two passes"] < 13.2
    assert 8 <= alive["VIMPO, one pass"] < 8.2
    assert alive["VIMPO, one pass"] < alive["VIMPO, two passes"] < alive["GRPO"] < alive["GRPO with a reference"]


@pytest.mark.parametrize("at_a_time", [1, 4, 7, 2**18])
def test_values_that_are_not_finite_are_found_whatever_is_looked_at_at_a_time(monkeypatch, at_a_time):
    """Nested and padded, with a mask and without: the first of them and their number; rows may be empty."""
    monkeypatch.setattr(finite, "_TOKENS_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 3, 5, 0, 1, 4, 0]
    values = [0.0, torch.nan, -torch.inf, 0.0, torch.inf, torch.nan, 0.0]  # of each row's strange tokens
    for share in (0.0, 0.1, 0.4):
        for _ in range(20):
            rows = [torch.randn(length, generator=generator) for length in lengths]
            strange = [torch.rand(length, generator=generator) < share for length in lengths]
            rows = [row.masked_fill(bad, value) for row, bad, value in zip(rows, strange, values, strict=True)]
            masks = [torch.randint(0, 2, (length,), generator=generator) for length in lengths]
            for of in (None, masks):
                looked_at = [torch.ones(length) for length in lengths] if of is None else of
                found = [
                    (row, token, rows[row][token].item())
                    for row, length in enumerate(lengths)
                    for token in range(length)
                    if strange[row][token] and looked_at[row][token]
                ]
                expected = repr((*found[0], len(found)) if found else None)  # NaN is not equal to itself
                assert repr(finite.first_non_finite(padded(rows), None if of is None else padded(of))) == expected
                assert repr(finite.first_non_finite(nested(rows), None if of is None else nested(of))) == expected
