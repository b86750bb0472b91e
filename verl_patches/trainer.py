"""VIMPO's part of a trainer (verl_patches.family_trainer puts it in front of verl's).

Touches, by subclassing, PPOTrainer's methods _compute_ref_log_prob, _compute_advantage, _save_checkpoint and _load_checkpoint,
and those that FamilyTrainer names. Checked against verl 0.9.1; no upstream issue.
"""

from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.utils.padding import response_from_nested

from verl_patches.batches import is_padding, row_sums
from verl_patches.checkpoints import loaded_folder
from verl_patches.family_trainer import FamilyTrainer, require_one_output_a_session, say, session_ends
from verl_patches.loss_aggregation import aggregation_weight
from verl_patches.names import ACTOR_COEFF, BETA, IS_REAL, VALUE_MASK, VALUE_SCALE
from verl_patches.passes import bypasses_old_log_probs
from verl_patches.run_beta import RunBeta
from verl_patches.worker import VimpoActorRolloutRefWorker
from vimpo_verl import functional as F
from vimpo_verl.registrations import JointPassOutput, joint_pass_output

PAPERS_NATS = 1 / 5e-4  # what R - V0 = 1 asks for at the paper's beta
TOO_FAR = 2  # of the reward scale that beta is for: rewards of -1 and 1 are not worth a word


class VimpoTrainer(FamilyTrainer):
    """What VIMPO changes in a v1 trainer: the worker, the joint pass, the estimator's inputs, c_A and beta of the update."""

    estimator = "vimpo"
    worker_type = VimpoActorRolloutRefWorker

    @staticmethod
    def require_fitting(trainer: type) -> None:
        """As FamilyTrainer's."""
        if trainer._compute_ref_log_prob is not PPOTrainer._compute_ref_log_prob:
            raise TypeError(
                f"algorithm.adv_estimator=vimpo: {trainer.__name__}._compute_ref_log_prob would never run, because VIMPO's "
                "joint pass takes its place. Remove it from that class, or move what it does to another step"
            )

    @classmethod
    def worker_in_place_of(cls, verls: type) -> type | None:
        """As FamilyTrainer's; also of verl's worker in separate_async."""
        from verl.experimental.separation.engine_workers import DetachActorWorker

        from verl_patches.separate_worker import VimpoDetachActorWorker

        return VimpoDetachActorWorker if verls is DetachActorWorker else super().worker_in_place_of(verls)

    def set_up_estimator(self) -> None:
        """As FamilyTrainer's."""
        super().set_up_estimator()
        self.scale_said, self.run_beta = False, RunBeta(self.knobs)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Bookkeeping only: the joint pass under _compute_old_log_prob has already found everything."""
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["ref_log_probs", "token_kl", "response_mask"],
        )
        mask = data["response_mask"]
        ref_log_prob = response_from_nested(data["ref_log_probs"], mask)
        token_kl = response_from_nested(data["token_kl"], mask)
        self.require_sound(
            batch,
            mask,
            "the policy's or the reference's logits are not finite there",
            ref_log_prob=ref_log_prob,
            token_kl=token_kl,
        )
        is_real = torch.tensor([not added for added in is_padding(batch)], dtype=torch.float32)
        fields = {"ref_log_prob": ref_log_prob, "token_kl": token_kl, IS_REAL: is_real}
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        whole = self._mask_before_rejection(batch)
        output = self._estimator_input(batch)
        if whole is not None:
            output.response_mask = torch.nested.to_padded_tensor(whole, padding=0)
        with joint_pass_output(output):
            batch = super()._compute_advantage(batch, metrics)
        result = output.result
        self.run_beta.fix(result.beta, self.global_steps)
        finite = {"value": result.values, "advantage": result.advantages, "target": result.returns}
        self.require_sound(batch, None, "td or the residual overflows there", **finite)
        metrics.update(result.metrics)
        self._look_at_the_scale(result.returns)
        batch.extra_info.update(
            {ACTOR_COEFF: result.actor_coeff, BETA: result.beta.value, VALUE_SCALE: result.value_scale}
        )
        if whole is not None:
            self._keep_whole_responses(batch, whole)
        return batch

    def _estimator_input(self, batch: KVBatchMeta) -> Any:
        """What the joint pass has found for the estimator, once it is sound. Of the size of the batch no more than the estimator
        needs: verl holds rewards, mask and log-probs of its own meanwhile."""
        if self.knobs.value_type == "soft" or self.knobs.actor_advantage == "grpo":  # which compare rows, not sessions
            require_one_output_a_session(batch.keys)
        fields = ["old_log_probs", "ref_log_prob", "token_kl", "rm_scores", "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        self.require_sound_rewards(batch, data["rm_scores"])
        mask = data["response_mask"]
        self.require_sound(batch, mask, "the policy's logits are not finite there", old_log_prob=data["old_log_probs"])
        padded = data.select("old_log_probs", "ref_log_prob", "token_kl").to_padded_tensor()
        return JointPassOutput(
            old_log_prob=padded["old_log_probs"],
            ref_log_prob=padded["ref_log_prob"],
            token_kl=padded["token_kl"],
            is_padding=torch.tensor(is_padding(batch)),
            config=self.run_beta.config,
            lam=self.config.algorithm.lam,
            actor_loss_weight=aggregation_weight(self.config, row_sums(mask)),
            session_end=torch.tensor(session_ends(batch.keys)),
            prior=getattr(self, "batch_prior", None),  # of PriorTrainer, where a prior is asked for
        )

    def require_sound_rewards(self, batch: KVBatchMeta, rewards: torch.Tensor) -> None:
        """As require_sound, of what the reward function has returned."""
        self.require_sound(batch, None, "the reward function returned it", reward=rewards)

    def _mask_before_rejection(self, batch: KVBatchMeta) -> torch.Tensor | None:
        """Nested [B, response], bools, which are an eighth of verl's integers; None where verl rejects nothing."""
        correction = self.config.algorithm.get("rollout_correction") or {}
        if correction.get("rollout_rs") is None or bypasses_old_log_probs(self.config):
            return None
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        F.require_mask(data["response_mask"].values())  # as a bool, every other number would be valid
        return data["response_mask"].bool()

    def _keep_whole_responses(self, batch: KVBatchMeta, whole: torch.Tensor) -> None:
        """After verl's rejection: L_V is about whole responses, but for those of which nothing is left, which leave it, too.

        Args:
            whole: nested [B, response], bools, the mask before the rejection. That after it is in the queue, for the actor loss.
        """
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask", IS_REAL]
        )
        left = torch.stack([row.any() for row in data["response_mask"].unbind()])
        anything = torch.stack([row.any() for row in whole.unbind()])
        kept = left | ~anything  # a response without a valid token has not been rejected
        rows = [(row & keep).long() for row, keep in zip(whole.unbind(), kept, strict=True)]
        fields = {
            VALUE_MASK: torch.nested.as_nested_tensor(rows, layout=torch.jagged),
            IS_REAL: data[IS_REAL] * kept.to(data[IS_REAL].dtype),
        }
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )

    def _look_at_the_scale(self, returns: torch.Tensor) -> None:
        """Say once that a reward is too far from its group's mean for beta: sum_t log-ratio - KL is to be (R - V0) / beta.

        Args:
            returns: [B, T], R - V0 on every valid token.
        """
        farthest = max(abs(end.item()) for end in returns.aminmax()) if returns.numel() else 0.0
        beta = self.run_beta.found
        usual = beta.reward_range or beta.value * PAPERS_NATS
        if farthest <= TOO_FAR * usual or self.scale_said:
            return
        self.scale_said = True
        if beta.reward_range is None:
            others = "0/1 rewards at the paper's beta"
        else:
            others = f"rewards that differ by {usual:.3g}, for which it was measured,"
        say(
            f"step {self.global_steps}: rewards are up to {farthest:.3g} from their group's mean. At algorithm.vimpo.beta="
            f"{beta.value:.3g} that asks for {farthest / beta.value:,.0f} nats between policy and reference in one response; "
            f"{others} ask for {usual / beta.value:,.0f} at most. Scale the rewards, or write "
            f"+algorithm.vimpo.beta={beta.value * farthest / usual:.2g}"
        )

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As FamilyTrainer's; every so many steps the policy that it leaves becomes the reference."""
        batch = super()._update_actor(batch, metrics)
        every = self.knobs.ref_refresh_every
        if every:
            last_of_step = self.local_trigger_step == self.parameter_sync_step - 1
            due = last_of_step and self.global_steps % every == 0
            if due:
                self.actor_rollout_wg.refresh_reference()
            metrics["vimpo/reference_refreshed"] = float(due)
        return batch

    def _save_checkpoint(self) -> None:
        """As verl's, with the run's beta in it."""
        self.save_state(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def save_state(self, folder: Path) -> None:
        """What of a run belongs to VIMPO, into a checkpoint that is being written, global_step_N."""
        self.run_beta.save(folder)

    def _load_checkpoint(self) -> None:
        """As verl's; the run goes on with the checkpoint's beta.

        Raises:
            ValueError: the checkpoint's file of it cannot be read.
        """
        super()._load_checkpoint()
        folder = loaded_folder(self)
        if folder is not None:
            self.load_state(folder)

    def load_state(self, folder: Path) -> None:
        """The same, out of a checkpoint.

        Raises:
            ValueError: the file cannot be read.
        """
        self.run_beta.restore(folder)
