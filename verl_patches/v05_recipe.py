"""What V0.5 needs of a verl recipe, as pure functions of verl's configuration; its budget and prior are in group_checks."""

from collections.abc import Iterator
from typing import Any

from verl_patches.recipe_checks import trainer_problems, type_problems


def problems(config: Any) -> list[str]:
    """Everything in the recipe that V0.5 cannot run with.

    Args:
        config: verl's configuration, a DictConfig, with algorithm.adv_estimator=v05.

    Returns:
        One sentence a problem; empty if the recipe fits.
    """
    found = list(type_problems(config))
    if found:
        return found  # the other checks look into these values
    return [*trainer_problems(config, "V0.5"), *_algorithm(config)]


def warnings(config: Any, knobs: Any) -> list[str]:
    """What runs, but perhaps not as meant. `config` as for `problems`; knobs: those of algorithm.v05."""
    return []


def _algorithm(config: Any) -> Iterator[str]:
    if config.algorithm.get("use_kl_in_reward", False):
        yield (
            "algorithm.use_kl_in_reward=True: V0.5's baseline is of rewards from 0 to 1, and the KL would be in them; write "
            "algorithm.use_kl_in_reward=False (actor.use_kl_loss works)"
        )
    if config.get("critic") is not None and config.critic.get("enable"):
        yield "critic.enable=True: V0.5 has a prior instead of a critic; remove critic.enable"
