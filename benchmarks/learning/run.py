"""One run of the study."""

import copy
import functools
import math
import time
from collections import deque
from dataclasses import asdict

import torch
from one_file import Rollout, imitate, train

from benchmarks.learning.arms import ARMS
from benchmarks.learning.settings import Setting
from benchmarks.learning.tasks import HELD_OUT, HELD_OUT_SEED, TASKS


def make_task(setting: Setting):
    """The task of a setting, in its size."""
    if setting.task == "needles":
        return TASKS["needles"](setting.tokens, setting.decisions)
    return TASKS[setting.task](setting.tokens)


@functools.lru_cache(maxsize=64)
def start(task_key: tuple, seed: int) -> dict:
    """The weights that every arm starts from: a policy of its seed's own initialisation, taught to `start_accuracy`."""
    name, tokens, decisions = task_key
    task = make_task(Setting("grpo", task=name, tokens=tokens, decisions=decisions))
    torch.manual_seed(seed)
    policy = task.make_policy()
    imitate(policy, task, task.start_accuracy, seed)
    return policy.state_dict()


def start_policy(setting: Setting) -> torch.nn.Module:
    """The policy that every arm of a seed starts from, and the reference."""
    policy = make_task(setting).make_policy()
    policy.load_state_dict(start((setting.task, setting.tokens, setting.decisions), setting.seed))
    return policy


def sample_from_past(policy: torch.nn.Module, batches: int) -> None:
    """Have the policy's answers sampled with the weights of `batches` batches ago, as asynchronous training does."""
    sampler, past = copy.deepcopy(policy), deque(maxlen=batches + 1)

    def sample(prompts: torch.Tensor, response_tokens: int):
        past.append(copy.deepcopy(policy.state_dict()))
        sampler.load_state_dict(past[0])
        return sampler.sample(prompts, response_tokens)

    policy.sample = sample


def trained(setting: Setting) -> tuple[torch.nn.Module, list[float]]:
    """Train once.

    Returns:
        The policy, and the batches' mean rewards without noise, each of fresh prompts, before the batch's updates.
    """
    torch.set_num_threads(1)
    task = make_task(setting)
    policy = start_policy(setting)
    flips = torch.Generator().manual_seed(1000 + setting.seed)

    def on_batch(rollout: Rollout) -> None:
        if setting.flip_kind == "response":
            flipped = torch.rand(len(rollout.truth), generator=flips) < setting.flip_prob
            rollout.outcome = (rollout.truth - flipped.float()).abs()
        if setting.arm == "oracle":
            rollout.exact_advantages = task.advantages(policy, rollout)

    if setting.staleness:
        sample_from_past(policy, setting.staleness)
    rewards = train(
        policy,
        task,
        functools.partial(ARMS[setting.arm], setting=setting),
        batches=setting.batches,
        lr=setting.lr,
        seed=setting.seed,
        updates=setting.updates,
        prompts=setting.prompts,
        responses=setting.responses,
        flip_prob=setting.flip_prob if setting.flip_kind == "group" else 0.0,
        on_batch=on_batch,
    )
    return policy, rewards


def run(setting: Setting) -> dict:
    """Train once and measure.

    Returns:
        accuracy: at the end, on held-out prompts; 0 if the weights are not finite any more.
        rewards: as of `trained`.
        seconds: processor seconds.
    """
    begin = time.process_time()
    policy, rewards = trained(setting)
    task = make_task(setting)
    accuracy = task.accuracy(policy, held_out_prompts(task))
    return {
        "accuracy": round(accuracy, 4) if math.isfinite(accuracy) else 0.0,
        "rewards": [round(reward, 4) for reward in rewards],
        "seconds": round(time.process_time() - begin, 1),
    }


def held_out_prompts(task) -> torch.Tensor:
    """The prompts of every measurement; training never sees them but by chance."""
    return task.prompts(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))


def run_named(setting: Setting) -> dict:
    """A run's result with its name and setting, as the results files have it."""
    return {"name": setting.name, "setting": asdict(setting), **run(setting)}
