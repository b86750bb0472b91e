"""Claim: the Triton kernel gives the numbers of the float64 formula, in Triton's interpreter without a GPU and compiled with one.

Log-probs and entropy to 1e-6, KL to 1e-5 for float32 inputs and for bfloat16 inputs against the formula on those same values, on
random and adversarial logits, any vocabulary size, strided rows, per-token temperature. Fresh inputs in every run, outputs
poisoned before. Not claimed: speed, which the interpreter says nothing about (benchmarks/kl_function.py).
"""

import os
import time

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported

triton = pytest.importorskip("triton")
import vimpo_verl.token_statistics_triton as kernel  # noqa: E402

INFINITY = float("inf")
NAMES = ("log_prob", "ref_log_prob", "token_kl", "entropy")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Whatever the kernel does not write is NaN."""
    original = torch.Tensor.new_empty

    def new_empty(self, *size, **kwargs):
        made = original(self, *size, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def draw():
    """Fresh normal numbers in every run; the seed is in the report of a failure."""
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def formula(z, u, labels, temperature=None):
    z, u = z.double(), u.double()
    if temperature is not None:
        z, u = z / temperature.double().unsqueeze(-1), u / temperature.double().unsqueeze(-1)
    log_p, log_q, label = torch.log_softmax(z, -1), torch.log_softmax(u, -1), labels.unsqueeze(-1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return log_p.gather(-1, label)[:, 0], log_q.gather(-1, label)[:, 0], kl, torch.special.entr(p).sum(-1)


def assert_agrees(z, u, temperature=None, labels=None, kl_tolerance=1e-5):
    labels = torch.arange(z.shape[0]) % z.shape[1] if labels is None else labels
    on_device = [None if t is None else t.to(DEVICE) for t in (z, u, labels, temperature)]
    found = kernel.triton_token_statistics(*on_device)
    for name, actual, expected in zip(NAMES, found, formula(z, u, labels, temperature), strict=True):
        tolerance = kl_tolerance if name == "token_kl" else 1e-6
        torch.testing.assert_close(
            actual.double().cpu(), expected, rtol=tolerance, atol=1e-11 if name == "token_kl" else 1e-6, msg=lambda m: f"{name}: {m}"  # noqa: B023
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 37, 4096, 5003, 151_936])
@pytest.mark.parametrize("distance", [0.01, 0.3, 3.0])
def test_random_logits(draw, dtype, vocabulary, distance):
    z = 3 * draw(3, vocabulary)
    assert_agrees(z.to(dtype), (z + distance * draw(3, vocabulary)).to(dtype))


def test_temperature_of_each_token(draw):
    z = 3 * draw(4, 5003)
    assert_agrees(z, z + 0.1 * draw(4, 5003), torch.tensor([0.5, 0.7, 1.0, 2.0]))


def test_equal_logits_give_exactly_zero(draw):
    z = (10 * draw(8, 5003)).to(DEVICE)
    log_prob, ref_log_prob, token_kl, _ = kernel.triton_token_statistics(
        z, z.clone(), torch.arange(8, device=DEVICE), None
    )
    assert (token_kl == 0).all() and torch.equal(log_prob, ref_log_prob)


def test_a_shift_of_all_logits_changes_nothing(draw):
    z = 3 * draw(4, 5003)
    assert_agrees(z, z + 0.1 * draw(4, 5003) + 100, kl_tolerance=1e-3)  # adding 100 rounds the inputs' difference away
    exact = (8 * z).round() / 8
    assert_agrees(exact, exact + 0.125 * (draw(4, 5003) > 0) + 64)


def test_peaked_policy(draw):
    """One token holds nearly all: the digits of a small KL must survive the move of the kernel's centre to it."""
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
    found = kernel.triton_token_statistics(
        torch.zeros(0, 7), torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), None
    )
    assert all(result.shape == (0,) for result in found)
