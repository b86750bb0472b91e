"""Finds values that are not finite, in batches of any size, without a copy of them. No seam."""

import torch
from torch import Tensor

_TOKENS_AT_A_TIME = 2**18


def first_non_finite(tensor: Tensor, mask: Tensor | None = None) -> tuple[int, int, float, int] | None:
    """The first value of a batch that is not finite.

    Args:
        tensor: [B, T], padded or nested.
        mask: [B, T], likewise, 0/1 or bool: where it is 0 nothing is looked at. None: every token counts.

    Returns:
        Row, position in the row, value, and how many there are; None if there is none.
    """
    if not tensor.is_nested:
        return _first(tensor, mask)
    found = _first(tensor.values().unsqueeze(-1), None if mask is None else mask.values().unsqueeze(-1))
    if found is None:
        return None
    position, _, value, count = found
    row = int(torch.searchsorted(tensor.offsets(), position, right=True)) - 1
    return row, position - int(tensor.offsets()[row]), value, count


def _first(tensor: Tensor, mask: Tensor | None) -> tuple[int, int, float, int] | None:
    """The same of a padded tensor, a few rows at a time: bools of the whole batch would be a copy, too."""
    step = max(1, _TOKENS_AT_A_TIME // max(1, tensor.shape[-1]))
    first, count = None, 0
    for start in range(0, len(tensor), step):
        block = tensor[start : start + step]
        bad = ~torch.isfinite(block)
        if mask is not None:
            bad &= mask[start : start + step].bool()
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            first, count = first or (start + row, token, block[row, token].item()), count + int(bad.sum())
    return None if first is None else (*first, count)
