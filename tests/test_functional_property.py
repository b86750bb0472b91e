"""Claim: on any shapes and any finite values, the functions of vimpo_verl.functional keep their promises.

Right shape and dtype, no NaN from finite input, zero where masked, invariance to order and to more padding; a ValueError
that names the argument where shapes do not fit. Some hundreds of cases each; 10,000 with HYPOTHESIS_PROFILE=long.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from vimpo_verl import functional as F
from vimpo_verl.batch import compute_batch
from vimpo_verl.config import VimpoConfig

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def accumulated(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def tensors(draw, *shape, scale=st.sampled_from([0.0, 1e-6, 1.0, 30.0]), dtype=None):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    return (draw(scale) * torch.randn(*shape, generator=generator)).to(dtype)


@st.composite
def masks(draw, batch, length):
    """0/1 in any dtype, with holes, empty rows or nothing at all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.2, 0.8, 1.0]))
    mask = torch.rand(batch, length, generator=generator) < density
    return mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))


@st.composite
def token_batches(draw):
    """log_prob, ref_log_prob, token_kl >= 0 of one dtype, and a mask; also with no sequences or no tokens."""
    batch, length = draw(st.integers(0, 6)), draw(st.integers(0, 12))
    dtype = draw(st.sampled_from(DTYPES))
    log_prob, ref_log_prob, kl = (draw(tensors(batch, length, dtype=dtype)) for _ in range(3))
    return log_prob, ref_log_prob, kl.abs(), draw(masks(batch, length))


@st.composite
def logits(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=2)) + [draw(st.integers(1, 40))]
    dtype = draw(st.sampled_from(DTYPES))
    scale = st.sampled_from([0.0, 1e-3, 1.0, 1e4])
    return draw(tensors(*shape, scale=scale, dtype=dtype)), draw(tensors(*shape, scale=scale, dtype=dtype))


@given(logits(), st.none() | st.integers(1, 9))
def test_exact_kl(pair, chunk_size):
    policy, ref = (x.requires_grad_() for x in pair)
    kl = F.exact_kl(policy, ref, chunk_size=chunk_size)
    assert kl.shape == policy.shape[:-1] and kl.dtype == accumulated(policy.dtype)
    assert torch.isfinite(kl).all() and (kl >= -1e-9).all()
    assert torch.equal(F.exact_kl(policy, policy), torch.zeros_like(kl))
    kl.sum().backward()
    assert torch.isfinite(policy.grad).all() and torch.isfinite(ref.grad).all()


@given(logits(), st.data())
def test_topk_kl(pair, data):
    k = data.draw(st.integers(1, pair[0].shape[-1]))
    kl = F.topk_kl(*pair, k)
    assert kl.shape == pair[0].shape[:-1] and torch.isfinite(kl).all()


@given(token_batches(), st.sampled_from(["k2", "k3"]))
def test_sampled_kl(batch, estimator):
    kl = F.sampled_kl(batch[0], batch[1], estimator)
    assert kl.shape == batch[0].shape and not kl.isnan().any() and (kl >= 0).all()


@given(token_batches(), st.floats(1e-6, 10.0), st.sampled_from([0.0, 0.3, 1.0]))
def test_td_values_advantages(batch, beta, lam):
    mask, masked = batch[-1], ~batch[-1].bool()
    td = F.td_residual(*batch, beta)
    results = td, F.implied_values(td, mask), F.implied_advantages(td, mask, lam), F.whiten(td, mask)
    for result in results:
        assert result.shape == mask.shape and result.dtype == accumulated(batch[0].dtype)
        assert torch.isfinite(result).all() and (result[masked] == 0).all()


@given(token_batches(), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_more_padding_changes_nothing(batch, extra, lam):
    """Neither columns behind nor empty rows; what they hold does not matter."""
    padded = [torch.nn.functional.pad(x, (0, extra, 0, extra), value=v) for x, v in zip(batch, (1e3, -7.0, 3.0, 0))]
    rows, columns = batch[-1].shape

    def compute(log_prob, ref_log_prob, token_kl, mask):
        td = F.td_residual(log_prob, ref_log_prob, token_kl, mask, 0.1)
        return td, F.implied_values(td, mask), F.implied_advantages(td, mask, lam), F.whiten(td, mask)

    for plain, longer in zip(compute(*batch), compute(*padded)):
        torch.testing.assert_close(longer[:rows, :columns], plain, rtol=1e-5, atol=1e-6)


@given(token_batches(), st.sampled_from(["squared_error", "huber"]), st.data())
def test_value_loss(batch, loss_type, data):
    target = data.draw(tensors(batch[0].shape[0]))
    log_prob = batch[0].clone().requires_grad_()
    losses = F.value_loss(log_prob, *batch[1:3], target, batch[3], 0.1, loss_type=loss_type)
    assert losses.shape == target.shape and torch.isfinite(losses).all() and (losses >= 0).all()
    losses.sum().backward()
    assert torch.isfinite(log_prob.grad).all()
    assert (log_prob.grad[~batch[3].bool()] == 0).all()


@given(st.lists(st.tuples(st.floats(-10, 10), st.sampled_from("abc")), max_size=12), st.none() | st.floats(-1, 1))
def test_baselines(members, cap):
    outcome, group = torch.tensor([m[0] for m in members]), [m[1] for m in members]
    for baseline in (F.group_baseline, F.leave_one_out_baseline):
        v0 = baseline(outcome, group, cap=cap)
        assert v0.shape == outcome.shape and torch.isfinite(v0).all()
        assert cap is None or (v0 <= cap + 1e-6).all()
        order = torch.randperm(len(members))
        shuffled = baseline(outcome[order], [group[i] for i in order], cap=cap)
        torch.testing.assert_close(shuffled, v0[order], rtol=1e-5, atol=1e-5)


@given(token_batches(), st.data())
def test_shapes_that_do_not_fit_are_refused(batch, data):
    """One of the four tensors gets another shape: a ValueError that names it."""
    names = ("log_prob", "ref_log_prob", "token_kl", "response_mask")
    wrong = data.draw(st.integers(0, 3))
    rows, columns = batch[0].shape
    shape = data.draw(st.sampled_from([(rows,), (rows, columns + 1), (rows + 1, columns), (rows, columns, 1), ()]))
    tensors = [torch.zeros(shape) if i == wrong else x for i, x in enumerate(batch)]
    with pytest.raises(ValueError, match=names[wrong]):
        F.td_residual(*tensors, 0.1)
    with pytest.raises(ValueError, match=f"{names[wrong]}|target"):
        F.value_loss(*tensors[:3], torch.zeros(rows), tensors[3], 0.1)
    if wrong == 3:
        for function in (F.implied_values, F.whiten, lambda td, mask: F.implied_advantages(td, mask, 0.5)):
            with pytest.raises(ValueError, match="response_mask"):
                function(batch[0], tensors[3])


@given(token_batches(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["group_mean", "leave_one_out"]), st.data())
def test_a_batch(batch, lam, baseline, data):
    """compute_batch on anything finite: finite results and metrics, bounded correlation, c_A >= 0."""
    size = batch[0].shape[0]
    assume(size > 0)
    outcome = data.draw(tensors(size, dtype=torch.float32))
    group = data.draw(st.lists(st.sampled_from("ab"), min_size=size, max_size=size))
    is_padding = data.draw(masks(size, 1)).squeeze(1).bool()
    result = compute_batch(
        old_log_prob=batch[0], ref_log_prob=batch[1], token_kl=batch[2], response_mask=batch[3], outcome=outcome,
        group=group, config=VimpoConfig(baseline=baseline), lam=lam, is_padding=is_padding,
    )  # fmt: skip
    for tensor in (result.advantages, result.returns, result.values):
        assert tensor.shape == batch[0].shape and torch.isfinite(tensor).all()
        assert (tensor[~batch[3].bool() | is_padding.unsqueeze(1)] == 0).all()
    assert result.actor_coeff >= 0 and -1.0001 <= result.metrics["vimpo/outcome_correlation"] <= 1.0001
    assert all(abs(value) < float("inf") for value in result.metrics.values())
