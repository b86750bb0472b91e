"""Finds values that are not finite, in batches of any size, without a copy of them. No seam."""

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 2**18  # tokens


def first_non_finite(tensor: Tensor, mask: Tensor | None = None) -> tuple[int, int, float, int] | None:
    """The first value of a batch that is not finite.

    Args:
        tensor: [B, T], padded or nested.
        mask: [B, T], likewise, 0/1 or bool: where it is 0 nothing is looked at. None: every token counts.

    Returns:
        Row, position in the row, value, and how many there are; None if there is none.
    """
    if tensor.is_nested:
        found = _first(tensor.values().unsqueeze(0), None if mask is None else mask.values().unsqueeze(0))
        if found is None:
            return None
        _, position, value, count = found
        row = int(torch.searchsorted(tensor.offsets(), position, right=True)) - 1
        return row, position - int(tensor.offsets()[row]), value, count
    step = max(1, _ROWS_AT_A_TIME // max(1, tensor.shape[-1]))
    first, count = None, 0
    for start in range(0, len(tensor), step):
        rows = slice(start, start + step)
        found = _first(tensor[rows], None if mask is None else mask[rows])
        if found is not None:
            row, token, value, here = found
            first, count = first or (start + row, token, value), count + here
    return None if first is None else (*first, count)


def _first(tensor: Tensor, mask: Tensor | None) -> tuple[int, int, float, int] | None:
    bad = ~torch.isfinite(tensor)
    if mask is not None:
        bad &= mask.bool()
    if not bad.any():
        return None
    row, token = bad.nonzero()[0].tolist()
    return row, token, tensor[row, token].item(), int(bad.sum())
