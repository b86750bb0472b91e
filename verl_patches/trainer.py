"""Seam: VIMPO's part of a trainer, put in front of whatever class of verl's v1 trainers a run makes its trainer of.

Touches verl.trainer.ppo.v1.trainer_base.PPOTrainer.__new__ and, by subclassing, PPOTrainer's methods
_init_resource_pool_mgr, _balance_batch, _compute_ref_log_prob, _compute_advantage, _update_actor, _save_checkpoint and
_load_checkpoint, and those that verl_patches.checkpoints and verl_patches.watchdog name. Checked against verl 0.9.1; no
upstream issue.

verl's registry and its trainers stay as they are. A trainer that is made with a configuration that asks for VIMPO becomes one
of a subclass, made on demand; with any other it is one of the very class that was called. So a trainer that a user derives
from verl's keeps all that is its own, and VIMPO's methods find its methods, and then verl's, behind super().
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import torch
import transfer_queue as tq
import verl
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested, response_to_nested

from verl_patches.checkpoints import CheckpointedTrainer
from verl_patches.family_switch import budget_of, is_v05, prior_of
from verl_patches.loss_aggregation import aggregation_weight, mini_batch_size
from verl_patches.prior_state import PriorTrainer
from verl_patches.reward_noise import with_reward_noise
from verl_patches.rollout_budget import BudgetedTrainer
from verl_patches.run_beta import RunBeta
from verl_patches.switch import is_vimpo, knobs_of
from verl_patches.value_branch import ACTOR_COEFF, BETA, IS_REAL
from verl_patches.watchdog import WatchedTrainer
from verl_patches.worker import VimpoActorRolloutRefWorker
from vimpo_verl import __version__
from vimpo_verl.registrations import JointPassOutput, joint_pass_output

PAPERS_NATS = 1 / 5e-4  # what R - V0 = 1 asks for at the paper's beta
TOO_FAR = 2  # of the reward scale that beta is for: rewards of -1 and 1 are not worth a word
ROLLOUT_N = "__rollout_n__"  # verl's column of a data set in which a prompt has a number of responses of its own


def install(v1: ModuleType) -> None:
    """Have PPOTrainer choose the class of a new trainer by its configuration. `v1` is the module verl.trainer.ppo.v1."""
    if PPOTrainer.__new__ is not object.__new__:
        raise RuntimeError(f"PPOTrainer has a __new__ of its own, {PPOTrainer.__new__}")
    PPOTrainer.__new__ = staticmethod(_new_trainer)


def _new_trainer(cls: type, *args, **kwargs):
    """PPOTrainer.__new__: Python then calls the __init__ of the class that is chosen here, with the same arguments."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, DictConfig) and "algorithm" in value]
    chosen = trainer_class(cls, given[0]) if given else cls  # without a configuration when it is copied
    return super(PPOTrainer, cls).__new__(chosen)


def trainer_class(trainer: type, config: Any) -> type:
    """The class to make a run's trainer of.

    Args:
        trainer: a class derived from PPOTrainer, verl's own or a user's.
        config: verl's configuration.

    Returns:
        `trainer` itself, unless VIMPO or reward noise is asked for; else a subclass of it with VIMPO's part, the noise, or
        both in front.

    Raises:
        TypeError: VIMPO is asked for and takes the place of a method that `trainer` has changed.
        ValueError: the section algorithm.reward_noise has problems.
    """
    if is_vimpo(config) and not issubclass(trainer, VimpoTrainer):
        if trainer._compute_ref_log_prob is not PPOTrainer._compute_ref_log_prob:
            raise TypeError(
                f"algorithm.adv_estimator=vimpo: {trainer.__name__}._compute_ref_log_prob would never run, because VIMPO's "
                "joint pass takes its place. Remove it from that class, or move what it does to another step"
            )
        trainer = type(f"Vimpo{trainer.__name__}", (WatchedTrainer, CheckpointedTrainer, VimpoTrainer, trainer), {})
    return with_reward_noise(with_family(trainer, config), config)


def with_family(trainer: type, config: Any) -> type:
    """`trainer` with the parts in front that V0.5, rollouts on demand and priors ask for; itself where none is asked for."""
    from verl_patches.v05 import V05Trainer

    asked = {
        PriorTrainer: prior_of(config)[0] is not None,
        BudgetedTrainer: budget_of(config)[0] is not None,
        V05Trainer: is_v05(config),
    }
    parts = tuple(part for part, is_asked in asked.items() if is_asked and not issubclass(trainer, part))
    return type(f"Family{trainer.__name__}", (*parts, trainer), {}) if parts else trainer


class VimpoTrainer:
    """What VIMPO changes in a v1 trainer: the worker, the joint pass, the estimator's inputs, c_A and beta of the update."""

    def __init__(self, *args, **kwargs):
        """As the trainer's behind it; says that VIMPO is in force.

        Raises:
            RuntimeError: the run has not been through verl's validate_config, which carries the knobs to the workers.
        """
        super().__init__(*args, **kwargs)
        config = self.config
        if "vimpo" not in config.actor_rollout_ref.actor.policy_loss:
            raise RuntimeError(
                f"algorithm.adv_estimator=vimpo: {type(self).__name__} was made with a configuration that has not been "
                "validated. Call verl.utils.config.validate_config with it first, as verl.trainer.main_ppo does"
            )
        self.knobs, problems = knobs_of(config)
        if problems:
            raise ValueError("\n".join(problems))
        self.rollout_n: dict[str, int] = {}  # uid of a prompt under way -> responses, where it is not rollout.n
        self.scale_said, self.run_beta = False, RunBeta(self.knobs)
        print(
            f"vimpo_verl {__version__}: VIMPO in force on verl {verl.__version__}, in {type(self).__name__}: {self.knobs}, "
            f"lam={config.algorithm.lam}",
            flush=True,
        )

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
        role = hybrid.pop()
        worker = self.role_worker_mapping[role].__ray_actor_class__
        if worker is not ActorRolloutRefWorker:
            raise RuntimeError(
                f"VIMPO puts its own worker in the place of verl's ActorRolloutRefWorker, and {type(self).__name__} has put "
                f"{worker.__name__} there"
            )
        self.role_worker_mapping[role] = ray.remote(VimpoActorRolloutRefWorker)

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
            config=self.run_beta.config,
            lam=self.config.algorithm.lam,
            actor_loss_weight=aggregation_weight(self.config, padded["response_mask"]),
            prior=getattr(self, "batch_prior", None),
        )
        with joint_pass_output(output):
            batch = super()._compute_advantage(batch, metrics)
        result = output.result
        self.run_beta.fix(result.beta, self.global_steps)
        finite = {"value": result.values, "advantage": result.advantages, "target": result.returns}
        nested = {name: response_to_nested(tensor, mask) for name, tensor in finite.items()}
        self._require_sound(batch, mask, "td or the residual overflows there", **nested)
        metrics.update(result.metrics)
        self._look_at_the_scale(result.returns)
        batch.extra_info.update({ACTOR_COEFF: result.actor_coeff, BETA: result.beta.value})
        return batch

    def _look_at_the_scale(self, returns: torch.Tensor) -> None:
        """Say once that a reward is too far from its group's mean for beta: sum_t log-ratio - KL is to be (R - V0) / beta.

        Args:
            returns: [B, T], R - V0 on every valid token.
        """
        farthest = returns.abs().amax().item() if returns.numel() else 0.0
        beta = self.run_beta.found
        usual = beta.reward_range or beta.value * PAPERS_NATS
        if farthest <= TOO_FAR * usual or self.scale_said:
            return
        self.scale_said = True
        if beta.reward_range is None:
            others = "0/1 rewards at the paper's beta"
        else:
            others = f"rewards that differ by {usual:.3g}, for which it was measured,"
        _say(
            f"step {self.global_steps}: rewards are up to {farthest:.3g} from their group's mean. At algorithm.vimpo.beta="
            f"{beta.value:.3g} that asks for {farthest / beta.value:,.0f} nats between policy and reference in one response; "
            f"{others} ask for {usual / beta.value:,.0f} at most. Scale the rewards, or write "
            f"+algorithm.vimpo.beta={beta.value * farthest / usual:.2g}"
        )

    def _save_checkpoint(self) -> None:
        """As verl's, with the run's beta in it."""
        self.run_beta.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        """As verl's; the run goes on with the checkpoint's beta.

        Raises:
            ValueError: the checkpoint's file of it cannot be read.
        """
        super()._load_checkpoint()
        if self.global_steps:  # verl's: 0 where it has loaded nothing
            trainer = self.config.trainer
            by_path = trainer.resume_mode == "resume_path"
            newest = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
            self.run_beta.restore(Path(trainer.resume_from_path) if by_path else newest)

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
