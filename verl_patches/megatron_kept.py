"""What the heads of verl's Megatron engine share (verl_patches.megatron_heads, megatron_fused_heads): the reference's last hidden
states between its pass and the policy's, on the host, and which part of the vocabulary a rank has.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vimpo_verl.token_statistics import VocabularyShard


@dataclass
class MicroBatch:
    """What the output matrix of the reference was to be given in one micro-batch."""

    labels: Tensor  # [1, n/cp], on the host: which micro-batch it was
    hidden: Tensor  # on the host, this rank's part of it
    arguments: dict[str, Any]


def vocab_size_of(engine: Any) -> int:
    """Of the model as it is published."""
    return engine.model_config.hf_config.get_text_config().vocab_size


def shard_of_rank(width: int, vocab_size: int) -> VocabularyShard:
    """The part of the vocabulary of this rank, whose output matrix has `width` rows.

    Raises:
        RuntimeError: Megatron has padded the vocabulary.
    """
    from megatron.core import parallel_state as mpu

    padded = width * mpu.get_tensor_model_parallel_world_size()
    if padded != vocab_size:
        raise RuntimeError(
            f"Megatron has padded the vocabulary from {vocab_size} to {padded}: verl's log-probs of the update count the "
            "padding, and the joint pass does not, so the ratio of the two would not start at 1; leave out should_pad_vocab "
            "and make_vocab_size_divisible_by"
        )
    return VocabularyShard(
        mpu.get_tensor_model_parallel_rank() * width, vocab_size, mpu.get_tensor_model_parallel_group()
    )


class KeptStates:
    """The states of a pass, in the order of its micro-batches; none on all stages of a pipeline but the last."""

    def __init__(self):
        self._kept: deque[MicroBatch] = deque()

    def keep(self, labels: Tensor, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Copy a micro-batch's to the host."""
        self._kept.append(MicroBatch(labels.cpu(), hidden.detach().cpu(), arguments))

    def next(self, labels: Tensor) -> MicroBatch:
        """The first that has not been asked for; its labels are to be these.

        Raises:
            RuntimeError: the policy's micro-batches are not the reference's.
        """
        kept = self._kept.popleft() if self._kept else None
        if kept is None or not torch.equal(kept.labels, labels.cpu()):
            raise RuntimeError(
                "the policy's micro-batch is not the reference's: the two passes over one batch were split differently"
            )
        return kept

    def require_all_used(self) -> None:
        """Raises RuntimeError if the policy had fewer micro-batches than the reference."""
        if self._kept:
            raise RuntimeError(f"{len(self._kept)} micro-batches of the reference were not asked for by the policy")
