"""Claim: vimpo_verl.pacs is PACS (arXiv 2509.02522): the authors' own function, recorded in reference_vectors/pacs.json,
loss and gradient to 1e-7 (its class weights are float32); its gradient is that of the formula written out, and the same
to 1e-9 for any split of the groups over micro-batches and ranks. Masked tokens never count, nor do padding, order and names.
"""

import json
import math
from itertools import product
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vimpo_verl import pacs

CASES = json.loads((Path(__file__).parent / "reference_vectors/pacs.json").read_text())
EVERY_WAY = list(product(pacs.SCORES, pacs.CLASS_WEIGHTS, pacs.REWARD_METHODS))
GROUPS = ["a", "b", "a", "c", "b", "a", "d", "a", "b", "e", "d"]  # sizes 4, 3, 1, 2, 1, not in order
OUTCOME = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]  # a has both classes, b and d one


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def make_batch(seed=0, length=6):
    """log_prob, old_log_prob, mask with holes; what is masked is NaN. Sequence 4 has no valid token."""
    generator = torch.Generator().manual_seed(seed)
    log_prob, old = (-torch.rand(2, len(GROUPS), length, generator=generator, dtype=torch.float64)).unbind()
    mask = torch.rand(len(GROUPS), length, generator=generator) < 0.7
    mask[4], mask[0, 0] = False, True
    return log_prob.masked_fill(~mask, torch.nan), old.masked_fill(~mask, torch.nan), mask


def loss_and_gradient(log_prob, *rest, **knobs):
    log_prob = log_prob.clone().requires_grad_()
    loss = pacs.pacs_loss(log_prob, *rest, **knobs)
    loss.backward()
    return loss.detach(), log_prob.grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_authors_function(case):
    score = {"rloo": "rloo", "naive": "plain", "grpo": "group_normalised" if case["norm_adv_by_std"] else "dr_grpo"}
    mask = doubles(case["response_mask"])
    loss, gradient = loss_and_gradient(
        doubles(case["log_prob"]),
        doubles(case["old_log_prob"]),
        mask,
        doubles(case["labels"]),
        [i // case["rollout_n"] for i in range(len(case["labels"]))],
        beta=case["beta"],
        score=score[case["adv_estimator"]],
        class_weight=case["weight_mode"] if case["use_weight"] else "off",
        reward_method={"1": "log_ratio", "2": "mean_log_prob"}[case["reward_method"]],
    )
    assert loss.item() == pytest.approx(case["loss"], abs=1e-7)
    recorded = mask * doubles(case["grad_per_sequence"]).unsqueeze(-1)
    torch.testing.assert_close(gradient, recorded, rtol=0, atol=1e-7)


def test_every_recorded_case_is_there():
    assert len(CASES) == 11 and {case["adv_estimator"] for case in CASES} == {"rloo", "grpo", "naive"}


# ---- the formula written out -----------------------------------------------------------------------------------------


def written_out(log_prob, old, mask, outcome, group, beta, score, class_weight, reward_method):
    """L with loops over sequences, from the paper's equations; differentiable by autograd alone."""
    r = []
    for j in range(len(group)):
        tokens = [t for t in range(mask.shape[1]) if mask[j, t]]
        terms = [log_prob[j, t] - (old[j, t] if reward_method == "log_ratio" else 0.0) for t in tokens]
        total = sum(terms) if terms else log_prob.new_zeros(())
        r.append(beta * total / (max(len(tokens), 1) if reward_method == "mean_log_prob" else 1))
    losses = []
    for j, name in enumerate(group):
        members = [i for i, other in enumerate(group) if other == name]
        n, mean = len(members), sum(r[i] for i in members) / len(members)
        if score == "plain":
            psi = r[j]
        elif n == 1:
            psi = torch.zeros_like(r[j])
        elif score == "rloo":
            psi = r[j] - sum(r[i] for i in members if i != j) / (n - 1)
        elif score == "dr_grpo":
            psi = r[j] - mean
        else:
            psi = (r[j] - mean) / ((sum((r[i] - mean) ** 2 for i in members) / (n - 1)).sqrt() + 1e-6)
        of_class = sum(bool(outcome[i] == outcome[j]) for i in members)
        weight = n / (2 * of_class) if class_weight == "question" and of_class < n else 1.0
        if class_weight in ("only_positive", "only_negative"):
            weight = float(outcome[j] == (class_weight == "only_positive"))
        probability = 1 / (1 + torch.exp(-psi))
        losses.append(-weight * torch.log(probability if outcome[j] == 1 else 1 - probability))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("score, class_weight, reward_method", EVERY_WAY)
def test_loss_and_gradient_are_those_of_the_formula(score, class_weight, reward_method):
    log_prob, old, mask = make_batch()
    outcome = doubles(OUTCOME)
    words = {"score": score, "class_weight": class_weight, "reward_method": reward_method}
    loss, gradient = loss_and_gradient(log_prob, old, mask, outcome, GROUPS, beta=0.7, **words)
    free = log_prob.clone().requires_grad_()
    expected = written_out(free, old, mask, outcome, GROUPS, 0.7, **words)
    (expected_gradient,) = torch.autograd.grad(expected, free)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert (gradient[mask] != 0).any() and (gradient[~mask] == 0).all()


def test_masked_values_never_count():
    log_prob, old, mask = make_batch()
    rest = (doubles(OUTCOME), GROUPS)
    with_nan = loss_and_gradient(log_prob, old, mask, *rest)
    with_numbers = loss_and_gradient(log_prob.nan_to_num(7.0), old.nan_to_num(-3.0), mask, *rest)
    assert all(torch.equal(a, b) for a, b in zip(with_nan, with_numbers, strict=True))
    assert torch.isfinite(with_nan[0]) and torch.isfinite(with_nan[1]).all()


def test_first_update_of_a_step_is_rloo_and_weighted_has_the_balanced_advantage():
    """At r = 0 (the note's consequence): -dL/dr is (y - mean of the others) / N, weighted (y - p) / (4 p (1 - p) N)."""
    outcome, group = doubles([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), ["a"] * 4 + ["b"] * 2
    zeros = torch.zeros(6, dtype=torch.float64)
    plain = pacs.score_coefficients(zeros, outcome, group, class_weight="off").coefficients
    rloo = doubles([1.0, -1 / 3, -1 / 3, -1 / 3, 0.0, 0.0])
    torch.testing.assert_close(-plain, rloo / 6, rtol=0, atol=1e-15)
    weighted = pacs.score_coefficients(zeros, outcome, group, score="dr_grpo").coefficients
    balanced = doubles([0.75, -0.25, -0.25, -0.25, 0.0, 0.0]) / (0.25 * 0.75)
    torch.testing.assert_close(-weighted, balanced / (4 * 6), rtol=0, atol=1e-15)


def test_a_group_of_one_class_has_a_gradient_once_the_policy_has_moved():
    outcome, group = doubles([1.0, 1.0]), ["a", "a"]
    assert (pacs.score_coefficients(doubles([0.0, 0.0]), outcome, group).coefficients == 0).all()
    assert (pacs.score_coefficients(doubles([0.5, -0.5]), outcome, group).coefficients != 0).all()


def test_group_normalised_divides_by_the_epsilon_alone_in_the_first_update():
    """What the page warns of: the published formula's gradient is that of dr_grpo times 1e6 while all r are equal."""
    outcome, group, r = doubles([1.0, 0.0, 0.0]), ["a"] * 3, torch.zeros(3, dtype=torch.float64)
    found = pacs.score_coefficients(r, outcome, group, score="group_normalised").coefficients
    torch.testing.assert_close(found, 1e6 * pacs.score_coefficients(r, outcome, group, score="dr_grpo").coefficients)


# ---- parts of a mini-batch -------------------------------------------------------------------------------------------


def gradient_in_parts(parts, log_prob, old, mask, outcome, group, *, beta, reward_method, **words):
    """As a trainer does it: r of every part without gradient, one number a sequence exchanged, then part by part."""
    knobs = {"beta": beta, "reward_method": reward_method}
    r = torch.full((len(group),), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        for rows in parts:
            r[rows] = pacs.reward_proxy(log_prob[rows], old[rows], mask[rows], **knobs)
    terms = pacs.score_coefficients(r, outcome, group, **words)
    free = log_prob.clone().requires_grad_()
    for rows in parts:
        part = pacs.reward_proxy(free[rows], old[rows], mask[rows], **knobs)
        pacs.surrogate(terms.coefficients[rows], part).backward()
    return terms.losses.mean(), free.grad


@settings(max_examples=10)  # for each way
@pytest.mark.parametrize("score, class_weight, reward_method", EVERY_WAY)
@given(seed=st.integers(0, 1000), data=st.data())
def test_any_split_over_micro_batches(score, class_weight, reward_method, seed, data):
    batch = (*make_batch(seed), doubles(OUTCOME), GROUPS)
    words = {"score": score, "class_weight": class_weight, "reward_method": reward_method, "beta": 1.3}
    part_of = data.draw(st.lists(st.integers(0, 4), min_size=len(GROUPS), max_size=len(GROUPS)))
    parts = [[i for i, part in enumerate(part_of) if part == number] for number in set(part_of)]
    for found, expected in zip(
        gradient_in_parts(parts, *batch, **words), loss_and_gradient(*batch, **words), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", pacs.SCORES)
def test_two_ranks_with_a_parameter_in_common(score):
    """Every group split over both ranks: each gathers all r, backpropagates its own, and the gradients are summed."""
    features, old, mask = make_batch(3)
    features, outcome = features.nan_to_num(9.0), doubles(OUTCOME)
    weight = doubles(0.8).requires_grad_()
    whole = pacs.pacs_loss(torch.sin(weight * features), old, mask, outcome, GROUPS, score=score)
    (expected,) = torch.autograd.grad(whole, weight)

    ranks, gradients = [list(range(0, len(GROUPS), 2)), list(range(1, len(GROUPS), 2))], []
    own = [pacs.reward_proxy(torch.sin(weight * features[rows]), old[rows], mask[rows]) for rows in ranks]
    gathered = torch.cat(own).detach()
    order = [i for rows in ranks for i in rows]
    terms = pacs.score_coefficients(gathered, outcome[order], [GROUPS[i] for i in order], score=score)
    for rank, coefficients in enumerate(terms.coefficients.split([len(rows) for rows in ranks])):
        gradients.extend(torch.autograd.grad(pacs.surrogate(coefficients, own[rank]), weight))
    assert sum(gradients).item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    assert abs(expected.item()) > 1e-3


# ---- invariances, dtypes, what does not fit --------------------------------------------------------------------------


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), way=st.sampled_from(EVERY_WAY), extra=st.integers(0, 3), data=st.data())
def test_padding_order_and_names_change_nothing(seed, way, extra, data):
    log_prob, old, mask = make_batch(seed)
    words = dict(zip(("score", "class_weight", "reward_method"), way, strict=True))
    loss, gradient = loss_and_gradient(log_prob, old, mask, doubles(OUTCOME), GROUPS, **words)
    order = data.draw(st.permutations(range(len(GROUPS))))
    names = dict(zip("abcde", data.draw(st.permutations([("uid", 1), 2, "x", None, 5.5])), strict=True))
    front = data.draw(st.booleans())
    columns = (extra, 0) if front else (0, extra)
    padded = [
        torch.nn.functional.pad(x[order], columns, value=v) for x, v in ((log_prob, torch.nan), (old, 1e3), (mask, 0))
    ]
    found, moved = loss_and_gradient(*padded, doubles(OUTCOME)[order], [names[GROUPS[i]] for i in order], **words)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
    kept = moved[:, extra:] if front else moved[:, : moved.shape[1] - extra]
    torch.testing.assert_close(kept, gradient[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    log_prob, old, mask = make_batch()
    log_prob, old = log_prob.to(dtype), old.to(dtype)
    loss, gradient = loss_and_gradient(log_prob, old, mask, torch.tensor(OUTCOME), GROUPS)
    expected, _ = loss_and_gradient(log_prob.double(), old.double(), mask, doubles(OUTCOME), GROUPS)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_sequences():
    empty = torch.zeros(0, 3)
    loss, gradient = loss_and_gradient(empty, empty, empty, torch.zeros(0), [])
    assert loss.item() == 0.0 and gradient.shape == (0, 3)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"outcome": torch.full((11,), 0.5)}, "outcome must hold rewards of 0 and 1 only"),
        ({"outcome": torch.full((11,), -1.0)}, "outcome must hold rewards of 0 and 1 only"),
        ({"outcome": torch.full((11,), math.nan)}, "outcome must hold rewards of 0 and 1 only"),
        ({"outcome": torch.zeros(11, 1)}, "outcome must be"),
        ({"outcome": torch.zeros(10)}, "group"),
        ({"group": GROUPS[1:]}, "group"),
        ({"group": [["a"]] * 11}, "group must hold hashables"),
        ({"response_mask": torch.full((11, 6), 0.5)}, "response_mask must hold 0 and 1 only"),
        ({"response_mask": torch.ones(11, 5)}, "response_mask"),
        ({"old_log_prob": torch.zeros(11, 5)}, "old_log_prob"),
        ({"log_prob": torch.zeros(11, 6, dtype=torch.long)}, "log_prob must be of a float dtype"),
        ({"beta": 0.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"score": "grpo"}, "unknown score 'grpo': choose one of rloo"),
        ({"class_weight": "batch"}, "unknown class_weight 'batch'"),
        ({"reward_method": "1"}, "unknown reward_method '1'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, named):
    log_prob, old, mask = make_batch()
    fitting = {
        "log_prob": log_prob, "old_log_prob": old, "response_mask": mask, "outcome": doubles(OUTCOME), "group": GROUPS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=named):
        pacs.pacs_loss(**{**fitting, **changed})


def test_parts_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"r must be \[N\]"):
        pacs.score_coefficients(torch.zeros(3), torch.zeros(2), ["a", "a"])
    with pytest.raises(ValueError, match="r must be of a float dtype"):
        pacs.score_coefficients(torch.zeros(2, dtype=torch.long), torch.zeros(2), ["a", "a"])
    with pytest.raises(ValueError, match="coefficients and r"):
        pacs.surrogate(torch.zeros(3), torch.zeros(2))
