"""Claim: exact_kl is the KL over the whole vocabulary, forward and backward, however extreme the logits.

Against the plain formula in float64 on the same values: 1e-5 relative for float32 inputs and 1e-4 for bfloat16 ones
(both are computed in float32), with vocabularies up to 151,936. topk_kl and sampled_kl against their formulas.
"""

import math

import pytest
import torch

from vimpo_verl import functional as F

QWEN_VOCABULARY = 151_936


def plain_kl(policy_logits, ref_logits):
    """sum p (log p - log q) in float64, with 0 log 0 = 0."""
    log_p = torch.log_softmax(policy_logits.double(), dim=-1)
    log_q = torch.log_softmax(ref_logits.double(), dim=-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def logits(tokens, vocabulary, seed=0, scale=3.0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    policy = scale * torch.randn(tokens, vocabulary, generator=generator)
    return policy, policy + shift * torch.randn(tokens, vocabulary, generator=generator)


@pytest.mark.parametrize("vocabulary", [2, 50, 1_000, 32_000, QWEN_VOCABULARY])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shift", [0.01, 0.5, 5.0])
def test_forward(vocabulary, dtype, tolerance, shift):
    policy, ref = (x.to(dtype) for x in logits(4, vocabulary, shift=shift))
    kl = F.exact_kl(policy, ref)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(kl.double(), plain_kl(policy, ref), rtol=tolerance, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("vocabulary", [50, QWEN_VOCABULARY])
def test_backward(dtype, tolerance, vocabulary):
    """Both gradients, relative to the largest entry; a bfloat16 gradient is rounded once, at the end."""
    weight = torch.tensor([1.0, -2.0, 0.5])
    inputs = [x.to(dtype) for x in logits(3, vocabulary)]
    ours, plain = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    (weight * F.exact_kl(*ours)).sum().backward()
    (weight * plain_kl(*plain)).sum().backward()
    for x, y in zip(ours, plain, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - y.grad).abs().max() <= tolerance * y.grad.abs().max()


def test_gradcheck():
    policy, ref = (x.double().requires_grad_() for x in logits(3, 7))
    assert torch.autograd.gradcheck(lambda p, q: F.exact_kl(p, q, chunk_size=2), (policy, ref))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_models_give_exactly_zero(dtype):
    policy = logits(8, 1_000)[0].to(dtype)
    assert torch.equal(F.exact_kl(policy, policy.clone()), torch.zeros(8, dtype=F.exact_kl(policy, policy).dtype))


def test_nearly_equal_models_keep_their_digits():
    """KL of about 1e-8 from float32 logits, where sum p (log p - log q) has none of its digits left."""
    policy, _ = logits(4, QWEN_VOCABULARY)
    ref = policy + 1e-4 * torch.randn(policy.shape, generator=torch.Generator().manual_seed(1))
    expected = plain_kl(policy, ref)
    assert expected.min() > 1e-9 and expected.max() < 1e-7
    torch.testing.assert_close(F.exact_kl(policy, ref).double(), expected, rtol=1e-5, atol=0.0)
    naive = (torch.log_softmax(policy, -1).exp() * (torch.log_softmax(policy, -1) - torch.log_softmax(ref, -1))).sum(-1)
    assert ((naive.double() - expected).abs() / expected).max() > 1.0


def with_one_entry_at(value, index):
    x = torch.zeros(1, 6)
    x[0, index] = value
    return x


def masked(x, *entries):
    x = x.clone()
    x[:, list(entries)] = -torch.inf
    return x


ADVERSARIAL = {
    "one policy token at 1e4": (with_one_entry_at(1e4, 2), torch.zeros(1, 6)),
    "one reference token at 100": (torch.zeros(1, 6), with_one_entry_at(100.0, 2)),
    "the same token at 1e4 in both": (with_one_entry_at(1e4, 2), with_one_entry_at(1e4, 2) + 0.25),
    "all equal": (torch.full((1, 6), 7.0), torch.full((1, 6), -3.0)),
    "-inf at the same places": (masked(logits(1, 6)[0], 1, 4), masked(logits(1, 6)[1], 1, 4)),
    "-inf in the policy only": (masked(logits(1, 6)[0], 1, 4), logits(1, 6)[1]),
    "very peaked": (300.0 * logits(1, 6)[0], 300.0 * logits(1, 6)[0].flip(-1)),
    "huge offset": (logits(1, 6)[0] + 1e6, logits(1, 6)[0] + 1e6),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_logits(name):
    policy, ref = (x.clone().requires_grad_() for x in ADVERSARIAL[name])
    kl = F.exact_kl(policy, ref)
    torch.testing.assert_close(kl.double().detach(), plain_kl(policy, ref).detach(), rtol=1e-5, atol=1e-7)
    kl.sum().backward()
    assert torch.isfinite(policy.grad).all() and torch.isfinite(ref.grad).all()


def test_support_outside_the_reference_is_infinite_and_not_hidden():
    """The policy can say what the reference cannot: KL is infinite, a fault to be seen, never clamped."""
    assert F.exact_kl(torch.zeros(1, 4), masked(torch.zeros(1, 4), 2)).item() == math.inf


def test_non_finite_logits_are_not_hidden():
    policy = torch.zeros(2, 4)
    policy[0, 1] = torch.nan
    kl = F.exact_kl(policy, torch.zeros(2, 4)) + F.exact_kl(torch.zeros(2, 4), policy)
    assert torch.isnan(kl[0]) and kl[1] == 0
    assert torch.isnan(F.exact_kl(policy, torch.zeros(2, 4))[0]) and torch.isnan(F.topk_kl(policy, policy, 2)[0])


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_change_nothing(chunk_size):
    """Bit for bit, forward and backward."""
    whole, parts = ([x.requires_grad_() for x in logits(7, 300)] for _ in range(2))
    a, b = F.exact_kl(*whole), F.exact_kl(*parts, chunk_size=chunk_size)
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    assert torch.equal(whole[0].grad, parts[0].grad) and torch.equal(whole[1].grad, parts[1].grad)


def test_shapes():
    for shape in [(5,), (2, 5), (2, 3, 5), (0, 5), (2, 0, 5)]:
        assert F.exact_kl(torch.zeros(shape), torch.zeros(shape)).shape == shape[:-1]


def test_inputs_are_not_modified():
    policy, ref = logits(3, 50)
    before = policy.clone(), ref.clone()
    F.exact_kl(policy, ref, chunk_size=2)
    assert torch.equal(policy, before[0]) and torch.equal(ref, before[1])


@pytest.mark.parametrize("k", [1, 4, 50])
def test_topk_kl(k):
    policy, ref = logits(6, 50)
    log_p, log_q = torch.log_softmax(policy.double(), -1), torch.log_softmax(ref.double(), -1)
    expected = torch.zeros(6, dtype=torch.float64)
    for n in range(6):
        for entry in sorted(range(50), key=lambda v: -log_p[n, v].item())[:k]:
            expected[n] += log_p[n, entry].exp() * (log_p[n, entry] - log_q[n, entry])
    torch.testing.assert_close(F.topk_kl(policy, ref, k).double(), expected, rtol=1e-5, atol=1e-6)


def test_sampled_kl():
    log_prob, ref_log_prob = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    for i in range(2):
        ratio = log_prob[i].item() - ref_log_prob[i].item()
        assert F.sampled_kl(log_prob, ref_log_prob, "k2")[i].item() == pytest.approx(ratio**2 / 2)
        assert F.sampled_kl(log_prob, ref_log_prob, "k3")[i].item() == pytest.approx(math.exp(-ratio) - 1 + ratio)


def test_k1_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="k1.*log-ratio.*zero"):
        F.sampled_kl(torch.zeros(2), torch.zeros(2), "k1")
    with pytest.raises(ValueError, match="estimator 'k4'.*k2, k3"):
        F.sampled_kl(torch.zeros(2), torch.zeros(2), "k4")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
def test_on_a_gpu(dtype, tolerance):
    policy, ref = (x.to("cuda", dtype) for x in logits(16, QWEN_VOCABULARY))
    torch.testing.assert_close(F.exact_kl(policy, ref).double(), plain_kl(policy, ref), rtol=tolerance, atol=0.0)
