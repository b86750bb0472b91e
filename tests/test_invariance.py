"""Claim: the result of a step does not depend on how it was computed.

Gradients of the first update, parameters after three updates, per-token results and every `vimpo/` metric are the same
for any micro-batch size, dynamic batch size or not, padding removed or not, FSDP1 or FSDP2, any order of the samples,
verl's placeholder samples, activation checkpointing, and over data-parallel ranks, also with the members of a group on
different ranks and a rank that has only placeholders.

The engine computes in float32: 1e-6 relative to the norm for gradients, parameters and losses. bfloat16 is only bounded.
Not covered: more than two ranks (marked slow), several machines, GPUs, where kernels may sum in another order.
"""

from dataclasses import replace

import pytest
import torch
from engine_harness import Setting, make_samples, placeholders, run_on_ranks, run_step

TOLERANCE = 1e-6
# Three updates, which move the policy far enough for clipping to take part; both branches of the loss matter.
BASE = Setting(epochs=3, lr=0.05, knobs={"actor_coeff": 0.1})

ELSEHOW = {
    "micro-batch of 1": {"micro_batch_size": 1},
    "micro-batch of all": {"micro_batch_size": 8},
    "dynamic batch": {"micro_batch_size": None},
    "dynamic batch, short": {"micro_batch_size": None, "max_token_len": 24},
    "padding kept": {"use_remove_padding": False},
    "padding kept, dynamic batch": {"use_remove_padding": False, "micro_batch_size": None},
    "FSDP1": {"strategy": "fsdp"},
    "activation checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def base(models):
    return run_step(models, BASE, make_samples())


def relative(actual, expected) -> float:
    """Norm of the difference, relative to the norm, over all tensors of two dicts."""
    difference = sum((actual[name].double() - expected[name].double()).square().sum() for name in expected)
    return (difference / sum(tensor.double().square().sum() for tensor in expected.values())).sqrt().item()


def vimpo_metrics(result) -> dict[str, float]:
    """Those of VIMPO, verl's aggregate of the same update, and verl's own losses."""
    names = ("loss", "grad_norm", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl")
    return {n: float(v) for n, v in result.metrics.items() if n.startswith("vimpo/") or n in names[:3]}


def assert_same(actual, expected, rows=None, tolerance=TOLERANCE):
    """`rows`: where each sample of `expected` is in `actual`."""
    rows = range(len(expected.per_token["log_probs"])) if rows is None else rows
    for name, wanted in expected.per_token.items():
        found = [actual.per_token[name][row] for row in rows]
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=10 * tolerance, atol=10 * tolerance)
    for name in ("advantages", "returns", "values"):
        found = getattr(actual.batch, name)[list(rows)][:, : getattr(expected.batch, name).shape[1]]
        torch.testing.assert_close(found, getattr(expected.batch, name), rtol=10 * tolerance, atol=10 * tolerance)
    assert relative(actual.gradients[0], expected.gradients[0]) <= tolerance
    assert relative(actual.parameters, expected.parameters) <= tolerance
    found, wanted = vimpo_metrics(actual), vimpo_metrics(expected)
    assert found.keys() == wanted.keys() and len(wanted) == 13
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name


@pytest.mark.parametrize("how", ELSEHOW)
def test_however_it_is_computed(models, base, how):
    assert_same(run_step(models, replace(BASE, **ELSEHOW[how]), make_samples()), base)


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_the_samples(models, base, seed):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    samples = make_samples()
    result = run_step(models, BASE, [samples[i] for i in order])
    assert_same(result, base, rows=[order.index(i) for i in range(8)])


@pytest.mark.parametrize("where", ["behind", "in front", "in their own micro-batches"])
def test_placeholder_samples_count_nowhere(models, base, where):
    samples = make_samples()
    if where == "in front":
        result, rows = run_step(models, BASE, placeholders(3) + samples + placeholders(1)), range(3, 11)
    else:
        setting = replace(BASE, micro_batch_size=1 if where == "in their own micro-batches" else 4)
        result, rows = run_step(models, setting, samples + placeholders(4)), range(8)
    assert_same(result, base, rows=rows)


def test_in_bfloat16_only_rounding_differs(models):
    """The spread is that of bfloat16 forwards (2^-8 a value); docs/reliability.md has the measured numbers."""
    setting = replace(BASE, dtype="bf16", epochs=1)
    samples = make_samples()
    reference = run_step(models, setting, samples)
    for changed in ({"micro_batch_size": 8}, {"micro_batch_size": None}, {"use_remove_padding": False}):
        result = run_step(models, replace(setting, **changed), samples)
        assert relative(result.gradients[0], reference.gradients[0]) <= 0.05
        assert result.metrics["vimpo/kl"] == pytest.approx(reference.metrics["vimpo/kl"], rel=0.02)


def test_in_bfloat16_equal_models_still_give_exactly_zero(models):
    result = run_step(models, replace(BASE, dtype="bf16", equal_models=True, epochs=1), make_samples())
    assert result.metrics["vimpo/kl"] == 0.0


# ---- data-parallel ranks ---------------------------------------------------------------------------------------------


def steps_on_rank(rank, models, jobs):
    """Several steps in one process group, because starting one is what takes time."""
    return [run_step(models, setting, samples) for setting, samples in jobs]


def dealt(samples, ranks, mini_batches=1):
    """Samples in the order that gives each rank, and each of its mini-batches, every `ranks`-th sample.

    Neighbours in `samples`, such as the members of a group, end up on different ranks.
    """
    size = len(samples) // mini_batches
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [sample for rank in range(ranks) for part in parts for sample in part[rank::ranks]]


def rows_of(samples, ordered):
    return [next(i for i, other in enumerate(ordered) if other is sample) for sample in samples]


def check_ranks(models, ranks):
    samples = make_samples()
    padded_out = samples + placeholders(ranks * len(samples) - len(samples))  # all but rank 0 hold placeholders only
    two_mini_batches = replace(BASE, mini_batches=2, micro_batch_size=1)
    jobs = [
        (BASE, samples),
        (BASE, dealt(samples, ranks)),
        (replace(BASE, strategy="fsdp"), dealt(samples, ranks)),
        (replace(BASE, micro_batch_size=None, max_token_len=40), dealt(samples, ranks)),
        (replace(BASE, use_remove_padding=False, micro_batch_size=1), dealt(samples, ranks)),
        (two_mini_batches, dealt(samples, ranks, mini_batches=2)),
        (BASE, padded_out),
    ]
    results = run_on_ranks(ranks, steps_on_rank, models, jobs)[0]
    expected = {1: run_step(models, BASE, samples), 2: run_step(models, two_mini_batches, samples)}
    for (setting, ordered), result in zip(jobs, results, strict=True):
        assert_same(result, expected[setting.mini_batches], rows=rows_of(samples, ordered))


def test_two_data_parallel_ranks(models):
    check_ranks(models, ranks=2)


@pytest.mark.slow
def test_four_data_parallel_ranks(models):
    check_ranks(models, ranks=4)
