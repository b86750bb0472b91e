"""Seam: a batch dealt out so that every prompt's group is whole in one global mini-batch.

Touches PPOTrainer._balance_batch, by subclassing: PacsTrainer calls verl's, and what is here reorders its result. Checked against
verl 0.9.1; no upstream issue.

verl deals sequences out to the data-parallel ranks by length, a rank gets one contiguous share of the batch, and every rank
cuts its share into mini-batches: the k-th mini-batch is the union of the ranks' k-th pieces. So verl tears groups apart over
mini-batches, which is all the same to a loss that is a sum over sequences and wrong for one that compares them. Here groups go
to mini-batches first, of like size and work, and the sequences of each mini-batch to the ranks then, a group's members to
whichever rank has room: so the ranks have equal counts and like lengths in every mini-batch, and not over the step alone.
"""

from collections.abc import Hashable, Sequence

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions


def mini_batches_of_groups(groups: Sequence[Hashable], work: Sequence[float], size: int) -> list[list[int]]:
    """Deal whole groups out to as few mini-batches as hold them.

    The largest group first and, of equal ones, the one with most work; each goes to the mini-batch with the least work that
    has room. So the result depends on the order of the sequences only between groups that are alike in both.

    Args:
        groups: the name of each sequence's group.
        work: of each sequence.
        size: sequences that a mini-batch has room for.

    Returns:
        The sequences of each mini-batch, by position; some mini-batches may have room left.

    Raises:
        ValueError: a group has more sequences than a mini-batch has room for.
    """
    members: dict[Hashable, list[int]] = {}
    for position, name in enumerate(groups):
        members.setdefault(name, []).append(position)
    largest = max(map(len, members.values()), default=0)
    if largest > size:
        raise ValueError(
            f"a prompt has {largest} responses and a mini-batch room for {size}: a group must be whole in one. Raise "
            "actor_rollout_ref.actor.ppo_mini_batch_size, which counts prompts of actor_rollout_ref.rollout.n responses"
        )
    in_order = sorted(members.values(), key=lambda rows: (-len(rows), -sum(work[row] for row in rows), rows[0]))
    count = -(-len(groups) // size)
    while (dealt := _deal(in_order, work, size, count)) is None:
        count += 1
    return dealt


def _deal(in_order: list[list[int]], work: Sequence[float], size: int, count: int) -> list[list[int]] | None:
    """The groups in this order, to `count` mini-batches; None where they do not fit."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for rows in in_order:
        fitting = [k for k in range(count) if len(dealt[k]) + len(rows) <= size]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda k: (load[k], len(dealt[k]), k))
        dealt[chosen] += rows
        load[chosen] += sum(work[row] for row in rows)
    return dealt


def order_for_ranks(mini_batches: list[list[int]], work: Sequence[float], ranks: int) -> list[int]:
    """The order in which verl's contiguous shares and their pieces are these mini-batches.

    Args:
        mini_batches: the sequences of each, by position; all of one length, a multiple of `ranks`.
        work: of each sequence.
        ranks: of the data-parallel group.

    Returns:
        Every position once: the first rank's piece of each mini-batch, the second rank's, and so on.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for rows in mini_batches:
        pieces = get_seqlen_balanced_partitions([work[row] for row in rows], k_partitions=ranks, equal_size=True)
        for share, piece in zip(shares, pieces, strict=True):
            share += [rows[position] for position in piece]
    return [position for share in shares for position in share]


def fill_up(batch: KVBatchMeta, size: int, eos_token_id: int) -> KVBatchMeta:
    """verl's placeholder samples added until whole groups fit into mini-batches of `size`.

    Args:
        batch: verl's handle, without placeholders.
        size: sequences of a global mini-batch.
        eos_token_id: what verl makes placeholders of.

    Raises:
        ValueError: a group is larger than a mini-batch.
    """
    needed = len(mini_batches_of_groups(groups_of(batch.keys), lengths_of(batch), size)) * size
    return upsample_batch_to_divisible_size(batch, needed, eos_token_id)


def regroup(batch: KVBatchMeta, size: int, ranks: int, work: Sequence[float]) -> list[list[int]]:
    """Reorder a filled batch in place, so that verl hands every group to one mini-batch.

    Args:
        batch: of `fill_up`, perhaps reordered since.
        size: sequences of a global mini-batch, a multiple of `ranks`.
        ranks: of the data-parallel group.
        work: of each sequence, as `batch` has them.

    Returns:
        The positions, before reordering, of each rank's share.
    """
    real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    names = groups_of([batch.keys[row] for row in real])
    dealt = mini_batches_of_groups(names, [work[row] for row in real], size)
    mini_batches = [[real[position] for position in rows] for rows in dealt]
    mini_batches += [[] for _ in range(len(batch.keys) // size - len(mini_batches))]
    placeholders = [row for row in range(len(batch.keys)) if row not in set(real)]
    for rows in mini_batches:
        while len(rows) < size:
            rows.append(placeholders.pop())
    order = order_for_ranks(mini_batches, work, ranks)
    batch.reorder(order)
    share = len(order) // ranks
    return [order[start : start + share] for start in range(0, len(order), share)]


def groups_of(keys: Sequence[str]) -> list[str]:
    """The uid of each sample's prompt: verl names a sample {uid}_{session}_{output}."""
    return [key.split("_")[0] for key in keys]


def lengths_of(batch: KVBatchMeta) -> list[int]:
    """Tokens of each sample, prompt and response."""
    return [tag["seq_len"] for tag in batch.tags]
