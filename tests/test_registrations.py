"""Claim: verl finds "vimpo" in its registries, and neither name ever works without the rest of VIMPO.

An estimator without kappa and a policy loss without the value branch raise; with verl's other estimators and trainers
nothing changes.
"""

import numpy as np
import pytest
import torch

from vimpo_verl.config import VimpoConfig
from vimpo_verl.registrations import (
    ActorBranch,
    JointPassOutput,
    actor_branch,
    joint_pass_output,
    vimpo_actor_loss,
    vimpo_advantage,
)

REWARDS, MASK, UID = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2), np.array(["a", "a"], dtype=object)


def make_output(batch=2, length=2):
    generator = torch.Generator().manual_seed(0)
    log_prob, ref_log_prob, kl = (torch.randn(batch, length, generator=generator) for _ in range(3))
    is_padding = torch.zeros(batch, dtype=torch.bool)
    return JointPassOutput(log_prob, ref_log_prob, kl.abs(), is_padding, VimpoConfig(beta=0.1), lam=1.0)


def test_verl_has_both_names():
    """Through the entry point alone: this test imports nothing of ours that registers."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

    assert get_adv_estimator_fn("vimpo") is vimpo_advantage
    assert get_policy_loss_fn("vimpo") is vimpo_actor_loss


def test_every_seam_is_in_force():
    import verl.trainer.main_ppo
    import verl.trainer.ppo.v1
    import verl.utils.config  # noqa: F401

    from verl_patches import seams

    assert [seam.name for seam in seams.SEAMS if not seams.is_in_force(seam)] == []
    assert seams.failures() == {}


def test_the_estimator_raises_without_a_joint_pass():
    with pytest.raises(RuntimeError, match="no kappa.*vimpo check"):
        vimpo_advantage(REWARDS, MASK, UID)


def test_the_estimator_refuses_the_joint_pass_of_another_batch():
    with joint_pass_output(make_output(length=3)), pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        vimpo_advantage(REWARDS, MASK, UID)


def test_the_estimator_refuses_rewards_of_several_channels():
    with (
        joint_pass_output(make_output()),
        pytest.raises(ValueError, match=r"token_level_rewards.*\[2, 2, 3\].*one reward"),
    ):
        vimpo_advantage(torch.zeros(2, 2, 3), MASK, UID)


def test_the_estimator_refuses_a_mask_that_is_not_0_and_1():
    with (
        joint_pass_output(make_output()),
        pytest.raises(ValueError, match="response_mask must hold 0 and 1 only, got 0.5"),
    ):
        vimpo_advantage(REWARDS, 0.5 * MASK, UID)


def test_the_estimator_through_verl():
    """verl's compute_advantage calls it with whatever verl calls estimators with."""
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    data = DataProto.from_dict({"token_level_rewards": REWARDS, "response_mask": MASK}, non_tensors={"uid": UID})
    with joint_pass_output(make_output()) as output:
        data = compute_advantage(data, adv_estimator="vimpo", gamma=1.0, lam=1.0, num_repeat=2, config=None)
    assert torch.equal(data.batch["advantages"], output.result.advantages)
    torch.testing.assert_close(data.batch["returns"], torch.tensor([[0.5, 0.5], [-0.5, -0.5]]))


def test_log_probs_are_let_go_of_once_there_is_a_result():
    """verl then copies the results; a trainer that asks twice is told."""
    with joint_pass_output(make_output()) as output:
        vimpo_advantage(REWARDS, MASK, UID)
        assert output.old_log_prob is output.ref_log_prob is output.token_kl is None
        with pytest.raises(RuntimeError, match=r"there already.*super\(\)._compute_advantage once a batch"):
            vimpo_advantage(REWARDS, MASK, UID)


def test_the_joint_pass_is_forgotten_afterwards():
    with joint_pass_output(make_output()):
        pass
    with pytest.raises(RuntimeError, match="no kappa"):
        vimpo_advantage(REWARDS, MASK, UID)


def make_actor_config():
    from verl.workers.config import FSDPActorConfig

    from verl_patches.policy_loss_config import VimpoPolicyLossConfig

    return FSDPActorConfig(
        rollout_n=2, ppo_micro_batch_size_per_gpu=1, policy_loss=VimpoPolicyLossConfig(loss_mode="vimpo")
    )


def loss_inputs():
    generator = torch.Generator().manual_seed(1)
    old, new, advantages = (torch.randn(2, 2, generator=generator) for _ in range(3))
    return {"old_log_prob": old, "log_prob": new, "advantages": advantages, "response_mask": MASK}


def test_the_policy_loss_raises_without_the_value_branch():
    with pytest.raises(RuntimeError, match="value loss is missing.*vimpo check"):
        vimpo_actor_loss(**loss_inputs(), config=make_actor_config())


@pytest.mark.parametrize("weights", [None, torch.tensor([[0.5, 2.0], [1.0, 0.0]])], ids=["", "rollout correction"])
def test_the_policy_loss_is_verls_ppo_clip_times_the_coefficient(weights):
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    inputs = {**loss_inputs(), "config": make_actor_config(), "rollout_is_weights": weights}
    with actor_branch(ActorBranch(coeff=0.25)) as branch:
        loss, metrics = vimpo_actor_loss(**inputs)
    expected, expected_metrics = compute_policy_loss_vanilla(**inputs)
    torch.testing.assert_close(loss, 0.25 * expected)
    torch.testing.assert_close(branch.loss, expected)
    assert metrics == expected_metrics


def test_the_policy_loss_config_notices_a_missing_plugin(monkeypatch):
    from verl.trainer.ppo import core_algos

    from verl_patches.policy_loss_config import VimpoPolicyLossConfig

    assert VimpoPolicyLossConfig(loss_mode="vimpo").vimpo == VimpoConfig()
    monkeypatch.delitem(core_algos.POLICY_LOSS_REGISTRY, "vimpo")
    with pytest.raises(RuntimeError, match="did not load the plugin"):
        VimpoPolicyLossConfig(loss_mode="vimpo")


def test_a_seam_that_fails_is_remembered_and_breaks_nothing(monkeypatch, capsys):
    from verl_patches import seams

    monkeypatch.setattr(seams, "_failures", {})
    monkeypatch.setattr(seams, "_in_force", set())
    broken = seams.Seam(
        "a name", "verl.some.module", "verl_patches.no_such_module:install", "something", "wrapper", "never"
    )
    seams._install(broken, None)
    assert "no_such_module" in seams.failures()["a name"] and not seams.is_in_force(broken)
    assert "'a name'" in capsys.readouterr().err
