"""Seam: VIMPO's worker, which holds policy and reference and runs both in one pass.

Touches verl.workers.engine_workers.ActorRolloutRefWorker and TrainingWorker, by subclassing; VIMPO's trainer puts the
subclass where verl's was. Checked against verl 0.9.1; no upstream issue.
"""

import contextlib
import math
from pathlib import Path

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import TrainingWorker

from verl_patches import policy_model, reference_precision, reference_refresh
from verl_patches.family_worker import FamilyWorker
from verl_patches.fused_head import fused_heads
from verl_patches.joint_pass import joint_infer_batch
from verl_patches.lora_reference import AdaptersOff
from verl_patches.names import AT_OLD_POLICY, IS_REAL, NUM_SEQUENCES
from verl_patches.one_pass_update import OnePassUpdate, is_one_pass
from verl_patches.value_branch import VimpoLoss
from vimpo_verl.config import VimpoConfig


class VimpoTrainingWorker(TrainingWorker):
    """verl's worker of the policy, with VIMPO's loss."""

    def use_vimpo_loss(self, knobs: VimpoConfig, reference: TrainingWorker | AdaptersOff) -> None:
        """Add L_V to the loss function that verl has set, and fit the model to it (verl_patches.policy_model).

        Args:
            knobs: VIMPO's configuration.
            reference: the reference; with kappa_policy=current, and in one pass, it runs in every update.
        """
        self.reference = reference
        self.kappa_in_update = knobs.kappa_policy == "current" and knobs.kl_estimator in ("exact", "topk")
        self.through_kappa = not knobs.kappa_detach
        self.is_at_old_policy = False
        self.set_loss_fn(VimpoLoss(self.loss_fn, knobs, reference.engine))
        policy_model.fit(self)

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """The updates on a batch; arguments and result are verl's, in one pass with the batch's `vimpo/` metrics."""
        self.is_at_old_policy = tu.get_non_tensor_data(data, AT_OLD_POLICY, False)
        if not is_one_pass(data):
            return super().train_mini_batch(data)
        loss = self.loss_fn
        loss.one_pass = OnePassUpdate(loss.knobs, sequences=len(data))
        try:
            output = super().train_mini_batch(data)
            found = loss.one_pass.metrics(data, loss.actor_config, self.engine.get_data_parallel_group())
        finally:
            loss.one_pass = None
        if output is not None:  # only the first rank of a sequence-parallel group collects
            tu.get(output, "metrics").update({name: [value] for name, value in found.items()})
        return output

    def train_batch(self, data: TensorDict) -> TensorDict:
        """One update on a mini-batch; arguments and result are verl's, with `vimpo/update_skipped` in its metrics.

        Raises:
            RuntimeError: the batch did not come from VIMPO's trainer.
        """
        if IS_REAL not in data.keys():
            raise RuntimeError(f"this batch lacks {IS_REAL}: VIMPO's trainer is not in force. Run `vimpo check`")
        count = data[IS_REAL].sum().to(self.device_name)
        torch.distributed.all_reduce(count, group=self.engine.get_data_parallel_group())
        tu.assign_non_tensor(data, **{NUM_SEQUENCES: int(count.item()), AT_OLD_POLICY: self.is_at_old_policy})
        with self._reference_at_hand(data):
            output = super().train_batch(data)
        self.is_at_old_policy = False  # the next mini-batch finds a policy that has moved
        if output is not None:  # only the first rank of a sequence-parallel group collects
            metrics = tu.get(output, "metrics")
            # Here, because verl logs the mean of grad_norm over the mini-batches.
            metrics["vimpo/update_skipped"] = float(not math.isfinite(metrics["grad_norm"]))
        return output

    @contextlib.contextmanager
    def _reference_at_hand(self, data: TensorDict):
        """Have verl's engine ask for kappa in the update, where kappa_policy=current or one pass wants it."""
        if not (self.kappa_in_update or is_one_pass(data)):
            yield
            return
        if self.engine_config.strategy == "megatron":
            from verl_patches.megatron_pass import megatron_kappa_in_update  # needs Megatron Core

            with megatron_kappa_in_update(self, self.reference, data):
                yield
            return
        with self.reference.engine.eval_mode():
            if self.engine_config.use_fused_kernels:
                with fused_heads(self.engine, self.reference.engine, with_policy=False):
                    yield
            else:
                tu.assign_non_tensor(data, distillation_use_topk=True)
                if self.through_kappa:  # or verl's backward pass of the log-probs may write over the logits
                    tu.assign_non_tensor(data, calculate_entropy=True)
                yield


class VimpoActorRolloutRefWorker(FamilyWorker):
    """verl's hybrid worker with VIMPO's joint pass and loss."""

    actor_worker_cls = VimpoTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """Build the models as verl does, then give the actor VIMPO's loss.

        Raises:
            RuntimeError: the worker has no reference.
        """
        super().init_model()
        self.knobs = omega_conf_to_dataclass(self.config.actor.policy_loss).vimpo
        self.reference = self._find_reference()
        if self.ref is not None and self.actor.engine_config.strategy in reference_precision.STRATEGIES:
            reference_precision.take_buffers(self.ref.engine.module, self.actor.engine.module)
        self.actor.use_vimpo_loss(self.knobs, self.reference)

    def _find_reference(self) -> TrainingWorker | AdaptersOff:
        if self.ref is not None:
            return self.ref
        model = self.actor.model_config
        if model.lora_rank > 0 or model.lora_adapter_path or model.lora.get("rank", 0) > 0:
            return AdaptersOff(self.actor)
        raise RuntimeError(
            f"VIMPO needs the reference model in the worker of the policy, but this worker's role is {self.role!r} and "
            "the policy has no LoRA adapters to switch off"
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def refresh_reference(self):
        """Make the policy as it is now the reference."""
        reference_refresh.copy_weights(self.actor.engine.module, self.reference.engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """As FamilyWorker's; with ref_refresh_every the reference, too, which is then on no other disk."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep=max_ckpt_to_keep)
        if self.knobs.ref_refresh_every:
            reference_refresh.save(self.reference.engine.module, Path(local_path))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        """As verl's; with the checkpoint's reference, where it has been refreshed."""
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        if self.ref is not None and reference_refresh.load(self.reference.engine.module, Path(local_path)):
            print(f"vimpo_verl: the reference is the refreshed one of {local_path}", flush=True)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="blue", role="actor_compute_log_prob")
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        """verl's pass for the old log-probs, with the reference's in it.

        Returns:
            verl's output, with `ref_log_probs` and `token_kl` beside `log_probs` and `entropy`.
        """
        if self.enable_routing_replay:  # as verl's own method says it; the reference's pass takes it back
            tu.assign_non_tensor(data, enable_routing_replay=True)
        output = joint_infer_batch(self.actor, self.reference, data, self.knobs.kl_estimator, self.knobs.kl_top_k)
        return output.cpu() if output is not None else None
