"""V0.5's part of a trainer (verl_patches.family_trainer puts it in front of verl's).

Touches PPOTrainer._compute_advantage, by subclassing, and what FamilyTrainer names. Checked against verl 0.9.1; no upstream
issue. Worker, loss and reference are verl's own. The priors are those of verl_patches.prior_state, in front of this part.
"""

import torch
from transfer_queue import KVBatchMeta

from verl_patches.batches import is_padding
from verl_patches.family_trainer import FamilyTrainer, require_one_output_a_session
from vimpo_verl.v05 import PriorOfBatch, prior_of_batch


class V05Trainer(FamilyTrainer):
    """Hands the priors of a batch to the estimator."""

    estimator = "v05"

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        require_one_output_a_session(batch.keys)
        handed = PriorOfBatch(mean=self.batch_prior.mean, is_padding=torch.tensor(is_padding(batch)))
        with prior_of_batch(handed):
            batch = super()._compute_advantage(batch, metrics)
        metrics.update(handed.metrics)
        return batch
