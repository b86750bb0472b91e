"""Seam: validate a run of the family, or one with reward noise, in the driver, before Ray starts; carry the knobs to the workers.

Touches verl.utils.config.validate_config, the one function that sees the user's configuration in the driver. Wrapped
when verl imports that module. Checked against verl 0.9.1; no upstream issue.

Which trainer will run is not known here, so what is said here is that the configuration is accepted; that the estimator is in
force is said by its trainer.
"""

import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from verl_patches import engine_checks, group_checks, recipe_checks, seams
from verl_patches.family import FAMILY, Member
from verl_patches.functions import wrap
from verl_patches.presence import where_the_plugin_is
from verl_patches.switch import knobs_of, member_of, noise_of
from vimpo_verl import __version__
from vimpo_verl.prior import SECTION as PRIOR_SECTION
from vimpo_verl.reward_noise import SECTION as NOISE_SECTION
from vimpo_verl.rollout_budget import SECTION as BUDGET_SECTION

logger = logging.getLogger("vimpo_verl")


def install(config_module: ModuleType) -> None:
    """Wrap validate_config in the module verl.utils.config."""
    wrap(config_module, "validate_config", _validate_config)


def _validate_config(verls: Callable, config: Any, *args, **kwargs) -> None:
    if member_of(config) is None:
        estimator = config.algorithm.adv_estimator
        print(f"vimpo_verl {__version__}: loaded, inert (algorithm.adv_estimator={estimator}){_without_effect(config)}")
        sections = f"{NOISE_SECTION}, {BUDGET_SECTION} or {PRIOR_SECTION}"
        found = _noise_problems(config) + _group_problems(config)
        _refuse(f"{sections} cannot run with this configuration", list(dict.fromkeys(found)))
        _announce_noise(config)
        group_checks.carry_to_workers(config)
    else:
        prepare(config)
    return verls(config, *args, **kwargs)


def prepare(config: Any) -> Any:
    """Check a configuration of the family and make it the one that verl's workers need. Changes `config`.

    Args:
        config: verl's configuration, a DictConfig, that asks for an estimator of this package.

    Returns:
        The knobs.

    Raises:
        ValueError: listing every problem at once.
    """
    member = member_of(config)
    recipe = member.recipe_checks()
    knobs, knob_problems = knobs_of(config)
    found = knob_problems + recipe.problems(config) + _seams_not_in_force(_everyones()) + _noise_problems(config)
    found += _group_problems(config)
    _refuse(f"algorithm.adv_estimator={member.name} cannot run with this configuration", list(dict.fromkeys(found)))
    for warning in recipe.warnings(config, knobs) + _version_warning():
        logger.warning("vimpo_verl: %s", warning)
    if hasattr(recipe, "adjust"):
        recipe.adjust(config)
    _carry_to_workers(config, member, knobs)
    group_checks.carry_to_workers(config)
    plan = f", {recipe.plan(config, knobs)}" if hasattr(recipe, "plan") else ""
    print(
        f"vimpo_verl {__version__}: {member.title} accepted with this configuration{plan}: {knobs}, lam={config.algorithm.lam}"
        f"{_without_effect(config)}"
    )
    _announce_noise(config)
    return knobs


def _without_effect(config: Any) -> str:
    """Sections of other estimators of the family, such as a recipe keeps that goes back to GRPO for a twin."""
    idle = [
        f"algorithm.{name}" for name in FAMILY if name != config.algorithm.adv_estimator and name in config.algorithm
    ]
    return f"; without effect there: {', '.join(idle)}" if idle else ""


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


def _group_problems(config: Any) -> list[str]:
    """What stands in the way of the rollouts on demand and the priors that `config` asks for."""
    return group_checks.problems(config) + _seams_not_in_force(group_checks.needed_seams(config))


def _everyones() -> list[seams.Seam]:
    """The seams that every estimator of this package needs."""
    return [seam for seam in seams.SEAMS if seam.name not in group_checks.SEAMS]


def _announce_noise(config: Any) -> None:
    noise, _ = noise_of(config)
    if noise.flip_prob > 0:
        print(f"vimpo_verl {__version__}: reward noise accepted with this configuration: {noise}")


def _seams_not_in_force(needed: Iterable[seams.Seam]) -> list[str]:
    import verl.trainer.main_ppo
    import verl.trainer.ppo.v1  # noqa: F401

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


def _carry_to_workers(config: Any, member: Member, knobs: Any) -> None:
    """Name the estimator's policy loss, with the knobs, where verl's workers build their losses from."""
    from dataclasses import asdict

    from omegaconf import open_dict

    actor_rollout_ref = config.actor_rollout_ref
    if member.policy_loss:
        policy_loss = actor_rollout_ref.actor.policy_loss
        with open_dict(policy_loss):
            policy_loss._target_ = where_the_plugin_is(member.policy_loss.replace(":", "."))
            if policy_loss.loss_mode != member.name and member.keeps_policy_loss:
                policy_loss.recipe_loss_mode = policy_loss.loss_mode
            policy_loss.loss_mode = member.name
            policy_loss[member.name] = {"_target_": f"{type(knobs).__module__}.{type(knobs).__name__}", **asdict(knobs)}
    if member.needs_reference:
        _fit_reference_to_actor(actor_rollout_ref)


def _fit_reference_to_actor(actor_rollout_ref: Any) -> None:
    """Settings of the reference worker that a GRPO recipe without KL has no reason to give."""
    actor, ref, rollout = actor_rollout_ref.actor, actor_rollout_ref.ref, actor_rollout_ref.rollout
    # verl wants a micro-batch size of whatever reference worker there is. A GRPO recipe without KL gives none, and the
    # joint pass takes its micro-batches from the actor's log-prob settings.
    if ref.log_prob_micro_batch_size is None and ref.log_prob_micro_batch_size_per_gpu is None:
        ref.log_prob_micro_batch_size_per_gpu = rollout.log_prob_micro_batch_size_per_gpu
    engine_checks.fit_reference(actor, ref)
