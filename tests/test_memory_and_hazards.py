"""Claim: VIMPO's update holds nothing logits-sized that GRPO's does not, and what verl does to logits in place cannot
change kappa.

Tensors are counted by a dispatch mode (benchmarks/tensor_memory.py), on verl's FSDP engine. The hazards are acted out: verl's
functions are replaced by ones that spoil the logits they were given. Not covered: the allocator of a GPU.
"""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_harness import (
    Setting,
    joint_pass,
    make_workers,
    one_pass_data,
    run_one_pass_step,
    run_step,
    training_data,
)
from engine_samples import VOCABULARY, make_samples, to_tensordict

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from tensor_memory import TensorMemory

SETTING = Setting(micro_batch_size=8)


def update_memory(workers, data, last_dimension=None) -> TensorMemory:
    workers.actor.train_mini_batch(data[:])  # what is made once a worker is not the update's
    with TensorMemory(large_elements=30 * VOCABULARY, last_dimension=last_dimension) as memory:
        workers.actor.train_mini_batch(data[:])
    memory.large = Counter({shape: count for shape, count in memory.large.items() if VOCABULARY in shape})
    return memory


@pytest.fixture
def workers_and_data(models):
    samples = make_samples()
    workers = make_workers(models, SETTING)
    result = run_step(models, SETTING, samples, workers)
    return workers, training_data(samples, result.per_token, result.batch, SETTING)


def test_update_makes_the_logits_sized_tensors_of_grpo(workers_and_data):
    workers, data = workers_and_data
    vimpo = update_memory(workers, data)
    grpo_loss(workers)
    grpo = update_memory(workers, data)
    assert vimpo.large, "the count would show nothing"
    assert vimpo.large == grpo.large
    # DESIGN: at most 1.02 times. Here a micro-batch has 8 sequences and 48 vocabulary entries, so VIMPO's few [B, T] tensors
    # weigh thousands of times more beside the logits than they do with a real vocabulary.
    assert vimpo.peak <= 1.02 * grpo.peak


def grpo_loss(workers):
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=1)
    workers.actor.set_loss_fn(partial(ppo_loss, config=config))


@pytest.fixture
def small_buffers(monkeypatch):
    """The token statistics' buffers on a CPU, whose size does not go with the logits', would be as large as these logits. One
    thread, because each has its own."""
    from vimpo_verl.token_statistics import cpu

    monkeypatch.setattr(cpu, "_SMALL_CHUNK", 2 * VOCABULARY)
    monkeypatch.setattr(cpu, "_LARGE_CHUNK", 2 * VOCABULARY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Bytes, of the micro-batch of SETTING.
LOGITS = 4 * VOCABULARY * sum(len(s.prompt) + len(s.response) for s in make_samples())
LAYOUTS = [(True, 1.0), (True, 0.7), (False, 1.0), (False, 0.7)]  # the columns of the page's table
PAGE = Path(__file__).parent.parent / "docs/performance.md"


def require_on_page(row: str, layout: tuple[bool, float], peak: int) -> None:
    """The table of logits tensors in docs/performance.md has this peak, in bytes."""
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {row} | ")]
    said = float(line.strip("| ").split(" | ")[1 + LAYOUTS.index(layout)])
    assert peak / LOGITS == pytest.approx(said, abs=0.06), (row, layout)


@pytest.mark.parametrize("use_remove_padding, temperature", LAYOUTS)
def test_the_update_in_one_pass_makes_one_logits_tensor_more_than_grpos(
    models, small_buffers, use_remove_padding, temperature
):
    """The reference's, once, and no temporary of its size; its padded length where padding is kept."""
    setting = replace(SETTING, use_remove_padding=use_remove_padding, temperature=temperature)
    samples, workers = make_samples(), make_workers(models, setting)
    batch = run_one_pass_step(models, setting, samples, workers).batch
    one = update_memory(workers, one_pass_data(samples, batch, setting), VOCABULARY)
    result = run_step(models, setting, samples, workers)
    data = training_data(samples, result.per_token, result.batch, setting)
    grpo_loss(workers)
    grpo = update_memory(workers, data, VOCABULARY)
    (shape,) = (one.large - grpo.large).elements()
    assert not grpo.large - one.large and shape[-1] == VOCABULARY
    # Of the logits alone: the reference's activations weigh more than logits of 48 entries. And not at one time: the
    # reference's are gone when the gradients of the policy's are made.
    assert one.peak <= grpo.peak + 4 * VOCABULARY * FEW_TOKENS
    for row, update in (("GRPO's update", grpo), ("VIMPO's update, two passes or one", one)):
        require_on_page(row, (use_remove_padding, temperature), update.peak)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_update_in_one_pass_with_fused_kernels_makes_no_logits(
    tied_models, own_forward, small_buffers, monkeypatch, temperature
):
    """Beside GRPO's update with them: chunks of both models, of `_LINEAR_CHUNK_TOKENS` tokens, here of four."""
    import vimpo_verl.token_statistics as token_statistics

    monkeypatch.setattr(token_statistics, "_LINEAR_CHUNK_TOKENS", CHUNK)
    setting = replace(SETTING, use_fused_kernels=True, temperature=temperature)
    samples, workers = make_samples(), make_workers(tied_models, setting)
    batch = run_one_pass_step(tied_models, setting, samples, workers).batch
    update = one_pass_data(samples, batch, setting)
    one, of_any_size = update_memory(workers, update, VOCABULARY), every_shape(workers, update)
    result = run_step(tied_models, setting, samples, workers)
    data = training_data(samples, result.per_token, result.batch, setting)
    grpo_loss(workers)
    grpo, its = update_memory(workers, data, VOCABULARY), every_shape(workers, data)
    assert not one.large - grpo.large, "none that is larger than 30 tokens"
    more = of_any_size - its
    assert more and all(shape[0] <= CHUNK or shape[0] == 1 for shape in more), more
    assert grpo.peak <= one.peak <= grpo.peak + 4 * VOCABULARY * (2 * CHUNK + FEW_TOKENS)


CHUNK = 4


def every_shape(workers, data) -> Counter:
    """Of the tensors with the vocabulary as their last dimension."""
    with TensorMemory(large_elements=1) as memory:
        workers.actor.train_mini_batch(data[:])
    return Counter({shape: count for shape, count in memory.large.items() if shape[-1:] == (VOCABULARY,)})


FEW_TOKENS = 8  # of a chunk of the token statistics, in float64


@pytest.mark.parametrize("use_remove_padding, temperature", LAYOUTS)
def test_the_joint_pass_needs_no_more_than_grpos_old_pass(models, small_buffers, use_remove_padding, temperature):
    setting = replace(SETTING, use_remove_padding=use_remove_padding, temperature=temperature)
    samples, workers = make_samples(), make_workers(models, setting)

    def old_pass():
        data = to_tensordict(samples, temperature=temperature, calculate_entropy=True, compute_loss=False)
        workers.actor.infer_batch(data)

    peaks = []
    for call in (partial(joint_pass, workers, samples, setting), old_pass):
        call()
        with TensorMemory(last_dimension=VOCABULARY) as memory:
            call()
        peaks.append(memory.peak)
    assert peaks[0] <= peaks[1] + 4 * VOCABULARY * FEW_TOKENS and peaks[1] > 2 * LOGITS
    for row, peak in zip(("VIMPO's joint pass", "GRPO's old pass, with entropy"), peaks, strict=True):
        require_on_page(row, (use_remove_padding, temperature), peak)


def test_joint_pass_keeps_no_logits(models):
    samples = make_samples()
    workers = make_workers(models, SETTING)
    joint_pass(workers, samples, SETTING)
    with TensorMemory() as memory:
        joint_pass(workers, samples, SETTING)
        after_one = memory.live  # gathered parameters, which FSDP keeps
        kept = joint_pass(workers, samples, SETTING)
    tokens = sum(len(s.prompt) + len(s.response) for s in samples)
    results = 4 * tokens * 4  # four float32 numbers a token
    logits = tokens * VOCABULARY * 4
    assert len(kept) == 4 and memory.live - after_one <= 4 * results < logits


def spoils(function):
    """verl's function, which afterwards destroys the logits that it was given."""

    def spoiled(logits, *args, **kwargs):
        result = function(logits.clone(), *args, **kwargs)
        logits.detach().fill_(7.0)
        return result

    return spoiled


def test_log_probs_that_spoil_the_logits_change_nothing(models, monkeypatch):
    """inplace_backward of verl's log-probs reuses the logits' memory; with kappa_policy=current kappa is made of the same."""
    import verl.workers.engine.fsdp.transformer_impl as engine

    setting = Setting(epochs=2, lr=0.05, knobs={"actor_coeff": 0.1, "kappa_policy": "current"})
    expected = run_step(models, setting, make_samples())
    monkeypatch.setattr(
        engine, "logprobs_from_logits", lambda logits, labels, **kwargs: spoils(_log_probs)(logits, labels)
    )
    found = run_step(models, setting, make_samples())
    assert found.metrics["vimpo/value_loss"] == pytest.approx(expected.metrics["vimpo/value_loss"], rel=1e-6)
    for name, rows in expected.per_token.items():
        torch.testing.assert_close(torch.cat(found.per_token[name]), torch.cat(rows), rtol=1e-6, atol=1e-6)


def _log_probs(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def test_temperature_scaled_in_place_changes_nothing(models, monkeypatch):
    import verl.workers.engine.fsdp.transformer_impl as engine

    setting = Setting(temperature=0.7)
    expected = joint_pass(make_workers(models, setting), make_samples(), setting)

    def in_place(logits, temperature, *, is_unit_temperature):
        return logits if is_unit_temperature else logits.div_(temperature.to(logits.dtype))

    monkeypatch.setattr(engine, "_scale_logits_by_temperature", in_place)
    found = joint_pass(make_workers(models, setting), make_samples(), setting)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.cat(found[name]), torch.cat(rows), rtol=1e-6, atol=1e-6)
