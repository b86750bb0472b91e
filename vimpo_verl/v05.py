"""V0.5 (arXiv 2603.10848): the reward above a baseline that is fused of a prior and the prompt's own rollouts. Torch only.

    A_i = R_i - mu*,    mu* = w rbar + (1 - w) prior    baselines.fused_baseline

on every token of a response, for verl's own PPO-clip loss. A is not divided by the group's standard deviation: unlike in GRPO
a group whose rewards are all equal has an advantage, wherever they differ from the prior, and its deviation is 0.

verl hands an estimator no prior: it comes through a context variable that the trainer sets (verl_patches/v05.py). Where
that is missing the estimator raises.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.baselines import fused_baseline

NAME = "v05"


@dataclass
class PriorOfBatch:
    """What the estimator is handed; it leaves its metrics in it.

    Attributes:
        mean: [B], what each sequence's prompt's mean reward was taken to be, from 0 to 1.
        is_padding: [B] bool, placeholder sequences that verl added; they count nowhere.
        metrics: under "v05/", filled by the estimator.
    """

    mean: Tensor
    is_padding: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


_prior_of_batch: ContextVar[PriorOfBatch | None] = ContextVar("v05_prior_of_batch", default=None)


@contextmanager
def prior_of_batch(prior: PriorOfBatch) -> Iterator[PriorOfBatch]:
    """Hand the priors to the estimator, for the calls inside the `with` block."""
    token = _prior_of_batch.set(prior)
    try:
        yield prior
    finally:
        _prior_of_batch.reset(token)


def fused_advantages(
    outcome: Tensor, group: Sequence[Hashable], prior: Tensor, is_padding: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """R - mu* of each sequence, and what to log.

    Args:
        outcome: [B], from 0 to 1.
        group: B hashables; sequences of one prompt share one. Groups may be of any size.
        prior: [B], from 0 to 1.
        is_padding: [B] bool.

    Returns:
        [B], float32 (float64 for float64 inputs), 0 for placeholders; and v05/prior_accepted, the share of prompts whose
        baseline is the prior itself, v05/baseline, the mean over the prompts, v05/advantage_rms, over the sequences.

    Raises:
        ValueError: as for `baselines.fused_baseline`.
    """
    real = ~is_padding.bool()
    names = [name for is_real, name in zip(real.tolist(), group, strict=True) if is_real]
    rewards, prior = F.accumulating(outcome[real]), prior[real]
    baseline = fused_baseline(rewards, names, prior)
    of_real = rewards - baseline
    advantages = of_real.new_zeros(outcome.shape).masked_scatter(real, of_real)
    first = list({name: row for row, name in reversed(list(enumerate(names)))}.values())
    if not first:
        return advantages, {}
    accepted = baseline[first] == prior.to(baseline.dtype)[first]
    return advantages, {
        "v05/prior_accepted": accepted.double().mean().item(),
        "v05/baseline": baseline[first].double().mean().item(),
        "v05/advantage_rms": of_real.double().square().mean().sqrt().item(),
    }


def v05_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: Any
) -> tuple[Tensor, Tensor]:
    """verl's estimator "v05".

    Args:
        token_level_rewards: [B, T]; the reward of a sequence is their sum.
        response_mask: [B, T].
        index: [B], the uid of each sequence's prompt.

    Returns:
        advantages and returns, the same [B, T]: A_i on every valid token, as GRPO's.

    Raises:
        RuntimeError: there is no prior for this batch, because V0.5's trainer is not in force.
        ValueError: the priors belong to another batch, the rewards have several channels, or are not from 0 to 1.
    """
    prior = _prior_of_batch.get()
    if prior is None:
        raise RuntimeError(
            "adv_estimator=v05: this batch has no prior, because V0.5's trainer is not in force in this process. Run "
            "`vimpo check` in the environment of the process that failed; a trainer of your own must derive from verl's "
            "PPOTrainerSync or PPOTrainerColocateAsync (verl.trainer.ppo.v1) and be made with verl's configuration"
        )
    if token_level_rewards.shape != response_mask.shape or len(prior.mean) != len(response_mask):
        raise ValueError(
            f"token_level_rewards {list(token_level_rewards.shape)}, response_mask {list(response_mask.shape)} and priors "
            f"[{len(prior.mean)}] do not fit: V0.5 has one reward a response, and one prior"
        )
    advantages, prior.metrics = fused_advantages(
        token_level_rewards.sum(-1), index.tolist(), prior.mean, prior.is_padding
    )
    per_token = torch.where(response_mask.bool(), advantages.unsqueeze(-1), 0.0).to(advantages.dtype)
    return per_token, per_token


def register(core_algos: ModuleType) -> None:
    """Register the name with verl. `core_algos` is the module verl.trainer.ppo.core_algos."""
    core_algos.register_adv_est(NAME)(v05_advantage)
