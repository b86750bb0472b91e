"""Claim: from a user's configuration, VIMPO's trainer and worker do the step of the formula, with every metric logged.

verl's own trainer stages and hybrid worker, in one process (in_process.py): configuration, validation, init_model, joint
pass, advantage, update. Ray, TransferQueue and vLLM are in test_end_to_end.py.
"""

from dataclasses import replace

import engine_formula
import pytest
import torch
from engine_harness import parameters_of
from engine_samples import make_samples, placeholders
from in_process import make_config, make_trainer, run_trainer_step

METRICS = {
    "vimpo/kl", "vimpo/value_loss", "vimpo/actor_loss", "vimpo/actor_coeff", "vimpo/residual_rms", "vimpo/target_rms",
    "vimpo/advantage_std", "vimpo/outcome_correlation", "vimpo/value_explained_variance", "vimpo/outcome_auc",
}  # fmt: skip


@pytest.fixture
def trainer_and_queue(models, monkeypatch):
    return make_trainer(make_config(models / "policy"), monkeypatch)


def test_two_steps_agree_with_the_formula(models, trainer_and_queue):
    """The reference is the initial policy: the first step has no KL and only the value loss, the second has both."""
    trainer, queue = trainer_and_queue
    samples = make_samples(tool_tokens=False)
    first = run_trainer_step(trainer, queue, samples)
    expected = engine_formula.step(models, samples, lr=0.1, equal=True)
    assert set(first) >= METRICS
    assert first["vimpo/kl"] == 0.0 and first["vimpo/actor_coeff"] == 0.0
    assert first["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-5)
    found = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert found.keys() == expected["parameters"].keys()
    for name, wanted in expected["parameters"].items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)

    second = run_trainer_step(trainer, queue, samples)
    assert second["vimpo/kl"] > 0 and second["vimpo/value_loss"] < first["vimpo/value_loss"]
    assert second["vimpo/outcome_correlation"] > 0 and second["vimpo/actor_coeff"] > 0


def test_a_derived_trainers_own_step_runs_inside_vimpos(models, monkeypatch):
    """And VIMPO's result is that of verl's own trainer."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class OfAUser(PPOTrainerSync):
        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            metrics["of_a_user/advantages"] = float("advantages" in queue.rows[batch.keys[0]])
            return batch

    samples = make_samples(tool_tokens=False)
    expected = run_trainer_step(*make_trainer(make_config(models / "policy"), monkeypatch), samples)
    trainer, queue = make_trainer(make_config(models / "policy"), monkeypatch, stock=OfAUser)
    found = run_trainer_step(trainer, queue, samples)
    assert isinstance(trainer, OfAUser) and found.pop("of_a_user/advantages") == 1.0
    for name in METRICS | {"actor/grad_norm"}:
        assert float(found[name]) == float(expected[name]), name


def test_what_the_trainer_leaves_in_the_queue(trainer_and_queue):
    """Nested over the response, for verl's own stages to read; returns is R - V0 on every valid token."""
    trainer, queue = trainer_and_queue
    samples = make_samples()
    run_trainer_step(trainer, queue, samples)
    for row, sample in zip(queue.rows.values(), samples, strict=True):
        for name in ("old_log_probs", "ref_log_prob", "token_kl", "advantages", "returns"):
            assert row[name].shape == (len(sample.response),), name
        outcomes = [s.outcome for s in samples if s.uid == sample.uid]
        target = sample.outcome - sum(outcomes) / len(outcomes)
        torch.testing.assert_close(row["returns"], target * torch.tensor(sample.mask, dtype=torch.float32))
        assert row["vimpo_is_real"] == 1


def test_placeholders_change_no_metric(models, monkeypatch):
    samples = make_samples()
    plain = run_trainer_step(*make_trainer(make_config(models / "policy"), monkeypatch), samples)
    config = make_config(models / "policy", "actor_rollout_ref.actor.ppo_mini_batch_size=6", "data.train_batch_size=6")
    padded = run_trainer_step(*make_trainer(config, monkeypatch), samples + placeholders(4))
    for name in METRICS | {"actor/grad_norm"}:
        assert float(padded[name]) == pytest.approx(float(plain[name]), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("which", ["actor", "ref"])
def test_a_non_finite_model_is_named_with_sample_and_token(trainer_and_queue, which):
    trainer, queue = trainer_and_queue
    worker = getattr(trainer.actor_rollout_wg.worker, which)
    with torch.no_grad():
        next(p for n, p in worker.engine.module.named_parameters() if "norm" in n).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 1.*response token 0 of sample p0_0_0"):
        run_trainer_step(trainer, queue, make_samples(tool_tokens=False))


def test_several_outputs_of_one_session_are_refused(trainer_and_queue):
    from verl_patches.trainer import _require_one_output_a_session

    _require_one_output_a_session(["a_0_0", "a_1_0", "b_0_0"])
    with pytest.raises(NotImplementedError, match="3 outputs for 2 sessions"):
        _require_one_output_a_session(["a_0_0", "a_0_1", "b_0_0"])


def test_a_batch_that_is_not_from_vimpos_trainer_is_refused(trainer_and_queue):
    """Neither update nor loss runs on a batch without kappa."""
    trainer, queue = trainer_and_queue
    run_trainer_step(trainer, queue, make_samples())
    group, stored = trainer.actor_rollout_wg, queue.rows
    for missing in ("vimpo_is_real", "token_kl"):
        batch = queue.start(make_samples())
        queue.rows = {key: {n: v for n, v in row.items() if n != missing} for key, row in stored.items()}
        batch.extra_info.update(
            mini_batch_size=8, global_batch_size=8, temperature=1.0, vimpo_actor_coeff=0.0, calculate_entropy=False
        )
        with pytest.raises(RuntimeError, match=missing):
            group.update_actor(batch)


def test_the_worker_needs_a_reference(models, monkeypatch):
    import verl.workers.engine_workers as engine_workers

    from verl_patches.worker import VimpoActorRolloutRefWorker

    monkeypatch.setattr(engine_workers, "get_rollout_class", lambda name, mode: lambda **_: None)
    config = make_config(models / "policy")
    with pytest.raises(RuntimeError, match="needs the reference.*'actor_rollout'"):
        VimpoActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor_rollout").init_model()


def test_an_outcome_is_the_sum_of_its_token_rewards(trainer_and_queue):
    """Rewards at other tokens than the last, as some reward managers give them."""
    trainer, queue = trainer_and_queue
    samples = make_samples(tool_tokens=False)
    expected = run_trainer_step(trainer, queue, samples)["vimpo/target_rms"]
    doubled = [replace(sample, outcome=2 * sample.outcome) for sample in samples]
    assert run_trainer_step(trainer, queue, doubled)["vimpo/target_rms"] == pytest.approx(2 * expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_reward_that_is_not_finite_is_named_with_sample_and_rank(trainer_and_queue, value):
    """verl hands equal parts of the batch, in its order, to the ranks."""
    trainer, queue = trainer_and_queue
    samples = make_samples(tool_tokens=False)
    trainer.actor_rollout_wg._dispatch_info = {"actor": [0, 1]}
    before = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    for position, rank in ((1, 0), (len(samples) - 1, 1)):
        bad = list(samples)
        bad[position] = replace(bad[position], outcome=value)
        token = len(bad[position].response) - 1
        with pytest.raises(FloatingPointError) as error:
            run_trainer_step(trainer, queue, bad)
        sample = list(queue.rows)[position]
        assert (
            f"step 1: reward is {value} at response token {token} of sample {sample} on data-parallel rank {rank} (1"
            in str(error.value)
        )
    after = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing was updated"


def test_a_td_that_overflows_is_named(trainer_and_queue):
    trainer, queue = trainer_and_queue
    batch, metrics = queue.start(make_samples(tool_tokens=False)), {}
    batch.extra_info.pop("global_token_num", None)
    batch = trainer._compute_ref_log_prob(trainer._compute_old_log_prob(batch, metrics), metrics)
    row = queue.rows[batch.keys[2]]
    row["ref_log_prob"], row["token_kl"] = row["ref_log_prob"] + 3e38, row["token_kl"] + 3e38
    with pytest.raises(
        FloatingPointError, match=f"step 1: value is .*inf at response token 0 of sample {batch.keys[2]} on"
    ):
        trainer._compute_advantage(batch, metrics)


def test_a_gradient_that_is_not_finite_is_counted_and_changes_nothing(trainer_and_queue, monkeypatch, capsys):
    from verl_patches.value_branch import VimpoLoss

    trainer, queue = trainer_and_queue
    assert run_trainer_step(trainer, queue, make_samples())["vimpo/update_skipped"] == 0.0
    before = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    loss = VimpoLoss._loss
    monkeypatch.setattr(VimpoLoss, "_loss", lambda self, *args: (loss(self, *args)[0] * torch.nan, {}))
    assert run_trainer_step(trainer, queue, make_samples())["vimpo/update_skipped"] == 1.0
    assert "step 1: the gradient is not finite (actor/grad_norm=nan)" in capsys.readouterr().err
    after = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dropped", [0, 3])
def test_responses_that_verl_left_out_are_counted(trainer_and_queue, monkeypatch, capsys, dropped):
    """verl fills the batch with placeholders afterwards; a reward that raised would not be seen."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    trainer, queue = trainer_and_queue
    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, batch, metrics: batch)
    trainer.parameter_sync_step = 1
    asked = trainer.config.data.train_batch_size * trainer.config.actor_rollout_ref.rollout.n
    batch, metrics = queue.start(make_samples()[: asked - dropped]), {}
    assert trainer._balance_batch(batch, metrics) is batch
    assert metrics == {"vimpo/missing_responses": dropped}
    assert (f"step 1: {dropped} of {asked} responses are missing" in capsys.readouterr().err) == (dropped > 0)
