"""Claim: the joint pass's four numbers a token equal the plain float64 formulas, from logits or from hidden states.

1e-5 relative for float32 logits and 1e-4 for bfloat16 ones (on a GPU to 1e-6 nats), computed on the values as given; equal
logits give a KL of exactly zero and equal log-probs, bit for bit. Fresh inputs in every run, outputs poisoned before. The
torch version takes its slow way only where it must, and holds a quarter of the plain formula's temporaries at most. The Triton
kernel is compared where there is a GPU. Not claimed: speed (benchmarks/kl_function.py).
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import vimpo_verl.token_statistics.cpu as module
from vimpo_verl.token_statistics import TokenStatistics, linear_token_statistics, token_statistics

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from tensor_memory import TensorMemory

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

QWEN_VOCABULARY = 151_936
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(tokens, vocabulary, dtype=torch.float32, seed=None, shift=0.5):
    """Logits of policy and reference, labels: fresh ones; the seed is in the report of a failure."""
    seed = time.time_ns() % 2**31 if seed is None else seed
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    policy = 3 * torch.randn(tokens, vocabulary, generator=generator)
    ref = policy + shift * torch.randn(tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return policy.to(dtype), ref.to(dtype), labels


def plain(policy_logits, ref_logits, labels, temperature=None):
    """log_softmax in float64, one token at a time."""
    rows = []
    for n, label in enumerate(labels.tolist()):
        scale = 1.0 if temperature is None else temperature[n].double()
        log_p = torch.log_softmax(policy_logits[n].double() / scale, dim=-1)
        log_q = torch.log_softmax(ref_logits[n].double() / scale, dim=-1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum()
        rows.append(torch.stack([log_p[label], log_q[label], kl, entropy]))
    return TokenStatistics(*torch.stack(rows, dim=1))


# On a CPU float64 is rounded once, so that a log-prob near 0 keeps its digits. The kernel's sums are float32, in which log(1 + w)
# is known to some 1e-7 however small w is (test_triton_kernel.py has the bound); these are its absolute tolerances.
KERNELS = {"log_prob": 1e-6, "ref_log_prob": 1e-6, "token_kl": 1e-11, "entropy": 1e-6}


def assert_agrees(actual, expected, tolerance):
    for name in TokenStatistics._fields:
        result, wanted = getattr(actual, name), getattr(expected, name).double().cpu()
        atol = KERNELS[name] if result.is_cuda and result.dtype == torch.float32 else 1e-13
        result = result.double().cpu()
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tokens, vocabulary", [(1, 2), (37, 50), (300, 1_000), (5, QWEN_VOCABULARY)])
def test_against_the_formula(device, dtype, tolerance, tokens, vocabulary):
    policy, ref, labels = (x.to(device) for x in inputs(tokens, vocabulary, dtype))
    statistics = token_statistics(policy, ref, labels)
    for result in statistics:
        assert result.shape == (tokens,)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_agrees(statistics, plain(policy, ref, labels), tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_temperature_of_each_token(device):
    policy, ref, labels = (x.to(device) for x in inputs(40, 500))
    temperature = torch.linspace(0.3, 2.0, 40).to(device)
    assert_agrees(token_statistics(policy, ref, labels, temperature), plain(policy, ref, labels, temperature), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens, vocabulary, scale", [(500, 48, 1), (200, 1_000, 10), (20, QWEN_VOCABULARY, 1)])
def test_equal_logits_give_exactly_zero(device, dtype, tokens, vocabulary, scale):
    policy, _, labels = (x.to(device) for x in inputs(tokens, vocabulary))
    policy = (scale * policy).to(dtype)
    statistics = token_statistics(policy, policy.clone(), labels)
    assert torch.equal(statistics.token_kl, torch.zeros_like(statistics.token_kl))
    assert torch.equal(statistics.log_prob, statistics.ref_log_prob)


@pytest.mark.parametrize("device", DEVICES)
def test_masked_vocabulary_entries(device):
    """-inf in both, in the policy alone, and where only the reference holds an entry impossible: an infinite KL."""
    policy, ref, labels = inputs(3, 20)
    labels[:] = 0
    policy[0, 3:5] = ref[0, 3:5] = -torch.inf
    policy[1, 7] = -torch.inf
    ref[2, 9] = -torch.inf
    statistics = token_statistics(policy.to(device), ref.to(device), labels.to(device))
    assert_agrees(TokenStatistics(*(x[:2] for x in statistics)), plain(policy[:2], ref[:2], labels[:2]), 1e-5)
    assert statistics.token_kl[2] == torch.inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["policy", "ref"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_are_not_hidden(device, which, value):
    policy, ref, labels = inputs(3, 20)
    (policy if which == "policy" else ref)[1, 4] = value
    kl = token_statistics(policy.to(device), ref.to(device), labels.to(device)).token_kl
    assert not torch.isfinite(kl[1]) and torch.isfinite(kl[[0, 2]]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits(device):
    """One token at 1e4; a very peaked policy; a huge common offset."""
    policy, ref, labels = inputs(3, 50)
    policy[0, 5], policy[1], policy[2], ref[2] = 1e4, 300 * policy[1], policy[2] + 1e5, ref[2] + 1e5
    statistics = token_statistics(policy.to(device), ref.to(device), labels.to(device))
    assert_agrees(statistics, plain(policy, ref, labels), 1e-5)


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("shift", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("peak", [0.0, 20.0])
def test_a_small_kl_keeps_its_digits(shift, peak, offset):
    """A policy near its reference, also one that is sure of a token, also when all logits have moved by the same."""
    policy, ref, labels = inputs(6, 1_000, seed=0, shift=shift)  # whose KL is below shift^2
    policy[:, 7], ref[:, 7], labels[:3] = policy[:, 7] + peak, ref[:, 7] + peak, 7
    ref += offset
    statistics, expected = token_statistics(policy, ref, labels), plain(policy, ref, labels)
    assert 0 < expected.token_kl.max() < shift**2
    for name in TokenStatistics._fields:
        result, wanted = getattr(statistics, name).double(), getattr(expected, name)
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def rows_by_the_formula(monkeypatch):
    """Yields a list that gets the number of rows for which the torch version takes the plain float64 formula."""
    original, rows = module._plain_statistics, []
    monkeypatch.setattr(module, "_plain_statistics", lambda z, *rest: rows.append(len(z)) or original(z, *rest))
    return rows


@pytest.mark.parametrize("scale, shift", [(1, 0.0), (1, 1e-3), (1, 0.5), (3, 1.0)])
def test_ordinary_logits_take_the_fast_way(rows_by_the_formula, scale, shift):
    policy, ref, labels = inputs(4, QWEN_VOCABULARY, shift=shift)
    token_statistics(scale * policy, scale * ref, labels)
    assert not rows_by_the_formula


@pytest.mark.parametrize("temperature", [None, torch.linspace(0.5, 2.0, 5)])
def test_labels_that_are_next_to_impossible(rows_by_the_formula, temperature):
    """Below the smallest float64, for the policy (row 1) or the reference (row 3), among ordinary rows."""
    policy, ref, labels = inputs(5, 50)
    policy[1, labels[1]] -= 1_000
    ref[3, labels[3]] -= 2_000
    assert_agrees(token_statistics(policy, ref, labels, temperature), plain(policy, ref, labels, temperature), 1e-5)
    assert sum(rows_by_the_formula) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, vocabulary", [(16, QWEN_VOCABULARY), (128, 32_000)])
def test_extra_memory_is_at_most_a_quarter_of_the_plain_formulas(dtype, tokens, vocabulary):
    policy, ref, labels = inputs(tokens, vocabulary, dtype)
    with TensorMemory() as ours:
        token_statistics(policy, ref, labels)
    with TensorMemory() as plain_float32:
        log_p, log_q = torch.log_softmax(policy.float(), -1), torch.log_softmax(ref.float(), -1)
        p = log_p.exp()
        kept = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    assert len(kept) == 2 and 0 < ours.peak <= plain_float32.peak / 4


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    """Neither the numbers, bit for bit, nor what threads see that start afterwards; no gradient from any of them."""
    policy, ref, labels = inputs(67, 5_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = token_statistics(policy, ref, labels)
        torch.set_num_threads(threads)
        actual = token_statistics(policy.requires_grad_(), ref, labels)
        with ThreadPoolExecutor(1) as pool:
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(actual, expected, strict=True))


def test_in_inference_mode():
    policy, ref, labels = inputs(67, 5_000)
    expected = token_statistics(policy, ref, labels)
    with torch.inference_mode():
        actual = token_statistics(policy.clone(), ref.clone(), labels)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_fault_in_a_thread_is_raised():
    policy, ref, labels = inputs(67, 5_000)
    with pytest.raises(RuntimeError, match="index .* out of bounds"):
        token_statistics(policy, ref, labels + 5_000)


def test_inputs_are_not_modified():
    policy, ref, labels = inputs(10, 50)
    before = policy.clone(), ref.clone()
    token_statistics(policy, ref, labels, torch.full((10,), 0.7))
    assert torch.equal(policy, before[0]) and torch.equal(ref, before[1])


def test_no_tokens():
    statistics = token_statistics(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert all(result.shape == (0,) for result in statistics)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_from_hidden_states(temperature):
    """More tokens than one chunk of logits holds."""
    generator = torch.Generator().manual_seed(0)
    policy_hidden, ref_hidden = (torch.randn(1_100, 16, generator=generator) for _ in range(2))
    policy_weight, ref_weight = (torch.randn(60, 16, generator=generator) for _ in range(2))
    labels = torch.randint(60, (1_100,), generator=generator)
    statistics = linear_token_statistics(policy_hidden, policy_weight, ref_hidden, ref_weight, labels, temperature)
    policy, ref = policy_hidden @ policy_weight.T / temperature, ref_hidden @ ref_weight.T / temperature
    assert_agrees(statistics, plain(policy, ref, labels), 1e-4)


def test_from_no_hidden_states():
    hidden, weight = torch.zeros(0, 16), torch.zeros(60, 16)
    statistics = linear_token_statistics(hidden, weight, hidden, weight, torch.zeros(0, dtype=torch.long))
    assert all(result.shape == (0,) for result in statistics)


@pytest.mark.parametrize("wrong", ["policy_logits", "ref_logits", "labels", "temperature"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    policy, ref, labels = inputs(4, 6)
    arguments = {"policy_logits": policy, "ref_logits": ref, "labels": labels, "temperature": torch.ones(4)}
    arguments[wrong] = arguments[wrong][:3]
    with pytest.raises(ValueError, match=wrong):
        token_statistics(**arguments)
