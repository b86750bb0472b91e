"""Makes verl's runs repeatable: loaded through VERL_USE_EXTERNAL_MODULES by the tests that compare two runs.

verl names prompts at random, takes the answers as they come and draws all their tokens from one stream of random numbers, so
no two of its runs have the same answers, nor their sums in the same order. Here prompts are numbered, a batch is put in the
order of its names, and each answer has a seed of its own, made of the step, the prompt's index in the data and the answer's
number: so a run that resumes at a step draws what the uninterrupted one drew there.
"""

import hashlib
import itertools
import types

import wrapt


@wrapt.when_imported("verl.trainer.ppo.v1.trainer_base")
def number_prompts(module):
    numbers = itertools.count()
    module.uuid = types.SimpleNamespace(uuid4=lambda: f"{next(numbers):08d}")


@wrapt.when_imported("verl.trainer.ppo.v1.replay_buffer")
def order_batches(module):
    wrapt.wrap_function_wrapper(module, "ReplayBuffer.sample", _in_order)


@wrapt.when_imported("verl.experimental.agent_loop.single_turn_agent_loop")
def seed_answers(module):
    wrapt.wrap_function_wrapper(module, "SingleTurnAgentLoop.run", _with_seed)


def _in_order(wrapped, instance, args, kwargs):
    batch, metrics = wrapped(*args, **kwargs)
    batch.reorder(sorted(range(len(batch.keys)), key=batch.keys.__getitem__))
    return batch, metrics


def _with_seed(wrapped, instance, args, kwargs):
    sampling_params, *others = args
    answer = f"{kwargs['global_steps']} {kwargs['index']} {kwargs['session_id']}"
    seed = int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4], "big")
    return wrapped({**sampling_params, "seed": seed}, *others, **kwargs)
