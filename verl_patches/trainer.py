"""Seam: VIMPO's trainers, in verl's registry under the names of the trainers they extend.

Touches verl.trainer.ppo.v1.trainer_base.TRAINER_REGISTRY and, by subclassing, PPOTrainer's methods
_init_resource_pool_mgr, _balance_batch, _compute_ref_log_prob, _compute_advantage and _update_actor, and those that
verl_patches.checkpoints and verl_patches.watchdog name. With another estimator the registered name still makes verl's own
trainer. Checked against verl 0.9.1; no upstream issue.
"""

import sys
from types import ModuleType
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_from_nested, response_to_nested

from verl_patches.checkpoints import CheckpointedTrainer
from verl_patches.loss_aggregation import aggregation_weight, mini_batch_size
from verl_patches.reward_noise import with_reward_noise
from verl_patches.switch import is_vimpo, knobs_of
from verl_patches.value_branch import ACTOR_COEFF, IS_REAL
from verl_patches.watchdog import WatchedTrainer
from verl_patches.worker import VimpoActorRolloutRefWorker
from vimpo_verl.registrations import JointPassOutput, joint_pass_output

PAPERS_NATS = 1 / 5e-4  # what R - V0 = 1 asks for at the paper's beta
MOST_NATS = 2 * PAPERS_NATS  # rewards of -1 and 1 are not worth a word
ROLLOUT_N = "__rollout_n__"  # verl's column of a data set in which a prompt has a number of responses of its own


def install(v1: ModuleType) -> None:
    """Replace verl's trainers in its registry. `v1` is the module verl.trainer.ppo.v1."""
    for mode, trainer in (("sync", VimpoTrainerSync), ("colocate_async", VimpoTrainerColocateAsync)):
        if TRAINER_REGISTRY.get(mode) is not trainer.stock:
            raise RuntimeError(f"verl's trainer {mode!r} is {TRAINER_REGISTRY.get(mode)}, not {trainer.stock}")
        TRAINER_REGISTRY[mode] = trainer


class VimpoTrainer:
    """What VIMPO changes in a v1 trainer: the worker, the joint pass, the estimator's inputs, c_A of the update.

    A class derived from this one and a trainer of verl, `stock`, makes the stock trainer unless VIMPO is asked for.
    """

    stock: type

    def __new__(cls, config: Any):
        if not is_vimpo(config):
            # Not an instance of cls, so Python calls no further __init__.
            return with_reward_noise(cls.stock, config)(config=config)
        return super().__new__(with_reward_noise(cls, config))

    def __init__(self, config: Any):
        super().__init__(config)
        self.knobs, problems = knobs_of(config)
        if problems:
            raise ValueError("\n".join(problems))
        self.rollout_n: dict[str, int] = {}  # uid of a prompt under way -> responses, where it is not rollout.n
        self.scale_said = False

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args, **kwargs) -> KVBatchMeta:
        """As verl's; says how many responses verl has dropped, because their generation or reward raised."""
        asked = self._responses_asked(batch)
        missing = metrics["vimpo/missing_responses"] = asked - len(batch.keys)
        if missing:
            _say(
                f"step {self.global_steps}: {missing} of {asked} responses are missing: their generation or reward raised "
                "('Error in _run_prompt' in the log). Training goes on with the others"
            )
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """As verl's; remembers how many responses a prompt is to have where the data set says so."""
        if ROLLOUT_N in batch.keys():
            self.rollout_n.update(zip(batch["uid"], map(int, batch[ROLLOUT_N]), strict=True))
        return super()._submit_batch_to_rollout(batch)

    def _responses_asked(self, batch: KVBatchMeta) -> int:
        """Of the prompts of this batch, those included of which nothing is left."""
        prompts = {key.split("_")[0] for key in batch.keys} | self.replay_buffer.failure_keys["train"]
        default = self.config.actor_rollout_ref.rollout.n
        return sum(self.rollout_n.pop(prompt, default) for prompt in prompts)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        hybrid = {Role.ActorRolloutRef, Role.ActorRollout} & self.role_worker_mapping.keys()  # the latter with LoRA
        if len(hybrid) != 1:
            raise RuntimeError(
                f"VIMPO needs one worker with policy and reference; verl chose {list(self.role_worker_mapping)}"
            )
        self.role_worker_mapping[hybrid.pop()] = ray.remote(VimpoActorRolloutRefWorker)

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
        self._require_sound(
            batch,
            mask,
            "the policy's or the reference's logits are not finite there",
            ref_log_prob=ref_log_prob,
            token_kl=token_kl,
        )
        is_real = torch.tensor([not is_padding for is_padding in _is_padding(batch)], dtype=torch.float32)
        fields = {"ref_log_prob": ref_log_prob, "token_kl": token_kl, IS_REAL: is_real}
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        _require_one_output_a_session(batch.keys)
        fields = ["old_log_probs", "ref_log_prob", "token_kl", "rm_scores", "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        mask, every_token = data["response_mask"], torch.ones_like(data["rm_scores"])
        self._require_sound(batch, mask, "the policy's logits are not finite there", old_log_prob=data["old_log_probs"])
        self._require_sound(batch, every_token, "the reward function returned it", reward=data["rm_scores"])
        padded = data.to_padded_tensor()
        output = JointPassOutput(
            old_log_prob=padded["old_log_probs"],
            ref_log_prob=padded["ref_log_prob"],
            token_kl=padded["token_kl"],
            is_padding=torch.tensor(_is_padding(batch)),
            config=self.knobs,
            lam=self.config.algorithm.lam,
            actor_loss_weight=aggregation_weight(self.config, padded["response_mask"]),
        )
        with joint_pass_output(output):
            batch = super()._compute_advantage(batch, metrics)
        result = output.result
        finite = {"value": result.values, "advantage": result.advantages, "target": result.returns}
        nested = {name: response_to_nested(tensor, mask) for name, tensor in finite.items()}
        self._require_sound(batch, mask, "td or the residual overflows there", **nested)
        metrics.update(result.metrics)
        self._look_at_the_scale(result.returns)
        batch.extra_info[ACTOR_COEFF] = result.actor_coeff
        return batch

    def _look_at_the_scale(self, returns: torch.Tensor) -> None:
        """Say once that a reward is too far from its group's mean for beta: sum_t log-ratio - KL is to be (R - V0) / beta.

        Args:
            returns: [B, T], R - V0 on every valid token.
        """
        farthest = returns.abs().amax().item() if returns.numel() else 0.0
        asked = farthest / self.knobs.beta
        if asked <= MOST_NATS or self.scale_said:
            return
        self.scale_said = True
        _say(
            f"step {self.global_steps}: rewards are up to {farthest:.3g} from their group's mean. At algorithm.vimpo.beta="
            f"{self.knobs.beta:g} that asks for {asked:,.0f} nats between policy and reference in one response; 0/1 rewards "
            f"at the paper's beta ask for {PAPERS_NATS:,.0f} at most. Scale the rewards, or write "
            f"+algorithm.vimpo.beta={farthest / PAPERS_NATS:.2g}"
        )

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.startswith("actor/vimpo/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)  # verl puts "actor/" before a worker's metrics
        updates = self.config.actor_rollout_ref.actor.ppo_epochs * len(batch.keys) // mini_batch_size(self.config)
        # verl logs the mean over the updates.
        skipped = metrics["vimpo/update_skipped"] = round(metrics["vimpo/update_skipped"] * updates)
        if skipped:
            _say(
                f"step {self.global_steps}: the gradient is not finite in {skipped} of {updates} mini-batches: verl has "
                f"skipped {'the optimiser step' if skipped == 1 else 'their optimiser steps'}"
                + (", the weights are as before" if skipped == updates else ", the others have changed the weights")
            )
        return batch

    def _require_sound(self, batch: KVBatchMeta, mask: torch.Tensor, reason: str, **per_token: torch.Tensor) -> None:
        """A non-finite value on a valid token is a fault to report, not to hide.

        Args:
            batch: verl's handle; equal parts of it, in its order, went to the data-parallel ranks.
            mask, per_token: nested [B, response].
            reason: what that means, for the message.

        Raises:
            FloatingPointError: naming the quantity, the sample, the token, the step and the rank.
        """
        ranks = _data_parallel_size(self.actor_rollout_wg)
        valid = mask.values().bool()
        for name, tensor in per_token.items():
            bad = (valid & ~torch.isfinite(tensor.values())).nonzero()
            if bad.numel():
                position = bad[0].item()
                sample = int(torch.searchsorted(tensor.offsets(), position, right=True)) - 1
                raise FloatingPointError(
                    f"step {self.global_steps}: {name} is {tensor.values()[position].item()} at response token "
                    f"{position - int(tensor.offsets()[sample])} of sample {batch.keys[sample]} on data-parallel rank "
                    f"{sample * ranks // len(batch.keys)} ({len(bad)} such tokens in the batch): {reason}"
                )


class VimpoTrainerSync(WatchedTrainer, CheckpointedTrainer, VimpoTrainer, PPOTrainerSync):
    """verl's trainer "sync" with VIMPO."""

    stock = PPOTrainerSync


class VimpoTrainerColocateAsync(WatchedTrainer, CheckpointedTrainer, VimpoTrainer, PPOTrainerColocateAsync):
    """verl's trainer "colocate_async" with VIMPO."""

    stock = PPOTrainerColocateAsync


def _say(sentence: str) -> None:
    print(f"vimpo_verl: {sentence}", file=sys.stderr, flush=True)


def _data_parallel_size(worker_group: Any) -> int:
    return max(getattr(worker_group, "_dispatch_info", {}).get("actor", [0])) + 1


def _is_padding(batch: KVBatchMeta) -> list[bool]:
    return [bool(tag.get("is_padding", False)) for tag in batch.tags]


def _require_one_output_a_session(keys: list[str]) -> None:
    """verl names a sample {uid}_{session}_{output}; the group statistics need one output a session."""
    sessions = {key.rsplit("_", 1)[0] for key in keys}
    if len(sessions) != len(keys):
        raise NotImplementedError(
            f"VIMPO: {len(keys)} outputs for {len(sessions)} sessions. An agent loop that returns several outputs for "
            "one session is not supported; return one, with tool output masked"
        )
