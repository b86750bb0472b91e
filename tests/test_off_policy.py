"""Claim: where the responses are not the current policy's, or are used more than once, a step is still the formula's.

Stale samples (trainer mode colocate_async): kappa, old log-probs, advantages and c_A belong to the policy that starts
the update, whichever policy wrote the responses. Rollout correction: verl's importance weights (rollout_is) multiply
L_A token by token and leave L_V alone: the optimum of L_V has a zero residual for every response, whatever distribution
they come from. Rejection (rollout_rs): rejected tokens leave L_A, L_V keeps whole responses, and a response of which verl
rejects every token leaves both; its reward stays in its group's V0. Several epochs: values, advantages and targets stay those of
the old policy.

verl's trainer stages and worker in one process (in_process.py) against float64; one whole run, marked slow, with
samples that are really stale. Not claimed: that training learns as well from stale samples.
"""

import logging
import math

import engine_formula
import pytest
import torch
from engine_harness import parameters_of
from engine_samples import make_samples
from in_process import make_config, make_trainer, run_trainer_step
from test_end_to_end import run_tiny
from test_validation import BYPASS, validate, vimpo

OVERRIDES = (
    "+algorithm.vimpo.passes=two",
    "+algorithm.vimpo.actor_coeff=0.3",
    "+algorithm.vimpo.actor_trust=false",
    f"actor_rollout_ref.actor.clip_ratio_low={engine_formula.CLIP_LOW}",
    f"actor_rollout_ref.actor.clip_ratio_high={engine_formula.CLIP_HIGH}",
    f"actor_rollout_ref.actor.clip_ratio_c={engine_formula.CLIP_DUAL}",
)
FORMULA = {"lr": 0.1, "equal": True, "coeff": 0.3}
SAMPLES = make_samples(seed=3, tool_tokens=False)


def change(before, after) -> dict[str, torch.Tensor]:
    return {name: after[name].double() - before[name].double() for name in before}


def relative(actual, expected) -> float:
    difference = sum((actual[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(tensor.square().sum() for tensor in expected.values())).sqrt().item()


def second_step(models, monkeypatch, *overrides, rollout_log_probs=False):
    """Two steps on the same samples, which the first policy wrote: the second step's samples are stale.

    Returns the trainer's metrics of the second step, its change of the parameters, and the queue's rows.
    """
    trainer, queue = make_trainer(make_config(models / "policy", *OVERRIDES, *overrides), monkeypatch)
    run_trainer_step(trainer, queue, SAMPLES)
    at_generation = [row.get("old_log_probs") for row in queue.rows.values()]  # not there in one pass
    engine = trainer.actor_rollout_wg.worker.actor.engine
    before = parameters_of(engine)
    metrics = run_trainer_step(trainer, queue, SAMPLES, at_generation if rollout_log_probs else None)
    return metrics, change(before, parameters_of(engine)), list(queue.rows.values())


def formula_of_second_step(models, weigh=None, keep=None, **changed):
    first = engine_formula.step(models, SAMPLES, **{**FORMULA, **changed})
    of_second = {"policy": first["policy"], "weigh": weigh, "keep": keep}
    second = engine_formula.step(models, SAMPLES, **{**FORMULA, **changed}, **of_second)
    return first, second, change(first["parameters"], second["parameters"])


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_stale_samples(models, monkeypatch, mode):
    metrics, moved, rows = second_step(models, monkeypatch, f"trainer.v1.trainer_mode={mode}")
    _, expected, expected_move = formula_of_second_step(models)
    for row, old, kl in zip(rows, expected["tokens"]["log_probs"], expected["tokens"]["token_kl"], strict=True):
        torch.testing.assert_close(row["old_log_probs"].double(), old, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row["token_kl"].double(), kl, rtol=1e-3, atol=1e-5)
    assert metrics["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-4)
    assert relative(moved, expected_move) < 1e-3


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_stale_samples_in_one_pass(models, monkeypatch, mode):
    """With the value loss alone, which needs no statistics of a batch before."""
    one_pass = ("++algorithm.vimpo.passes=one", "+algorithm.vimpo.use_actor=false", f"trainer.v1.trainer_mode={mode}")
    metrics, moved, rows = second_step(models, monkeypatch, *one_pass)
    _, expected, expected_move = formula_of_second_step(models, coeff=0.0)
    assert all("old_log_probs" not in row for row in rows)
    assert metrics["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-4)
    assert relative(moved, expected_move) < 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_multiply_the_actor_loss_alone(models, monkeypatch, level):
    overrides = (
        f"algorithm.rollout_correction.rollout_is={level}",
        "algorithm.rollout_correction.rollout_is_threshold=1.05",
    )
    metrics, moved, rows = second_step(models, monkeypatch, *overrides, rollout_log_probs=True)
    first, _, unweighted = formula_of_second_step(models)

    def weigh(old_log_probs, i):
        log_ratio = old_log_probs - first["tokens"]["log_probs"][i]
        log_ratio = log_ratio if level == "token" else log_ratio.sum().expand_as(log_ratio)
        return log_ratio.exp().clamp(max=1.05)

    _, expected, expected_move = formula_of_second_step(models, weigh)
    weights = torch.cat([row["rollout_is_weights"] for row in rows])
    assert weights.max() == pytest.approx(1.05) and weights.min() < 0.95, "truncation and down-weighting take part"
    assert metrics["vimpo/actor_loss"] == pytest.approx(expected["updates"][0]["actor_loss"], rel=1e-3)
    assert metrics["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-4)
    assert relative(moved, expected_move) < 1e-3 < 0.02 < relative(moved, unweighted)


def test_rejected_tokens_leave_the_actor_loss_and_rejected_responses_both(models, monkeypatch):
    first, second, unrejected = formula_of_second_step(models)
    pairs = zip(second["tokens"]["log_probs"], first["tokens"]["log_probs"], strict=True)
    k2 = [0.5 * (now - then) ** 2 for now, then in pairs]
    of_tokens, of_responses = torch.cat(k2).sort().values, torch.stack([row.max() for row in k2]).sort().values
    token_limit = of_tokens[len(of_tokens) // 2 - 1 : len(of_tokens) // 2 + 1].mean().item()
    limit = of_responses[len(of_responses) // 2 - 1 : len(of_responses) // 2 + 1].mean().item()

    def keep(old_log_probs, i):
        return bool(0.5 * ((old_log_probs - first["tokens"]["log_probs"][i]) ** 2).max() <= limit)

    def weigh(old_log_probs, i):
        tokens = 0.5 * (old_log_probs - first["tokens"]["log_probs"][i]) ** 2 <= token_limit
        return (tokens & keep(old_log_probs, i)).double()

    _, expected, expected_move = formula_of_second_step(models, weigh, keep=keep)
    overrides = (
        "algorithm.rollout_correction.rollout_rs='token_k2,seq_max_k2'",
        f"algorithm.rollout_correction.rollout_rs_threshold='{token_limit},{limit}'",
    )
    metrics, moved, rows = second_step(models, monkeypatch, *overrides, rollout_log_probs=True)
    left = [int(row["response_mask"].sum()) for row in rows]
    assert left.count(0) == len(SAMPLES) // 2 and 0 < sum(left) < sum(sum(s.mask) for s in SAMPLES)
    assert [float(row["vimpo_is_real"]) for row in rows] == [float(n > 0) for n in left]
    assert metrics["vimpo/actor_loss"] == pytest.approx(expected["updates"][0]["actor_loss"], rel=1e-3)
    assert metrics["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-4)
    assert relative(moved, expected_move) < 1e-3 < 0.02 < relative(moved, unrejected)


@pytest.mark.parametrize("value_clip", [engine_formula.VALUE_CLIP, None])
def test_several_epochs(models, monkeypatch, value_clip):
    """ppo_epochs of the recipe, with several mini-batches: four updates a step, against the same in float64."""
    overrides = (
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        f"+algorithm.vimpo.value_clip={'null' if value_clip is None else value_clip}",
    )
    metrics, moved, _ = second_step(models, monkeypatch, *overrides)
    _, expected, expected_move = formula_of_second_step(models, epochs=2, mini_batches=2, value_clip=value_clip)
    assert len(expected["updates"]) == 4
    losses = [update["value_loss"] for update in expected["updates"]]
    assert metrics["vimpo/value_loss"] == pytest.approx(sum(losses) / 4, rel=1e-3)
    assert relative(moved, expected_move) < 1e-3


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_stale_samples_from_vllm(tmp_path):
    """A whole run in mode colocate_async that is two batches ahead, with importance weights.

    The later steps' responses are an older policy's: the probabilities that vLLM had for them are no longer those of
    the policy that starts the update, and the weights are no longer 1.
    """
    run = run_tiny(
        tmp_path, "vimpo", 4, "trainer.v1.trainer_mode=colocate_async",
        "trainer.v1.colocate_async.num_warmup_batches=2",
        "algorithm.rollout_correction.rollout_is=token",
    )  # fmt: skip
    assert sorted(run.steps) == [1, 2, 3, 4]
    difference = {step: metrics["training/rollout_probs_diff_mean"] for step, metrics in run.steps.items()}
    assert run.steps[1]["vimpo/kl"] == 0.0 < min(run.steps[step]["vimpo/kl"] for step in (2, 3, 4))
    staleness = {step: run.steps[step]["training/off_policy/trajectory_staleness/max"] for step in run.steps}
    assert staleness[1] == 0 < staleness[3] <= 2, staleness
    for step, difference_of_step in difference.items():  # how stale step 4 is, if at all, is a matter of timing
        assert difference_of_step > 1e-3 if staleness[step] else difference_of_step < 1e-4, (step, staleness)
    for step in run.steps.values():
        assert all(math.isfinite(value) for name, value in step.items() if name.startswith("vimpo/"))
    assert run.steps[1]["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-3)
    assert run.steps[3]["rollout_corr/rollout_is_std"] > 10 * run.steps[1]["rollout_corr/rollout_is_std"]


SEVERAL = {
    "actor_rollout_ref.actor.ppo_mini_batch_size=8": "actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_epochs=2": "actor.ppo_epochs=2",
}


def warned(caplog, *overrides) -> list[str]:
    """What the driver warns of."""
    with caplog.at_level(logging.WARNING, logger="vimpo_verl"):
        validate(vimpo(*overrides))
    return [r.getMessage() for r in caplog.records if r.name == "vimpo_verl"]


@pytest.mark.parametrize("several", SEVERAL)
def test_bypass_mode_with_several_updates_a_batch_is_warned_of(several, caplog):
    """Each update's kappa is its own policy's: there is no pass before the first to have an old policy's from."""
    (warning,) = warned(caplog, *BYPASS, several)
    assert warning.endswith("algorithm.rollout_correction.bypass_mode=False") and SEVERAL[several] in warning
    assert "of the policy of each update" in warning


@pytest.mark.parametrize("setting", ["rollout_is=token", "rollout_rs=token_k1"])
def test_a_correction_that_bypass_mode_leaves_out_is_warned_of(setting, caplog):
    (warning,) = warned(caplog, *BYPASS, f"algorithm.rollout_correction.{setting}")
    assert warning.startswith(f"vimpo_verl: algorithm.rollout_correction.{setting} with bypass_mode=True: nothing is")


@pytest.mark.parametrize("without", [BYPASS, (*SEVERAL,)], ids=["one update", "two passes"])
def test_and_either_alone_is_not(without, caplog):
    assert warned(caplog, *without) == []
