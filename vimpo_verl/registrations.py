"""The two names that verl looks up: the advantage estimator "vimpo" and the policy loss "vimpo".

verl hands an estimator rewards, mask, groups and configuration, and a policy loss two log-probs and the advantages. What
VIMPO needs beyond that reaches them through two context variables, set by the seams in verl_patches around verl's own
calls. Where a seam is not in force the variable is empty and the function raises: VIMPO never trains without kappa or
without its value loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from vimpo_verl.batch import VimpoBatch, compute_batch, compute_targets
from vimpo_verl.config import VimpoConfig
from vimpo_verl.one_pass import Statistics

NAME = "vimpo"


@dataclass
class JointPassOutput:
    """What the joint pass found for a batch; the estimator leaves its result in it.

    Attributes:
        old_log_prob, ref_log_prob, token_kl: [B, T], in nats, padded on the right. None once there is a result.
        is_padding: [B] bool, placeholder sequences that verl added.
        config: the knobs.
        lam: verl's algorithm.lam.
        actor_loss_weight: what loss_agg_mode makes of a loss of 1 on every token; 1 for token-mean.
        response_mask: [B, T], of whole responses, where the one that the estimator is handed lacks tokens that verl has
            rejected from the policy loss. None: they are the same.
        session_end: [B], the row that ended the session of each; None: there is one response a session.
        prior: mean and weight, [B] each, for a baseline that needs a prior.
        result: filled by the estimator.
    """

    old_log_prob: Tensor | None
    ref_log_prob: Tensor | None
    token_kl: Tensor | None
    is_padding: Tensor
    config: VimpoConfig
    lam: float
    actor_loss_weight: float = 1.0
    response_mask: Tensor | None = None
    session_end: Tensor | None = None
    prior: tuple[Tensor, Tensor] | None = None
    result: VimpoBatch | None = None


@dataclass
class BatchBefore:
    """In one pass, in the place of JointPassOutput: the update finds the log-probs. The estimator leaves its result in it.

    Attributes:
        before: statistics of the batch before, or None.
        others: as in JointPassOutput.
    """

    before: Statistics | None
    is_padding: Tensor
    config: VimpoConfig
    actor_loss_weight: float = 1.0
    prior: tuple[Tensor, Tensor] | None = None
    result: VimpoBatch | None = None


@dataclass
class ActorBranch:
    """c_A of the update under way; the policy loss leaves L_A (a micro-batch's share, not yet times c_A) in it."""

    coeff: float
    loss: Tensor | None = None


_joint_pass_output: ContextVar[JointPassOutput | BatchBefore | None] = ContextVar(
    "vimpo_joint_pass_output", default=None
)
_actor_branch: ContextVar[ActorBranch | None] = ContextVar("vimpo_actor_branch", default=None)


@contextmanager
def joint_pass_output(output: JointPassOutput | BatchBefore) -> Iterator[JointPassOutput | BatchBefore]:
    """Hand the joint pass's output, or that there is none in one pass, to the estimator, for the calls inside the `with`
    block."""
    token = _joint_pass_output.set(output)
    try:
        yield output
    finally:
        _joint_pass_output.reset(token)


@contextmanager
def actor_branch(branch: ActorBranch) -> Iterator[ActorBranch]:
    """Hand c_A to the policy loss, for the calls inside the `with` block."""
    token = _actor_branch.set(branch)
    try:
        yield branch
    finally:
        _actor_branch.reset(token)


def vimpo_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: Any
) -> tuple[Tensor, Tensor]:
    """verl's estimator "vimpo": implied advantages and the value target (paper section 3).

    Args:
        token_level_rewards: [B, T]; the reward of a sequence is their sum.
        response_mask: [B, T].
        index: [B], the uid of each sequence's prompt.

    Returns:
        advantages [B, T], whitened over the batch (zeros in one pass, where the update works out its own), and returns
        [B, T] = R - V0 on every valid token.

    Raises:
        RuntimeError: there is no kappa for this batch, because VIMPO's trainer is not in force; or it has been asked before.
        ValueError: the joint pass belongs to another batch, or the rewards have several channels.
    """
    output = _joint_pass_output.get()
    if output is None:
        raise RuntimeError(
            "adv_estimator=vimpo: this batch has no kappa, because VIMPO's trainer is not in force in this process. "
            "Run `vimpo check` in the environment of the process that failed; a trainer of your own must derive from verl's "
            "PPOTrainerSync or PPOTrainerColocateAsync (verl.trainer.ppo.v1) and be made with verl's configuration"
        )
    if isinstance(output, JointPassOutput) and output.result is not None:
        raise RuntimeError(
            "adv_estimator=vimpo: the advantages of this batch are there already, and its log-probs are gone. A trainer of your "
            "own must call super()._compute_advantage once a batch"
        )
    if isinstance(output, JointPassOutput) and output.token_kl.shape != response_mask.shape:
        raise ValueError(
            f"the joint pass covers {tuple(output.token_kl.shape)} response tokens and the batch has "
            f"{tuple(response_mask.shape)}"
        )
    if token_level_rewards.shape != response_mask.shape:
        raise ValueError(
            f"token_level_rewards must be [B, T] = {list(response_mask.shape)}, got {list(token_level_rewards.shape)}: VIMPO "
            "has one reward a response. Have the reward function return one number as its score; several channels can go "
            "into its extra values, which verl logs"
        )
    whole = output.response_mask if isinstance(output, JointPassOutput) else None
    of_the_batch = {
        "response_mask": response_mask if whole is None else whole,
        "outcome": token_level_rewards.sum(-1),
        "group": index.tolist(),
        "config": output.config,
        "is_padding": output.is_padding,
        "actor_loss_weight": output.actor_loss_weight,
        "prior": output.prior[0] if output.prior else None,
        "prior_weight": output.prior[1] if output.prior else None,
    }
    if isinstance(output, BatchBefore):
        output.result = compute_targets(**of_the_batch, before=output.before)
        return output.result.advantages, output.result.returns
    output.result = compute_batch(
        old_log_prob=output.old_log_prob,
        ref_log_prob=output.ref_log_prob,
        token_kl=output.token_kl,
        lam=output.lam,
        **of_the_batch,
        session_end=output.session_end,
    )
    output.old_log_prob = output.ref_log_prob = output.token_kl = None  # verl copies the results next
    return output.result.advantages, output.result.returns


def vimpo_actor_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's policy loss "vimpo": c_A * L_A, where L_A is the recipe's own policy loss; "vanilla", PPO-clip, is the paper's.

    Arguments and metrics are those of verl's policy losses; config.policy_loss.recipe_loss_mode names the recipe's. L_V is
    added by verl_patches.value_branch, which also says what c_A is.

    Returns:
        The micro-batch's share of c_A * L_A, a scalar, and verl's metrics.

    Raises:
        RuntimeError: the value branch is missing: VIMPO's worker is not in force.
    """
    branch = _actor_branch.get()
    if branch is None:
        raise RuntimeError(
            "policy_loss.loss_mode=vimpo: the value loss is missing, because VIMPO's worker is not in force in this "
            "process; training would go on without L_V. Choose VIMPO with algorithm.adv_estimator=vimpo, not with "
            "loss_mode, and run `vimpo check` in the environment of the process that failed"
        )
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    loss, metrics = get_policy_loss_fn(config.policy_loss.recipe_loss_mode)(
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=rollout_is_weights,
    )
    branch.loss = loss.detach()
    return branch.coeff * loss, metrics


def register(core_algos: ModuleType) -> None:
    """Register both names with verl. `core_algos` is the module verl.trainer.ppo.core_algos."""
    core_algos.register_adv_est(NAME)(vimpo_advantage)
    core_algos.register_policy_loss(NAME)(vimpo_actor_loss)
