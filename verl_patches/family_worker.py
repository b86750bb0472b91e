"""What the hybrid workers of the family share: a checkpoint is one of finite weights.

Touches verl.workers.engine_workers.ActorRolloutRefWorker, by subclassing; a trainer of the family puts a subclass where verl's
was. Checked against verl 0.9.1; no upstream issue.
"""

import torch
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker


class FamilyWorker(ActorRolloutRefWorker):
    """verl's hybrid worker, which saves no weights that are not finite."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """As verl's, of finite weights only.

        With max_ckpt_to_keep=1 verl deletes the checkpoint before this one when this one's shards are there, before the rest
        is and before its tracker names it: a run that dies in between has none. So one more is kept then, which takes no more
        room than verl's own while it saves.

        Raises:
            FloatingPointError: on every rank, if a weight of any is not finite.
        """
        self._require_finite_weights(global_step)
        keep = 2 if max_ckpt_to_keep == 1 else max_ckpt_to_keep
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep=keep)

    def _require_finite_weights(self, step: int) -> None:
        module = self.actor.engine.module
        chunks = module if isinstance(module, list) else [module]  # Megatron's engine has one a virtual pipeline stage
        bad = [name for chunk in chunks for name, weight in chunk.named_parameters() if not _is_finite(weight)]
        anywhere = torch.tensor([len(bad)], device=self.actor.device_name)
        torch.distributed.all_reduce(anywhere)
        if anywhere.item():
            here = f"such as {bad[0]}" if bad else "none"
            raise FloatingPointError(
                f"step {step}: the weights of the policy are not finite ({len(bad)} tensors on rank "
                f"{torch.distributed.get_rank()}, {here}): no checkpoint is written of them"
            )


def _is_finite(weight: torch.Tensor) -> bool:
    shard = weight.detach()
    shard = shard.to_local() if hasattr(shard, "to_local") else shard
    return bool(torch.isfinite(shard).all())
