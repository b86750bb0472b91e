"""What the joint pass keeps of two logits tensors: four numbers a token.

One function in front. On a GPU it runs the Triton kernel (`triton_kernel`), on a CPU the chunked torch version (`cpu`), on
other accelerators that of `float32`; all give the same numbers to float32 accuracy, from one read of each tensor. Logits of
which every rank of a tensor-parallel group has a part of the vocabulary are reduced part by part and merged
(`vocabulary_parallel`). `linear_token_statistics` does the same from hidden states and output matrices, where there are no
logits.
"""

import torch
from torch import Tensor

from vimpo_verl.token_statistics.front import TokenStatistics, whole_vocabulary_statistics
from vimpo_verl.token_statistics.vocabulary_parallel import VocabularyShard, merged_over_shards, shard_statistics

__all__ = ["TokenStatistics", "VocabularyShard", "linear_token_statistics", "token_statistics"]

# Tokens whose logits `linear_token_statistics` makes at a time, as in verl's own fused output head.
_LINEAR_CHUNK_TOKENS = 512


@torch.no_grad()
def token_statistics(
    policy_logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None = None,
    *,
    shard: VocabularyShard | None = None,
) -> TokenStatistics:
    """Both log-probs of the sampled token, the exact KL and the policy's entropy.

    Args:
        policy_logits: [N, V], any float dtype. Not modified. -inf entries have probability zero.
        ref_logits: [N, V], likewise.
        labels: [N], int64: the sampled token of each position.
        temperature: [N] > 0, divides both logits; None if they are already divided.
        shard: which part of the vocabulary the logits are, V being its width, padding included; every rank of its group
            calls with the same tokens, and gets the same numbers. None: they are the whole of it.

    Returns:
        TokenStatistics. Where the logits are equal, token_kl is exactly 0 and the two log-probs are equal. A token
        that the reference holds impossible and the policy does not makes token_kl infinite.

    Raises:
        ValueError: the shapes do not fit, or a label is not in the vocabulary that the shards make up.
    """
    if shard is None:
        return whole_vocabulary_statistics(policy_logits, ref_logits, labels, temperature)
    parts = shard_statistics(policy_logits, ref_logits, labels, temperature, shard)
    return _merged(parts, shard, policy_logits)


@torch.no_grad()
def linear_token_statistics(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    shard: VocabularyShard | None = None,
) -> TokenStatistics:
    """`token_statistics` of hidden @ weight.T for both models, a chunk of tokens at a time: no logits tensor.

    Args:
        policy_hidden, ref_hidden: [N, D], last hidden states.
        policy_weight, ref_weight: [V, D], output matrices, or this rank's part of them.
        labels: [N], int64.
        temperature: divides both logits.
        shard: as for `token_statistics`.

    Returns:
        TokenStatistics; extra memory is two [512, V] tensors in the models' dtype.
    """
    chunks = []
    for start in range(0, max(1, labels.shape[0]), _LINEAR_CHUNK_TOKENS):
        rows = slice(start, start + _LINEAR_CHUNK_TOKENS)
        policy_logits = policy_hidden[rows] @ policy_weight.t()
        ref_logits = ref_hidden[rows] @ ref_weight.t()
        scale = labels.new_full(labels[rows].shape, temperature, dtype=torch.float32) if temperature != 1.0 else None
        if shard is None:
            chunks.append(torch.stack(token_statistics(policy_logits, ref_logits, labels[rows], scale)))
        else:
            chunks.append(shard_statistics(policy_logits, ref_logits, labels[rows], scale, shard))
        del policy_logits, ref_logits  # before the next two are made
    whole = torch.cat(chunks, dim=1)
    return TokenStatistics(*whole) if shard is None else _merged(whole, shard, policy_hidden)


def _merged(parts: Tensor, shard: VocabularyShard, of: Tensor) -> TokenStatistics:
    """In the dtype that logits of the dtype of `of` have without shards."""
    dtype = parts.dtype if of.dtype == torch.float64 else torch.float32
    return TokenStatistics(*(result.to(dtype) for result in merged_over_shards(parts, shard)))
