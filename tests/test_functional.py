"""Claim: values, advantages, whitening, baselines and value loss are the equations of the paper.

Against loops over samples and tokens in float64, forward and backward: masks in the middle of a response, NaN under the
mask, edge cases. exact_kl and the other estimators are in test_exact_kl.py, random shapes in test_functional_property.py.
"""

import math

import pytest
import torch

from vimpo_verl import functional as F

B, T = 5, 9
# A full row, padding behind, tool output in the middle, a single token in the middle, nothing.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 1, 1],
        [0, 0, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def token_inputs(dtype=torch.float64):
    return random(B, T, seed=1, dtype=dtype), random(B, T, seed=2, dtype=dtype), random(B, T, seed=3, dtype=dtype).abs()


def loop_td(log_prob, ref_log_prob, token_kl, beta):
    td = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        for t in range(T):
            if MASK[i, t]:
                td[i, t] = beta * (log_prob[i, t] - ref_log_prob[i, t]) - beta * token_kl[i, t]
    return td


def loop_advantages(td, lam):
    """GAE over the implied values: delta_t = V(next) - V(t) = td_t, between tokens that the policy wrote."""
    advantages = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        valid = [t for t in range(T) if MASK[i, t]]
        for n, t in enumerate(valid):
            advantages[i, t] = sum(lam**steps * td[i, k].item() for steps, k in enumerate(valid[n:]))
    return advantages


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
def test_td_residual(mask):
    inputs = token_inputs()
    td = F.td_residual(*inputs, mask, 0.3)
    torch.testing.assert_close(td, loop_td(*inputs, 0.3), rtol=1e-14, atol=0)


def test_implied_values():
    td = loop_td(*token_inputs(), 0.3)
    values = F.implied_values(td, MASK)
    for i in range(B):
        following = 0.0  # V(s_{T+1})
        for t in reversed(range(T)):
            expected = following - td[i, t].item() if MASK[i, t] else 0.0
            assert values[i, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
            following = expected if MASK[i, t] else following


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_implied_advantages(lam):
    """lam does not decay over tool output, and padding is no episode end."""
    td = loop_td(*token_inputs(), 0.3)
    torch.testing.assert_close(F.implied_advantages(td, MASK, lam), loop_advantages(td, lam), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_are_gae_over_the_implied_values(lam):
    """The reward cancels: with V(s_{T+1}) = R in place of 0, and the reward R at the end, the same advantages."""
    td = loop_td(*token_inputs(), 0.3)
    values, advantages = F.implied_values(td, MASK), F.implied_advantages(td, MASK, lam)
    for i in range(B):
        valid = [t for t in range(T) if MASK[i, t]]
        running = 0.0
        for n in reversed(range(len(valid))):
            following = values[i, valid[n + 1]].item() if n + 1 < len(valid) else 0.0
            delta = following - values[i, valid[n]].item()
            running = delta + lam * running
            assert advantages[i, valid[n]].item() == pytest.approx(running, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("function", ["td", "values", "advantages", "whiten", "value_loss", "clipped_value_loss"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_values_under_the_mask_never_matter(function, poison):
    """Nor do their gradients."""

    def result(*tensors):
        td = F.td_residual(*tensors, MASK, 0.3)
        return {
            "td": lambda: td,
            "values": lambda: F.implied_values(tensors[0], MASK),
            "advantages": lambda: F.implied_advantages(tensors[0], MASK, 0.5),
            "whiten": lambda: F.whiten(tensors[0], MASK),
            "value_loss": lambda: F.value_loss(*tensors, random(B, seed=4), MASK, 0.3),
            "clipped_value_loss": lambda: F.clipped_value_loss(
                *tensors[:1], *tensors, random(B, seed=4), MASK, 0.3, clip=0.2
            ),
        }[function]()

    clean = [x.requires_grad_() for x in token_inputs()]
    poisoned = [torch.where(MASK.bool(), x, poison).detach().requires_grad_() for x in token_inputs()]
    assert torch.equal(result(*clean), result(*poisoned))
    result(*clean).sum().backward(), result(*poisoned).sum().backward()
    assert torch.equal(clean[0].grad, poisoned[0].grad)


def test_whiten():
    a = random(B, T)
    white, values = F.whiten(a, MASK), [a[i, t].item() for i in range(B) for t in range(T) if MASK[i, t]]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    expected = torch.where(MASK.bool(), (a - mean) / math.sqrt(variance + 1e-8), 0.0)
    torch.testing.assert_close(white, expected, rtol=1e-12, atol=1e-14)


def test_whiten_damps_advantages_that_are_tiny():
    """The 1e-8 belongs to the scale of the data: at a standard deviation of 1e-6 the result has 1e-2, not 1."""
    white = F.whiten(1e-6 * random(B, T), MASK)
    assert 0.5e-2 < white[MASK.bool()].std() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("constant", [0.0, 0.1, -3e4, 1e-20])
def test_whiten_of_a_constant_is_zero(dtype, constant):
    white = F.whiten(torch.full((B, T), constant, dtype=dtype), MASK)
    assert white.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(white, torch.zeros_like(white))


def test_whiten_of_one_token_or_none_is_zero():
    one = torch.zeros(B, T)
    one[2, 3] = 1
    for mask in (one, torch.zeros(B, T)):
        assert torch.equal(F.whiten(random(B, T), mask), torch.zeros(B, T, dtype=torch.float64))
    assert F.whiten(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_whiten_keeps_its_digits_at_a_large_offset():
    a = random(B, T)
    offset = F.whiten((a + 1000).float(), MASK)
    expected = F.whiten((a + 1000).float().double(), MASK)
    torch.testing.assert_close(offset.double(), expected, rtol=1e-5, atol=1e-6)


# ---- baselines -------------------------------------------------------------------------------------------------------

OUTCOME = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.25, 7.0])
GROUP = ["a", "b", "a", "b", "a", ("c", 3)]  # different sizes, not sorted, any hashable


def test_group_baseline():
    a, b = (1.0 + 1.0 + 0.25) / 3, 0.25
    torch.testing.assert_close(F.group_baseline(OUTCOME, GROUP), torch.tensor([a, b, a, b, a, 7.0]))


def test_leave_one_out_baseline():
    """A group of one has no other member: its own reward, so that its target is 0."""
    expected = torch.tensor([0.625, 0.5, 0.625, 0.0, 1.0, 7.0])
    torch.testing.assert_close(F.leave_one_out_baseline(OUTCOME, GROUP), expected)


@pytest.mark.parametrize("baseline", [F.group_baseline, F.leave_one_out_baseline])
def test_baseline_cap_and_detachment(baseline):
    outcome = OUTCOME.clone().requires_grad_()
    capped = baseline(outcome, GROUP, cap=0.4)
    torch.testing.assert_close(capped, baseline(OUTCOME, GROUP).clamp(max=0.4))
    assert not capped.requires_grad
    assert torch.equal(baseline(torch.zeros(0), []), torch.zeros(0))


@pytest.mark.parametrize("baseline", [F.group_baseline, F.leave_one_out_baseline])
def test_baseline_refuses_groups_of_another_length(baseline):
    with pytest.raises(ValueError, match="outcome.*group"):
        baseline(OUTCOME, GROUP[:-1])
    with pytest.raises(ValueError, match="outcome"):
        baseline(OUTCOME.reshape(2, 3), GROUP)


# ---- value loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type, delta", [("squared_error", 0.5), ("huber", 0.5), ("huber", 0.1)])
def test_value_loss(loss_type, delta):
    log_prob, ref_log_prob, token_kl = token_inputs()
    target = random(B, seed=4)
    td = loop_td(log_prob, ref_log_prob, token_kl, 0.3)
    losses = F.value_loss(log_prob, ref_log_prob, token_kl, target, MASK, 0.3, loss_type=loss_type, huber_delta=delta)
    for i in range(B):
        residual = td[i].sum().item() - target[i].item()
        expected = 0.5 * residual**2
        if loss_type == "huber" and abs(residual) > delta:
            expected = delta * (abs(residual) - 0.5 * delta)
        assert losses[i].item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_the_value_loss_flows_through_log_prob_only():
    inputs = [x.requires_grad_() for x in token_inputs()]
    target = random(B, seed=4).requires_grad_()
    F.value_loss(*inputs, target, MASK, 0.3).sum().backward()
    residual = loop_td(*[x.detach() for x in inputs], 0.3).sum(-1) - target.detach()
    torch.testing.assert_close(inputs[0].grad, 0.3 * residual.unsqueeze(-1) * MASK, rtol=1e-12, atol=1e-15)
    assert inputs[1].grad is None and inputs[2].grad is None and target.grad is None


@pytest.mark.parametrize("loss_type, delta", [("squared_error", 0.5), ("huber", 0.1)])
def test_the_clipped_value_loss(loss_type, delta):
    """The number of value_loss; the gradient of a loop over the tokens that the clip lets through, kappa and ratio stopped."""
    new, ref_log_prob, token_kl = token_inputs()
    old, target = new + 0.6 * random(B, T, seed=5), random(B, seed=4)
    kinds = {"loss_type": loss_type, "huber_delta": delta}
    inputs = [x.requires_grad_() for x in (new, old, ref_log_prob, token_kl, target)]
    losses = F.clipped_value_loss(*inputs, MASK, 0.3, clip=0.2, **kinds)
    torch.testing.assert_close(losses, F.value_loss(new, ref_log_prob, token_kl, target, MASK, 0.3, **kinds))
    losses.sum().backward()
    expected, stopped = torch.zeros(B, T, dtype=torch.float64), 0
    td = loop_td(*[x.detach() for x in (new, ref_log_prob, token_kl)], 0.3)
    for i in range(B):
        error = td[i].sum().item() - target[i].item()
        error = error if loss_type == "squared_error" else max(-delta, min(delta, error))
        for t in range(T):
            ratio = math.exp(new[i, t].item() - old[i, t].item())
            too_far = (error > 0 and ratio < 0.8) or (error < 0 and ratio > 1.2)
            stopped += bool(MASK[i, t]) and too_far
            if MASK[i, t] and not too_far:
                expected[i, t] = 0.3 * error * min(ratio, 1.2)
    assert 2 < stopped < MASK.sum() - 2
    torch.testing.assert_close(new.grad, expected, rtol=1e-12, atol=1e-15)
    assert all(x.grad is None for x in inputs[1:])


@pytest.mark.parametrize("detach_kl", [True, False])
def test_the_clipped_value_loss_of_the_first_update_is_the_value_loss(detach_kl):
    gradients = []
    for clip in (False, True):
        log_prob, ref_log_prob, token_kl = token_inputs()
        new, kl = log_prob.clone().requires_grad_(), token_kl.clone().requires_grad_()
        rest, kind = (ref_log_prob, kl, random(B, seed=4), MASK, 0.3), {"detach_kl": detach_kl}
        losses = (
            F.clipped_value_loss(new, log_prob, *rest, clip=0.2, **kind) if clip else F.value_loss(new, *rest, **kind)
        )
        losses.sum().backward()
        assert (kl.grad is None) == detach_kl
        gradients.append([new.grad] if detach_kl else [new.grad, kl.grad])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_half_precision_is_accumulated_in_float32():
    """4,096 log-ratios of 2^-7 with the sum 32: bfloat16 would stop adding at 2."""
    log_prob, ref_log_prob = torch.full((1, 4096), -1.0), torch.full((1, 4096), -1.0078125)
    half = [x.bfloat16() for x in (log_prob, ref_log_prob, torch.zeros(1, 4096))]
    exact = (half[0].double() - half[1].double()).sum().item()
    assert exact == 32
    loss = F.value_loss(*half, torch.zeros(1).bfloat16(), torch.ones(1, 4096), 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * exact**2, rel=1e-6)


# ---- bad input -------------------------------------------------------------------------------------------------------

X, M = torch.zeros(2, 3), torch.ones(2, 3)


def clipped(old_log_prob, clip=0.2):
    return F.clipped_value_loss(X, old_log_prob, X, X, torch.zeros(2), M, 0.1, clip=clip)


BAD_CALLS = {
    "exact_kl": ("ref_logits", lambda: F.exact_kl(X, torch.zeros(2, 4))),
    "exact_kl, no vocabulary": ("policy_logits", lambda: F.exact_kl(torch.zeros(2, 0), torch.zeros(2, 0))),
    "exact_kl, scalar": ("policy_logits", lambda: F.exact_kl(torch.zeros(()), torch.zeros(()))),
    "exact_kl, chunk": ("chunk_size", lambda: F.exact_kl(X, X, chunk_size=0)),
    "topk_kl": ("ref_logits", lambda: F.topk_kl(X, torch.zeros(2, 4), 1)),
    "topk_kl, k = 0": ("k must", lambda: F.topk_kl(X, X, 0)),
    "topk_kl, k > V": ("k must", lambda: F.topk_kl(X, X, 4)),
    "sampled_kl": ("ref_log_prob", lambda: F.sampled_kl(X, torch.zeros(3), "k2")),
    "td_residual": ("token_kl", lambda: F.td_residual(X, X, torch.zeros(2), M, 0.1)),
    "td_residual, mask": ("response_mask", lambda: F.td_residual(X, X, X, torch.ones(2, 4), 0.1)),
    "implied_values": ("response_mask", lambda: F.implied_values(X, torch.ones(3))),
    "implied_advantages": ("response_mask", lambda: F.implied_advantages(X, torch.ones(3, 2), 0.5)),
    "implied_advantages, lam": ("lam", lambda: F.implied_advantages(X, M, 1.5)),
    "implied_advantages, NaN": ("lam", lambda: F.implied_advantages(X, M, math.nan)),
    "whiten": ("response_mask", lambda: F.whiten(X, torch.ones(2))),
    "value_loss, target": ("target", lambda: F.value_loss(X, X, X, torch.zeros(3), M, 0.1)),
    "value_loss, target [B, T]": ("target", lambda: F.value_loss(X, X, X, X, M, 0.1)),
    "value_loss, kl": ("token_kl", lambda: F.value_loss(X, X, torch.zeros(2, 1), torch.zeros(2), M, 0.1)),
    "clipped_value_loss": ("old_log_prob", lambda: clipped(X[:1])),
    "clipped_value_loss, clip": ("clip", lambda: clipped(X, clip=-0.1)),
    "value_loss, type": ("loss_type", lambda: F.value_loss(X, X, X, torch.zeros(2), M, 0.1, loss_type="l1")),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_a_value_error_that_names_the_argument(name):
    argument, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=argument):
        call()
