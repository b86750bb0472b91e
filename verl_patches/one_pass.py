"""Seam: VIMPO without a pass before the update, `algorithm.vimpo.passes` (docs/method.md, "One pass").

Touches, by subclassing, PPOTrainer's _compute_old_log_prob, _compute_ref_log_prob, _compute_advantage, _update_actor and
_compute_metrics; the family's table names OnePassTrainer. The update's part is in verl_patches.value_branch and
verl_patches.worker. Checked against verl 0.9.1; no upstream issue.

The driver works out what the rewards give (V0, targets, beta) and hands the update two numbers of the batch before. The
update's hook runs the reference on each micro-batch, and the loss goes on from there; what the ranks leave of their sequences
is put together in the worker, and comes back as metrics, of which the next batch's statistics are a part.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu

from verl_patches.batches import is_padding, row_sums
from verl_patches.family_trainer import require_one_output_a_session, session_ends
from verl_patches.loss_aggregation import aggregation_weight, mini_batch_size
from verl_patches.names import (
    ADVANTAGE_MEAN,
    ADVANTAGE_STD,
    AT_OLD_POLICY,
    GROUP,
    IS_REAL,
    LAM,
    OF_BATCH,
    ONE_PASS,
    OUTCOME,
    ROW,
    STEP,
)
from verl_patches.passes import Passes, bypasses_old_log_probs, decide, is_separate
from verl_patches.trainer import VimpoTrainer
from vimpo_verl.beta import STATE
from vimpo_verl.config import SECTION
from vimpo_verl.one_pass import Statistics
from vimpo_verl.registrations import BatchBefore

KEPT = "one_pass"  # in a checkpoint's STATE, beside the fields of beta


# ---- in a checkpoint -------------------------------------------------------------------------------------------------


def save(statistics: Statistics, folder: Path) -> None:
    """Put the statistics beside beta into a checkpoint that is being written, global_step_N."""
    path = folder / STATE
    state = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**state, KEPT: asdict(statistics)}, indent=1))


def load(folder: Path) -> Statistics | None:
    """Those of a checkpoint, bit for bit; None where there are none.

    Raises:
        ValueError: the file cannot be read, naming it.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text()).get(KEPT)
        return Statistics(**{name: float(value) for name, value in kept.items()}) if kept is not None else None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the statistics of the batch before cannot be read ({error})") from error


# ---- the trainer's part ----------------------------------------------------------------------------------------------


class OnePassTrainer(VimpoTrainer):
    """VIMPO's trainer with a step without a pass before the update, where `passes` says so."""

    def set_up_estimator(self) -> None:
        """As VimpoTrainer's; decides between one pass and two, and begins without statistics."""
        super().set_up_estimator()
        self.passes, self.takes_one_pass = self._decide_passes(), False
        self.before: Statistics | None = None  # of the batch before
        self.trained_advantages: dict[str, float] = {}
        self.two_passes_said = False

    def settings(self) -> str:
        """As FamilyTrainer's, with what `passes` has come to."""
        return f"{super().settings()}, {self.passes}"

    def _decide_passes(self) -> Passes:
        passes = decide(self.config, self.knobs)
        if not passes.one:
            return passes
        bypasses = bypasses_old_log_probs(self.config)
        is_asked_for = self.knobs.passes == "one" or bypasses
        own = super()._compute_old_log_prob
        if not bypasses and getattr(own, "__func__", own) is not PPOTrainer._compute_old_log_prob:
            why = f"{type(self).__name__} has a _compute_old_log_prob of its own, which one pass would leave out"
            if is_asked_for:
                raise TypeError(f"{SECTION}.passes=one: {why}; write {SECTION}.passes=auto")
            return Passes(False, why)
        if not is_asked_for and _is_of_a_user(type(self), "_compute_advantage"):
            why = (
                f"{type(self).__name__} has a _compute_advantage of its own, which may look at log-probs and advantages"
            )
            return Passes(False, why)
        return passes

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl's, in two passes; with bypass_mode the rollout's log-probs; else nothing: the update has them."""
        self.takes_one_pass = self.passes.one and self._fits_one_pass(batch)
        if self.takes_one_pass and not bypasses_old_log_probs(self.config):
            return batch
        return super()._compute_old_log_prob(batch, metrics)

    def _fits_one_pass(self, batch: KVBatchMeta) -> bool:
        """Whether this batch is as the recipe says: one mini-batch, which it is not where prompts have numbers of responses
        of their own, and one output a session.

        Raises:
            NotImplementedError: it is not, and with bypass_mode there is no other way.
        """
        if bypasses_old_log_probs(self.config):
            require_one_output_a_session(batch.keys)
            return True
        updates, sessions = len(batch.keys) // mini_batch_size(self.config), len(set(session_ends(batch.keys)))
        what = f"{len(batch.keys)} responses, {updates} mini-batches" if updates > 1 else None
        if sessions != len(batch.keys):
            what = f"{len(batch.keys)} outputs for {sessions} sessions"
        if what and not self.two_passes_said:
            self.two_passes_said = True
            print(
                f"vimpo_verl: step {self.global_steps}: the batch has {what}: two passes for this one and its like",
                flush=True,
            )
        return what is None

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return batch if self.takes_one_pass else super()._compute_ref_log_prob(batch, metrics)

    def _estimator_input(self, batch: KVBatchMeta) -> Any:
        """What the estimator is handed, once what there is of it is sound."""
        if not self.takes_one_pass:
            return super()._estimator_input(batch)
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores", "response_mask", "uid"]
        )
        self.require_sound_rewards(batch, data["rm_scores"])
        self._put_rows(batch, data)
        return BatchBefore(
            before=self.before,
            is_padding=torch.tensor(is_padding(batch)),
            config=self.run_beta.config,
            actor_loss_weight=aggregation_weight(self.config, row_sums(data["response_mask"])),
            prior=getattr(self, "batch_prior", None),  # of PriorTrainer, where a prior is asked for
        )

    def _put_rows(self, batch: KVBatchMeta, data: TensorDict) -> None:
        """What the update needs of each sequence, in the order of the batch."""
        number: dict[str, int] = {}
        group = [number.setdefault(uid, len(number)) for uid in tu.get(data, "uid")]
        outcome = [row.sum().item() for row in data["rm_scores"].unbind()]
        is_real = [float(not added) for added in is_padding(batch)]
        fields = {
            ROW: torch.arange(len(batch)),
            GROUP: torch.tensor(group),
            OUTCOME: torch.tensor(outcome, dtype=torch.float32),
            IS_REAL: torch.tensor(is_real, dtype=torch.float32),
        }
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with _without_rollout_correction(self.config.algorithm, self.takes_one_pass):
            batch = super()._compute_advantage(batch, metrics)
        if self.takes_one_pass:
            known = self.before is not None and self.before.says_something
            mean, std = (self.before.advantage_mean, self.before.advantage_std) if known else (0.0, -1.0)
            batch.extra_info.update({ONE_PASS: True, ADVANTAGE_MEAN: mean, ADVANTAGE_STD: std})
            batch.extra_info.update({LAM: float(self.config.algorithm.lam), STEP: self.global_steps})
        else:
            self.before = Statistics.of_metrics(metrics)
            batch.extra_info[AT_OLD_POLICY] = self._is_at_old_policy()
        return batch

    def _is_at_old_policy(self) -> bool:
        """In two passes: whether the old log-probs are those of the policy as it is now, which the update starts from."""
        cycle_has_begun = is_separate(self.config) and self.local_trigger_step > 0
        return not (cycle_has_begun or _is_of_a_user(type(self), "_compute_old_log_prob"))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        if self.takes_one_pass:
            prefix = f"actor/{OF_BATCH}"  # verl puts "actor/" before a worker's metrics
            names = [name for name in metrics if name.startswith(prefix)]
            found = {name.removeprefix(prefix): metrics.pop(name) for name in names}
            self.trained_advantages = {n: value for n, value in found.items() if n.startswith("critic/")}
            metrics.update({n: value for n, value in found.items() if n not in self.trained_advantages})
            self.before = Statistics.of_metrics(metrics)
        if metrics.get("vimpo/reference_refreshed"):
            self.before = None  # values begin anew with the reference, as at a run's start
        return batch

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args, **kwargs) -> None:
        """As verl's, with the advantages that were trained on, of which its driver knows nothing in one pass."""
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        if self.takes_one_pass:
            metrics.update(self.trained_advantages)

    def save_state(self, folder: Path) -> None:
        super().save_state(folder)
        if self.before is not None:
            save(self.before, folder)

    def load_state(self, folder: Path) -> None:
        super().load_state(folder)
        self.before = load(folder)
        if self.passes.one and self.before is None:
            print(
                f"vimpo_verl: the checkpoint {folder} has no statistics of its last batch: the first step has no actor loss",
                flush=True,
            )


def _is_of_a_user(trainer: type, method: str) -> bool:
    """Whether a class that is neither verl's nor of this package has the method."""
    return any(
        method in vars(of) and of.__module__.split(".")[0] not in ("verl", "verl_patches", "vimpo_verl")
        for of in trainer.__mro__
    )


@contextlib.contextmanager
def _without_rollout_correction(algorithm: Any, in_force: bool) -> Iterator[None]:
    """verl's trainer measures the rollout by the old log-probs, which are not there yet: the update does it then."""
    if not in_force or "rollout_correction" not in algorithm:
        yield
        return
    asked = algorithm.rollout_correction
    algorithm.rollout_correction = None
    try:
        yield
    finally:
        algorithm.rollout_correction = asked
