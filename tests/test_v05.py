"""Claim: V0.5's advantages are R minus the fused baseline, for groups of any size and beside placeholders; the estimator that
verl calls raises where it has no prior; and what V0.5, budgets and priors cannot run with is refused in the driver.
"""

import numpy as np
import pytest
import torch
from test_validation import GRPO, compose, validate

from vimpo_verl.v05 import PriorOfBatch, fused_advantages, prior_of_batch, v05_advantage

# k, successes, prior, baseline: the worked numbers of the published rule in rewards 0/1
WORKED = [(4, 4, 0.5, 0.875), (4, 0, 0.9, 0.069444), (8, 2, 0.6, 0.339286), (16, 3, 0.8, 0.213010), (4, 1, 0.5, 0.5)]
V05 = "algorithm.adv_estimator=v05"


def rows_of_worked():
    outcome = [float(i < right) for k, right, _, _ in WORKED for i in range(k)]
    group = [number for number, row in enumerate(WORKED) for _ in range(row[0])]
    prior = [row[2] for row in WORKED for _ in range(row[0])]
    baseline = [row[3] for row in WORKED for _ in range(row[0])]
    return outcome, group, prior, baseline


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_worked_numbers_in_groups_of_unequal_size_among_placeholders():
    outcome, group, prior, baseline = rows_of_worked()
    order = torch.randperm(len(outcome) + 3, generator=torch.Generator().manual_seed(0)).tolist()
    outcome, group, prior = [*outcome, 5.0, 1.0, 0.0], [*group, 0, 0, "pad"], [*prior, 0.5, 0.5, 0.5]
    is_padding = torch.tensor([False] * len(baseline) + [True] * 3)[order]
    expected = as_tensor([r - b for r, b in zip(outcome, baseline, strict=False)] + [0.0] * 3)[order]
    found, metrics = fused_advantages(
        as_tensor(outcome)[order], [group[i] for i in order], as_tensor(prior)[order], is_padding
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert metrics["v05/prior_accepted"] == 1 / 5, "the last of the five"
    assert metrics["v05/baseline"] == pytest.approx(sum(row[3] for row in WORKED) / 5, abs=1e-6)
    assert metrics["v05/advantage_rms"] == pytest.approx(expected[~is_padding].square().mean().sqrt().item())


def test_a_group_of_equal_rewards_has_an_advantage_over_its_prior():
    found, _ = fused_advantages(as_tensor([1, 1, 1, 1]), ["a"] * 4, as_tensor([0.9] * 4), torch.zeros(4).bool())
    torch.testing.assert_close(found, as_tensor([0.1] * 4))


def test_a_batch_of_placeholders_alone():
    found, metrics = fused_advantages(torch.zeros(2), ["x", "x"], torch.full((2,), 0.5), torch.ones(2).bool())
    assert found.tolist() == [0.0, 0.0] and metrics == {}


def test_the_estimator_that_verl_calls():
    """Registered under its name; verl's compute_advantage hands it rewards, mask and groups, the trainer the priors."""
    import verl.trainer.main_ppo  # noqa: F401  with the plugin, as a run does
    from verl.protocol import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    outcome, group, prior, baseline = rows_of_worked()
    mask = torch.ones(len(outcome), 3)
    mask[:, 2] = torch.arange(len(outcome)) % 2
    rewards = torch.zeros(len(outcome), 3)
    rewards[:, 1] = torch.tensor(outcome)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask},
        non_tensors={"uid": np.array(group, dtype=object)},
    )
    handed = PriorOfBatch(mean=as_tensor(prior), is_padding=torch.zeros(len(outcome)).bool())
    with prior_of_batch(handed):
        data = compute_advantage(data, adv_estimator="v05")
    expected = (torch.tensor(outcome) - torch.tensor(baseline)).unsqueeze(1) * mask
    torch.testing.assert_close(data.batch["advantages"], expected, rtol=0, atol=2e-6)
    assert torch.equal(data.batch["returns"], data.batch["advantages"]) and set(handed.metrics) == {
        "v05/prior_accepted", "v05/baseline", "v05/advantage_rms"
    }  # fmt: skip


def test_without_a_prior_it_raises():
    arguments = {"token_level_rewards": torch.zeros(2, 3), "response_mask": torch.ones(2, 3), "index": np.array([0, 0])}
    with pytest.raises(RuntimeError, match="adv_estimator=v05: this batch has no prior"):
        v05_advantage(**arguments)
    of_another = PriorOfBatch(torch.full((3,), 0.5), torch.zeros(3).bool())
    with prior_of_batch(of_another), pytest.raises(ValueError, match=r"priors \[3\] do not fit"):
        v05_advantage(**arguments)


# ---- in the driver ---------------------------------------------------------------------------------------------------

MANAGER = "verl_patches.rollout_budget.BudgetedAgentLoopManager"


def manager_of(*overrides):
    config = compose(*overrides)
    validate(config)
    return config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")


def test_what_brings_the_budget_with_it(capsys):
    assert manager_of(V05) == MANAGER
    assert "V0.5" in capsys.readouterr().out
    assert manager_of(V05, "+algorithm.rollout_budget.enable=false") is None
    for algo in ("grpo", "vimpo"):
        switch = f"algorithm.adv_estimator={algo}"
        assert manager_of(switch) is None
        assert manager_of(switch, "+algorithm.rollout_budget.max_rollouts=8") == MANAGER
        assert manager_of(switch, "+algorithm.rollout_budget.enable=true") == MANAGER


def test_what_loads_a_reference():
    from verl.trainer.ppo.utils import need_reference_policy

    assert not need_reference_policy(compose(V05))
    assert need_reference_policy(compose(V05, "actor_rollout_ref.actor.use_kl_loss=True"))


REFUSED = [
    ([V05, "algorithm.use_kl_in_reward=True"], ["algorithm.use_kl_in_reward=True: V0.5's baseline"]),
    ([V05, "critic.enable=True"], ["V0.5 has a prior instead of a critic"]),
    ([V05, "trainer.use_v1=False"], ["trainer.use_v1=False"]),
    ([V05, "+algorithm.rollout_budget.max_rollout=8"], ["did you mean algorithm.rollout_budget.max_rollouts?"]),
    ([V05, "+algorithm.rollout_budget=8"], ["algorithm.rollout_budget=8 is not a section"]),
    ([V05, "+algorithm.prior.discount=2"], ["algorithm.prior.discount=2"]),
    (
        [V05, "+algorithm.prior.path=/nowhere.py", "+algorithm.prior.name=f"],
        ["path=/nowhere.py, name=f: cannot be loaded"],
    ),
    ([V05, "+algorithm.reward_noise.flip_prob=0.1"], ["decided by the clean rewards"]),
    (
        [V05, "algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=reward"],
        ["own past would miss all groups that are filtered out"],
    ),
    (
        [
            V05,
            "trainer.v1.trainer_mode=separate_async",
            "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=a.B",
        ],
        ["trainer_mode=separate_async", "agent_loop_manager_class=a.B"],
    ),
    ([V05, "reward.reward_model.enable=True"], ["such rewards come after all answers"]),
    (["+algorithm.prior.column=rate"], ["none of which is asked for"]),
    (["algorithm.adv_estimator=rloo", "+algorithm.rollout_budget.enable=true"], ["and not with rloo"]),
    (["+algorithm.rollout_budget.min_rollouts=20"], ["min_rollouts=20 is more than max_rollouts=16"]),
    (
        [
            "algorithm.adv_estimator=vimpo",
            "+algorithm.vimpo.baseline=fused",
            "+algorithm.prior.weight=0",
            "algorithm.lam=2",
        ],
        ["algorithm.prior.weight=0", "algorithm.lam=2"],
    ),
]


@pytest.mark.parametrize(("overrides", "named"), REFUSED)
def test_what_it_cannot_run_with_is_refused_at_once(overrides, named):
    with pytest.raises(ValueError) as caught:
        validate(compose(*overrides))
    assert all(part in str(caught.value) for part in named), str(caught.value)


@pytest.mark.parametrize("baseline", ["fused", "posterior_mean"])
def test_vimpo_takes_a_baseline_with_a_prior(baseline):
    config = compose(
        "algorithm.adv_estimator=vimpo", f"+algorithm.vimpo.baseline={baseline}", "+algorithm.prior.column=x"
    )
    validate(config)
    assert config.actor_rollout_ref.actor.policy_loss.vimpo.baseline == baseline


def test_a_grpo_run_without_them_is_left_as_it_was():
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from verl_patches.family_trainer import trainer_class

    assert GRPO[0] == "algorithm.adv_estimator=grpo"
    assert trainer_class(PPOTrainerSync, compose()) is PPOTrainerSync
    budgeted = trainer_class(PPOTrainerSync, compose("+algorithm.rollout_budget.enable=true"))
    assert issubclass(budgeted, PPOTrainerSync) and [c.__name__ for c in budgeted.__mro__[1:4]] == [
        "PriorTrainer", "BudgetedTrainer", "PPOTrainerSync"
    ]  # fmt: skip
