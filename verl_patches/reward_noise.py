"""Seam: noisy rewards, for any estimator, in training only.

Touches PPOTrainer._compute_advantage, by subclassing. Checked against verl 0.9.1; no upstream issue.

Why there: the rewards of a batch are complete and still unused at that point, for every estimator and every source of
rewards (reward loop or colocated reward model), and validation never comes by. The noise is written into `rm_scores` of
the TransferQueue, so verl's own critic/score, critic/rewards and rollout dumps show what was trained on; the clean mean is
logged beside it. A reward function could not do it: it is called in validation too and does not know the step.

Why a subclass made on demand (verl_patches.trainer makes it): where noise is not asked for, a run gets the class that it would
get without this package, or VIMPO's, unchanged. Where it is, the same class with RewardNoise in front.
"""

import inspect
from types import ModuleType
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_patches.switch import noise_of
from vimpo_verl import __version__
from vimpo_verl.reward_noise import SECTION, flip_groups


def install(v1: ModuleType) -> None:
    """Check that verl's trainer has the step that RewardNoise extends. `v1` is the module verl.trainer.ppo.v1."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    parameters = list(inspect.signature(PPOTrainer._compute_advantage).parameters)
    if parameters != ["self", "batch", "metrics"]:
        raise RuntimeError(f"PPOTrainer._compute_advantage takes {parameters}, not self, batch, metrics")


def with_reward_noise(trainer: type, config: Any) -> type:
    """The class to make a run's trainer of.

    Args:
        trainer: a PPOTrainer of verl's v1, a user's or VIMPO's.
        config: verl's configuration.

    Returns:
        `trainer` itself where no noise is asked for, else a subclass of it with noise.

    Raises:
        ValueError: the section algorithm.reward_noise has problems.
    """
    knobs, problems = noise_of(config)
    if problems:
        raise ValueError("\n".join(problems))
    if knobs.flip_prob == 0.0 or issubclass(trainer, RewardNoise):
        return trainer
    return type(f"Noisy{trainer.__name__}", (RewardNoise, trainer), {})


class RewardNoise:
    """Put in front of a v1 trainer: flips rewards just before the advantages are computed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        noise, _ = noise_of(self.config)
        print(f"vimpo_verl {__version__}: reward noise in force, in training only: {noise}", flush=True)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        add_noise(batch, metrics, self.config)
        return super()._compute_advantage(batch, metrics)


def add_noise(batch: KVBatchMeta, metrics: dict, config: Any) -> None:
    """Flip the rewards of the groups that the hash chooses, in the TransferQueue, and log what was done.

    Args:
        batch: verl's handle of the batch; its placeholder samples are left alone.
        metrics: filled with reward_noise/clean_mean, reward_noise/noisy_mean and reward_noise/flipped_groups.
        config: verl's configuration.

    Raises:
        ValueError: a reward is neither 0 nor 1, or a sample has no index.
    """
    real = [position for position, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    keys = [batch.keys[position] for position in real]
    data = tq.kv_batch_get(
        keys=keys, partition_id=batch.partition_id, select_fields=["uid", "rm_scores", "data_source", "extra_info"]
    )
    per_token = list(data["rm_scores"].unbind())
    if any(scores.dim() != 1 for scores in per_token):
        raise ValueError(
            f"{SECTION}: rm_scores has several channels, {list(per_token[0].shape)}; a reward is one number"
        )
    noisy = flip_groups(
        noise_of(config)[0],
        rewards=[scores.sum().item() for scores in per_token],
        groups=list(data["uid"]),
        # The step that drew the prompt: the step of the update when verl's trainer is synchronous, and the same for
        # both algorithms also when it is not.
        steps=[batch.tags[position]["global_steps"] for position in real],
        prompts=_prompts(keys, list(data["data_source"]), list(data["extra_info"])),
        names=keys,
    )
    if noisy.flipped_groups:
        rewritten = [_at_the_end(scores, reward) for scores, reward in zip(per_token, noisy.rewards, strict=True)]
        rm_scores = torch.nested.as_nested_tensor(rewritten, layout=torch.jagged)
        tq.kv_batch_put(
            keys=keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"rm_scores": rm_scores}, batch_size=len(keys)),
        )
    metrics["reward_noise/clean_mean"] = noisy.clean_mean
    metrics["reward_noise/noisy_mean"] = noisy.noisy_mean
    metrics["reward_noise/flipped_groups"] = noisy.flipped_groups


def _prompts(keys: list[str], data_sources: list[str], extra_infos: list[dict]) -> list[tuple]:
    """What names each sample's prompt. verl's own field `index` is 0 where the data have none, so it is not used."""
    prompts = []
    for key, data_source, extra_info in zip(keys, data_sources, extra_infos, strict=True):
        index = (extra_info or {}).get("index")
        if index is None:
            raise ValueError(
                f"{SECTION}: sample {key} (data_source {data_source!r}) has no extra_info.index, and the noise is decided "
                "by the prompt's index in its data set. Write one into the parquet file, as "
                "examples/math/prepare_data.py does"
            )
        prompts.append((data_source, index))
    return prompts


def _at_the_end(scores: torch.Tensor, reward: float) -> torch.Tensor:
    """[T] -> [T]: a response's reward on its last token, where verl puts it."""
    moved = torch.zeros_like(scores)
    moved[-1] = reward
    return moved
