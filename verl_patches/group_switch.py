"""What the user asks for beside an estimator's own knobs: algorithm.rollout_budget and algorithm.prior, and who needs a prior."""

from typing import Any

from verl_patches.switch import knobs_of, section_of
from vimpo_verl import prior, rollout_budget
from vimpo_verl.config import BASELINES_WITH_PRIOR
from vimpo_verl.prior import PriorConfig
from vimpo_verl.rollout_budget import RolloutBudgetConfig


def is_v05(config: Any) -> bool:
    """Whether verl's configuration (a DictConfig) asks for V0.5."""
    return config.algorithm.get("adv_estimator") == "v05"


def budget_of(config: Any) -> tuple[RolloutBudgetConfig | None, list[str]]:
    """The knobs under algorithm.rollout_budget, None where a prompt has rollout.n answers; and the problems found in them.

    It is on with V0.5, and with any other estimator where the section is there.
    """
    given = section_of(config, "rollout_budget")
    if given is None and not is_v05(config):
        return None, []
    knobs, problems = rollout_budget.parse_config(given)
    return (knobs if knobs.enable else None), problems


def prior_of(config: Any) -> tuple[PriorConfig | None, list[str]]:
    """The knobs under algorithm.prior, None where nothing needs a prior; and the problems found in them."""
    given = section_of(config, "prior")
    knobs, problems = prior.parse_config(given)
    if needs_prior(config):
        return knobs, problems
    if given is not None:
        problems.append(
            f"{prior.SECTION} is read by algorithm.adv_estimator=v05, algorithm.rollout_budget and algorithm.vimpo.baseline="
            f"{' or '.join(BASELINES_WITH_PRIOR)}, none of which is asked for: remove the section, or ask"
        )
    return None, problems


def needs_prior(config: Any) -> bool:
    """Whether something in this run asks what a prompt's mean reward is taken to be."""
    if is_v05(config) or budget_of(config)[0] is not None:
        return True
    return config.algorithm.get("adv_estimator") == "vimpo" and knobs_of(config)[0].baseline in BASELINES_WITH_PRIOR
