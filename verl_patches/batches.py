"""What verl's handle of a batch and its worker group say of a batch. No seam."""

from typing import Any

import torch
from torch import Tensor
from transfer_queue import KVBatchMeta


def data_parallel_size(worker_group: Any) -> int:
    """Ranks of the actor's data-parallel group; 1 where verl has not asked for it yet."""
    return max(getattr(worker_group, "_dispatch_info", {}).get("actor", [0])) + 1


def is_padding(batch: KVBatchMeta) -> list[bool]:
    """Which samples of a batch verl has added to fill it up."""
    return [bool(tag.get("is_padding", False)) for tag in batch.tags]


def row_sums(tensor: Tensor) -> Tensor:
    """[B], of [B, T], padded or nested: of a mask the valid tokens of each sequence, of rm_scores its reward."""
    return torch.stack([row.sum() for row in tensor.unbind()])
