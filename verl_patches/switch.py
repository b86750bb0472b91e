"""What the user asks for: algorithm.adv_estimator=vimpo, the one switch, and algorithm.reward_noise, for any estimator."""

from typing import Any

from vimpo_verl import reward_noise
from vimpo_verl.config import VimpoConfig, parse_config


def is_vimpo(config: Any) -> bool:
    """Whether verl's configuration (a DictConfig) asks for VIMPO."""
    return config.algorithm.get("adv_estimator") == "vimpo"


def knobs_of(config: Any) -> tuple[VimpoConfig, list[str]]:
    """The knobs under algorithm.vimpo of verl's configuration, and the problems found in them."""
    return parse_config(_section(config, "vimpo"))


def noise_of(config: Any) -> tuple[reward_noise.RewardNoiseConfig, list[str]]:
    """The knobs under algorithm.reward_noise of verl's configuration, and the problems found in them."""
    return reward_noise.parse_config(_section(config, "reward_noise"))


def _section(config: Any, name: str) -> Any:
    from omegaconf import OmegaConf

    section = config.algorithm.get(name)
    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
