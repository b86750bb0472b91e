"""The two names of PACS that verl looks up: the advantage estimator "pacs" and the policy loss "pacs".

PACS has no advantage of its own: its loss is that of a classifier, and in every mini-batch its gradient is another. What the
estimator returns is what drives the first update of a step, for verl's metrics and dumps; the loss does not read it. The loss
needs dL/dr of the sequences of a micro-batch, which depends on their whole groups: the worker finds it for the whole mini-batch
(verl_patches.pacs_worker) and hands it over through a context variable. Where that is empty the loss raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl import pacs
from vimpo_verl.pacs_config import PacsConfig

NAME = "pacs"


@dataclass(frozen=True)
class MicroBatch:
    """What the loss needs of a micro-batch of B sequences.

    Attributes:
        config: the knobs.
        coefficients: [B], dL/dr_j.
        losses: [B], w_j BCE_j / N: the sequences' shares of L.
        scale: what verl multiplies a rank's losses by, because it averages gradients over the ranks.
    """

    config: PacsConfig
    coefficients: Tensor
    losses: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class OldPolicy:
    """What the estimator needs of a batch beside rewards and groups: the knobs, and old_log_prob [B, T] in nats."""

    config: PacsConfig
    old_log_prob: Tensor


_micro_batch: ContextVar[MicroBatch | None] = ContextVar("pacs_micro_batch", default=None)
_old_policy: ContextVar[OldPolicy | None] = ContextVar("pacs_old_policy", default=None)


@contextmanager
def micro_batch(found: MicroBatch) -> Iterator[None]:
    """Hand the loss what it needs, for the calls inside the `with` block."""
    token = _micro_batch.set(found)
    try:
        yield
    finally:
        _micro_batch.reset(token)


@contextmanager
def old_policy(found: OldPolicy) -> Iterator[None]:
    """Hand the estimator what it needs, for the calls inside the `with` block."""
    token = _old_policy.set(found)
    try:
        yield
    finally:
        _old_policy.reset(token)


def pacs_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: Any
) -> tuple[Tensor, Tensor]:
    """verl's estimator "pacs": the advantage that drives the first update of a step.

    The gradient of L is that of sum_j dL/dr_j r_j. So the first update is a policy gradient with the advantage
    A_jt = - N dL/dr_j dr_j/dlog pi(y_jt), of the whole batch: without class weights RLOO's times beta, for the log-ratio.

    Args:
        token_level_rewards: [B, T]; the label of a sequence is their sum, 0 or 1.
        response_mask: [B, T].
        index: [B], the uid of each sequence's prompt.

    Returns:
        advantages [B, T] and returns [B, T], the label on every valid token.

    Raises:
        RuntimeError: PACS's trainer is not in force.
        ValueError: a label is neither 0 nor 1, or the rewards have several channels.
    """
    found = _old_policy.get()
    if found is None:
        raise RuntimeError(
            "adv_estimator=pacs: PACS's trainer is not in force in this process, so groups would be torn apart. Run `vimpo "
            "check` in the environment of the process that failed; a trainer of your own must derive from verl's "
            "PPOTrainerSync or PPOTrainerColocateAsync (verl.trainer.ppo.v1) and be made with verl's configuration"
        )
    if token_level_rewards.shape != response_mask.shape:
        raise ValueError(
            f"token_level_rewards must be [B, T] = {list(response_mask.shape)}, got {list(token_level_rewards.shape)}: PACS "
            "has one reward a response, 0 or 1. Have the reward function return one number as its score"
        )
    config, outcome, mask = found.config, token_level_rewards.sum(-1), F.require_mask(response_mask)
    log_prob = found.old_log_prob.detach().clone().requires_grad_()
    with torch.enable_grad():
        r = pacs.reward_proxy(log_prob, found.old_log_prob, mask, beta=config.beta, reward_method=config.reward_method)
        terms = pacs.score_coefficients(
            r.detach(), outcome, index.tolist(), score=config.score, class_weight=config.class_weight
        )
        (per_token,) = torch.autograd.grad(pacs.surrogate(terms.coefficients, r), log_prob)
    return -len(outcome) * per_token.to(outcome.dtype), (outcome.unsqueeze(-1) * mask).to(outcome.dtype)


def pacs_policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, response_mask: Tensor, **_: Any
) -> tuple[Tensor, dict[str, Any]]:
    """verl's policy loss "pacs": a micro-batch's share of L, with the gradient of L whatever the micro-batch holds.

    Args:
        old_log_prob, log_prob, response_mask: [B, T]. verl's advantages, loss_agg_mode and clipping have no part in it.

    Returns:
        The share of L, a scalar, and no metrics.

    Raises:
        RuntimeError: the coefficients are missing: PACS's worker is not in force.
    """
    found = _micro_batch.get()
    if found is None:
        raise RuntimeError(
            "policy_loss.loss_mode=pacs: the gradient of the groups' scores is missing, because PACS's worker is not in force "
            "in this process. Choose PACS with algorithm.adv_estimator=pacs, not with loss_mode, and run `vimpo check` in the "
            "environment of the process that failed"
        )
    config = found.config
    r = pacs.reward_proxy(log_prob, old_log_prob, response_mask, beta=config.beta, reward_method=config.reward_method)
    gradient_of = pacs.surrogate(found.coefficients, r)
    return found.scale * (found.losses.sum() + gradient_of - gradient_of.detach()), {}


def register(core_algos: ModuleType) -> None:
    """Register both names with verl. `core_algos` is the module verl.trainer.ppo.core_algos."""
    core_algos.register_adv_est(NAME)(pacs_advantage)
    core_algos.register_policy_loss(NAME)(pacs_policy_loss)
