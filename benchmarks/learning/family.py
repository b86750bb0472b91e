"""The arms of VIMPO's two neighbours, and their trials: as many as any other arm has.

PACS       arXiv 2509.02522, vimpo_verl.pacs, with two updates a batch or more: with one it is RLOO with weights; coeff is beta.
V0.5       arXiv 2603.10848: the fused baseline, and of a prompt's responses as many as its rule wants, from 4 on. A run's prompts
           never come again, so there is no own past: the prior of a prompt is the mean reward of the batch's others. It is
           given 16 responses a prompt to choose from, of which `rollouts_used` are trained on.
"""

import torch
from one_file import Rollout, ppo_loss
from torch import Tensor

from benchmarks.learning.settings import Setting
from vimpo_verl.baselines import MIN_ROLLOUTS, fused_baseline, wants_another_rollout
from vimpo_verl.pacs import pacs_loss


def pacs(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """The authors' defaults, beta apart."""
    return pacs_loss(
        log_prob, rollout.old_log_prob, rollout.mask, rollout.outcome, rollout.group, beta=setting.coeff or 1.0
    )


def v05(rollout: Rollout, log_prob: Tensor, logits: Tensor, setting: Setting) -> Tensor:
    """PPO with R - mu* on the responses that the budget rule takes."""
    prior, used = mean_of_others(rollout), rollouts_used(rollout)
    groups = [name for name, is_used in zip(rollout.group, used.tolist(), strict=True) if is_used]
    advantages = torch.zeros_like(rollout.outcome)
    advantages[used] = rollout.outcome[used] - fused_baseline(rollout.outcome[used], groups, prior[used])
    kept = Rollout(**{**vars(rollout), "mask": rollout.mask * used.unsqueeze(1)})
    return ppo_loss(kept, log_prob, advantages.unsqueeze(1))


def mean_of_others(rollout: Rollout) -> Tensor:
    """[B]: the mean reward of the batch's other prompts; 1/2 where there are none."""
    of_prompt = rollout.outcome.view(rollout.group[-1] + 1, -1).mean(1)
    if len(of_prompt) == 1:
        return torch.full_like(rollout.outcome, 0.5)
    others = (of_prompt.sum() - of_prompt) / (len(of_prompt) - 1)
    return others.clamp(0, 1)[torch.tensor(rollout.group)]


def rollouts_used(rollout: Rollout) -> Tensor:
    """[B] bool: of each prompt's responses, in their order, those that the published rule would have asked for."""
    rewards = rollout.outcome.view(rollout.group[-1] + 1, -1)
    prior = mean_of_others(rollout).view(rewards.shape)[:, 0]
    used, wanting = torch.zeros_like(rewards, dtype=torch.bool), torch.ones(len(rewards), dtype=torch.bool)
    for k in range(1, rewards.shape[1] + 1):
        used[:, k - 1] = wanting
        wanting = wanting & ((k < MIN_ROLLOUTS) | wants_another_rollout(rewards[:, :k].mean(1), prior, k))
    return used.flatten()


ARMS = {"pacs": pacs, "v05": v05}

RATES = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3)
SCHEDULES = ((2, 7e-4), (2, 5e-4), (4, 5e-4), (4, 3e-4), (8, 3e-4), (8, 2e-4))  # updates a batch, learning rate
# Arm's label -> the settings that are tried for it, as in grids.TRIALS.
TRIALS: dict[str, list[Setting]] = {
    "PACS": [Setting("pacs", lr=lr, coeff=1.0, updates=updates) for updates, lr in SCHEDULES],
    "V0.5": [Setting("v05", lr=lr, responses=16) for lr in RATES],
}
