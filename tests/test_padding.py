"""Claim: every mini-batch of an update has a real sample in it, whatever placeholders verl adds and however it
shuffles.

verl fills a batch up to a multiple of its mini-batch with placeholders that have no valid token. A global mini-batch of
nothing else would make the token mean of verl's losses 0 / 0. It cannot come about: without a critic, which VIMPO
refuses, verl pads to a multiple of the global mini-batch, so there are fewer placeholders than a mini-batch has
samples. If it did come about, by a sampler of one's own, the parameters would not move: only the logged losses would be
NaN.

verl's own function says what it pads to; the dealing over ranks and mini-batches is written out here.
"""

from random import Random
from types import SimpleNamespace as Namespace

import hypothesis.strategies as st
import torch
from engine_harness import Setting, make_workers, parameters_of, run_step
from engine_samples import placeholders
from hypothesis import given


def padded_size(size: int, prompts: int, responses: int, dp_size: int) -> int:
    """What verl fills a batch up to."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    trainer = object.__new__(PPOTrainer.__subclasses__()[0])
    trainer.use_critic, trainer.global_steps = False, 1
    trainer.config = Namespace(
        trainer=Namespace(critic_warmup=0),
        actor_rollout_ref=Namespace(actor=Namespace(ppo_mini_batch_size=prompts), rollout=Namespace(n=responses)),
    )
    multiple = trainer._get_required_batch_multiple(dp_size)
    return -(-size // multiple) * multiple


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.integers(1, 100), st.integers(0, 2**31))
def test_every_mini_batch_has_a_real_sample(dp_size, prompts_a_rank, responses, size, seed):
    prompts = prompts_a_rank * dp_size  # verl refuses a mini-batch that does not divide over the ranks
    random = Random(seed)
    is_real = [i < size for i in range(padded_size(size, prompts, responses, dp_size))]
    random.shuffle(is_real)  # verl balances lengths over ranks: any order
    share, mini_batch = len(is_real) // dp_size, prompts * responses // dp_size
    ranks = [is_real[rank * share : (rank + 1) * share] for rank in range(dp_size)]
    for rank in ranks:
        random.shuffle(rank)  # actor.shuffle
    for start in range(0, share, mini_batch):
        assert any(any(rank[start : start + mini_batch]) for rank in ranks)


def test_an_update_on_placeholders_alone_moves_nothing(models):
    setting = Setting(lr=1.0, epochs=2, knobs={"actor_coeff": 0.1})
    workers = make_workers(models, setting)
    before = parameters_of(workers.actor.engine)
    result = run_step(models, setting, placeholders(4), workers)
    assert all((gradient == 0).all() for gradients in result.gradients for gradient in gradients.values())
    for name, parameter in parameters_of(workers.actor.engine).items():
        assert torch.equal(parameter, before[name])
    assert result.metrics["vimpo/value_loss"] == 0.0
