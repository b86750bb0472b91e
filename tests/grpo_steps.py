"""GRPO steps of verl's own trainer and worker in this process, as JSON: metrics and weights, to the bit.

`grpo_steps.py FOLDER`, with the tiny policy of engine_harness.make_models in the folder. Once with the registered trainer,
once with one derived from it; Ray, TransferQueue and vLLM are replaced as in_process.py does.
"""

import hashlib
import json
import sys
from pathlib import Path

import engine_harness
import pytest
from engine_samples import make_samples
from in_process import InMemoryQueue, InProcessGroup, make_config, run_trainer_step

STEPS = 2


class GrpoGroup(InProcessGroup):
    def compute_ref_log_prob(self, batch):
        output = self.worker.compute_ref_log_prob(self._data(batch))
        self.queue.put(batch.keys, batch.partition_id, output.exclude("metrics"))
        return batch


def derive(trainer: type) -> type:
    """As a user does it."""

    class OfAUser(trainer):
        def _compute_advantage(self, batch, metrics):
            metrics["of_a_user"] = 1.0
            return super()._compute_advantage(batch, metrics)

    return OfAUser


def grpo_steps(trainer_class: type, config, patch: pytest.MonkeyPatch) -> dict:
    """Metrics of each step and a hash of the weights at the end."""
    import transfer_queue
    import verl.workers.engine_workers as engine_workers
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    queue = InMemoryQueue()
    patch.setattr(transfer_queue, "kv_batch_get", queue.get)
    patch.setattr(transfer_queue, "kv_batch_put", queue.put)
    patch.setattr(engine_workers, "get_rollout_class", lambda name, mode: lambda **_: None)
    patch.setattr(PPOTrainer, "_build_replay_buffer", lambda self: None)
    trainer = trainer_class(config=config)
    trainer._init_resource_pool_mgr()
    worker_class = trainer.role_worker_mapping[Role.ActorRolloutRef].__ray_actor_class__
    worker = worker_class(config=config.actor_rollout_ref, role="actor_rollout_ref")
    worker.init_model()
    trainer.actor_rollout_wg = trainer.ref_policy_wg = GrpoGroup(worker, queue)
    trainer.ref_in_actor = False
    metrics = []
    for trainer.global_steps in range(1, STEPS + 1):
        metrics.append(run_trainer_step(trainer, queue, make_samples()))
    weights = engine_harness.parameters_of(worker.actor.engine)
    return {
        "trainer": type(trainer).__name__,
        "worker": worker_class.__module__,
        "metrics": [
            {name: float(value).hex() for name, value in step.items() if "perf/" not in name} for step in metrics
        ],
        "weights": {name: hashlib.sha256(w.numpy().tobytes()).hexdigest() for name, w in sorted(weights.items())},
    }


def main(folder: Path) -> None:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    engine_harness.start_process_group()
    found = {"plugin": "vimpo_verl.plugin" in sys.modules}
    for name, trainer_class in (
        ("registered", TRAINER_REGISTRY["sync"]),
        ("derived", derive(TRAINER_REGISTRY["sync"])),
    ):
        config = make_config(
            folder / "policy",
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.actor.use_kl_loss=True",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
        )
        with pytest.MonkeyPatch.context() as patch:
            found[name] = grpo_steps(trainer_class, config, patch)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
