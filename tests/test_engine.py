"""Claim: on verl's real FSDP engine, one step of VIMPO agrees with the formula in float64 (engine_formula.py).

Joint pass: log-probs, entropy, reference log-probs and exact KL of every response token. Update: loss and gradients of
one optimiser step, and the parameters after several mini-batches and epochs. The engine computes in float32.

Not covered here: Ray and the TransferQueue (test_trainer.py, test_end_to_end.py), flash attention, several GPUs.
"""

import engine_formula
import pytest
import torch
from engine_harness import Setting, joint_pass, make_workers, run_step
from engine_samples import make_samples, make_uneven_samples

# float32 through two layers against float64.
TOLERANCE = 1e-5


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Relative to the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (torch.as_tensor(actual, dtype=torch.float64) - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item() + 1e-12


def assert_gradients_close(actual, expected, tolerance=TOLERANCE):
    """Relative to the norm of the whole gradient."""
    assert actual.keys() == expected.keys()
    difference = sum((actual[name].double() - expected[name].double()).square().sum() for name in expected)
    norm = sum(gradient.double().square().sum() for gradient in expected.values())
    assert norm > 0
    assert (difference / norm).sqrt().item() <= tolerance


def assert_step_agrees(result, expected, of_gradients=TOLERANCE):
    for name, rows in expected["tokens"].items():
        assert_close(torch.cat(result.per_token[name]), torch.cat(rows))
    assert_close(result.batch.actor_coeff, expected["coeff"], 5e-5)  # its correlation is one of differences of sums
    assert len(result.gradients) == len(expected["updates"])
    for gradients, update in zip(result.gradients, expected["updates"], strict=True):
        assert_gradients_close(gradients, update["gradients"], of_gradients)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("use_remove_padding", [True, False])
def test_a_step_agrees_with_the_formula(models, strategy, use_remove_padding):
    """With ragged lengths, tool tokens in the middle of a response, and a response without a valid token."""
    samples = make_samples()
    result = run_step(models, Setting(strategy=strategy, use_remove_padding=use_remove_padding), samples)
    expected = engine_formula.step(models, samples)
    assert_step_agrees(result, expected)
    assert_close(result.metrics["vimpo/value_loss"], expected["updates"][0]["value_loss"])
    assert_close(result.metrics["loss"], expected["updates"][0]["value_loss"])  # at ratio 1 the actor loss is zero
    assert expected["coeff"] > 1e-3, "the actor branch would not be tested"


def test_a_step_on_uneven_groups_agrees_with_the_formula(models):
    """Groups of 1, 3 and 4, an empty response, responses cut at the limit: three updates.

    The logged value loss leaves out the constant 1/2 (R - V0)^2 of a response without a valid token, which has no
    gradient.
    """
    samples = make_uneven_samples()
    result = run_step(models, Setting(epochs=3, lr=0.1), samples)
    expected = engine_formula.step(models, samples, lr=0.1, epochs=3)
    assert_step_agrees(result, expected)
    assert_gradients_close(result.parameters, expected["parameters"])
    (empty,) = [i for i, sample in enumerate(samples) if not sample.response]
    constant = 0.5 * targets_of(samples)[empty] ** 2 / len(samples)
    assert constant > 0.01
    assert_close(result.metrics["vimpo/value_loss"] + constant, _mean(u["value_loss"] for u in expected["updates"]))


def targets_of(samples):
    groups = [[s.outcome for s in samples if s.uid == sample.uid] for sample in samples]
    return [sample.outcome - sum(group) / len(group) for sample, group in zip(samples, groups, strict=True)]


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.7},
        {"lam": 0.5},
        {"actor": {"entropy_coeff": 0.02}},
        {"actor": {"use_kl_loss": True, "kl_loss_coef": 0.03}},
        {"knobs": {"actor_coeff": 0.3, "actor_trust": False}},
        {"knobs": {"use_actor": False}},
    ],
    ids=str,
)
def test_a_step_with_other_settings_agrees_with_the_formula(models, changed):
    samples = make_samples(seed=1)
    knobs, actor = changed.get("knobs", {}), changed.get("actor", {})
    expected = engine_formula.step(
        models,
        samples,
        temperature=changed.get("temperature", 1.0),
        lam=changed.get("lam", 1.0),
        entropy_coeff=actor.get("entropy_coeff", 0.0),
        kl_coeff=actor.get("kl_loss_coef", 0.0),
        coeff=knobs.get("actor_coeff", 0.0 if "use_actor" in knobs else None),
    )
    assert_step_agrees(run_step(models, Setting(**changed), samples), expected)


@pytest.mark.parametrize("value_clip", [0.2, 0.01, None])
def test_several_mini_batches_and_epochs_agree_with_the_formula(models, value_clip):
    """Values, advantages and targets stay those of the old policy, so the ratio leaves 1 and clipping takes part."""
    samples = make_samples(seed=2, tool_tokens=False)
    knobs = {"actor_coeff": 0.3, "actor_trust": False, "value_clip": value_clip}
    setting = Setting(mini_batches=2, epochs=2, lr=0.1, knobs=knobs)
    result = run_step(models, setting, samples)
    expected = engine_formula.step(models, samples, lr=0.1, mini_batches=2, epochs=2, coeff=0.3, value_clip=value_clip)
    assert len(result.gradients) == 4
    assert_step_agrees(result, expected)
    assert_gradients_close(result.parameters, expected["parameters"])
    assert_close(result.metrics["vimpo/value_loss"], _mean(u["value_loss"] for u in expected["updates"]))
    assert_close(result.metrics["vimpo/actor_loss"], _mean(u["actor_loss"] for u in expected["updates"]), 1e-4)
    assert result.metrics["actor/pg_clipfrac"] > 0


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_equal_models_give_exactly_zero(models):
    result = run_step(models, Setting(equal_models=True), make_samples())
    for i in range(len(result.per_token["token_kl"])):
        assert torch.equal(result.per_token["token_kl"][i], torch.zeros_like(result.per_token["token_kl"][i]))
        assert torch.equal(result.per_token["log_probs"][i], result.per_token["ref_log_probs"][i])
    assert result.metrics["vimpo/kl"] == 0.0
    assert result.metrics["vimpo/actor_coeff"] == 0.0  # S = 0: no judgement yet to trust
    assert result.batch.advantages.abs().max() == 0.0


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_sampled_estimators(models, estimator):
    samples = make_samples()
    tokens = run_step(models, Setting(knobs={"kl_estimator": estimator}), samples).per_token
    exact = engine_formula.per_token(
        engine_formula.load(models / "policy"), engine_formula.load(models / "ref"), samples, 1.0
    )
    ratio = torch.cat(exact["log_probs"]) - torch.cat(exact["ref_log_probs"])
    expected = 0.5 * ratio.square() if estimator == "k2" else torch.exp(-ratio) - 1 + ratio
    assert_close(torch.cat(tokens["token_kl"]), expected)


@pytest.mark.parametrize("micro_batch_size, expected", [(2, 4), (8, 1)])
def test_the_joint_pass_runs_each_model_once_a_micro_batch(models, micro_batch_size, expected):
    """And the update runs the policy alone: 1 old + 1 reference + 4 update, as GRPO with a reference does."""
    setting = Setting(micro_batch_size=micro_batch_size)
    workers = make_workers(models, setting)
    forwards = {"actor": 0, "ref": 0}

    def count(name):
        def hook(*_):
            forwards[name] += 1

        return hook

    for name in forwards:
        getattr(workers, name).engine.module.register_forward_pre_hook(count(name))
    samples = make_samples()
    joint_pass(workers, samples, setting)
    assert forwards == {"actor": expected, "ref": expected}
    run_step(models, setting, samples, workers)
    assert forwards == {"actor": 3 * expected, "ref": 2 * expected}


def test_the_joint_pass_leaves_the_training_loss_in_place(models):
    setting = Setting()
    workers = make_workers(models, setting)
    loss = workers.actor.loss_fn
    joint_pass(workers, make_samples(), setting)
    assert workers.actor.loss_fn is loss
