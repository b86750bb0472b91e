"""The one switch: algorithm.adv_estimator=vimpo."""

from typing import Any

from vimpo_verl.config import VimpoConfig, parse_config


def is_vimpo(config: Any) -> bool:
    """Whether verl's configuration (a DictConfig) asks for VIMPO."""
    return config.algorithm.get("adv_estimator") == "vimpo"


def knobs_of(config: Any) -> tuple[VimpoConfig, list[str]]:
    """The knobs under algorithm.vimpo of verl's configuration, and the problems found in them."""
    from omegaconf import OmegaConf

    section = config.algorithm.get("vimpo")
    return parse_config(OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section)
