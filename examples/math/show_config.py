"""Check a verl configuration as `python -m verl.trainer.main_ppo` would, print it resolved as YAML, and start nothing.

Takes the Hydra overrides of main_ppo. What the checks say goes to stderr, so that stdout is the configuration alone.
Exits with 1 if verl, or vimpo_verl in verl's own check, refuses the configuration.
"""

import contextlib
import sys

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf


def resolved_config(overrides: list[str]) -> DictConfig:
    """verl's configuration with these overrides, interpolations included, before any check has changed it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def check(config: DictConfig) -> None:
    """verl's check, on a copy because VIMPO's part of it fills settings in. Raises what main_ppo would raise."""
    # Here, because verl's plugins wrap these names when verl is imported.
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    copy = config.copy()
    validate_config(config=copy, use_reference_policy=need_reference_policy(copy), use_critic=need_critic(copy))


def main() -> None:
    config = resolved_config(sys.argv[1:])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            check(config)
    except (ValueError, AssertionError) as error:
        sys.exit(f"show_config.py: refused: {error}")
    print(OmegaConf.to_yaml(config, resolve=True))


if __name__ == "__main__":
    main()
