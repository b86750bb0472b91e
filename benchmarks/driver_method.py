"""Tensors that a trainer's whole `_compute_advantage` has alive: VIMPO's in two passes and in one, and verl's own GRPO.

The methods themselves, in this process, on a batch of which the queue has what the stages before have left there. No model, no
worker, no Ray. The queue's own share is left out: what is stored is in other processes, and is sent to them without a copy.
"""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import before_verl  # noqa: F401  first: verl reads it when it is imported
import torch
from in_process import PARTITION, InMemoryQueue, make_config
from tensor_memory import TensorMemory
from torch.utils._python_dispatch import _disable_current_modes
from transfer_queue import KVBatchMeta

# Recipe -> what the stages before leave in the queue, beside rewards, mask and uid.
FIELDS = {
    "VIMPO, two passes": ("old_log_probs", "ref_log_prob", "token_kl"),
    "VIMPO, one pass": (),
    "GRPO": ("old_log_probs",),
    "GRPO with a reference": ("old_log_probs", "ref_log_prob"),
}
GROUP = 8  # responses to a prompt


class _Queue(InMemoryQueue):
    """What it stores is another process's memory; what it hands over is the caller's, each time anew."""

    def get(self, keys, partition_id, select_fields=None):
        with _disable_current_modes():
            data = super().get(keys, partition_id, select_fields)
        return data.clone()

    def put(self, keys, partition_id, fields, tags=None):
        with _disable_current_modes():
            return super().put(keys, partition_id, fields, tags)


def tensors_alive(recipe: str, rows: int, length: int, full: bool = True) -> float:
    """Most that is alive at a time while `_compute_advantage` runs, what it fetches included, in float32 tensors [rows, length].

    Args:
        recipe: of FIELDS.
        rows: responses, a multiple of GROUP.
        length: of the longest, in tokens.
        full: all responses have this length; else half of it at least.
    """
    import transfer_queue as tq

    queue, batch = _batch(FIELDS[recipe], rows, length, full)
    trainer = _trainer(recipe, rows)
    before, (tq.kv_batch_get, tq.kv_batch_put) = (tq.kv_batch_get, tq.kv_batch_put), (queue.get, queue.put)
    try:
        if "one pass" in recipe:
            trainer._compute_old_log_prob(batch, {})  # nothing but the decision
        gc.collect()
        with TensorMemory() as memory:
            trainer._compute_advantage(batch, {})
    finally:
        tq.kv_batch_get, tq.kv_batch_put = before
    return memory.peak / (4 * rows * length)


def _batch(fields: tuple[str, ...], rows: int, length: int, full: bool) -> tuple[_Queue, KVBatchMeta]:
    """A queue with the fields that the trainer's stages before have left there, and verl's handle of them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length if full else length // 2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    queue, keys = _Queue(), [f"p{row // GROUP}_{row % GROUP}_0" for row in range(rows)]
    queue.tags, queue.extra_info = {key: {"is_padding": False} for key in keys}, {}
    for key, tokens in zip(keys, lengths.tolist(), strict=True):
        scores = torch.zeros(tokens)
        scores[-1] = float(torch.randint(0, 2, (), generator=generator))
        queue.rows[key] = {
            "uid": key.split("_")[0],
            "rm_scores": scores,
            "response_mask": torch.ones(tokens, dtype=torch.int64),
            **{name: torch.rand(tokens, generator=generator) for name in fields},
        }
    return queue, KVBatchMeta(keys, queue.tags_of(keys), PARTITION, extra_info={})


def _trainer(recipe: str, rows: int) -> Any:
    """A trainer without workers, for a batch that is one update."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from verl_patches.family_trainer import trainer_class
    from verl_patches.switch import knobs_of

    prompts = rows // GROUP
    sizes = {"data.train_batch_size": prompts, "actor_rollout_ref.actor.ppo_mini_batch_size": prompts}
    sizes |= {"actor_rollout_ref.rollout.n": GROUP, "+algorithm.vimpo.passes": "one" if "one pass" in recipe else "two"}
    config = make_config("somewhere", *(f"{name}={value}" for name, value in sizes.items()))
    verls = TRAINER_REGISTRY[config.trainer.v1.trainer_mode]
    if recipe.startswith("GRPO"):
        trainer = object.__new__(verls)
        trainer.config = config
        config.algorithm.adv_estimator = "grpo"
        return trainer
    trainer = object.__new__(trainer_class(verls, config))  # its __init__ starts workers
    trainer.config, trainer.knobs, trainer.global_steps = config, knobs_of(config)[0], 1
    trainer.actor_rollout_wg = Namespace()
    trainer.set_up_estimator()
    return trainer
