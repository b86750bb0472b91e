"""Claim: on any shapes and any finite values, the functions of vimpo_verl.functional keep their promises.

Right shape and dtype, no NaN from finite input up to 1e15 (beyond, squares overflow float32), zero where masked,
invariance to order and to more padding. What does not fit gives a ValueError that names the argument: shapes, devices,
dtypes, masks that are not 0/1, numbers out of range, groups of another length, rewards of several channels. Some
hundreds of cases each; 10,000 with HYPOTHESIS_PROFILE=long. The device that does not fit is "meta", so that no GPU is
needed.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from vimpo_verl import functional as F
from vimpo_verl.baselines import OF_A_BATCH, WITH_PRIOR
from vimpo_verl.batch import compute_batch
from vimpo_verl.config import BASELINES, VimpoConfig

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def accumulated(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def tensors(draw, *shape, scale=st.sampled_from([0.0, 1e-6, 1.0, 30.0, 1e15]), dtype=None):  # noqa: B008
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    largest = min(torch.finfo(dtype).max, 1e30)  # float16 ends at 65504
    return (draw(scale) * torch.randn(*shape, generator=generator)).clamp(-largest, largest).to(dtype)


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
    scale = st.sampled_from([0.0, 1e-3, 1.0, 1e4, 1e15])
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
    padded = [
        torch.nn.functional.pad(x, (0, extra, 0, extra), value=v)
        for x, v in zip(batch, (1e3, -7.0, 3.0, 0), strict=True)
    ]
    rows, columns = batch[-1].shape

    def compute(log_prob, ref_log_prob, token_kl, mask):
        td = F.td_residual(log_prob, ref_log_prob, token_kl, mask, 0.1)
        return td, F.implied_values(td, mask), F.implied_advantages(td, mask, lam), F.whiten(td, mask)

    for plain, longer in zip(compute(*batch), compute(*padded), strict=True):
        torch.testing.assert_close(longer[:rows, :columns], plain, rtol=1e-5, atol=1e-6)


@given(token_batches(), st.sampled_from(["squared_error", "huber"]), st.data())
def test_value_loss(batch, loss_type, data):
    target = data.draw(tensors(batch[0].shape[0]))
    log_prob = batch[0].clone().requires_grad_()
    losses = F.value_loss(log_prob, *batch[1:3], target, batch[3], 0.1, loss_type=loss_type)
    assert losses.shape == target.shape and torch.isfinite(losses).all() and (losses >= 0).all()
    losses.sum().backward()
    # A gradient of 1e14 is infinite in float16, which ends at 65504, and verl skips such an update; it is never NaN.
    assert torch.isfinite(log_prob.grad).all() if log_prob.dtype != torch.float16 else not log_prob.grad.isnan().any()
    assert (log_prob.grad[~batch[3].bool()] == 0).all()


@given(st.lists(st.tuples(st.floats(-10, 10), st.sampled_from("abc")), max_size=12), st.none() | st.floats(-1, 1))
def test_baselines(members, cap):
    outcome, group = torch.tensor([m[0] for m in members]), [m[1] for m in members]
    for baseline in OF_A_BATCH.values():
        v0 = baseline(outcome, group, cap=cap)
        assert v0.shape == outcome.shape and torch.isfinite(v0).all()
        assert cap is None or (v0 <= cap + 1e-6).all()
        order = torch.randperm(len(members))
        shuffled = baseline(outcome[order], [group[i] for i in order], cap=cap)
        torch.testing.assert_close(shuffled, v0[order], rtol=1e-5, atol=1e-5)


# ---- what does not fit -----------------------------------------------------------------------------------------------

NAMES = ("log_prob", "ref_log_prob", "token_kl", "response_mask")


def refused(name, function, *arguments, **keywords):
    with pytest.raises(ValueError, match=name):
        function(*arguments, **keywords)


def refused_everywhere(name, batch, wrong):
    """One of the four token tensors is replaced: everything that takes it refuses it."""
    arguments = [wrong if other == name else tensor for other, tensor in zip(NAMES, batch, strict=True)]
    target = torch.zeros(batch[0].shape[0])
    refused(name, F.td_residual, *arguments, 0.1)
    refused(name, F.value_loss, *arguments[:3], target, arguments[3], 0.1)
    if name in ("log_prob", "ref_log_prob"):
        refused(name, F.sampled_kl, *arguments[:2], "k3")
    td, mask = (wrong, batch[3]) if name == "log_prob" else (batch[0], arguments[3])
    if name in ("log_prob", "response_mask"):
        refused("td" if name == "log_prob" else name, F.implied_values, td, mask)
        refused("td" if name == "log_prob" else name, F.implied_advantages, td, mask, 0.5)
        refused("advantages" if name == "log_prob" else name, F.whiten, td, mask)


@given(token_batches(), st.sampled_from(NAMES), st.data())
def test_shapes_that_do_not_fit_are_refused(batch, name, data):
    rows, columns = batch[0].shape
    shape = data.draw(st.sampled_from([(rows,), (rows, columns + 1), (rows + 1, columns), (rows, columns, 1), ()]))
    refused_everywhere(name, batch, torch.zeros(shape))


@given(token_batches(), st.sampled_from(NAMES))
def test_devices_that_do_not_fit_are_refused(batch, name):
    refused_everywhere(name, batch, torch.zeros(batch[0].shape, device="meta"))


@given(token_batches(), st.sampled_from(NAMES[:3]), st.sampled_from([torch.int64, torch.bool, torch.complex64]))
def test_dtypes_that_do_not_fit_are_refused(batch, name, dtype):
    refused_everywhere(name, batch, torch.zeros(batch[0].shape, dtype=dtype))


@given(token_batches(), st.sampled_from([2.0, -1.0, 0.5, 1e-30, float("nan"), float("inf")]), st.data())
def test_a_mask_that_is_not_0_and_1_is_refused(batch, value, data):
    assume(batch[0].numel() > 0)
    mask = batch[3].double()
    mask.view(-1)[data.draw(st.integers(0, mask.numel() - 1))] = value
    refused_everywhere("response_mask", batch, mask)
    refused("response_mask must hold 0 and 1", F.implied_values, batch[0], mask)


@given(token_batches(), st.sampled_from([0, -1.0, float("nan"), float("inf"), None, "5e-4", 1j]))
def test_numbers_out_of_range_are_refused(batch, number):
    target = torch.zeros(batch[0].shape[0])
    refused("beta", F.td_residual, *batch, number)
    refused("beta", F.value_loss, *batch[:3], target, batch[3], number)
    refused("huber_delta", F.value_loss, *batch[:3], target, batch[3], 0.1, loss_type="huber", huber_delta=number)
    refused("loss_type", F.value_loss, *batch[:3], target, batch[3], 0.1, loss_type=number)
    refused("estimator", F.sampled_kl, *batch[:2], number)
    if number != 0:
        refused("lam", F.implied_advantages, batch[0], batch[3], number)


@given(token_batches(), st.data())
def test_a_target_that_does_not_fit_is_refused(batch, data):
    rows = batch[0].shape[0]
    shape = data.draw(st.sampled_from([(rows + 1,), (rows, 1), (), tuple(batch[0].shape)]))
    wrong = data.draw(st.sampled_from([torch.zeros(shape), torch.zeros(rows, device="meta"), 1j * torch.zeros(rows)]))
    refused("target", F.value_loss, *batch[:3], wrong, batch[3], 0.1)


@given(logits(), st.data())
def test_logits_that_do_not_fit_are_refused(pair, data):
    policy, vocabulary = pair[0], pair[0].shape[-1]
    other = torch.float64 if policy.dtype != torch.float64 else torch.float32
    wrong = data.draw(
        st.sampled_from([policy.to(other), policy.long(), policy.to("meta"), policy[..., :-1], policy.unsqueeze(0)])
    )
    for function in (F.exact_kl, lambda p, q: F.topk_kl(p, q, 1)):
        refused("ref_logits", function, policy, wrong)
        refused("policy_logits", function, wrong, policy)
        refused("policy_logits", function, policy[..., :0], policy[..., :0])
        refused("policy_logits", function, policy.sum(), policy.sum())
    for number in (0, -1, vocabulary + 1, 1.0, True, None):
        refused("k must", F.topk_kl, *pair, number)
        if number is not None and number != vocabulary + 1:
            refused("chunk_size", F.exact_kl, *pair, chunk_size=number)


@given(st.integers(0, 6), st.data())
def test_outcomes_and_groups_that_do_not_fit_are_refused(size, data):
    outcome, group = torch.zeros(size), ["a"] * size
    channels = data.draw(st.integers(0, 3))
    for baseline in OF_A_BATCH.values():
        refused("outcome", baseline, torch.zeros(size, channels), group)
        refused("outcome", baseline, 1j * outcome, group)
        refused("group", baseline, outcome, [*group, "b"])
        refused("group", baseline, outcome[:0], [["a"]][: size + 1])
        refused("cap", baseline, outcome, group, cap=data.draw(st.sampled_from([float("nan"), "1", 1j])))
        if size:
            refused("group", baseline, outcome, group[1:])
            refused("group must hold hashables", baseline, outcome, [*group[1:], ["a"]])


def test_a_tensor_of_groups_is_taken_by_value():
    """Elements of a tensor hash by identity: as names they would make every sequence a group of its own."""
    outcome = torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(F.group_baseline(outcome, torch.tensor([7, 7, 8])), torch.tensor([0.5, 0.5, 1.0]))


# ---- a batch ---------------------------------------------------------------------------------------------------------


@given(token_batches(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(BASELINES), st.data())
def test_a_batch(batch, lam, baseline, data):
    """compute_batch on anything finite: finite results and metrics, bounded correlation, c_A >= 0."""
    size = batch[0].shape[0]
    assume(size > 0)
    outcome = data.draw(tensors(size, dtype=torch.float32))
    group = data.draw(st.lists(st.sampled_from("ab"), min_size=size, max_size=size))
    is_padding = data.draw(masks(size, 1)).squeeze(1).bool()
    given_prior = {}
    if baseline in WITH_PRIOR:  # which take rewards from 0 to 1
        outcome = (outcome > 0).float()
        number = st.floats(0, 1).map(lambda share: torch.full((size,), share))
        given_prior = {"prior": data.draw(number), "prior_weight": 8 * data.draw(number)}
    result = compute_batch(
        old_log_prob=batch[0], ref_log_prob=batch[1], token_kl=batch[2], response_mask=batch[3], outcome=outcome,
        group=group, config=VimpoConfig(beta=5e-4, baseline=baseline), lam=lam, is_padding=is_padding, **given_prior,
    )  # fmt: skip
    for tensor in (result.advantages, result.returns, result.values):
        assert tensor.shape == batch[0].shape and torch.isfinite(tensor).all()
        assert (tensor[~batch[3].bool() | is_padding.unsqueeze(1)] == 0).all()
    assert result.actor_coeff >= 0 and -1.0001 <= result.metrics["vimpo/outcome_correlation"] <= 1.0001
    assert all(abs(value) < float("inf") for value in result.metrics.values())


@given(token_batches(), st.data())
def test_a_batch_that_does_not_fit_is_refused(batch, data):
    """compute_batch names what does not fit, before anything is computed."""
    rows, columns = batch[0].shape
    assume(rows > 0 and columns > 0)
    good = dict(zip(("old_log_prob", "ref_log_prob", "token_kl", "response_mask"), batch, strict=True), outcome=torch.zeros(rows),
                group=["a"] * rows, is_padding=torch.zeros(rows, dtype=torch.bool), lam=1.0)  # fmt: skip
    wrong = {
        "old_log_prob": ("log_prob", torch.zeros(rows, columns + 1)),
        "ref_log_prob": ("ref_log_prob", torch.zeros(rows, columns + 1)),
        "token_kl": ("token_kl", torch.zeros(rows, columns, dtype=torch.int64)),
        "response_mask": ("response_mask", torch.full((rows, columns), 0.5)),
        "outcome": ("outcome", torch.zeros(rows, 2)),
        "group": ("group", ["a"] * (rows + 1)),
        "is_padding": ("is_padding", torch.zeros(rows + 1, dtype=torch.bool)),
        "lam": ("lam", 1.5),
    }
    name = data.draw(st.sampled_from(sorted(wrong)))
    refused(wrong[name][0], compute_batch, config=VimpoConfig(beta=5e-4), **{**good, name: wrong[name][1]})
