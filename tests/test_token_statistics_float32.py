"""Claim: on an accelerator without Triton the joint pass works in large float32 chunks and never waits for the device.

Seen on torch's device "meta", where whatever looks at a value raises: 16,384 tokens of Qwen's vocabulary are 75 chunks. The
numbers are those of the plain float64 formulas, on the CPU, also for a KL of 1e-9; equal logits give exactly zero. Not
claimed: that it has run on such an accelerator.
"""

import pytest
import torch
from test_token_statistics import QWEN_VOCABULARY, inputs, plain

import vimpo_verl.token_statistics.float32 as module
from vimpo_verl.token_statistics import TokenStatistics, linear_token_statistics, token_statistics

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def float32(*arguments):
    return TokenStatistics(*module.float32_token_statistics(*arguments)[:4])


def assert_agrees(actual, expected):
    """Log-probs to 5e-6 nats or 1e-5 of them, the entropy, a sum of up to 151,936 terms, and the KL to 3e-5 of them."""
    tolerances = {"token_kl": {"rtol": 3e-5, "atol": 1e-12}, "entropy": {"rtol": 3e-5, "atol": 5e-6}}
    for name in TokenStatistics._fields:
        tolerance = tolerances.get(name, {"rtol": 1e-5, "atol": 5e-6})
        result, wanted = getattr(actual, name).double(), getattr(expected, name)
        torch.testing.assert_close(result, wanted, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def chunks(monkeypatch):
    """Yields a list that gets the tokens of every chunk."""
    original, seen = module.chunk_statistics, []
    monkeypatch.setattr(module, "chunk_statistics", lambda z, *rest: seen.append(len(z)) or original(z, *rest))
    return seen


@pytest.mark.parametrize("temperature", [None, torch.empty(16_384, device="meta")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_off_the_cpu_nothing_waits_and_chunks_are_large(chunks, dtype, temperature):
    logits = torch.empty(16_384, QWEN_VOCABULARY, dtype=dtype, device="meta")
    labels = torch.empty(16_384, dtype=torch.int64, device="meta")
    statistics = token_statistics(logits, logits, labels, temperature)
    assert all(x.shape == (16_384,) and x.dtype == torch.float32 and x.is_meta for x in statistics)
    assert len(chunks) == 75 and sum(chunks) == 16_384


def test_off_the_cpu_from_hidden_states(chunks):
    hidden, weight = torch.empty(1_100, 16, device="meta"), torch.empty(60, 16, device="meta")
    labels = torch.empty(1_100, dtype=torch.int64, device="meta")
    assert linear_token_statistics(hidden, weight, hidden, weight, labels, 0.7).token_kl.shape == (1_100,)
    assert sum(chunks) == 1_100


def test_on_the_cpu_nothing_has_changed(chunks):
    token_statistics(*inputs(5, 50))
    assert chunks == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, vocabulary", [(1, 2), (37, 50), (300, 1_000), (5, QWEN_VOCABULARY)])
def test_against_the_formula(monkeypatch, dtype, tokens, vocabulary):
    """In several chunks."""
    monkeypatch.setattr(module, "CHUNK", 16 * vocabulary)
    policy, ref, labels = inputs(tokens, vocabulary, dtype)
    assert_agrees(float32(policy, ref, labels, None), plain(policy, ref, labels))


def test_temperature_of_each_token():
    policy, ref, labels = inputs(40, 500)
    temperature = torch.linspace(0.3, 2.0, 40)
    assert_agrees(float32(policy, ref, labels, temperature), plain(policy, ref, labels, temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, vocabulary, scale", [(500, 48, 1), (200, 1_000, 10), (20, QWEN_VOCABULARY, 1)])
def test_equal_logits_give_exactly_zero(dtype, tokens, vocabulary, scale):
    policy, _, labels = inputs(tokens, vocabulary)
    policy = (scale * policy).to(dtype)
    statistics = float32(policy, policy.clone(), labels, None)
    assert torch.equal(statistics.token_kl, torch.zeros_like(statistics.token_kl))
    assert torch.equal(statistics.log_prob, statistics.ref_log_prob)


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("shift", [1e-4, 1e-2, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("peak", [0.0, 20.0])
def test_a_small_kl_keeps_its_digits(shift, peak, offset):
    """Where the plain sum in float32 has none. With an offset z - u is rounded at its size: 3e-7 of 5 beside a shift of 1e-4.

    With a peak, too, the reference's logits reach 25, half an ulp of which is 9.5e-7: a KL is known to half its square.
    """
    policy, ref, labels = inputs(6, 1_000, shift=shift)
    policy[:, 7], ref[:, 7], labels[:3] = policy[:, 7] + peak, ref[:, 7] + peak, 7
    ref += offset
    kl, expected = float32(policy, ref, labels, None).token_kl.double(), plain(policy, ref, labels).token_kl
    rtol, atol = 2e-3 if offset and shift == 1e-4 else 1e-4, 5e-13 if offset and peak else 1e-13
    torch.testing.assert_close(kl, expected, rtol=rtol, atol=atol)


def test_impossible_entries():
    """-inf in both, in the policy alone, and where only the reference holds an entry impossible: an infinite KL."""
    policy, ref, labels = inputs(4, 20)
    labels[:] = 0
    policy[0, 3:5] = ref[0, 3:5] = -torch.inf
    policy[1, 7] = -torch.inf
    ref[2, 9] = -torch.inf
    policy[3], ref[3, 1:] = ref[3], ref[3, 1:]
    policy[3, 5] = -torch.inf  # a small KL by it alone
    statistics, expected = float32(policy, ref, labels, None), plain(policy, ref, labels)
    kept = [0, 1, 3]
    assert_agrees(TokenStatistics(*(x[kept] for x in statistics)), TokenStatistics(*(x[kept] for x in expected)))
    assert statistics.token_kl[2] == torch.inf


@pytest.mark.parametrize("which", ["policy", "ref"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_are_not_hidden(which, value):
    policy, ref, labels = inputs(3, 20)
    (policy if which == "policy" else ref)[1, 4] = value
    kl = float32(policy, ref, labels, None).token_kl
    assert not torch.isfinite(kl[1]) and torch.isfinite(kl[[0, 2]]).all()


def test_extreme_logits():
    """One token at 1e4; a very peaked policy; a huge common offset."""
    policy, ref, labels = inputs(3, 50)
    policy[0, 5], policy[1], policy[2], ref[2] = 1e4, 300 * policy[1], policy[2] + 1e5, ref[2] + 1e5
    assert_agrees(float32(policy, ref, labels, None), plain(policy, ref, labels))


def test_no_tokens():
    assert all(x.shape == (0,) for x in float32(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=int), None))


def test_extra_memory_is_bounded(monkeypatch):
    """A dozen tensors of a chunk."""
    from tensor_memory import TensorMemory

    monkeypatch.setattr(module, "CHUNK", 8 * 32_000)
    policy, ref, labels = inputs(64, 32_000, torch.bfloat16)
    with TensorMemory() as memory:
        float32(policy, ref, labels, None)
    assert 0 < memory.peak <= 12 * 4 * module.CHUNK
