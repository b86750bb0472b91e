"""What the joint pass keeps of two logits tensors: four numbers a token. Imports torch only."""

from typing import NamedTuple

import torch
from torch import Tensor

from vimpo_verl.functional import kl_terms

# Elements of one [chunk, V] temporary: 4 MiB in float32, so that a chunk's temporaries stay in a CPU's cache.
_CHUNK_ELEMENTS = 2**20


class TokenStatistics(NamedTuple):
    """Per token, all [N] and float32 (float64 for float64 logits), in nats."""

    log_prob: Tensor  # log pi_theta(y_t|s_t)
    ref_log_prob: Tensor  # log pi_ref(y_t|s_t)
    token_kl: Tensor  # KL( pi_theta(.|s_t) || pi_ref(.|s_t) ), exact
    entropy: Tensor  # of pi_theta(.|s_t)


@torch.no_grad()
def token_statistics(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> TokenStatistics:
    """Both log-probs of the sampled token, the exact KL and the policy's entropy, in chunks of tokens.

    Args:
        policy_logits: [N, V], any float dtype, already divided by the temperature. Not modified.
        ref_logits: [N, V], likewise.
        labels: [N], int64: the sampled token of each position.

    Returns:
        TokenStatistics. Where the logits are equal, token_kl is exactly 0 and the two log-probs are equal.

    Raises:
        ValueError: the shapes do not fit.
    """
    if policy_logits.dim() != 2 or policy_logits.shape != ref_logits.shape or labels.shape != policy_logits.shape[:1]:
        raise ValueError(
            "expected policy_logits and ref_logits [N, V] and labels [N], got "
            f"{tuple(policy_logits.shape)}, {tuple(ref_logits.shape)} and {tuple(labels.shape)}"
        )
    tokens, vocab_size = policy_logits.shape
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    out = TokenStatistics(*(policy_logits.new_empty(tokens, dtype=dtype) for _ in TokenStatistics._fields))
    step = max(1, _CHUNK_ELEMENTS // max(vocab_size, 1))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        log_p = torch.log_softmax(policy_logits[rows].to(dtype), dim=-1)
        log_q = torch.log_softmax(ref_logits[rows].to(dtype), dim=-1)
        label = labels[rows].unsqueeze(-1)
        out.log_prob[rows] = log_p.gather(-1, label).squeeze(-1)
        out.ref_log_prob[rows] = log_q.gather(-1, label).squeeze(-1)
        out.token_kl[rows] = kl_terms(log_p, log_q).sum(-1)
        out.entropy[rows] = torch.special.entr(log_p.exp_()).sum(-1)
    return out
