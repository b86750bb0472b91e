"""Puts a verl run's batches in a fixed order: loaded through VERL_USE_EXTERNAL_MODULES by the test that compares two runs.

verl names prompts at random and takes the answers as they come, so the sums of no two of its runs are in the same order. Here
prompts are numbered and a batch is put in the order of its names. (Sampling is the test's to make reproducible.)
"""

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


def _in_order(wrapped, instance, args, kwargs):
    batch, metrics = wrapped(*args, **kwargs)
    batch.reorder(sorted(range(len(batch.keys)), key=batch.keys.__getitem__))
    return batch, metrics

