"""Claim: the Triton kernel gives the numbers of the float64 formula, in Triton's interpreter without a GPU and compiled with one.

Log-probs to 1e-6, entropy and KL to 1e-5; the KL of half precision to 1e-4, against the formula on those same values. On random
and adversarial logits, any vocabulary size, strided rows, per-token temperature. Fresh inputs in every run, outputs poisoned
before. A row is read once, or twice where its label is far from the mean of delta; the careful kernel does again the rows that
need it, and few others. Not claimed:
speed, which the interpreter says nothing about (benchmarks/kl_function.py; tests/test_kernel_code.py for what is compiled).
"""

import os
import time

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported

triton = pytest.importorskip("triton")
import vimpo_verl.token_statistics.triton_kernel as kernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

INFINITY = float("inf")
HALF_PRECISION_KL = 1e-4
# relative and absolute
TOLERANCE = {"log_prob": (1e-6, 1e-6), "ref_log_prob": (1e-6, 1e-6), "token_kl": (1e-5, 1e-11), "entropy": (1e-5, 1e-6)}


@pytest.fixture
def draw():
    """Fresh normal numbers in every run; the seed is in the report of a failure."""
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def done_again(monkeypatch):
    """Yields a list that gets, for every call, which tokens the careful kernel does again."""
    original, calls = kernel.careful_token_statistics_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            launch = original[grid]
            return lambda *args, **kwargs: calls.append(args[4].bool().cpu()) or launch(*args, **kwargs)

    monkeypatch.setattr(kernel, "careful_token_statistics_kernel", Recorded())
    return calls


def sampled(logits):
    """A token of each row's softmax."""
    return torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]


def formula(z, u, labels, temperature=None):
    z, u = z.double(), u.double()
    if temperature is not None:
        z, u = z / temperature.double().unsqueeze(-1), u / temperature.double().unsqueeze(-1)
    log_p, log_q, label = torch.log_softmax(z, -1), torch.log_softmax(u, -1), labels.unsqueeze(-1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return log_p.gather(-1, label)[:, 0], log_q.gather(-1, label)[:, 0], kl, torch.special.entr(p).sum(-1)


def assert_agrees(z, u, temperature=None, labels=None):
    labels = torch.arange(z.shape[0]) % z.shape[1] if labels is None else labels
    on_device = [None if t is None else t.to(DEVICE) for t in (z, u, labels, temperature)]
    found = kernel.triton_token_statistics(*on_device)[:4]
    for name, actual, expected in zip(TOLERANCE, found, formula(z, u, labels, temperature), strict=True):
        rtol, atol = TOLERANCE[name]
        if name == "token_kl" and z.dtype != torch.float32:
            rtol = HALF_PRECISION_KL
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 37, 4096, 5003, 151_936])
@pytest.mark.parametrize("distance", [0.01, 0.3, 3.0])
def test_random_logits(draw, dtype, vocabulary, distance):
    z = 3 * draw(3, vocabulary)
    assert_agrees(z.to(dtype), (z + distance * draw(3, vocabulary)).to(dtype))


def near(kind, z, distance, generator):
    """A reference near the logits z, in one of the ways that a row can be hard."""
    noise = torch.randn(z.shape, generator=generator)
    few = torch.rand(z.shape, generator=generator) < 0.05
    return {
        "noise": z + distance * noise,
        "two values": z + distance * noise.sign(),
        "few changed": z + distance * noise * few,
        "few elsewhere": torch.where(few, z.std() * noise, z + distance * noise),
        "heavy tails": z + distance * noise / torch.randn(z.shape, generator=generator).abs().clamp(min=1e-3),
        "all moved": z
        + distance * noise
        + torch.tensor([-500.0, -20.0, 20.0, 500.0]).repeat(len(z) // 4).unsqueeze(-1),
    }[kind]


LABELS = {
    "sampled": sampled,
    "first": lambda z: torch.zeros(len(z), dtype=torch.long),
    "most likely": lambda z: z.float().argmax(-1),
    "least likely": lambda z: z.float().argmin(-1),
}


@settings(max_examples=settings.default.max_examples // 4)  # the interpreter is slow
@given(
    seed=st.integers(0, 2**31 - 1),
    vocabulary=st.sampled_from([2, 3, 17, 1000, 1024, 2500]),
    scale=st.floats(-1.5, 1.5).map(lambda power: 10**power),
    distance=st.floats(-4, 2).map(lambda power: 10**power),
    kind=st.sampled_from(["noise", "two values", "few changed", "few elsewhere", "heavy tails", "all moved"]),
    labels=st.sampled_from(list(LABELS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_temperature=st.booleans(),
)
def test_any_logits(seed, vocabulary, scale, distance, kind, labels, dtype, with_temperature):
    """Either kernel, whichever a row goes through."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(16, vocabulary, generator=generator)
    z, u = (logits.clamp(-6e4, 6e4).to(dtype) for logits in (z, near(kind, z, distance, generator)))
    temperature = 0.3 + 2 * torch.rand(16, generator=generator) if with_temperature else None
    torch.manual_seed(seed)  # of the samples
    assert_agrees(z, u, temperature, LABELS[labels](z))


def rounding_of_log_s(vocabulary, w):
    """What float32 leaves unknown of log s, s = sum w, at most; in nats.

    Each w is exp2 of a float32: off by 2^-24 of its exponent's size (times ln2), and by what the exponential allows itself, 2^-22
    on a GPU. Each lane adds an entry of every block, then the lanes are added in pairs; every addition is off by 2^-24 of s.
    """
    block = min(kernel.BLOCK, triton.next_power_of_2(vocabulary))
    additions = vocabulary // block + 1 + numpy.log2(block)
    exponents = (w * w.log2().abs().clamp(min=0.5)).sum(-1) / w.sum(-1)
    return 2.0**-22 + additions * 2.0**-24 + exponents * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2, 37, 5003] + [151_936] * (DEVICE == "cuda"))  # slow in the interpreter
def test_a_log_prob_near_0_is_off_by_the_roundings_of_float32_at_most(draw, vocabulary, dtype):
    """log p = -log(1 + w) of a token that the policy is sure of: 0.002 is known to 6e-8 at best, since 1 + w is a float32.

    If all roundings went the same way it would be 4e-7 of two entries and 1e-6 of 5,003; they do not, and TOLERANCE has no more.
    """
    z, rows, labels = draw(8, vocabulary), torch.arange(8), torch.zeros(8, dtype=torch.long)
    z[rows, labels] = z[rows, 1:].logsumexp(-1) + torch.linspace(4.0, 9.0, 8)
    z = z.to(dtype)
    found = kernel.triton_token_statistics(z.to(DEVICE), z.to(DEVICE), labels.to(DEVICE), None)[0].double().cpu()
    expected = formula(z, z, labels)[0]
    assert (expected > -0.02).all() and (expected < -5e-5).any()
    bound = rounding_of_log_s(vocabulary, (z.double() - z.double()[:, :1]).exp())
    print(f"{dtype}, V = {vocabulary}: off by {(found - expected).abs().max():.1e}, {bound.max():.1e} allowed")
    assert ((found - expected).abs() <= bound).all(), (found - expected, bound)


def test_temperature_of_each_token(draw):
    z = 3 * draw(4, 5003)
    assert_agrees(z, z + 0.1 * draw(4, 5003), torch.tensor([0.5, 0.7, 1.0, 2.0]))


@pytest.mark.parametrize("scale", [1, 3, 8, 20])
@pytest.mark.parametrize("distance", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_done_again_where_the_labels_are_samples(draw, done_again, scale, distance, dtype):
    """From a flat to a peaked policy. That delta at the label is far from its mean, as it often is, does not count any more."""
    z = scale * draw(64, 5003)
    u = z + distance * draw(64, 5003)
    z, u = z.to(dtype), u.to(dtype)
    assert_agrees(z, u, labels=sampled(z))
    print(f"{dtype}, scale {scale}, distance {distance}: {int(done_again[0].sum())} of 64 done again")
    assert done_again[0].sum() <= 4


def test_odd_rows_are_done_again(draw, done_again):
    """A label next to impossible for the policy, for the reference; one far apart where the KL is small; infinite entries.

    The last row is the one that is not: its label is the likely token whose delta is nearest to the mean.
    """
    z = 3 * draw(6, 5003)
    u = z + 0.01 * draw(6, 5003)
    labels = sampled(z)
    delta, likely = (z - u)[5], z[5].topk(100).indices
    labels[5] = likely[(delta[likely] - (z[5].softmax(-1) * delta).sum()).abs().argmin()]
    z[0, labels[0]] -= 200
    u[1, labels[1]] -= 200
    labels[2] = z[2].median(0).indices
    u[2, labels[2]] += 0.5
    z[3, 17] = u[3, 17] = -INFINITY
    z[4, 17 if labels[4] != 17 else 18] = -INFINITY
    assert_agrees(z, u, labels=labels)
    assert done_again[0].tolist() == [True] * 5 + [False]


@pytest.fixture
def readings(monkeypatch):
    """Yields a function: how often each logit of a tensor has been read."""
    from triton.runtime.interpreter import InterpreterBuilder

    original, addresses = InterpreterBuilder.create_masked_load, []

    def create_masked_load(self, ptrs, mask, *rest):
        addresses.append(ptrs.data[numpy.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return original(self, ptrs, mask, *rest)

    def count(logits):
        first, size = logits.data_ptr(), logits.element_size()
        inside = [a[(a >= first) & (a < first + logits.nbytes)] for a in addresses]
        counts = numpy.bincount(((numpy.concatenate(inside) - first) // size).astype(int), minlength=logits.numel())
        return counts.reshape(logits.shape)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    return count


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_logit_is_read_once_or_twice_where_the_label_is_far_from_the_mean(draw, done_again, readings, dtype):
    """And that of the label once more, to begin with. No row is done again.

    The labels of rows 0 and 1 are the likely tokens whose delta is nearest to its mean under the policy, and farthest from it.
    """
    z = 3 * draw(2, 5003).clamp(max=2)  # no entry is so likely that it alone moves the mean, or makes the KL
    z, u = z.to(dtype), (z + 0.1 * draw(2, 5003)).to(dtype)
    delta, likely = z.double() - u.double(), z.topk(100).indices
    from_mean = (delta.gather(1, likely) - (z.double().softmax(-1) * delta).sum(-1, keepdim=True)).abs()
    labels = torch.stack([likely[0, from_mean[0].argmin()], likely[1, from_mean[1].argmax()]])
    u[1, labels[1]] -= delta[1, labels[1]].sign()  # farther yet
    kernel.triton_token_statistics(z, u, labels, None)
    assert not done_again[0].any()
    expected = numpy.array([[1], [2]]).repeat(5003, axis=1)
    expected[numpy.arange(2), labels] += 1
    for logits in (z, u):
        numpy.testing.assert_array_equal(readings(logits), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own")
@pytest.mark.parametrize("labels", ["sampled", "least likely"])
@pytest.mark.parametrize("distance", [0.01, 0.3, 3.0])
def test_with_the_error_of_a_gpus_exponential(draw, done_again, monkeypatch, distance, labels):
    """PTX allows ex2.approx.ftz a relative error of 2^-22; here one that looks random, the same for the same argument.

    tl.exp is ex2.approx of the argument times log2 e in float32. The least likely labels go to the careful kernel.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def power_of_two(x):
        x = x.astype(numpy.float64)
        error = numpy.where(numpy.isfinite(x), numpy.sin(1e4 * numpy.where(numpy.isfinite(x), x, 0)), 0) * 2.0**-22
        power = numpy.exp2(x) * (1 + error)
        return numpy.where(power < 2.0**-126, 0, power).astype(numpy.float32)

    def create_exp2(self, arg):
        return TensorHandle(power_of_two(arg.data), arg.dtype.scalar)

    def create_exp(self, arg):
        return TensorHandle(power_of_two(arg.data * numpy.float32(1.4426950408889634)), arg.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_exp2", create_exp2)
    monkeypatch.setattr(InterpreterBuilder, "create_exp", create_exp)
    z = 3 * draw(8, 5003)
    u = z + distance * draw(8, 5003)
    assert_agrees(z, u, labels=LABELS[labels](z))
    assert (kernel.triton_token_statistics(z, z.clone(), LABELS[labels](z), None)[2] == 0).all()


def test_equal_logits_give_exactly_zero(draw):
    z = (10 * draw(8, 5003)).to(DEVICE)
    log_prob, ref_log_prob, token_kl, *_ = kernel.triton_token_statistics(
        z, z.clone(), torch.arange(8, device=DEVICE), None
    )
    assert (token_kl == 0).all() and torch.equal(log_prob, ref_log_prob)


def test_a_shift_of_all_logits_changes_nothing(draw):
    z = 3 * draw(4, 5003)
    assert_agrees(z, z + 0.1 * draw(4, 5003) + 100)
    exact = (8 * z).round() / 8
    for shift in (64, -64, 500, -500):
        assert_agrees(exact, exact + 0.125 * (draw(4, 5003) > 0) + shift)
        assert_agrees(exact, exact + 0.125 * (draw(4, 5003) > 0) + shift, torch.full((4,), 0.8))


@pytest.mark.parametrize("shift", [-5.5, -1.0, 1.0, 4.5])
@pytest.mark.parametrize("label", [-9.0, 0.0, 9.0])
def test_logits_a_little_apart(draw, shift, label):
    """z - u is rounded where z is near 0 and u is not, also where the label's are both large."""
    z = draw(64, 17)
    z[:, 0] = label
    assert_agrees(z, z + shift + 1e-3 * draw(64, 17), labels=torch.zeros(64, dtype=torch.long))


def test_peaked_policy(draw):
    """One token holds nearly all, which need not be the label."""
    z = 6 * draw(16, 5003)
    assert_agrees(z, z + 0.2 * draw(16, 5003))


@pytest.mark.parametrize("who", ["policy", "reference", "both"])
def test_one_logit_of_ten_thousand(draw, who):
    z, u = 3 * draw(3, 5003), 3 * draw(3, 5003)
    for name, logits in (("policy", z), ("reference", u)):
        if who in (name, "both"):
            logits[:, 4500] = 1e4
    assert_agrees(z, u, labels=torch.tensor([4500, 0, 7]))


def test_flat_logits(draw):
    assert_agrees(torch.zeros(3, 5003), 3 * draw(3, 5003))
    assert_agrees(torch.full((3, 5003), 7.0), torch.full((3, 5003), -7.0))


@pytest.mark.parametrize("impossible", [slice(5, 4900), slice(0, 4500), slice(4200, 5003)])
def test_entries_impossible_for_both(draw, impossible):
    z = 3 * draw(3, 5003)
    u = z + 0.2 * draw(3, 5003)
    z[:, impossible] = u[:, impossible] = -INFINITY
    assert_agrees(z, u, labels=torch.full((3,), 4950 if impossible.stop < 4950 else 2))


def test_entries_impossible_for_one(draw):
    z = 3 * draw(3, 5003)
    u = z + 0.2 * draw(3, 5003)
    only_policy, only_ref = z.clone(), u.clone()
    only_policy[:, 11] = -INFINITY
    assert_agrees(only_policy, u)
    only_ref[:, 11] = -INFINITY
    token_kl = kernel.triton_token_statistics(
        z.to(DEVICE), only_ref.to(DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE), None
    )[2]
    assert (token_kl == INFINITY).all()


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_the_smallest_float_stands_for_impossible(draw, temperature):
    """As transformers' masks have it. Over a temperature it is infinite in float32."""
    z = draw(4, 37)
    u = z + 0.2 * draw(4, 37)
    z[:, 5] = torch.finfo(torch.float32).min
    u[:2, 5] = torch.finfo(torch.float32).min
    assert_agrees(z, u, None if temperature is None else torch.full((4,), temperature), torch.full((4,), 3))


def test_what_only_the_reference_excludes_makes_the_kl_infinite_however_unlikely(draw):
    z, u = torch.zeros(2, 5003), torch.zeros(2, 5003)
    z[:, 2], u[:, 2] = -110.0, -INFINITY
    token_kl = kernel.triton_token_statistics(z.to(DEVICE), u.to(DEVICE), torch.zeros(2, device=DEVICE).long(), None)[2]
    assert (token_kl == INFINITY).all()


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_what_is_not_finite_is_not_hidden(draw, bad):
    z = draw(2, 5003)
    z[0, 4700] = bad
    found = kernel.triton_token_statistics(
        z.to(DEVICE), z.clone().to(DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE), None
    )
    assert not torch.isfinite(found[2][0]) and torch.isfinite(found[2][1])


def test_strided_rows_and_nothing_modified(draw):
    z, u = 3 * draw(6, 600), 3 * draw(6, 600)
    before = z.clone(), u.clone()
    assert_agrees(z[::2, 50:550], u[::2, 50:550])
    assert torch.equal(z, before[0]) and torch.equal(u, before[1])


def test_no_tokens():
    found = kernel.triton_token_statistics(torch.zeros(0, 7), torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), None)
    assert all(result.shape == (0,) for result in found)
