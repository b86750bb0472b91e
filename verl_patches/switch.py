"""What the user asks for: one estimator of the family by algorithm.adv_estimator, and algorithm.reward_noise, for any."""

from typing import Any

from verl_patches.family import FAMILY, Member
from vimpo_verl import reward_noise


def member_of(config: Any) -> Member | None:
    """The estimator of this package that verl's configuration (a DictConfig) asks for; None for one of verl's own."""
    return FAMILY.get(config.algorithm.get("adv_estimator"))


def knobs_of(config: Any) -> tuple[Any, list[str]]:
    """The knobs under algorithm.<name of the estimator> of verl's configuration, and the problems found in them.

    Args:
        config: verl's configuration, which asks for an estimator of this package.
    """
    member = member_of(config)
    return member.parse_config(section_of(config, member.name))


def noise_of(config: Any) -> tuple[reward_noise.RewardNoiseConfig, list[str]]:
    """The knobs under algorithm.reward_noise of verl's configuration, and the problems found in them."""
    return reward_noise.parse_config(section_of(config, "reward_noise"))


def asked_for(config: Any) -> list[str]:
    """The keys of verl's configuration by which it asks for anything of this package; empty where it asks for nothing."""
    member, (noise, problems) = member_of(config), noise_of(config)
    asked = [f"algorithm.adv_estimator={member.name}"] if member else []
    return asked + (["algorithm.reward_noise"] if problems or noise.flip_prob > 0 else [])


def section_of(config: Any, name: str) -> Any:
    """What stands under algorithm.<name> of verl's configuration, as plain values; None where nothing does."""
    from omegaconf import OmegaConf

    section = config.algorithm.get(name)
    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
