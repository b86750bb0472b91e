"""A program of a user's own, as recipes have it: task runner, trainer, checkpoint callback and main in one file.

Run as `python -m`, so that Ray pickles runner and trainer by value, with the functions of verl that they use. The callback
writes what it finds at its call to `callback.jsonl` beside the checkpoints; it is named by
`trainer.checkpoint_callback_class=users_run.UsersCallback`.
"""

import json
from pathlib import Path

import hydra
import ray
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import trainer_base
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device


class UsersTrainer(trainer_base.TRAINER_REGISTRY["sync"]):
    """Derived from what is in the registry; logs one number of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.steps_seen = 0

    def _compute_advantage(self, batch, metrics):
        self.steps_seen += 1
        metrics["users/steps_seen"] = self.steps_seen
        return super()._compute_advantage(batch, metrics)


class UsersCallback(CheckpointCallback):
    """Lists a checkpoint's files."""

    def on_save(self, trainer, global_step, checkpoint_dir, **_):
        folder = Path(checkpoint_dir)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        record = {"step": global_step, "files": files, "steps_seen": trainer.steps_seen}
        with (folder.parent / "callback.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


@ray.remote
class UsersTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """Validates in the runner, as verl.experimental.one_step_off_policy does, and runs the trainer above."""

    def run(self, config):
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY  # of the runner's process

        TRAINER_REGISTRY["sync"] = UsersTrainer
        super().run(config)


@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):
    auto_set_device(config)
    run_ppo(config, task_runner_class=UsersTaskRunner)


if __name__ == "__main__":
    main()
