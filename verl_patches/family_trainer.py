"""Seam: an estimator's part of a trainer, put in front of whatever class of verl's v1 trainers a run makes its trainer of.

Touches verl.trainer.ppo.v1.trainer_base.PPOTrainer.__new__ and, by subclassing, PPOTrainer's methods _init_resource_pool_mgr,
_balance_batch, _submit_batch_to_rollout and _update_actor, those that the estimator's own part names, and those that
verl_patches.checkpoints and verl_patches.watchdog name. Checked against verl 0.9.1; no upstream issue.

verl's registry and its trainers stay as they are. A trainer that is made with a configuration that asks for an estimator of
this package becomes one of a subclass, made on demand; with any other it is one of the very class that was called. So a
trainer that a user derives from verl's keeps all that is its own, and our methods find its methods, and then verl's, behind
super().
"""

import sys
from types import ModuleType
from typing import Any

import ray
import torch
import verl
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_patches.batches import data_parallel_size
from verl_patches.checkpoints import CheckpointedTrainer
from verl_patches.family import FAMILY, Member
from verl_patches.finite import first_non_finite
from verl_patches.group_parts import group_parts, with_group_parts
from verl_patches.loss_aggregation import mini_batch_size
from verl_patches.presence import require_on_every_node
from verl_patches.reward_noise import with_reward_noise
from verl_patches.switch import knobs_of, member_of
from verl_patches.watchdog import WatchedTrainer
from vimpo_verl import __version__

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
        `trainer` itself, unless an estimator of this package, rollouts on demand or reward noise is asked for; else a
        subclass of it with the parts of what is asked for in front.

    Raises:
        TypeError: the estimator takes the place of a method that `trainer` has changed.
        ValueError: the section algorithm.reward_noise has problems.
    """
    member = member_of(config)
    if member and not issubclass(trainer, FamilyTrainer):
        part = member.trainer_part()
        part.require_fitting(trainer)
        parts = (WatchedTrainer, CheckpointedTrainer, *group_parts(config), part, trainer)
        trainer = type(f"{member.name.capitalize()}{trainer.__name__}", parts, {})
    return with_reward_noise(with_group_parts(trainer, config), config)


class FamilyTrainer:
    """What the estimators' parts of a v1 trainer share: the knobs, the worker, and what is said and counted in a step.

    Attributes:
        estimator: its name in family.FAMILY.
        worker_type: the class, derived from verl's ActorRolloutRefWorker, in whose place it is put; None: verl's own stays.
    """

    estimator: str
    worker_type: type | None = None

    def __init__(self, *args, **kwargs):
        """As the trainer's behind it; says that the estimator is in force.

        Raises:
            RuntimeError: the run has not been through verl's validate_config, which carries the knobs to the workers, or a
                node lacks this package.
        """
        super().__init__(*args, **kwargs)
        config = self.config
        if self.member.policy_loss and self.estimator not in config.actor_rollout_ref.actor.policy_loss:
            raise RuntimeError(
                f"algorithm.adv_estimator={self.estimator}: {type(self).__name__} was made with a configuration that has not "
                "been validated. Call verl.utils.config.validate_config with it first, as verl.trainer.main_ppo does"
            )
        self.knobs, problems = knobs_of(config)
        if problems:
            raise ValueError("\n".join(problems))
        self.set_up_estimator()
        if ray.is_initialized() and self.worker_type is not None:
            require_on_every_node()
        print(
            f"vimpo_verl {__version__}: {self.member.title} in force on verl {verl.__version__}, in {type(self).__name__}: "
            f"{self.settings()}",
            flush=True,
        )

    def settings(self) -> str:
        """What the line says that the estimator prints when it is in force."""
        return f"{self.knobs}, lam={self.config.algorithm.lam}"

    def set_up_estimator(self) -> None:
        """Set up what the trainer remembers from step to step; `config` and `knobs` are there."""
        self.rollout_n: dict[str, int] = {}  # uid of a prompt under way -> responses, where it is not rollout.n

    @property
    def member(self) -> Member:
        """The estimator's row of the family's table."""
        return FAMILY[self.estimator]

    @staticmethod
    def require_fitting(trainer: type) -> None:
        """Refuse a trainer class that this part cannot be put in front of.

        Raises:
            TypeError: naming the method of `trainer` that would never run.
        """

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args, **kwargs) -> KVBatchMeta:
        """As verl's; says how many responses verl has dropped, because their generation or reward raised."""
        asked = self._responses_asked(batch)
        sessions = len(set(session_ends(batch.keys)))
        missing = metrics[f"{self.estimator}/missing_responses"] = asked - sessions
        if missing:
            say(
                f"step {self.global_steps}: {missing} of {asked} responses are missing: their generation or reward raised "
                "('Error in _run_prompt' in the log). Training goes on with the others"
            )
        return super()._balance_batch(self.filled_up(batch), metrics, *args, **kwargs)

    def filled_up(self, batch: KVBatchMeta) -> KVBatchMeta:
        """The batch, with placeholder samples where the estimator wants more of them than verl adds by itself."""
        return batch

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
        if self.worker_type is None:
            return
        title = self.member.title
        hybrid = {Role.ActorRolloutRef, Role.ActorRollout} & self.role_worker_mapping.keys()
        if len(hybrid) != 1:
            raise RuntimeError(
                f"{title} needs one worker with policy and rollout; verl chose {list(self.role_worker_mapping)}"
            )
        role = hybrid.pop()
        worker = self.role_worker_mapping[role].__ray_actor_class__
        own = self.worker_in_place_of(worker)
        if own is None:
            raise RuntimeError(
                f"{title} puts its own worker in the place of verl's ActorRolloutRefWorker, and {type(self).__name__} has put "
                f"{worker.__name__} there"
            )
        self.role_worker_mapping[role] = ray.remote(own)

    @classmethod
    def worker_in_place_of(cls, verls: type) -> type | None:
        """The estimator's worker for the one that verl has chosen; None where there is none for it."""
        return cls.worker_type if verls is ActorRolloutRefWorker else None

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl's; the estimator's metrics under its own name, and a word about mini-batches that were skipped."""
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.startswith(f"actor/{self.estimator}/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)  # verl puts "actor/" before a worker's metrics
        if f"{self.estimator}/update_skipped" in metrics:
            self._look_at_skipped_updates(batch, metrics)
        return batch

    def _look_at_skipped_updates(self, batch: KVBatchMeta, metrics: dict) -> None:
        updates = self.config.actor_rollout_ref.actor.ppo_epochs * len(batch.keys) // mini_batch_size(self.config)
        name = f"{self.estimator}/update_skipped"
        skipped = metrics[name] = round(metrics[name] * updates)  # verl logs the mean over the updates
        if skipped:
            say(
                f"step {self.global_steps}: the gradient is not finite in {skipped} of {updates} mini-batches: verl has "
                f"skipped {'the optimiser step' if skipped == 1 else 'their optimiser steps'}"
                + (", the weights are as before" if skipped == updates else ", the others have changed the weights")
            )

    def require_sound(
        self, batch: KVBatchMeta, mask: torch.Tensor | None, reason: str, **per_token: torch.Tensor
    ) -> None:
        """A non-finite value on a valid token is a fault to report, not to hide.

        Args:
            batch: verl's handle; equal parts of it, in its order, went to the data-parallel ranks.
            mask, per_token: [B, response], nested or padded. None: every token counts.
            reason: what that means, for the message.

        Raises:
            FloatingPointError: naming the quantity, the sample, the token, the step and the rank.
        """
        ranks = data_parallel_size(self.actor_rollout_wg)
        for name, tensor in per_token.items():
            found = first_non_finite(tensor, mask)
            if found is not None:
                sample, token, value, count = found
                raise FloatingPointError(
                    f"step {self.global_steps}: {name} is {value} at response token {token} of sample {batch.keys[sample]} on "
                    f"data-parallel rank {sample * ranks // len(batch.keys)} ({count} such tokens in the batch): {reason}"
                )


def say(sentence: str) -> None:
    """Something that the user should know, on stderr."""
    print(f"vimpo_verl: {sentence}", file=sys.stderr, flush=True)


def session_ends(keys: list[str]) -> list[int]:
    """The row that ended the session of each row: an agent loop may return several outputs for one, in order.

    Args:
        keys: verl's names of the samples of a batch, {uid}_{session}_{output}.
    """
    last: dict[str, tuple[int, int]] = {}
    for row, key in enumerate(keys):
        session, output = key.rsplit("_", 1)
        last[session] = max(last.get(session, (-1, row)), (int(output), row))
    return [last[key.rsplit("_", 1)[0]][1] for key in keys]


def require_one_output_a_session(keys: list[str]) -> None:
    """For an estimator that needs one output a session.

    Raises:
        NotImplementedError: a session has several.
    """
    sessions = len(set(session_ends(keys)))
    if sessions != len(keys):
        raise NotImplementedError(
            f"{len(keys)} outputs for {sessions} sessions. An agent loop that returns several outputs for one session is not "
            "supported; return one, with tool output masked"
        )
