"""Seam: a run with a trainer that the family and reward noise do not reach is refused, where it asks for either.

Touches verl.trainer.ppo.ray_trainer.RayPPOTrainer._create_dataloader. Checked against verl 0.9.1; no upstream issue.

Beside the v1 trainers verl has those derived from RayPPOTrainer: the older one, one_step_off_policy, fully_async_policy and
the recipes'. Which of them will run cannot be seen when the configuration is validated, and some mains never validate it. Their
constructors have one thing in common before the first step: in one process of the run, the data loader is made.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_patches.functions import wrap
from verl_patches.switch import member_of, noise_of


def install(ray_trainer: ModuleType) -> None:
    """Wrap _create_dataloader in the module verl.trainer.ppo.ray_trainer."""
    wrap(ray_trainer.RayPPOTrainer, "_create_dataloader", _create_dataloader)


def _create_dataloader(verls: Callable, self: Any, *args, **kwargs) -> None:
    """As verl's.

    Raises:
        RuntimeError: an estimator of this package or reward noise is asked for.
    """
    noise, problems = noise_of(self.config)
    member = member_of(self.config)
    asked = [f"algorithm.adv_estimator={member.name}"] if member else []
    asked += ["algorithm.reward_noise"] if problems or noise.flip_prob > 0 else []
    if asked:
        raise RuntimeError(
            f"{' and '.join(asked)}: this run's trainer, {type(self).__name__}, is none of verl's v1 trainers, which that "
            "needs. Start the run with python -m verl.trainer.main_ppo and trainer.v1.trainer_mode=sync or colocate_async"
        )
    verls(self, *args, **kwargs)
