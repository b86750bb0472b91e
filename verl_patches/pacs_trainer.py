"""PACS's part of a trainer (verl_patches.family_trainer puts it in front of verl's).

Touches, by subclassing, PPOTrainer's methods _balance_batch and _compute_advantage, and those that FamilyTrainer names. Checked
against verl 0.9.1; no upstream issue.
"""

from collections import Counter

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.seqlen_balancing import calculate_workload, log_seqlen_unbalance

from verl_patches import group_balance
from verl_patches.batches import data_parallel_size, is_padding, row_sums
from verl_patches.family_trainer import FamilyTrainer, require_one_output_a_session
from verl_patches.loss_aggregation import mini_batch_size
from verl_patches.pacs_worker import GROUP, GROUP_SIZE, OUTCOME, PacsActorRolloutRefWorker
from vimpo_verl.pacs_registrations import OldPolicy, old_policy


class PacsTrainer(FamilyTrainer):
    """What PACS changes in a v1 trainer: whole groups in every mini-batch, labels and groups for the update, the worker."""

    estimator = "pacs"
    worker_type = PacsActorRolloutRefWorker

    def filled_up(self, batch: KVBatchMeta) -> KVBatchMeta:
        """As many placeholders as whole groups need to fit into mini-batches.

        Raises:
            ValueError: a prompt has more responses than a mini-batch holds.
        """
        require_one_output_a_session(batch.keys)
        return group_balance.fill_up(batch, mini_batch_size(self.config), self.tokenizer.eos_token_id)

    def _balance_batch(
        self, batch: KVBatchMeta, metrics: dict, logging_prefix: str = "global_seqlen", **options
    ) -> KVBatchMeta:
        """As verl's, and then every prompt's group whole in one global mini-batch."""
        batch = super()._balance_batch(batch, metrics, logging_prefix=logging_prefix, **options)
        lengths = group_balance.lengths_of(batch)
        work = calculate_workload(torch.tensor(lengths)).tolist()
        ranks = data_parallel_size(self.actor_rollout_wg)
        shares = group_balance.regroup(batch, mini_batch_size(self.config), ranks, work)
        metrics.update(log_seqlen_unbalance(seqlen_list=lengths, partitions=shares, prefix=logging_prefix))
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl's, with the estimator "pacs"; leaves each sequence's label and group for the update.

        Raises:
            FloatingPointError: a log-prob or a reward is not finite.
            ValueError: a reward is neither 0 nor 1, naming the sample.
        """
        require_one_output_a_session(batch.keys)
        with old_policy(self._estimator_input(batch)):
            return super()._compute_advantage(batch, metrics)

    def _estimator_input(self, batch: KVBatchMeta) -> OldPolicy:
        """What the estimator is handed, once it is sound; labels and groups go to the queue. Errors as above."""
        fields = ["old_log_probs", "rm_scores", "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        mask = data["response_mask"]
        self.require_sound(batch, mask, "the policy's logits are not finite there", old_log_prob=data["old_log_probs"])
        self.require_sound(batch, None, "the reward function returned it", reward=data["rm_scores"])
        outcome = row_sums(data["rm_scores"]).float()
        self._require_labels(batch, outcome)
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=_labels_and_groups(batch, outcome))
        return OldPolicy(self.knobs, data.select("old_log_probs").to_padded_tensor()["old_log_probs"])

    def _require_labels(self, batch: KVBatchMeta, outcome: torch.Tensor) -> None:
        strange = ((outcome != 0) & (outcome != 1)).nonzero().flatten().tolist()
        if strange:
            raise ValueError(
                f"step {self.global_steps}: the reward of sample {batch.keys[strange[0]]} is {outcome[strange[0]].item():g} "
                f"({len(strange)} of {len(outcome)} are neither 0 nor 1): PACS takes rewards as labels. Have the reward "
                "function return 0 or 1, without additions for format or length"
            )


def _labels_and_groups(batch: KVBatchMeta, outcome: torch.Tensor) -> TensorDict:
    """Of each sequence its label, the number of its group, and how many real sequences that group has; 0: a placeholder."""
    names, added = group_balance.groups_of(batch.keys), is_padding(batch)
    sizes = Counter(names)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    fields = {
        OUTCOME: outcome,
        GROUP: torch.tensor([float(numbers[name]) for name in names]),
        GROUP_SIZE: torch.tensor(
            [float(sizes[name] * (not is_added)) for name, is_added in zip(names, added, strict=True)]
        ),
    }
    return TensorDict(fields, batch_size=len(names))
