"""V0.5's part of a trainer: the priors of a batch for the estimator. No seam of its own: verl_patches.trainer puts it in front.

Touches PPOTrainer._compute_advantage, by subclassing. Checked against verl 0.9.1; no upstream issue.
"""

import torch
from transfer_queue import KVBatchMeta

from verl_patches.trainer import _is_padding, _require_one_output_a_session
from vimpo_verl.v05 import PriorOfBatch, prior_of_batch


class V05Trainer:
    """Behind PriorTrainer, whose `batch_prior` it hands to the estimator. Worker, loss and reference are verl's own."""

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        _require_one_output_a_session(batch.keys)
        handed = PriorOfBatch(mean=self.batch_prior.mean, is_padding=torch.tensor(_is_padding(batch)))
        with prior_of_batch(handed):
            batch = super()._compute_advantage(batch, metrics)
        metrics.update(handed.metrics)
        return batch
