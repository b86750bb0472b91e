"""Claim: every baseline of vimpo_verl.baselines is its formula, worked by hand or written out with loops in float64; its
degenerate cases are as its text says; and what algorithm.vimpo.baseline takes reaches the targets, without placeholders.
"""

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vimpo_verl import baselines
from vimpo_verl import functional as F
from vimpo_verl.batch import compute_batch
from vimpo_verl.config import BASELINES, VimpoConfig

ROOT = Path(__file__).parent.parent


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, doubles(expected), rtol=0, atol=atol)


rewards_and_groups = st.lists(
    st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), st.sampled_from("abcd")), min_size=1, max_size=14
).map(lambda members: ([reward for reward, _ in members], [name for _, name in members]))


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_knob_takes_what_needs_only_the_batch_or_a_prior():
    assert (*baselines.OF_A_BATCH, *baselines.WITH_PRIOR) == BASELINES
    assert set(baselines.TABLE) == {
        "group_mean", "leave_one_out", "capped", "soft", "shrunk", "fused", "posterior_mean"
    }  # fmt: skip


def test_the_names_of_the_contract_are_the_tables():
    assert baselines.TABLE["group_mean"].function is F.group_baseline
    assert baselines.TABLE["leave_one_out"].function is F.leave_one_out_baseline


@given(rewards_and_groups, st.randoms())
def test_order_and_names_change_nothing(members, random):
    outcome, group = members
    size = len(outcome)
    extra = {"cap": 0.6, "beta": 0.3}
    extra.update({name: torch.rand(size, dtype=torch.float64) for name in ("sequence_kl", "prior", "a", "b")})
    order = random.sample(range(size), size)
    for row in baselines.TABLE.values():
        needed = {name: extra[name] for name in row.needs}
        moved = {name: value[order] if torch.is_tensor(value) else value for name, value in needed.items()}
        expected = row.function(doubles(outcome), group, **needed)
        found = row.function(doubles(outcome)[order], [("uid", group[i]) for i in order], **moved)
        assert found.shape == (size,) and torch.isfinite(found).all()
        torch.testing.assert_close(found, expected[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["group_mean", "leave_one_out", "capped", "shrunk"])
def test_constant_rewards_give_that_constant(name):
    needed = {"cap": 2.0} if name == "capped" else {}
    found = baselines.TABLE[name].function(torch.full((5,), 0.75), ["a", "a", "b", "b", "c"], **needed)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((5,), 0.75), rtol=0, atol=0)


# ---- capped, soft ----------------------------------------------------------------------------------------------------


def test_capped():
    assert_close(baselines.capped_baseline(doubles([1, 1, 0, 1]), ["a", "a", "b", "b"], 0.6), [0.6, 0.6, 0.5, 0.5])
    with pytest.raises(ValueError, match="cap must be a number"):
        baselines.capped_baseline(doubles([1.0]), ["a"], None)


def test_soft():
    """b: (0 - 0.1 * 1 + 1 - 0.1 * 3) / 2 = 0.3; a group of one: 1 - 0.1 * 2."""
    found = baselines.soft_baseline(doubles([1, 0, 1]), ["a", "b", "b"], doubles([2, 1, 3]), 0.1)
    assert_close(found, [0.8, 0.3, 0.3])
    with pytest.raises(ValueError, match="sequence_kl must be"):
        baselines.soft_baseline(doubles([1, 0]), ["a", "b"], doubles([1]), 0.1)
    with pytest.raises(ValueError, match="beta"):
        baselines.soft_baseline(doubles([1]), ["a"], doubles([1]), 0.0)


def test_soft_counts_the_kl_twice_beside_kappa():
    """Why the knob does not take it: at the reference's own answer to V0, S = 0, the targets' mean is beta * KL, not 0."""
    outcome, group, kl = doubles([1, 0, 1, 0]), ["a"] * 4, doubles([2.0, 4.0, 6.0, 8.0])
    assert (outcome - baselines.soft_baseline(outcome, group, kl, 0.1)).mean().item() == pytest.approx(0.1 * 5.0)
    assert (outcome - F.group_baseline(outcome, group)).mean().item() == pytest.approx(0.0)


# ---- shrunk ----------------------------------------------------------------------------------------------------------


def shrunk_written_out(outcome, group):
    """The formula with loops and the standard library's statistics."""
    prompts = {name: [r for r, g in zip(outcome, group, strict=True) if g == name] for name in group}
    found = []
    for reward, name in zip(outcome, group, strict=True):
        own, others = prompts[name], [rewards for other, rewards in prompts.items() if other != name]
        own_mean = (sum(own) - reward) / (len(own) - 1) if len(own) > 1 else reward
        if not others:
            found.append(own_mean)
            continue
        means = [statistics.fmean(rewards) for rewards in others]
        noises = [statistics.variance(rewards) / len(rewards) for rewards in others if len(rewards) > 1]
        v = statistics.fmean(noises) if noises else 0.0
        s = statistics.pvariance(means)
        weight = v / (v + s + 1e-6) if len(own) > 1 else 1.0
        found.append((1 - weight) * own_mean + weight * statistics.fmean(means))
    return found


@settings(max_examples=100)
@given(rewards_and_groups)
def test_shrunk_is_its_formula(members):
    assert_close(baselines.shrunk_baseline(doubles(members[0]), members[1]), shrunk_written_out(*members), atol=1e-9)


def test_shrunk_by_hand():
    """For prompt a, the others: means 1/2 and 1, v = (1/4 + 0) / 2, s = 1/16: l = 2/3 up to the epsilon, towards 3/4."""
    outcome, group = doubles([1, 0, 0, 1, 1, 1]), ["a", "a", "b", "b", "c", "c"]
    found = baselines.shrunk_baseline(outcome, group)
    assert_close(found[:2], [(0 + 2 * 0.75) / 3, (1 + 2 * 0.75) / 3], atol=1e-5)
    assert found[0].item() != pytest.approx(0.5, abs=1e-9)  # the epsilon is there


def test_shrunk_to_what():
    """Two prompts: all the way, where the other's rewards vary. One: leave-one-out. Prompts with one answer: the others."""
    assert_close(baselines.shrunk_baseline(doubles([1, 0, 1, 1]), list("aabb")), [0, 1, 0.5, 0.5], atol=1e-5)
    assert_close(baselines.shrunk_baseline(doubles([1, 0, 1]), list("aaa")), [0.5, 1, 0.5])
    assert_close(baselines.shrunk_baseline(doubles([1, 0, 1]), list("abc")), [0.5, 1, 0.5])
    assert_close(baselines.shrunk_baseline(doubles([0.3]), ["a"]), [0.3])
    assert baselines.shrunk_baseline(torch.zeros(0), []).shape == (0,)


def test_shrunk_never_reads_the_reward_that_it_is_for():
    outcome, group = doubles([1, 0, 1, 0, 1, 1, 0, 0, 1]), list("aaabbbccc")
    before = baselines.shrunk_baseline(outcome, group)
    for i in range(9):
        changed = outcome.clone()
        changed[i] = 7.0
        assert baselines.shrunk_baseline(changed, group)[i].item() == pytest.approx(before[i].item(), abs=1e-12)


def test_shrunk_cap():
    found = baselines.shrunk_baseline(doubles([1, 1, 1, 0]), list("aabb"), cap=0.4)
    assert (found <= 0.4).all() and (baselines.shrunk_baseline(doubles([1, 1]), list("aa"), cap=0.4) == 0.4).all()


# ---- fused -----------------------------------------------------------------------------------------------------------

WORKED = [  # k, successes, prior, baseline: the numbers of the published rule in rewards 0/1
    (4, 4, 0.5, 0.875),
    (4, 0, 0.9, 0.069444),
    (8, 2, 0.6, 0.339286),
    (16, 3, 0.8, 0.213010),
    (4, 1, 0.5, 0.5),
]


@pytest.mark.parametrize("k, successes, prior, expected", WORKED)
def test_fused_worked_numbers(k, successes, prior, expected):
    outcome = doubles([1.0] * successes + [0.0] * (k - successes))
    found = baselines.fused_baseline(outcome, ["a"] * k, torch.full((k,), prior, dtype=torch.float64))
    assert_close(found, [expected] * k, atol=1e-6)


def test_fused_of_groups_of_unequal_size():
    sizes = [row[0] for row in WORKED]
    outcome = [reward for k, right, _, _ in WORKED for reward in [1.0] * right + [0.0] * (k - right)]
    group = [number for number, k in enumerate(sizes) for _ in range(k)]
    prior = [row[2] for row, k in zip(WORKED, sizes, strict=True) for _ in range(k)]
    expected = [row[3] for row, k in zip(WORKED, sizes, strict=True) for _ in range(k)]
    assert_close(baselines.fused_baseline(doubles(outcome), group, doubles(prior)), expected, atol=1e-6)


def test_fused_is_the_papers_rule_in_rewards_of_minus_one_and_one():
    """The same with V, vbar in -1..1 and 1/k, as published; ours is its image under (x + 1) / 2."""
    for k, mean, prior in [(4, 0.75, 0.1), (8, 0.5, 0.9), (5, 0.2, 0.3), (1, 1.0, 0.0)]:
        vbar, v = 2 * mean - 1, 2 * prior - 1
        wrong = max(0.0, (vbar - v) ** 2 - 1 / k)
        w = wrong / (wrong + 1 / k)
        expected = (w * vbar + (1 - w) * v + 1) / 2
        outcome = torch.full((k,), mean, dtype=torch.float64)
        found = baselines.fused_baseline(outcome, [0] * k, torch.full((k,), prior, dtype=torch.float64))
        assert_close(found, [expected] * k)


def test_fused_group_of_one_follows_its_prior_up_to_a_distance_of_one_half():
    assert_close(baselines.fused_baseline(doubles([1, 1]), ["a", "b"], doubles([0.5, 0.6])), [0.5, 0.6])
    assert baselines.fused_baseline(doubles([1]), ["a"], doubles([0.4])).item() > 0.4


@pytest.mark.parametrize(
    "outcome, prior, named",
    [
        ([1, -1], [0.5, 0.5], "outcome must be from 0 to 1, got -1"),
        ([1, math.nan], [0.5, 0.5], "outcome must be from 0 to 1, got nan"),
        ([1, 0], [0.5, 1.5], "prior must be from 0 to 1, got 1.5"),
        ([1, 0], [0.5], r"prior must be \[2\]"),
    ],
)
def test_fused_refuses_by_name(outcome, prior, named):
    with pytest.raises(ValueError, match=named):
        baselines.fused_baseline(doubles(outcome), ["a", "a"], doubles(prior))


# ---- rollouts on demand ----------------------------------------------------------------------------------------------


def test_budget_rule_is_the_papers():
    """In rewards of -1 and +1: R(k) = w^2 / k + (1 - w)^2 D + c k at the best w, one more while R falls, c = 1/16^2."""
    for k in range(4, 16):
        for mean, prior in [(0.5, 0.5), (0.75, 0.25), (1.0, 0.0), (0.0, 0.6), (0.25, 0.7)]:
            wrong = max(0.0, (2 * mean - 2 * prior) ** 2 - 1 / k)

            def risk(count, wrong=wrong):
                w = wrong / (wrong + 1 / count)
                return w**2 / count + (1 - w) ** 2 * wrong + count / 256

            found = baselines.wants_another_rollout(doubles([mean]), doubles([prior]), k)
            assert found.item() == (risk(k + 1) < risk(k)), (k, mean, prior)


def test_budget_is_from_4_to_16():
    right, wrong = doubles([0.5]), doubles([0.0])
    assert baselines.wants_another_rollout(right, right, 3).all()
    assert not baselines.wants_another_rollout(right, right, 4).any()
    assert baselines.wants_another_rollout(doubles([1.0]), wrong, 15).all()
    assert not baselines.wants_another_rollout(doubles([1.0]), wrong, 16).any()
    with pytest.raises(ValueError, match="rollouts must be 1 or more"):
        baselines.wants_another_rollout(right, wrong, 0)


# ---- posterior mean --------------------------------------------------------------------------------------------------


def test_posterior_mean_by_hand():
    """(3 + 2) / (3 + 1 + 4); a group of one; no prior is the group mean."""
    found = baselines.posterior_mean_baseline(doubles([1, 1, 0, 0]), ["a"] * 4, doubles([3] * 4), doubles([1] * 4))
    assert_close(found, [5 / 8] * 4)
    assert_close(baselines.posterior_mean_baseline(doubles([1]), ["a"], doubles([1]), doubles([1])), [2 / 3])
    outcome, none = doubles([1, 0, 0, 1]), doubles([0] * 4)
    assert_close(baselines.posterior_mean_baseline(outcome, list("aaab"), none, none), [1 / 3, 1 / 3, 1 / 3, 1])


def test_discounted_past_by_hand():
    """Two visits, one and three steps ago, at 1/2 a step: a = 1 + 2/2 + 4/8, b = 1 + 2/2 + 0; a prompt never seen."""
    a, b = baselines.discounted_past(
        doubles([[2, 4], [0, 0]]), doubles([[2, 0], [0, 0]]), doubles([[1, 3], [0, 0]]), discount=0.5
    )
    assert_close(a, [2.5, 1.0])
    assert_close(b, [2.0, 1.0])


@pytest.mark.parametrize("discount", [0.0, 1.5, math.nan])
def test_discount_out_of_range_is_refused(discount):
    with pytest.raises(ValueError, match="discount"):
        baselines.discounted_past(doubles([1]), doubles([1]), doubles([1]), discount=discount)


def test_past_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        baselines.discounted_past(doubles([1]), doubles([1, 2]), doubles([1]), discount=1.0)
    with pytest.raises(ValueError, match="failures must hold"):
        baselines.discounted_past(doubles([1]), doubles([-1]), doubles([1]), discount=1.0)
    with pytest.raises(ValueError, match="b must hold"):
        baselines.posterior_mean_baseline(doubles([1]), ["a"], doubles([1]), doubles([math.inf]))


# ---- the benchmark and its page --------------------------------------------------------------------------------------


def exact_error(k, rate, prior):
    """E of (fused - rate)^2 over the k + 1 numbers of successes."""
    total = 0.0
    for successes in range(k + 1):
        outcome = doubles([1.0] * successes + [0.0] * (k - successes))
        fused = baselines.fused_baseline(outcome, [0] * k, torch.full((k,), prior, dtype=torch.float64))[0].item()
        total += math.comb(k, successes) * rate**successes * (1 - rate) ** (k - successes) * (fused - rate) ** 2
    return total


def test_the_stored_figures_are_those_of_the_exact_sums():
    """And the published rule loses to the mean of the same four rewards where the prior is moderately wrong."""
    stored = json.loads((ROOT / "benchmarks/results/baselines.json").read_text())["budget"]
    for row in stored:
        exact = exact_error(4, row["rate"], row["prior"])
        assert row["fused of 4"] == pytest.approx(exact, rel=0.05)
        assert row["mean of 4"] == pytest.approx(row["rate"] * (1 - row["rate"]) / 4, rel=0.05)
        assert (exact > row["mean of 4"]) == ((row["rate"], row["prior"]) in {(0.1, 0.35), (0.7, 0.2), (0.9, 0.65)})


def exact_budget(rate, prior):
    """Expected rollouts, and errors of the fused baseline and of the plain mean of them, over every way the rewards may fall.

    The rule and the baseline in rewards of -1 and +1, as published; errors of rewards 0 and 1 are a quarter.
    """
    state, expected = {(0, 0): 1.0}, [0.0, 0.0, 0.0]
    for k in range(17):
        after: dict[tuple[int, int], float] = {}
        for (_, right), chance in state.items():
            if k >= 4:
                vbar, v = 2 * right / k - 1, 2 * prior - 1
                wrong = max(0.0, (vbar - v) ** 2 - 1 / k)
                gain = wrong / (1 + k * wrong) - wrong / (1 + (k + 1) * wrong)
                if k == 16 or gain <= 1 / 256:
                    w = wrong / (wrong + 1 / k)
                    fused = w * vbar + (1 - w) * v
                    for i, value in enumerate((k, (fused - 2 * rate + 1) ** 2 / 4, (right / k - rate) ** 2)):
                        expected[i] += chance * value
                    continue
            for reward, share in ((1, rate), (0, 1 - rate)):
                after[k + 1, right + reward] = after.get((k + 1, right + reward), 0.0) + chance * share
        state = after
    return expected


def test_the_stored_budget_is_that_of_every_way_the_rewards_may_fall():
    stored = json.loads((ROOT / "benchmarks/results/baselines.json").read_text())
    grid = {(row["rate"], round(abs(row["prior"] - row["rate"]), 6)) for row in stored["budget_grid"]}
    assert grid == {(rate, error) for rate in (0.1, 0.3, 0.5, 0.7, 0.9) for error in (0.0, 0.1, 0.25, 0.5)}
    for row in stored["budget"] + stored["budget_grid"]:
        taken, fused, mean = exact_budget(row["rate"], row["prior"])
        assert row["rollouts taken"] == pytest.approx(taken, rel=0.02)
        assert row["fused of these"] == pytest.approx(fused, rel=0.15, abs=3e-4), row
        assert row["mean of these"] == pytest.approx(mean, rel=0.05), row


def test_the_page_names_every_baseline_and_which_the_knob_takes():
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]+ \|$", (ROOT / "docs/algorithms.md").read_text(), flags=re.MULTILINE
    )
    taken = {name: knob.startswith("yes") for name, knob in rows if name in baselines.TABLE}
    assert taken == {name: name in BASELINES for name in baselines.TABLE}


def test_the_page_shows_the_stored_figures():
    stored = json.loads((ROOT / "benchmarks/results/baselines.json").read_text())["budget"]
    page = (ROOT / "docs/algorithms.md").read_text()
    table = page.split("| rate | prior | mean of 4")[1].split("\n\n")[0]
    shown = [[float(cell) for cell in re.findall(r"[\d.]+", line)] for line in table.splitlines()[2:]]
    names = list(stored[0])
    expected = [[round(row[name], 1 if name == "rollouts taken" else 4) for name in names] for row in stored]
    assert shown == expected


# ---- in VIMPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("cap", [None, 0.4])
def test_targets_are_rewards_above_the_baseline_and_placeholders_count_nowhere(name, cap):
    """A placeholder bears the name of a real prompt and a reward; the baselines are those of the batch without it."""
    outcome, group = doubles([1, 0, 1, 0, 0, 1, 1]), list("aabbbcc")
    is_padding = torch.zeros(9, dtype=torch.bool)
    is_padding[[2, 8]] = True
    padded = torch.zeros(9, dtype=torch.float64)
    padded[is_padding], padded[~is_padding] = 5.0, outcome
    names = ["b"] * 9
    for position, prompt in zip((~is_padding).nonzero().flatten().tolist(), group, strict=True):
        names[position] = prompt
    zeros = torch.zeros(9, 3, dtype=torch.float64)
    prior, weight = torch.full((9,), 0.9, dtype=torch.float64), torch.full((9,), 3.0, dtype=torch.float64)
    batch = compute_batch(
        old_log_prob=zeros, ref_log_prob=zeros, token_kl=zeros, response_mask=torch.ones(9, 3), outcome=padded,
        group=names, config=replace(VimpoConfig(), baseline=name, baseline_cap=cap), lam=1.0, is_padding=is_padding,
        prior=prior, prior_weight=weight,
    )  # fmt: skip
    if name == "fused":
        v0 = baselines.fused_baseline(outcome, group, prior[:7])
    elif name == "posterior_mean":
        v0 = baselines.posterior_mean_baseline(outcome, group, weight[:7] * 0.9, weight[:7] * 0.1)
    else:
        v0 = baselines.OF_A_BATCH[name](outcome, group)
    target = outcome - (v0 if cap is None else v0.clamp(max=cap))
    torch.testing.assert_close(batch.returns[~is_padding], target.unsqueeze(-1).expand(-1, 3), rtol=0, atol=1e-12)
    assert (batch.returns[is_padding] == 0).all()


@pytest.mark.parametrize("name", baselines.WITH_PRIOR)
def test_a_baseline_with_a_prior_is_refused_without_one(name):
    with pytest.raises(ValueError, match=f"the baseline {name} needs a prior"):
        baselines.baseline_of(name, doubles([1, 0]), ["a", "a"])


def test_the_budgets_bounds_and_cost_are_the_papers_or_given():
    """c = 1 / maximum^2 in rewards of -1 and +1: with k(k + 1) < maximum^2 / (what the prior is wrong by), one more."""
    far, prior = doubles([1.0]), doubles([0.0])
    for least, most in ((4, 16), (2, 8), (8, 8)):
        wanted = [
            baselines.wants_another_rollout(far, prior, k, minimum=least, maximum=most).item() for k in range(1, 17)
        ]
        assert wanted == [k < most for k in range(1, 17)], "a prior that is as wrong as can be takes them all"
    assert not baselines.wants_another_rollout(far, prior, 8, cost=0.01).item()
    assert baselines.wants_another_rollout(far, prior, 8, cost=0.001).item()
