"""Claim: what is computed once a batch equals loops in float64, and placeholder samples count nowhere.

Advantages, returns, values, c_A, and every metric; independent of the order of samples; groups of different size, empty
responses, constant rewards. Beside the three results [B, T] it takes no memory of the batch's size.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vimpo_verl.batch as batch_module
from vimpo_verl.batch import compute_batch, compute_targets, outcome_auc, outcome_correlation
from vimpo_verl.config import VimpoConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

LENGTH = 7
GROUPS = ["a", "b", "a", "a", "b", "single", "constant", "constant"]
OUTCOME = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
CONFIG = VimpoConfig(beta=0.1)


def make_inputs(seed=0):
    """Eight samples of ragged length in mixed order, the last without a valid token, the first with a hole."""
    generator = torch.Generator().manual_seed(seed)
    log_prob, ref_log_prob, kl = (torch.randn(8, LENGTH, generator=generator, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([7, 3, 5, 1, 6, 4, 2, 0])
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    mask[0, 2:4] = 0
    return {
        "old_log_prob": log_prob, "ref_log_prob": ref_log_prob, "token_kl": kl.abs(), "response_mask": mask,
        "outcome": OUTCOME, "group": GROUPS,
    }  # fmt: skip


def compute(inputs, config=CONFIG, lam=0.9, is_padding=None):
    return compute_batch(**inputs, config=config, lam=lam, is_padding=is_padding)


def loops(inputs, config=CONFIG, lam=0.9):
    """Everything again, with loops over samples and tokens."""
    mask = inputs["response_mask"]
    found = {name: torch.zeros(8, LENGTH, dtype=torch.float64) for name in ("raw", "values", "returns")}
    sums, targets = [], []
    for i in range(8):
        members = [j for j in range(8) if GROUPS[j] == GROUPS[i]]
        if config.baseline == "leave_one_out" and len(members) > 1:
            members.remove(i)
        baseline = sum(OUTCOME[j].item() for j in members) / len(members)
        baseline = baseline if config.baseline_cap is None else min(baseline, config.baseline_cap)
        advantage = value = 0.0
        for t in reversed(range(LENGTH)):
            if mask[i, t]:
                log_ratio = inputs["old_log_prob"][i, t].item() - inputs["ref_log_prob"][i, t].item()
                td = config.beta * (log_ratio - inputs["token_kl"][i, t].item())
                advantage, value = td + lam * advantage, value - td
                found["raw"][i, t], found["values"][i, t] = advantage, value
                found["returns"][i, t] = OUTCOME[i].item() - baseline
        sums.append(-value)
        targets.append(OUTCOME[i].item() - baseline)
    return {**found, "sums": sums, "targets": targets}


def loop_metrics(inputs, expected):
    mask = inputs["response_mask"]
    lengths = [int(row.sum()) for row in mask]
    tokens = sum(lengths)
    residuals = [s - t for s, t in zip(expected["sums"], expected["targets"], strict=True)]
    judged = [i for i in range(8) if lengths[i]]  # S = 0 of a sequence without a valid token is no judgement

    def centred(values):
        means = {g: _mean([values[i] for i in judged if GROUPS[i] == g]) for g in {GROUPS[i] for i in judged}}
        return [values[i] - means[GROUPS[i]] for i in judged]

    s, r = centred(expected["sums"]), centred(OUTCOME.tolist())
    pairs = [(i, j) for i in judged for j in judged if GROUPS[i] == GROUPS[j] and OUTCOME[i] > OUTCOME[j]]
    won = sum(1.0 if expected["sums"][i] > expected["sums"][j] else 0.0 for i, j in pairs)
    raw = [expected["raw"][i, t].item() for i in range(8) for t in range(LENGTH) if mask[i, t]]
    return {
        "vimpo/kl": _mean([inputs["token_kl"][i, t].item() for i in range(8) for t in range(LENGTH) if mask[i, t]]),
        "vimpo/residual_rms": math.sqrt(sum(n * x * x for n, x in zip(lengths, residuals, strict=True)) / tokens),
        "vimpo/target_rms": math.sqrt(sum(n * x * x for n, x in zip(lengths, expected["targets"], strict=True)) / tokens),
        "vimpo/advantage_mean": _mean(raw),
        "vimpo/advantage_std": math.sqrt(sum((a - _mean(raw)) ** 2 for a in raw) / (len(raw) - 1)),
        "vimpo/outcome_correlation": _dot(s, r) / math.sqrt(_dot(s, s) * _dot(r, r)),
        "vimpo/value_explained_variance": 1
        - _variance([residuals[i] for i in judged]) / _variance([expected["targets"][i] for i in judged]),
        "vimpo/outcome_auc": won / len(pairs),
        "vimpo/beta_fit": _fit(inputs, expected),
    }, tokens / 8  # fmt: skip


def _fit(inputs, expected):
    """sum_i G_i target_i / sum_i G_i^2 with G_i = sum_t log-ratio - KL, from the inputs."""
    mask = inputs["response_mask"].double()
    per_token = (inputs["old_log_prob"] - inputs["ref_log_prob"] - inputs["token_kl"]) * mask
    nats = per_token.sum(-1).tolist()
    return _dot(nats, expected["targets"]) / _dot(nats, nats)


def _mean(values):
    return sum(values) / len(values)


def _variance(values):
    return _mean([(v - _mean(values)) ** 2 for v in values])


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


CONFIGS = {
    "defaults": CONFIG,
    "leave one out": replace(CONFIG, baseline="leave_one_out"),
    "capped": replace(CONFIG, baseline_cap=0.4),
    "raw advantages": replace(CONFIG, whiten=False, actor_coeff=0.1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_tensors(config, lam):
    inputs = make_inputs()
    batch, expected = compute(inputs, config, lam), loops(inputs, config, lam)
    advantages, valid = expected["raw"], inputs["response_mask"].bool()
    if config.whiten:
        mean, std = advantages[valid].mean(), (advantages[valid].var() + 1e-8).sqrt()
        advantages = torch.where(valid, (advantages - mean) / std, 0.0)
    torch.testing.assert_close(batch.advantages, advantages, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(batch.values, expected["values"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(batch.returns, expected["returns"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", [CONFIGS["defaults"], CONFIGS["leave one out"]], ids=["mean", "leave one out"])
def test_metrics(config):
    inputs = make_inputs()
    batch = compute(inputs, config)
    expected, _ = loop_metrics(inputs, loops(inputs, config))
    assert set(batch.metrics) == set(expected) | {"vimpo/actor_coeff", "vimpo/beta"}
    assert batch.metrics["vimpo/beta"] == batch.beta.value == config.beta
    for name, value in expected.items():
        assert batch.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("seed", range(6))
def test_actor_coeff(seed):
    """alpha * beta * mean_length * rms_over_tokens(residual), times max(0, correlation)."""
    inputs = make_inputs(seed)
    metrics, mean_length = loop_metrics(inputs, loops(inputs))
    correlation = metrics["vimpo/outcome_correlation"]
    formula = 0.3 * CONFIG.beta * mean_length * metrics["vimpo/residual_rms"]

    def coeff(**knobs):
        batch = compute(inputs, replace(CONFIG, actor_alpha=0.3, **knobs))
        assert batch.metrics["vimpo/actor_coeff"] == batch.actor_coeff
        return batch.actor_coeff

    assert coeff() == pytest.approx(formula * max(0.0, correlation), rel=1e-9, abs=1e-15)
    assert coeff(actor_trust=False) == pytest.approx(formula, rel=1e-9)
    assert coeff(actor_coeff=5e-3) == pytest.approx(5e-3 * max(0.0, correlation), rel=1e-9, abs=1e-15)
    assert coeff(actor_coeff=5e-3, actor_trust=False) == 5e-3
    assert coeff(use_actor=False) == 0.0


def test_both_signs_of_the_correlation_were_tested():
    signs = {compute(make_inputs(seed)).metrics["vimpo/outcome_correlation"] > 0 for seed in range(6)}
    assert signs == {True, False}


def test_sequences_masked_out_whole_pass_no_judgement():
    """Two of eight, in their groups, with rewards: S follows the outcomes wherever there is one, so trust is whole."""
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    mask = torch.ones(8, 2)
    mask[[2, 7]] = 0
    log_prob = torch.where(outcome > 0, 1.0, -1.0).unsqueeze(-1).expand(8, 2)
    batch = compute_batch(
        old_log_prob=log_prob,
        ref_log_prob=torch.zeros(8, 2),
        token_kl=torch.zeros(8, 2),
        response_mask=mask,
        outcome=outcome,
        group=["a"] * 4 + ["b"] * 4,
        config=VimpoConfig(actor_coeff=0.3, beta=0.25),
        lam=1.0,
    )
    assert batch.metrics["vimpo/outcome_correlation"] == pytest.approx(1.0, abs=1e-12)
    assert batch.metrics["vimpo/outcome_auc"] == 1.0
    assert batch.actor_coeff == pytest.approx(0.3, abs=1e-12)
    # Their rewards are in the baselines: 2 / 4 and 3 / 4.
    target = [0.5, -0.5, 0.0, -0.5, 0.25, -0.75, 0.25, 0.0]
    torch.testing.assert_close(batch.returns[:, 0], torch.tensor(target))
    residual = [0.0, 0.0, 0.0, 0.25, 0.25, 0.25]  # S is 0.5 or -0.5
    judged = [0.5, -0.5, -0.5, 0.25, -0.75, 0.25]
    expected = 1 - _variance(residual) / _variance(judged)
    assert batch.metrics["vimpo/value_explained_variance"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pad_group", ["pad", "a"])
def test_placeholders_count_nowhere(pad_group):
    """Whatever they hold, also under the name of a real group, in front of and between the real ones."""
    inputs = make_inputs()
    at = [1, 2, 4, 5, 6, 8, 9, 11]  # where the real samples are among twelve
    wide = {"group": [pad_group] * 12, "outcome": torch.full((12,), 9.0, dtype=torch.float64)}
    for name in ("old_log_prob", "ref_log_prob", "token_kl"):
        wide[name] = torch.full((12, LENGTH), torch.nan, dtype=torch.float64)
    wide["response_mask"] = torch.ones(12, LENGTH)  # verl's are empty; even a full one must not count
    for real, row in enumerate(at):
        for name in wide:
            wide[name][row] = inputs[name][real]
    is_padding = torch.tensor([row not in at for row in range(12)])
    batch, expected = compute(wide, is_padding=is_padding), compute(inputs)
    for name in ("advantages", "returns", "values"):
        torch.testing.assert_close(getattr(batch, name)[at], getattr(expected, name), rtol=1e-12, atol=1e-14)
        assert (getattr(batch, name)[is_padding] == 0).all()
    assert batch.metrics == pytest.approx(expected.metrics, rel=1e-12)
    assert batch.actor_coeff == pytest.approx(expected.actor_coeff, rel=1e-12)


def test_a_session_of_several_sequences_counts_once_in_its_group():
    """Beside each of the first four a sequence of the same session that came before it, whose own reward is of no account."""
    inputs = make_inputs()
    alone = compute(inputs)
    earlier = {**make_inputs(seed=1), "outcome": OUTCOME + 7.0, "group": GROUPS}
    joined = {
        name: torch.cat([value, earlier[name][:4]]) if torch.is_tensor(value) else value + GROUPS[:4]
        for name, value in inputs.items()
    }
    both = compute_batch(**joined, config=CONFIG, lam=0.9, session_end=torch.tensor([*range(8), *range(4)]))
    target = alone.returns.amax(-1) + alone.returns.amin(-1)  # one value on every valid token, 0 elsewhere
    torch.testing.assert_close(both.returns[:8], alone.returns)
    torch.testing.assert_close(both.returns[8:], torch.where(joined["response_mask"][8:].bool(), target[:4, None], 0.0))


def test_the_order_of_samples_does_not_matter():
    inputs, order = make_inputs(), torch.tensor([5, 2, 7, 0, 4, 1, 6, 3])
    shuffled = {name: value[order] for name, value in inputs.items() if name != "group"}
    batch, expected = compute({**shuffled, "group": [GROUPS[i] for i in order]}), compute(inputs)
    for name in ("advantages", "returns", "values"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name)[order], rtol=1e-12, atol=1e-14)
    assert batch.metrics == pytest.approx(expected.metrics, rel=1e-12)


def test_constant_rewards():
    """Nothing to learn from: targets 0, no correlation, no actor branch, no pair to rank."""
    batch = compute({**make_inputs(), "outcome": torch.full((8,), 0.1, dtype=torch.float64)})
    assert batch.returns.abs().max() < 1e-15 and batch.actor_coeff == 0.0
    assert batch.metrics["vimpo/outcome_correlation"] == 0.0
    assert "vimpo/outcome_auc" not in batch.metrics
    assert all(math.isfinite(value) for value in batch.metrics.values())


def test_equal_models():
    inputs = make_inputs()
    inputs |= {"ref_log_prob": inputs["old_log_prob"], "token_kl": torch.zeros(8, LENGTH, dtype=torch.float64)}
    batch = compute(inputs)
    assert batch.metrics["vimpo/kl"] == 0.0 and batch.actor_coeff == 0.0
    assert batch.advantages.abs().max() == 0.0 and batch.values.abs().max() == 0.0
    assert batch.metrics["vimpo/outcome_auc"] == 0.5  # every pair is a tie


@pytest.mark.parametrize("empty", ["no valid token", "placeholders only"])
def test_nothing_valid(empty):
    inputs, is_padding = make_inputs(), None
    if empty == "no valid token":
        inputs["response_mask"] = torch.zeros(8, LENGTH)
    else:
        is_padding = torch.ones(8, dtype=torch.bool)
    batch = compute(inputs, is_padding=is_padding)
    assert batch.advantages.abs().max() == 0.0 and batch.actor_coeff == 0.0
    assert all(math.isfinite(value) for value in batch.metrics.values())


def test_correlation_and_auc_by_hand():
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.0])
    right, wrong = torch.tensor([2.0, 1.0, 9.0, 8.0]), torch.tensor([1.0, 2.0, 8.0, 9.0])
    group = ["x", "x", "y", "y"]
    assert outcome_correlation(right, outcome, group) == pytest.approx(1.0)
    assert outcome_correlation(wrong, outcome, group) == pytest.approx(-1.0)
    assert outcome_auc(right, outcome, group) == 1.0 and outcome_auc(wrong, outcome, group) == 0.0
    assert outcome_auc(right, outcome, ["x", "y", "z", "w"]) is None
    # Between prompts nothing is compared: a judgement that only knows the prompt has no correlation.
    assert outcome_correlation(torch.tensor([1.0, 1.0, 5.0, 5.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]), group) == 0.0


@pytest.mark.parametrize("name", ["old_log_prob", "ref_log_prob", "token_kl", "response_mask", "outcome", "group"])
def test_shapes_that_do_not_fit_are_refused(name):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=name.removeprefix("old_")):
        compute({**inputs, name: inputs[name][:5]})


def test_no_memory_but_for_the_three_results(monkeypatch):
    """In float32 tensors [B, T]: what is worked on at a time goes with the block, not with the batch."""
    from tensor_memory import extra_bytes

    monkeypatch.setattr(batch_module, "_TOKENS_AT_A_TIME", 2**10)
    rows, length = 512, 256
    one_tensor, generator = 4 * rows * length, torch.Generator().manual_seed(0)
    log_prob, ref_log_prob, kl = (torch.rand(rows, length, generator=generator) for _ in range(3))
    lengths = torch.randint(1, length, (rows, 1), generator=generator)
    of_rewards = {
        "response_mask": (torch.arange(length) < lengths).long(),
        "outcome": torch.randint(0, 2, (rows,), generator=generator).float(),
        "group": [row // 8 for row in range(rows)],
    }
    of_tokens = {"old_log_prob": log_prob, "ref_log_prob": ref_log_prob, "token_kl": kl}
    of_switches = {"actor_coeff": "gradient", "actor_advantage": "grpo", "value_normalised": True}
    for config in (CONFIG, replace(CONFIG, **of_switches), replace(CONFIG, beta="auto")):
        for lam in (1.0, 0.9):
            two = extra_bytes(lambda: compute_batch(**of_rewards, **of_tokens, config=config, lam=lam), "cpu")  # noqa: B023
            assert 3 * one_tensor <= two < 3.2 * one_tensor
        one = extra_bytes(lambda: compute_targets(**of_rewards, config=config, before=None), "cpu")  # noqa: B023
        assert one_tensor <= one < 1.2 * one_tensor
