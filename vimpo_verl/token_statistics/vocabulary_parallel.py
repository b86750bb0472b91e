"""`token_statistics` where every rank of a group has the logits of a part of the vocabulary: one gather, 64 bytes a token.

Each rank reduces its part as if it were a vocabulary of its own, with the version for its device. With S_k and S'_k the logs
of the sums of exp over part k of policy and reference, d_k = S_k - S'_k, and KL_k, H_k of the distributions inside part k, the
parts are merged by the chain rule of KL and entropy:

    P_k = exp(S_k - S), S = logsumexp_k S_k       the policy's probability of part k; Q_k the reference's
    KL      = sum_k P_k KL_k + KL(P || Q)
    entropy = sum_k P_k (H_k - log P_k)
    log p_y = log P_k + log p_y inside k, the part that has y

and, as in `triton_kernel`, with c = sum_k P_k d_k, delta_k = d_k - c, a = sum_k P_k delta_k, next to nothing,
b = sum_k P_k (exp(-delta_k) - 1 + delta_k),

    KL(P || Q) = a + log(1 + b - a)       log Q_k = log P_k - delta_k - log(1 + b - a)

No term is a small difference of large ones, as long as d_k is none: it is (z_a - u_a) - (log p_a - log q_a) at a token a of the
part, and all of that is of the size of z - u. a is the label where the part has it. Elsewhere it is the policy's most likely
token of the part, for which the policy's logits are read once more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vimpo_verl.token_statistics.front import TokenStatistics, require_shapes, statistics_rows

# S_k is z_a - log p_a. Of a label that is less likely, log p_a is rounded in float32 to more than 2e-6.
_LEAST_LOG_PROB = -50.0


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this rank's logits are about.

    Attributes:
        start: token id of the first column.
        vocab_size: tokens of the whole vocabulary. Columns from this id on are padding and count nowhere.
        group: the ranks that have the parts, each another one.
    """

    start: int
    vocab_size: int
    group: torch.distributed.ProcessGroup

    def real_columns(self, width: int) -> int:
        """How many of the `width` columns of the logits are no padding."""
        return max(0, min(width, self.vocab_size - self.start))


def shard_statistics(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor | None, shard: VocabularyShard
) -> Tensor:
    """What this rank's part says of each token.

    Args:
        policy_logits, ref_logits: [N, width], padding included.
        labels: [N], int64, token ids.
        temperature: [N] or None.
        shard: which part it is.

    Returns:
        [8, N], float64 on a CPU or GPU, else float32; to be gathered and merged.
    """
    require_shapes(policy_logits, ref_logits, labels, temperature)
    width = shard.real_columns(policy_logits.shape[1])
    z, u = policy_logits[:, :width], ref_logits[:, :width]
    dtype = torch.float64 if z.device.type in ("cpu", "cuda") else torch.float32
    here = (labels >= shard.start) & (labels < shard.start + width)
    if width == 0:
        return _parts_of_padding(here, dtype)
    anchor = torch.where(here, labels - shard.start, z.argmax(-1))
    log_prob, ref_log_prob, kl, entropy, log_ratio = statistics_rows(z, u, anchor, temperature).to(dtype)
    z_anchor, u_anchor = (logits.gather(-1, anchor.unsqueeze(-1)).squeeze(-1).to(dtype) for logits in (z, u))
    apart = z_anchor - u_anchor
    if temperature is not None:
        z_anchor, apart = z_anchor / temperature, apart / temperature
    log_sum, apart = z_anchor - log_prob, apart - log_ratio
    parts = torch.stack([log_sum, log_sum - apart, apart, kl, entropy, log_prob, ref_log_prob, here.to(dtype)])
    odd = ~parts.isfinite().all(0) | (log_prob < _LEAST_LOG_PROB)
    if odd.any():
        scale = None if temperature is None else temperature[odd]
        parts[:-1, odd] = _plain_parts(z[odd], u[odd], anchor[odd], scale).to(dtype)
    return parts


def merged_over_shards(parts: Tensor, shard: VocabularyShard) -> TokenStatistics:
    """The numbers of the whole vocabulary, the same on every rank of the group; float64 where the parts are.

    Args:
        parts: [8, N] of this rank, from `shard_statistics`.
        shard: whose group has the others'.

    Raises:
        ValueError: a label is in no part, or in several.
    """
    everywhere = parts.new_zeros(torch.distributed.get_world_size(shard.group), *parts.shape)
    torch.distributed.all_gather(list(everywhere.unbind()), parts.contiguous(), group=shard.group)
    _require_one_owner(everywhere[:, -1], shard)
    return merged(everywhere)


def merged(everywhere: Tensor) -> TokenStatistics:
    """[ranks, 8, N], the parts of all ranks, to the numbers of the whole vocabulary."""
    log_sums, ref_log_sums, apart, kls, entropies, log_probs, ref_log_probs, here = everywhere.unbind(1)
    log_sum = log_sums.logsumexp(0)
    log_mass = log_sums - log_sum
    mass = log_mass.exp()
    log_ref_mass, kl_of_masses = _ref_masses(log_mass, mass, apart, ref_log_sums - log_sum)
    kl = kl_of_masses + _weighted(mass, kls)
    entropy = _weighted(mass, entropies - log_mass)
    owner = here.argmax(0, keepdim=True)
    log_prob, ref_log_prob = (
        (inside + masses).gather(0, owner).squeeze(0)
        for inside, masses in ((log_probs, log_mass), (ref_log_probs, log_ref_mass))
    )
    return TokenStatistics(log_prob, ref_log_prob, kl, entropy)


def _ref_masses(log_mass: Tensor, mass: Tensor, apart: Tensor, ref_log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """log Q_k, and KL(P || Q).

    Args:
        log_mass, mass: log P_k, P_k, [ranks, N].
        apart: d_k, [ranks, N].
        ref_log_sums: S'_k - S, [ranks, N].

    Returns:
        [ranks, N], [N]. The KL is finite where the reference alone holds a part impossible: that part's KL_k is infinite.
    """
    impossible = mass == 0  # for the policy: d_k says nothing about Q_k
    excluded = ~impossible & (apart == torch.inf)  # impossible for the reference
    apart = torch.where(impossible | excluded, 0.0, apart)
    centre = _weighted(mass, apart)
    delta = apart - centre
    a, b = _weighted(mass, delta), _weighted(mass, torch.expm1(-delta) + delta)
    unforeseen = torch.where(impossible, (ref_log_sums + centre).exp(), 0.0).sum(0)
    lost = torch.where(excluded, mass * (-delta).exp(), 0.0).sum(0)
    log_mean = torch.log1p(b - a + unforeseen - lost)
    log_ref_mass = torch.where(impossible, ref_log_sums + centre, log_mass - delta) - log_mean
    return torch.where(excluded, -torch.inf, log_ref_mass), a + log_mean


def _weighted(mass: Tensor, values: Tensor) -> Tensor:
    """[ranks, N] -> [N]: sum_k P_k x_k, and nothing where P_k is 0, whatever x_k."""
    return torch.where(mass == 0, 0.0, mass * values).sum(0)


def _parts_of_padding(here: Tensor, dtype: torch.dtype) -> Tensor:
    """A part without a single token: its probability is 0."""
    parts = torch.zeros(8, *here.shape, dtype=dtype, device=here.device)
    parts[:2] = -torch.inf
    return parts


def _plain_parts(z: Tensor, u: Tensor, anchor: Tensor, temperature: Tensor | None) -> Tensor:
    """The rows of `shard_statistics` but the last, by float64 formulas that know impossible tokens and impossible parts."""
    z, u = z.double(), u.double()
    if temperature is not None:
        z, u = z / temperature.unsqueeze(-1), u / temperature.unsqueeze(-1)
    log_sum, ref_log_sum = z.logsumexp(-1), u.logsumexp(-1)
    nowhere, ref_nowhere = log_sum == -torch.inf, ref_log_sum == -torch.inf
    log_p, log_q = z - log_sum.unsqueeze(-1), u - ref_log_sum.unsqueeze(-1)
    p = log_p.exp()
    kl = torch.where(ref_nowhere, torch.inf, torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1))
    log_prob, ref_log_prob = (x.gather(-1, anchor.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
    return torch.stack(
        [
            log_sum,
            ref_log_sum,
            log_sum - ref_log_sum,
            torch.where(nowhere, 0.0, kl),
            torch.where(nowhere, 0.0, torch.special.entr(p).sum(-1)),
            torch.where(nowhere, -torch.inf, log_prob),
            torch.where(ref_nowhere, -torch.inf, ref_log_prob),
        ]
    )


def _require_one_owner(here: Tensor, shard: VocabularyShard) -> None:
    wrong = (here.sum(0) != 1).sum().item()
    if wrong:
        raise ValueError(
            f"{wrong} of {here.shape[1]} labels are in no shard of the vocabulary of {shard.vocab_size}, or in several: "
            "are they token ids, and does every rank of the group have the same ones and another shard?"
        )
