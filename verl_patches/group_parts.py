"""Priors and rollouts on demand in front of a trainer, for any estimator. No seam: verl_patches.family_trainer calls it."""

from typing import Any

from verl_patches.group_switch import budget_of, prior_of
from verl_patches.prior_state import PriorTrainer
from verl_patches.rollout_budget import BudgetedTrainer


def group_parts(config: Any) -> tuple[type, ...]:
    """The classes that a configuration asks for: none, or the prior's and perhaps the budget's, which needs it."""
    asked = {PriorTrainer: prior_of(config)[0], BudgetedTrainer: budget_of(config)[0]}
    return tuple(part for part, knobs in asked.items() if knobs is not None)


def with_group_parts(trainer: type, config: Any) -> type:
    """`trainer` itself where it has them or none is asked for, else a subclass of it with them in front."""
    parts = tuple(part for part in group_parts(config) if not issubclass(trainer, part))
    return type(f"Grouped{trainer.__name__}", (*parts, trainer), {}) if parts else trainer
