"""Rollouts on demand (V0.5, arXiv 2603.10848): each prompt is answered until one answer more gains less than it costs.

The rule is `baselines.wants_another_rollout`; here are its knobs and the bookkeeping of one prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vimpo_verl import section as section_reader
from vimpo_verl.baselines import MAX_ROLLOUTS, MIN_ROLLOUTS, wants_another_rollout

SECTION = "algorithm.rollout_budget"


@dataclass(frozen=True)
class RolloutBudgetConfig:
    """Knobs under `algorithm.rollout_budget`.

    Attributes:
        enable: False takes rollout.n answers a prompt with algorithm.adv_estimator=v05, too.
        min_rollouts, max_rollouts: answers of a prompt, at least and at most.
        cost: c, what an answer more must gain, in squared units of a reward from 0 to 1: a number >= 0, or "auto" for the
            paper's 1 / max_rollouts^2 in rewards of -1 and +1, here a quarter of it.
        round_size: answers that are asked for at once where the rule wants one more. 1 is the paper's; a prompt that needs
            all 16 then waits for twelve answers one after another.
    """

    enable: bool = True
    min_rollouts: int = MIN_ROLLOUTS
    max_rollouts: int = MAX_ROLLOUTS
    cost: float | str = "auto"
    round_size: int = 1


def parse_config(section: Mapping[str, Any] | None) -> tuple[RolloutBudgetConfig, list[str]]:
    """Read `algorithm.rollout_budget`, collecting every problem.

    Args:
        section: the mapping under `algorithm.rollout_budget`, or None if the user gave none.

    Returns:
        The configuration (defaults where a value was unusable) and the problems found, each a sentence that names the
        key and says what to write instead. The configuration may be used only if there are none.
    """
    values, problems = section_reader.read(section, SECTION, _CHECKS, f"+{SECTION}.max_rollouts=16")
    config = RolloutBudgetConfig(**values)
    if config.min_rollouts > config.max_rollouts:
        problems.append(
            f"{SECTION}.min_rollouts={config.min_rollouts} is more than max_rollouts={config.max_rollouts}: write the "
            "smaller number first"
        )
    return config, problems


class PromptBudget:
    """How many answers a prompt may have, while they come in.

    Args:
        config: the knobs.
        prior: what its mean reward is taken to be, from 0 to 1.

    Attributes:
        asked: answers asked for so far.
        closed: no more will be.
    """

    def __init__(self, config: RolloutBudgetConfig, prior: float):
        self.config, self.prior = config, prior
        self.asked, self.closed = config.min_rollouts, False
        self.rewards: list[float] = []
        self.missing = 0

    def settle(self, reward: float | None) -> None:
        """An answer has ended. When all that were asked for have, the rule says whether there will be more.

        A prompt of which an answer is missing, or has a reward that is not from 0 to 1, gets no more: the trainer deals with
        both.

        Args:
            reward: None if generation or reward raised.
        """
        if reward is None:
            self.missing += 1
        else:
            self.rewards.append(reward)
        if len(self.rewards) + self.missing < self.asked:
            return
        if self.missing or not all(0 <= given <= 1 for given in self.rewards) or not self._wants_another():
            self.closed = True
        else:
            self.asked = min(self.asked + self.config.round_size, self.config.max_rollouts)

    def _wants_another(self) -> bool:
        mean = torch.tensor(self.rewards, dtype=torch.float64).mean()
        prior = torch.tensor(self.prior, dtype=torch.float64)
        config, cost = self.config, None if self.config.cost == "auto" else self.config.cost
        return wants_another_rollout(
            mean, prior, len(self.rewards), cost=cost, minimum=config.min_rollouts, maximum=config.max_rollouts
        ).item()


def budget_metrics(config: RolloutBudgetConfig, rollouts: list[int]) -> dict[str, float]:
    """What was spent on a batch.

    Args:
        config: the knobs.
        rollouts: answers of each prompt, at least one prompt.
    """
    return {
        "budget/rollouts": sum(rollouts),
        "budget/rollouts_per_prompt": sum(rollouts) / len(rollouts),
        "budget/share_at_min": sum(count <= config.min_rollouts for count in rollouts) / len(rollouts),
        "budget/share_at_max": sum(count >= config.max_rollouts for count in rollouts) / len(rollouts),
    }


def _count(value: Any) -> tuple[str, Any]:
    complaint, count = section_reader.integer(value)
    return ("", count) if not complaint and count >= 1 else ("write an integer, 1 or greater", None)


def _auto_or_cost(value: Any) -> tuple[str, Any]:
    if value == "auto":
        return "", value
    found = section_reader.number(value)
    return ("", found) if found is not None and found >= 0 else ("write auto or a number, 0 or greater", None)


_CHECKS = {
    "enable": section_reader.flag,
    "min_rollouts": _count,
    "max_rollouts": _count,
    "cost": _auto_or_cost,
    "round_size": _count,
}
