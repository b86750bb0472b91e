"""What rollouts on demand and priors need of a verl recipe, as pure functions of verl's configuration.

As verl_patches.recipe_checks: every check yields sentences that name the key, say what is wrong and what to write instead.
"""

from collections.abc import Iterator
from typing import Any

from verl_patches import seams
from verl_patches.group_switch import budget_of, prior_of
from verl_patches.recipe_checks import trainer_problems
from verl_patches.switch import member_of
from vimpo_verl.prior import SECTION as PRIOR_SECTION
from vimpo_verl.rollout_budget import SECTION as BUDGET_SECTION

SEAMS = ("priors", "rollouts on demand")  # of verl_patches.seams: what nobody else needs
BUDGETED = ("v05", "vimpo", "grpo")  # estimators that have been seen with groups of unequal size
# verl_patches.rollout_budget.MANAGER, which cannot be imported before verl's trainer
MANAGER = "verl_patches.rollout_budget.BudgetedAgentLoopManager"


def problems(config: Any) -> list[str]:
    """Everything in the recipe that what it asks for of these two cannot run with; empty if it asks for none.

    Args:
        config: verl's configuration, a DictConfig.
    """
    budget, found = budget_of(config)
    prior, prior_problems = prior_of(config)
    found = found + prior_problems
    if found or (budget is None and prior is None):
        return found
    if member_of(config) is None:  # one of this package has looked at its trainer itself
        found += trainer_problems(config, f"{BUDGET_SECTION} or {PRIOR_SECTION}")
    if prior.source == "function":
        found += _function(prior)
    if budget is not None:
        found += _budget(config)
    if prior.source == "own_past":
        found += _own_past(config)
    return found


def needed_seams(config: Any) -> list[seams.Seam]:
    """The seams of these two that it asks for; none if it asks for none."""
    asked = (prior_of(config)[0] is not None, budget_of(config)[0] is not None)
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


def _function(prior: Any) -> Iterator[str]:
    from verl_patches.prior_state import load_function

    try:
        load_function(prior)
    except ValueError as error:
        yield str(error)


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
