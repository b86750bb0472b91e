"""Seam: a main whose runs are not verl's v1 trainers is refused before Ray starts, where it asks for the family or reward noise.

Touches verl.trainer.main_ppo.run_ppo, which verl's mains and many recipes' call in the driver with the class that will run the
task: one_step_off_policy and fully_async_policy, neither of which validates its configuration there, and DAPO's. Checked against
verl 0.9.1; no upstream issue.

A class that this module does not know is let through, for it may well make a v1 trainer; if not, the trainer is refused where it
is made (verl_patches.other_trainers).
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_patches.functions import wrap
from verl_patches.switch import asked_for

V1_RUNNERS = "verl.trainer.main_ppo"
OLDER_RUNNERS = "verl.trainer.main_ppo_v0"


def install(main_ppo: ModuleType) -> None:
    """Wrap run_ppo in the module verl.trainer.main_ppo."""
    wrap(main_ppo, "run_ppo", _run_ppo)


def _run_ppo(verls: Callable, config: Any, task_runner_class: Any, *args, **kwargs) -> None:
    """As verl's.

    Raises:
        RuntimeError: an estimator of this package or reward noise is asked for, and the runner makes another trainer than v1's.
    """
    asked = asked_for(config)
    if asked and _makes_another_trainer(getattr(task_runner_class, "__ray_actor_class__", task_runner_class)):
        raise RuntimeError(
            f"{' and '.join(asked)}: {_module_of(task_runner_class)} brings a trainer that is none of verl's v1 trainers, which "
            "that needs. Start the run with python -m verl.trainer.main_ppo and trainer.v1.trainer_mode=sync or colocate_async"
        )
    return verls(config, task_runner_class, *args, **kwargs)


def _makes_another_trainer(runner: type) -> bool:
    """Whether it is one of verl's runners that are not v1's, or derived from them, as DAPO's is."""
    modules = {_module_of(ancestor) for ancestor in runner.__mro__}
    if V1_RUNNERS in modules:
        return False
    return OLDER_RUNNERS in modules or any(module.startswith("verl.") for module in modules)


def _module_of(runner: Any) -> str:
    """Its module's name, also where it was started as `python -m`."""
    module = getattr(runner, "__ray_actor_class__", runner).__module__
    spec = getattr(sys.modules.get("__main__"), "__spec__", None) if module == "__main__" else None
    return spec.name if spec else module
