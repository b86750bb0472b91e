"""Claim: from sums a sequence, the distance between rollout and policy is what verl's own functions make of all tokens.

Every metric of calculate_debug_metrics and of compute_offpolicy_metrics, whatever the cut into micro-batches.
"""

import pytest
import torch
from tensordict import TensorDict

from verl_patches import rollout_gap


def make_batch(seed=0, batch=6, length=9):
    generator = torch.Generator().manual_seed(seed)
    log_prob = -torch.rand(batch, length, generator=generator) * 3
    rollout = log_prob + 0.05 * torch.randn(batch, length, generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.7
    mask[2] = False  # a placeholder
    rollout[0, 0], mask[0, 0] = log_prob[0, 0] - 30, True  # further apart than verl's bound
    return log_prob, rollout, mask


def verls(log_prob, rollout, mask):
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.utils.debug.metrics import calculate_debug_metrics

    fields = {
        "rollout_log_probs": rollout, "old_log_probs": log_prob, "response_mask": mask.long(), "responses": mask.long(),
    }  # fmt: skip
    debug = calculate_debug_metrics(DataProto(batch=TensorDict(fields, batch_size=len(mask))))
    _, _, corrections = compute_rollout_correction_and_rejection_mask(log_prob, rollout, mask.long())
    return {**debug, **corrections}


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 1, 1, 1, 1]], ids=str)
def test_the_metrics_are_verls(sizes):
    log_prob, rollout, mask = make_batch()
    parts = [rollout_gap.gap(*rows) for rows in zip(*(x.split(sizes) for x in (log_prob, rollout, mask)), strict=True)]
    found = rollout_gap.metrics(rollout_gap.Gap(*(torch.cat(column) for column in zip(*parts, strict=True))))
    expected = verls(log_prob, rollout, mask)
    assert found.keys() == expected.keys() and len(found) == 18
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_without_a_valid_token():
    log_prob, rollout, mask = make_batch()
    found = rollout_gap.metrics(rollout_gap.gap(log_prob, rollout, torch.zeros_like(mask)))
    assert found == {"training/rollout_probs_diff_valid": 0.0}
    assert rollout_gap.gap(log_prob[:, :0], rollout[:, :0], mask[:, :0]).largest_distance.tolist() == [0.0] * 6
