"""Seam: a run with a trainer that the family and reward noise do not reach is refused, where it asks for either.

Touches verl.trainer.ppo.ray_trainer.RayPPOTrainer.__new__ and _create_dataloader. Checked against verl 0.9.1; no upstream issue.

Beside the v1 trainers verl has those derived from RayPPOTrainer: the older one, one_step_off_policy, fully_async_policy and
the recipes'. Which of them will run cannot be seen when the configuration is validated, and some mains never validate it. Where
the main uses verl's run_ppo, verl_patches.other_runners refuses before Ray starts; here it is done where the trainer is made,
before any model is loaded. Twice, because neither place is enough: a recipe's own _create_dataloader may not call verl's, and Ray
makes an actor (fully_async_policy) by a __new__ without arguments.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_patches.functions import wrap
from verl_patches.switch import asked_for


def install(ray_trainer: ModuleType) -> None:
    """Put the refusal into RayPPOTrainer of the module verl.trainer.ppo.ray_trainer."""
    trainer = ray_trainer.RayPPOTrainer
    if trainer.__new__ is not object.__new__:
        raise RuntimeError(f"RayPPOTrainer has a __new__ of its own, {trainer.__new__}")
    trainer.__new__ = staticmethod(_new_trainer)
    wrap(trainer, "_create_dataloader", _create_dataloader)


def _new_trainer(cls: type, *args, **kwargs):
    """RayPPOTrainer.__new__.

    Raises:
        RuntimeError: the configuration among the arguments asks for an estimator of this package or reward noise.
    """
    from omegaconf import DictConfig

    for value in (*args, *kwargs.values()):
        if isinstance(value, DictConfig) and "algorithm" in value:
            _refuse(cls, value)
    return object.__new__(cls)


def _create_dataloader(verls: Callable, self: Any, *args, **kwargs) -> None:
    """As verl's.

    Raises:
        RuntimeError: an estimator of this package or reward noise is asked for.
    """
    _refuse(type(self), self.config)
    verls(self, *args, **kwargs)


def _refuse(trainer: type, config: Any) -> None:
    asked = asked_for(config)
    if asked:
        raise RuntimeError(
            f"{' and '.join(asked)}: this run's trainer, {trainer.__name__}, is none of verl's v1 trainers, which that "
            "needs. Start the run with python -m verl.trainer.main_ppo and trainer.v1.trainer_mode=sync or colocate_async"
        )
