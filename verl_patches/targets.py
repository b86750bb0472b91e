"""The value target of a sequence, out of what verl carries a token. No seam."""

import torch
from torch import Tensor


def target_of(returns: Tensor, response_mask: Tensor) -> Tensor:
    """[B, T] -> [B]: the value target, which every valid token of a sequence carries; 0 where there is none."""
    if response_mask.shape[-1] == 0:  # a micro-batch of empty responses
        return returns.new_zeros(returns.shape[:1])
    first_valid = response_mask.int().argmax(-1, keepdim=True)
    target = returns.gather(-1, first_valid).squeeze(-1)
    return torch.where(response_mask.any(-1), target, torch.zeros_like(target))
