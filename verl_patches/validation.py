"""Seam: validate a VIMPO run, or one with reward noise, in the driver, before Ray starts; carry the knobs to the workers.

Touches verl.utils.config.validate_config, the one function that sees the user's configuration in the driver. Wrapped
when verl imports that module. Checked against verl 0.9.1; no upstream issue.

Which trainer will run is not known here, so what is said here is that the configuration is accepted; that VIMPO is in force
is said by its trainer.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from verl_patches import family_checks, recipe_checks, seams
from verl_patches.functions import wrap
from verl_patches.switch import is_vimpo, knobs_of, noise_of
from vimpo_verl import __version__
from vimpo_verl.config import VimpoConfig
from vimpo_verl.reward_noise import SECTION as NOISE_SECTION

logger = logging.getLogger("vimpo_verl")


def install(config_module: ModuleType) -> None:
    """Wrap validate_config in the module verl.utils.config."""
    wrap(config_module, "validate_config", _validate_config)


def _validate_config(verls: Callable, config: Any, *args, **kwargs) -> None:
    if not is_vimpo(config):
        print(f"vimpo_verl {__version__}: loaded, inert (algorithm.adv_estimator={config.algorithm.adv_estimator})")
        _refuse(f"{NOISE_SECTION} cannot run with this configuration", _noise_problems(config))
        _announce_noise(config)
        _refuse("this configuration cannot run", _family_problems(config))
        family_checks.carry_to_workers(config)
    else:
        prepare(config)
    return verls(config, *args, **kwargs)


def prepare(config: Any) -> VimpoConfig:
    """Check a VIMPO configuration and make it the one that verl's workers need. Changes `config`.

    Args:
        config: verl's configuration, a DictConfig, with algorithm.adv_estimator=vimpo.

    Returns:
        The knobs.

    Raises:
        ValueError: listing every problem at once.
    """
    knobs, knob_problems = knobs_of(config)
    found = knob_problems + recipe_checks.problems(config) + _seams_not_in_force(_everyones()) + _noise_problems(config)
    found += _family_problems(config)
    _refuse("algorithm.adv_estimator=vimpo cannot run with this configuration", list(dict.fromkeys(found)))
    for warning in recipe_checks.warnings(config, knobs) + _version_warning():
        logger.warning("vimpo_verl: %s", warning)
    _carry_to_workers(config, knobs)
    family_checks.carry_to_workers(config)
    print(f"vimpo_verl {__version__}: VIMPO accepted with this configuration: {knobs}, lam={config.algorithm.lam}")
    _announce_noise(config)
    return knobs


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ValueError(f"{what}:\n{lines}")


def _noise_problems(config: Any) -> list[str]:
    """What stands in the way of the reward noise that `config` asks for; nothing where it asks for none."""
    if config.algorithm.get("reward_noise") is None:
        return []
    needed = [seam for seam in _everyones() if seam.module == "verl.trainer.ppo.v1"]
    return noise_of(config)[1] + recipe_checks.noise_problems(config) + _seams_not_in_force(needed)


def _family_problems(config: Any) -> list[str]:
    """What stands in the way of the V0.5, rollouts on demand and priors that `config` asks for."""
    return family_checks.problems(config) + _seams_not_in_force(family_checks.needed_seams(config))


def _announce_noise(config: Any) -> None:
    noise, _ = noise_of(config)
    if noise.flip_prob > 0:
        print(f"vimpo_verl {__version__}: reward noise accepted with this configuration: {noise}")


def _everyones() -> list[seams.Seam]:
    """The seams that VIMPO itself needs."""
    return [seam for seam in seams.SEAMS if seam.name not in family_checks.SEAMS]


def _seams_not_in_force(needed: Iterable[seams.Seam]) -> list[str]:
    import verl.trainer.ppo.v1  # noqa: F401  the last of the modules that seams belong to

    failures = seams.failures()
    return [
        f"the seam '{seam.name}' ({seam.module}: {seam.touches}) is not in force: "
        + failures.get(seam.name, "verl did not load the plugin; is VERL_USE_EXTERNAL_PLUGINS set?")
        for seam in needed
        if not seams.is_in_force(seam)
    ]


def _verl_version() -> str:
    import verl

    return verl.__version__


def _version_warning() -> list[str]:
    if _verl_version() in seams.TESTED_VERL:
        return []
    return [f"verl {_verl_version()} is not one that vimpo_verl is tested with: {', '.join(seams.TESTED_VERL)}"]


def _carry_to_workers(config: Any, knobs: VimpoConfig) -> None:
    """Name VIMPO's policy loss, with the knobs, where verl's workers build their losses from."""
    from dataclasses import asdict

    from omegaconf import open_dict

    actor_rollout_ref = config.actor_rollout_ref
    policy_loss = actor_rollout_ref.actor.policy_loss
    with open_dict(policy_loss):
        policy_loss._target_ = "verl_patches.policy_loss_config.VimpoPolicyLossConfig"
        policy_loss.loss_mode = "vimpo"
        policy_loss.vimpo = {"_target_": "vimpo_verl.config.VimpoConfig", **asdict(knobs)}
    _fit_reference_to_actor(actor_rollout_ref)


def _fit_reference_to_actor(actor_rollout_ref: Any) -> None:
    """Settings of the reference worker that a GRPO recipe without KL has no reason to give."""
    from omegaconf import open_dict

    actor, ref, rollout = actor_rollout_ref.actor, actor_rollout_ref.ref, actor_rollout_ref.rollout
    # verl wants a micro-batch size of whatever reference worker there is. A GRPO recipe without KL gives none, and the
    # joint pass takes its micro-batches from the actor's log-prob settings.
    if ref.log_prob_micro_batch_size is None and ref.log_prob_micro_batch_size_per_gpu is None:
        ref.log_prob_micro_batch_size_per_gpu = rollout.log_prob_micro_batch_size_per_gpu
    ref.fsdp_config.ulysses_sequence_parallel_size = recipe_checks.sequence_parallel_size(actor)
    for name in recipe_checks.PRECISION:
        if ref.fsdp_config.get(name) != actor.fsdp_config.get(name):
            with open_dict(ref.fsdp_config):
                ref.fsdp_config[name] = copy.deepcopy(actor.fsdp_config[name])
