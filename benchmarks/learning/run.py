"""One run of the study."""

import copy
import functools
import hashlib
import math
import os
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import choose_lr
import make_model
import one_file
import torch
from one_file import Rollout, imitate, train

from benchmarks.learning import tasks
from benchmarks.learning.arms import ARMS
from benchmarks.learning.settings import Setting
from benchmarks.learning.tasks import HELD_OUT, HELD_OUT_SEED, TASKS

STARTS = Path(__file__).parents[2] / "outputs" / "learning"  # weights that every arm starts from, made once


def make_task(setting: Setting):
    """The task of a setting, in its size."""
    if setting.task in ("needles", "path_star"):
        return TASKS[setting.task](setting.tokens, setting.decisions)
    return TASKS[setting.task](setting.tokens)


def make_policy(setting: Setting) -> torch.nn.Module:
    """The untaught policy of a setting."""
    task = make_task(setting)
    if setting.model == "qwen3":
        return choose_lr.Policy(make_model.make_model(task.vocabulary))
    return task.make_policy()


def taught(setting: Setting) -> dict:
    """The weights that every arm of a seed starts from: of an initialisation of its own, taught to `start_accuracy`."""
    task = make_task(setting)
    torch.manual_seed(setting.seed)
    policy = make_policy(setting)
    if task.start_accuracy > 0:
        imitate(policy, task.teacher(), task.start_accuracy, setting.seed)
    return policy.state_dict()


def start_policy(setting: Setting) -> torch.nn.Module:
    """The policy that every arm of a seed starts from, and the reference; kept in STARTS by the code that makes it."""
    name = f"{setting.model}_{setting.task}_{setting.tokens}_{setting.decisions}_{setting.seed}_{_code()}.pt"
    path = STARTS / name
    if not path.exists():
        STARTS.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(taught(setting), unfinished)
        unfinished.replace(path)
    policy = make_policy(setting)
    policy.load_state_dict(torch.load(path, weights_only=True))
    return policy


@functools.cache
def _code() -> str:
    """Of the files that decide what a start is."""
    sources = (one_file, tasks, make_model, choose_lr)
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in sources)).hexdigest()[:8]


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
