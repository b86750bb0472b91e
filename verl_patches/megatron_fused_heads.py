"""Seam: the same as megatron_heads where verl's fused kernels make no logits (`use_fused_kernels=True`).

Touches `linear_cross_entropy` in verl.models.mcore.model_forward_fused, which verl's patched GPT forward (or, from Megatron Core
0.18 on, its output processor) calls on a pipeline's last stage with the last hidden states, gathered from sequence
parallelism, and this rank's part of the output matrix. It is replaced inside a `with` block, and verl's own at any other time.
Checked against verl 0.9.1 with Megatron Core 0.16.1; no upstream issue.

verl gathers and unpacks log_probs [1, n/cp] and entropy, and nothing else. So the reference's log-probs and the KL go with the
policy's log-probs, as [1, n/cp, 3], and `unpacked` takes them apart.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_patches.megatron_kept import KeptStates, shard_of_rank
from vimpo_verl.token_statistics import linear_token_statistics


class FusedReferenceStates(KeptStates):
    """The reference's last hidden states of a pass, in the order of its micro-batches."""

    @contextlib.contextmanager
    def recorded(self, engine: Any) -> Iterator[None]:
        """Every micro-batch inside the block is kept, and yields log-probs and entropies of 0."""

        def keep(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any):
            self.keep(labels, _my_slice(hidden), {"weight": weight.detach()})
            return (torch.zeros_like(labels, dtype=torch.float32),) * 2

        with _verls_head_replaced(keep):
            yield


@contextlib.contextmanager
def fused_statistics_at_the_head(engine: Any, states: FusedReferenceStates, vocab_size: int) -> Iterator[None]:
    """Every forward inside the block yields log_probs that are the policy's, the reference's and token_kl, and entropy."""

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *_: Any):
        kept = states.next(labels)
        ref_hidden = _whole(kept.hidden.to(hidden.device))
        shard = shard_of_rank(weight.shape[0], vocab_size)
        statistics = linear_token_statistics(
            hidden.flatten(0, 1),
            weight,
            ref_hidden.flatten(0, 1),
            kept.arguments["weight"],
            labels.flatten(),
            temperature,
            shard=shard,
        )
        together = torch.stack([statistics.log_prob, statistics.ref_log_prob, statistics.token_kl], dim=-1)
        return together.unsqueeze(0), statistics.entropy.unsqueeze(0)

    with _verls_head_replaced(head):
        yield
    states.require_all_used()


def unpacked(output: TensorDict) -> TensorDict:
    """log_probs, nested [B, prompt + response, 3], to log_probs, ref_log_probs and token_kl. Changes `output`."""
    together = output["log_probs"]
    for i, name in enumerate(("log_probs", "ref_log_probs", "token_kl")):
        output[name] = torch.nested.nested_tensor_from_jagged(together.values()[:, i].contiguous(), together.offsets())
    return output


def _my_slice(hidden: Tensor) -> Tensor:
    """Every rank of a tensor-parallel group has the whole of it, so each keeps a part."""
    from megatron.core import parallel_state as mpu

    return hidden.chunk(mpu.get_tensor_model_parallel_world_size())[mpu.get_tensor_model_parallel_rank()]


def _whole(part: Tensor) -> Tensor:
    """The parts of `_my_slice`, together again. verl pads a micro-batch to a multiple of the group's size."""
    from megatron.core import parallel_state as mpu

    parts = [torch.empty_like(part) for _ in range(mpu.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts)


@contextlib.contextmanager
def _verls_head_replaced(head: Any) -> Iterator[None]:
    module = importlib.import_module("verl.models.mcore.model_forward_fused")
    verls = module.linear_cross_entropy
    module.linear_cross_entropy = head
    try:
        yield
    finally:
        module.linear_cross_entropy = verls
