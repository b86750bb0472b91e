"""What the aggregation of the actor loss makes of it, asked of verl's own function. No seam: nothing of verl is changed.

Reads verl.trainer.ppo.core_algos.agg_loss, so that a mode that a later release adds is known here, too. Checked against
verl 0.9.1.
"""

from typing import Any

import torch
from torch import Tensor

# Policy losses of verl that do not look at actor.loss_agg_mode -> the mode that they aggregate by.
OWN_AGG_MODE = {"sapo": "seq-mean-token-mean"}


def recipe_loss_mode(actor: Any) -> str:
    """The recipe's policy loss, which is the form of L_A, before and after the configuration is made that of VIMPO's workers.

    Args:
        actor: verl's section actor_rollout_ref.actor.
    """
    policy_loss = actor.policy_loss
    mode = policy_loss.get("loss_mode") or "vanilla"
    return policy_loss.get("recipe_loss_mode", "vanilla") if mode == "vimpo" else mode


def agg_mode(actor: Any) -> str:
    """How the recipe's policy loss is aggregated. `actor` as above."""
    return OWN_AGG_MODE.get(recipe_loss_mode(actor), actor.loss_agg_mode)


def mini_batch_size(config: Any) -> int:
    """Sequences of a global mini-batch, as verl's trainers hand them to an update.

    Args:
        config: verl's configuration, a DictConfig.
    """
    return config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n


def aggregation_weight(config: Any, length: Tensor) -> float:
    """What the actor loss's aggregation makes of a loss of 1 on every valid token of a mini-batch: 1 for "token-mean".

    So it is the sum of the weights of a mini-batch's tokens: a coefficient divided by it weighs the same in every mode.

    Args:
        config: verl's configuration, a DictConfig.
        length: [B], valid tokens of each sequence of the whole batch, verl's placeholder samples included.

    Returns:
        The mean over the batch's mini-batches; 0 where no token is valid.

    Raises:
        ValueError: verl has no such mode.
    """
    return _share(config, length, len(length) / mini_batch_size(config))


def full_length_weight(config: Any) -> float:
    """The same for responses that all have `data.max_response_length` tokens. Arguments and errors as above."""
    # Every sequence has the same share, and one is enough to see it.
    length = torch.tensor([config.data.max_response_length])
    return _share(config, length, 1 / mini_batch_size(config))


def _share(config: Any, length: Tensor, mini_batches: float) -> float:
    """agg_loss of ones over sequences of these lengths, which make up this number of mini-batches, divided by that number."""
    actor = config.actor_rollout_ref.actor
    if not length.any():
        return 0.0
    loss = _agg_loss(
        agg_mode(actor),
        torch.ones_like(length, dtype=torch.float64),
        length,
        # The horizon that adjust_losses writes where a recipe leaves it out.
        loss_scale_factor=actor.loss_scale_factor or config.data.max_response_length,
        batch_num_tokens=length.double().sum() / mini_batches,
        global_batch_size=mini_batch_size(config),
    )
    return loss / mini_batches


def aggregate_sums(actor: Any, sums: Tensor, tokens: Tensor) -> float:
    """verl's aggregation of a per-token quantity over a whole batch, from its sums.

    Args:
        actor: verl's configuration of the actor: loss_agg_mode, loss_scale_factor.
        sums: [B], over the valid tokens of each sequence.
        tokens: [B], valid ones.

    Returns:
        What agg_loss makes of the quantity itself; 0 where no token is valid.
    """
    if not tokens.any():
        return 0.0
    mean = sums / tokens.clamp(min=1)
    return _agg_loss(actor.loss_agg_mode, mean, tokens, loss_scale_factor=actor.loss_scale_factor)


def _agg_loss(mode: str, mean: Tensor, tokens: Tensor, **of_the_batch: Any) -> float:
    """verl's agg_loss, which looks at the sums of a sequence and of its mask alone: one column stands for all tokens."""
    from verl.trainer.ppo.core_algos import agg_loss

    loss = agg_loss(
        loss_mat=mean.double().unsqueeze(-1),
        loss_mask=tokens.double().unsqueeze(-1),
        loss_agg_mode=mode,
        **of_the_batch,
    )
    return loss.item()
