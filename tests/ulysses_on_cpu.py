"""Sequence parallelism without flash attention: verl's own all-to-all around a plain attention over packed sequences.

verl supports Ulysses through its replacement of transformers' flash attention. Here the same replacement is called with
a float32 attention in place of the flash kernel, as the attention implementation NAME of transformers.
"""

import torch

NAME = "ulysses_on_cpu"


def register() -> str:
    """Make NAME known to transformers; returns it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return NAME


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    from verl.models.transformers import monkey_patch

    monkey_patch._flash_attention_forward = _packed_attention
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # to [1, n, heads, dim]
    output = monkey_patch._ulysses_flash_attention_forward(
        query, key, value, None, query.shape[1], position_ids=kwargs["position_ids"], softmax_scale=scaling
    )
    return output, None


def _packed_attention(query, key, value, attention_mask, query_length, position_ids, softmax_scale, **_):
    """Causal attention within each packed sequence; a sequence starts where position_ids restart."""
    sequence = (position_ids[0] == 0).cumsum(0)
    allowed = (sequence.unsqueeze(0) == sequence.unsqueeze(1)).tril()
    repeats = query.shape[2] // key.shape[2]
    key, value = (states.repeat_interleave(repeats, dim=2) for states in (key, value))
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=softmax_scale)
    return output.transpose(1, 2)
