"""What V0.5, rollouts on demand and priors need of a verl recipe, as pure functions of verl's configuration.

As verl_patches.recipe_checks: every check yields sentences that name the key, say what is wrong and what to write instead.
"""

from collections.abc import Iterator
from typing import Any

from verl_patches import seams
from verl_patches.family_switch import budget_of, is_v05, prior_of
from verl_patches.recipe_checks import TRAINER_MODES
from vimpo_verl.prior import SECTION as PRIOR_SECTION
from vimpo_verl.rollout_budget import SECTION as BUDGET_SECTION

SEAMS = ("estimator v05", "priors", "rollouts on demand")  # of verl_patches.seams: what nobody else needs
BUDGETED = ("v05", "vimpo", "grpo")  # estimators that have been seen with groups of unequal size
# verl_patches.rollout_budget.MANAGER, which cannot be imported before verl's trainer
MANAGER = "verl_patches.rollout_budget.BudgetedAgentLoopManager"


def problems(config: Any) -> list[str]:
    """Everything in the recipe that what it asks for of these three cannot run with; empty if it asks for none.

    Args:
        config: verl's configuration, a DictConfig.
    """
    budget, found = budget_of(config)
    prior, prior_problems = prior_of(config)
    found = found + prior_problems
    if found or (budget is None and prior is None):
        return found
    found += _trainer(config)
    if prior.source == "function":
        found += _function(prior)
    if is_v05(config):
        found += _v05(config)
    if budget is not None:
        found += _budget(config)
    if prior.source == "own_past":
        found += _own_past(config)
    return found


def needed_seams(config: Any) -> list[seams.Seam]:
    """The seams that it asks for of these three; none if it asks for none."""
    asked = (is_v05(config), prior_of(config)[0] is not None, budget_of(config)[0] is not None)
    names = {name for name, is_asked in zip(SEAMS, asked, strict=True) if is_asked}
    if names:
        names.add("trainer, worker, joint pass and value loss")  # which puts the parts in front of the trainer
    return [seam for seam in seams.SEAMS if seam.name in names]


def carry_to_workers(config: Any) -> None:
    """Name the agent loop manager that knows the budget, by verl's own key. Changes `config`."""
    from omegaconf import open_dict

    if budget_of(config)[0] is not None:
        agent = config.actor_rollout_ref.rollout.agent
        with open_dict(agent):
            agent.agent_loop_manager_class = MANAGER


def _who(config: Any) -> str:
    return "algorithm.adv_estimator=v05" if is_v05(config) else f"{BUDGET_SECTION} or {PRIOR_SECTION}"


def _trainer(config: Any) -> Iterator[str]:
    if not config.trainer.get("use_v1", True):
        yield f"trainer.use_v1=False: {_who(config)} is built on verl's v1 trainer; write trainer.use_v1=True"
    mode = config.trainer.get("v1", {}).get("trainer_mode", "sync")
    if mode not in TRAINER_MODES:
        yield (
            f"trainer.v1.trainer_mode={mode}: {_who(config)} has no trainer for it; write trainer.v1.trainer_mode=sync or "
            "colocate_async"
        )


def _function(prior: Any) -> Iterator[str]:
    from verl_patches.prior_state import load_function

    try:
        load_function(prior)
    except ValueError as error:
        yield str(error)


def _v05(config: Any) -> Iterator[str]:
    if config.algorithm.get("use_kl_in_reward", False):
        yield (
            "algorithm.use_kl_in_reward=True: V0.5's baseline is of rewards from 0 to 1, and the KL would be in them; write "
            "algorithm.use_kl_in_reward=False (actor.use_kl_loss works)"
        )
    if config.get("critic") is not None and config.critic.get("enable"):
        yield "critic.enable=True: V0.5 has a prior instead of a critic; remove critic.enable"


def _budget(config: Any) -> Iterator[str]:
    estimator = config.algorithm.adv_estimator
    if estimator not in BUDGETED:
        yield (
            f"{BUDGET_SECTION} works with algorithm.adv_estimator={', '.join(BUDGETED)}, and not with {estimator}: remove it"
        )
    manager = config.actor_rollout_ref.rollout.get("agent", {}).get("agent_loop_manager_class")
    if manager and manager != MANAGER:
        yield (
            f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={manager}: {BUDGET_SECTION} puts its own in that "
            f"place, which decides prompt by prompt; remove the key, or {BUDGET_SECTION}"
        )
    model = config.reward.reward_model
    if model.enable and not model.enable_resource_pool:
        yield (
            "reward.reward_model.enable=True with enable_resource_pool=False: such rewards come after all answers, and "
            f"{BUDGET_SECTION} decides by them while it generates; write reward.reward_model.enable_resource_pool=True"
        )
    if config.algorithm.get("reward_noise") is not None:
        yield (
            f"{BUDGET_SECTION} and algorithm.reward_noise: the budget would be decided by the clean rewards; write one of them "
            "(algorithm.rollout_budget.enable=false with V0.5)"
        )


def _own_past(config: Any) -> Iterator[str]:
    groups = config.algorithm.get("filter_groups")
    if groups is not None and groups.get("enable", False):
        yield (
            "algorithm.filter_groups.enable=True: a prompt's own past would miss all groups that are filtered out, which are "
            f"those with equal rewards; give the prior by +{PRIOR_SECTION}.column=... or +{PRIOR_SECTION}.path=..., or "
            "write algorithm.filter_groups.enable=False"
        )
