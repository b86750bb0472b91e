"""Claim: the result of a step does not depend on how it was computed.

Gradients of the first update, parameters after three updates, per-token results and every `vimpo/` metric are the same
for any micro-batch size, dynamic batch size or not, padding removed or not, more padding, FSDP1 or FSDP2, any order of
the samples, verl's placeholder samples, activation checkpointing, two sequence-parallel ranks, and two (marked slow:
four) data-parallel ranks, also with the members of a group on different ranks and a rank that has only placeholders.
For a batch with tool output and a response without a valid token, and for one with groups of 1, 3 and 4, an empty
response, and responses cut at the limit.

The engine computes in float32: 1e-6 relative to the norm for gradients, parameters and losses. bfloat16 is only
bounded. Not covered: several machines, and GPUs, where kernels may sum in another order.
"""

from dataclasses import replace

import pytest
import torch
from engine_harness import Setting, run_on_ranks, run_step
from engine_samples import make_samples, make_uneven_samples, placeholders

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


BATCHES = {"even": make_samples(), "uneven": make_uneven_samples()}


@pytest.fixture(scope="module")
def bases(models):
    return {name: run_step(models, BASE, samples) for name, samples in BATCHES.items()}


@pytest.fixture(scope="module")
def base(bases):
    return bases["even"]


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
    assert found.keys() == wanted.keys() and len(wanted) == 17
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("how", ELSEHOW)
def test_however_it_is_computed(models, bases, batch, how):
    assert_same(run_step(models, replace(BASE, **ELSEHOW[how]), BATCHES[batch]), bases[batch])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_the_samples(models, bases, batch, seed):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    result = run_step(models, BASE, [BATCHES[batch][i] for i in order])
    assert_same(result, bases[batch], rows=[order.index(i) for i in range(8)])


@pytest.mark.parametrize("where", ["behind", "in front", "in their own micro-batches", "as more padding"])
def test_placeholder_samples_count_nowhere(models, base, where):
    """They have 128 tokens, so where padding is kept they are also more padding for the samples beside them."""
    samples = make_samples()
    if where == "as more padding":
        setting = replace(BASE, use_remove_padding=False, micro_batch_size=6)
        result, rows = run_step(models, setting, samples + placeholders(4)), range(8)
    elif where == "in front":
        result, rows = run_step(models, BASE, placeholders(3) + samples + placeholders(1)), range(3, 11)
    else:
        setting = replace(BASE, micro_batch_size=1 if where == "in their own micro-batches" else 4)
        result, rows = run_step(models, setting, samples + placeholders(4)), range(8)
    assert_same(result, base, rows=rows)


def test_in_bfloat16_only_rounding_differs(models):
    """The spread is that of bfloat16 forwards (2^-8 a value); only a bound is asserted."""
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
    return [run_step(models, setting, samples) for setting, samples in jobs]


def dealt(samples, ranks, mini_batches=1):
    """Samples in the order that gives each rank, and each of its mini-batches, every `ranks`-th sample.

    Neighbours in `samples`, such as the members of a group, end up on different ranks.
    """
    size = len(samples) // mini_batches
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [sample for rank in range(ranks) for part in parts for sample in part[rank::ranks]]


def rank_jobs(ranks):
    """Name -> setting and samples, whose real ones are those of one of BATCHES in some order."""
    samples = make_samples()
    two_mini_batches = replace(BASE, mini_batches=2, micro_batch_size=1)
    return {
        "groups together": (BASE, samples),
        "groups over ranks": (BASE, dealt(samples, ranks)),
        "FSDP1": (replace(BASE, strategy="fsdp"), dealt(samples, ranks)),
        "dynamic batch": (replace(BASE, micro_batch_size=None, max_token_len=40), dealt(samples, ranks)),
        "padding kept": (replace(BASE, use_remove_padding=False, micro_batch_size=1), dealt(samples, ranks)),
        "two mini-batches": (two_mini_batches, dealt(samples, ranks, mini_batches=2)),
        "ranks of placeholders only": (BASE, samples + placeholders((ranks - 1) * len(samples))),
        "uneven groups over ranks": (BASE, dealt(BATCHES["uneven"], ranks)),
        "uneven groups, FSDP1, padding kept": (
            replace(BASE, strategy="fsdp", use_remove_padding=False),
            dealt(BATCHES["uneven"], ranks),
        ),
    }


# Ulysses: each rank has every second half of the packed tokens, and the labels that go with it.
SEQUENCE_PARALLEL_JOBS = {
    "sequence parallel": (replace(BASE, sp_size=2), make_samples()),
    "sequence parallel, dynamic batch": (replace(BASE, sp_size=2, micro_batch_size=None), make_samples()),
    "sequence parallel, uneven groups": (replace(BASE, sp_size=2, micro_batch_size=1), BATCHES["uneven"]),
    "sequence parallel, current kappa": (
        replace(BASE, sp_size=2, knobs={**BASE.knobs, "kappa_policy": "current"}),
        make_samples(),
    ),
    # Last, because verl's fused kernels replace the forward of the model's class. FSDP1: see test_fused_head.py.
    "sequence parallel, fused kernels": (
        replace(BASE, sp_size=2, strategy="fsdp", use_fused_kernels=True),
        make_samples(),
    ),
}
TWO_RANK_JOBS = {**rank_jobs(2), **SEQUENCE_PARALLEL_JOBS}


@pytest.fixture(scope="module")
def on_two_ranks(models):
    """Name of the job -> result on rank 0. All in one pair of processes, because starting them is what takes time."""
    results = run_on_ranks(2, steps_on_rank, models, list(TWO_RANK_JOBS.values()))[0]
    return dict(zip(TWO_RANK_JOBS, results, strict=True))


def check_job(models, job, result):
    setting, ordered = job
    samples = next(batch for batch in BATCHES.values() if batch[0] in ordered)
    plain = replace(BASE, mini_batches=setting.mini_batches, micro_batch_size=1, knobs=setting.knobs)
    expected = run_step(models, plain, samples)
    tolerance = 1e-5 if setting.use_fused_kernels else TOLERANCE  # the fused head multiplies in another order
    assert_same(result, expected, rows=[ordered.index(sample) for sample in samples], tolerance=tolerance)


@pytest.mark.parametrize("name", TWO_RANK_JOBS)
def test_on_two_ranks(models, on_two_ranks, name):
    check_job(models, TWO_RANK_JOBS[name], on_two_ranks[name])


def test_fused_kernels_with_fsdp2_on_two_sequence_parallel_ranks(tied_models):
    """Tied output matrix, because verl's own fused kernels fail otherwise with FSDP2 (test_fused_head.py)."""
    fused = replace(BASE, sp_size=2, use_fused_kernels=True)
    current = replace(fused, knobs={**BASE.knobs, "kappa_policy": "current"})
    jobs = [(fused, make_samples()), (current, make_samples())]
    for job, result in zip(jobs, run_on_ranks(2, steps_on_rank, tied_models, jobs)[0], strict=True):
        check_job(tied_models, job, result)


@pytest.mark.slow
def test_on_four_ranks(models):
    jobs = rank_jobs(4)
    results = run_on_ranks(4, steps_on_rank, models, list(jobs.values()))[0]
    for job, result in zip(jobs.values(), results, strict=True):
        check_job(models, job, result)


def test_the_table_of_the_spread_can_be_measured(base):
    """benchmarks/precision_spread.py, whose figures are in docs/reliability.md, takes every metric that a step has."""
    from benchmarks.precision_spread import difference

    found = difference(base, base)
    assert found["gradient"] == found["metrics"] == 0.0
    moved = difference(replace(base, metrics=base.metrics | {"vimpo/kl": 2 * base.metrics["vimpo/kl"]}), base)
    assert moved["worst_metric"] == "vimpo/kl" and moved["metrics"] == pytest.approx(1.0)
