"""Claim: from a user's configuration, VIMPO's trainer and worker do the step of the formula, with every metric logged.

verl's own trainer stages and hybrid worker, in one process (in_process.py): configuration, validation, init_model, joint
pass, advantage, update; in two passes where it matters, and in one (more of that in test_one_pass.py). Ray, TransferQueue and
vLLM are in test_end_to_end.py.
"""

from dataclasses import replace
from types import SimpleNamespace as Namespace

import engine_formula
import numpy as np
import pytest
import torch
from engine_harness import parameters_of
from engine_samples import make_samples, placeholders
from in_process import make_config, make_trainer, run_trainer_step

METRICS = {
    "vimpo/kl", "vimpo/value_loss", "vimpo/actor_loss", "vimpo/actor_coeff", "vimpo/residual_rms", "vimpo/target_rms",
    "vimpo/advantage_std", "vimpo/outcome_correlation", "vimpo/value_explained_variance", "vimpo/outcome_auc",
    "vimpo/beta",
}  # fmt: skip


TWO = "+algorithm.vimpo.passes=two"


@pytest.fixture
def trainer_and_queue(models, monkeypatch):
    return make_trainer(make_config(models / "policy", TWO), monkeypatch)


@pytest.mark.parametrize("passes", ["two", "auto"])
def test_steps_agree_with_the_formula(models, monkeypatch, passes):
    """The reference is the initial policy: the first step has no KL and only the value loss, the second has both, but in one
    pass, where the first has no statistics for it: then the third has."""
    trainer, queue = make_trainer(make_config(models / "policy", f"+algorithm.vimpo.passes={passes}"), monkeypatch)
    assert trainer.passes.one == (passes == "auto")
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
    assert second["vimpo/outcome_correlation"] > 0
    if passes == "auto":
        assert second["vimpo/actor_coeff"] == 0.0
        second = run_trainer_step(trainer, queue, samples)
    assert second["vimpo/actor_coeff"] > 0 and set(second) >= METRICS


PRECISIONS = {
    "float16": ["++{}.mixed_precision.param_dtype=fp16"],
    "bfloat16": ["++{}.mixed_precision.param_dtype=bf16"],
    "bfloat16 weights": ["{}.model_dtype=bf16", "++{}.mixed_precision.param_dtype=bf16"],
}


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kl_is_exactly_0_at_the_first_step_in_the_policys_precision(models, monkeypatch, precision, strategy, passes):
    """The recipe gives the actor's alone. A reference that rounds otherwise would have a KL of 1e-4 to itself."""
    overrides = [override.format("actor_rollout_ref.actor.fsdp_config") for override in PRECISIONS[precision]]
    overrides += [f"actor_rollout_ref.actor.strategy={strategy}", f"+algorithm.vimpo.passes={passes}"]
    trainer, queue = make_trainer(make_config(models / "policy", *overrides), monkeypatch)
    metrics = run_trainer_step(trainer, queue, make_samples())
    assert metrics["vimpo/kl"] == 0.0 and metrics["vimpo/residual_rms"] == metrics["vimpo/target_rms"] > 0
    for row in queue.rows.values() if passes == "two" else ():
        assert torch.equal(row["old_log_probs"], row["ref_log_prob"])


def test_a_derived_trainers_own_step_runs_inside_vimpos(models, monkeypatch):
    """And VIMPO's result is that of verl's own trainer."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class OfAUser(PPOTrainerSync):
        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            metrics["of_a_user/advantages"] = float("advantages" in queue.rows[batch.keys[0]])
            return batch

    samples = make_samples(tool_tokens=False)
    expected = run_trainer_step(*make_trainer(make_config(models / "policy", TWO), monkeypatch), samples)
    trainer, queue = make_trainer(make_config(models / "policy"), monkeypatch, stock=OfAUser)
    assert "VimpoOfAUser has a _compute_advantage of its own" in str(trainer.passes), "which may look at log-probs"
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


def test_the_last_output_of_a_session_ends_it(trainer_and_queue):
    from verl_patches.family_trainer import session_ends

    assert session_ends(["a_0_0", "a_1_0", "b_0_0"]) == [0, 1, 2]
    assert session_ends(["a_0_10", "a_1_0", "a_0_9", "u_x_0_0", "a_0_2"]) == [0, 1, 0, 3, 0]


def test_the_outputs_of_a_session_share_its_reward(models, monkeypatch, capsys):
    """Two prompts of two sessions, each with two outputs, of which the last has the reward; the queue's order is another."""
    samples = make_samples(seed=3, prompts=4, group_size=2, tool_tokens=False)
    keys = ["p_0_0", "p_0_1", "q_0_1", "q_0_0", "p_1_1", "p_1_0", "q_1_0", "q_1_1"]
    rewards = dict(zip(keys, [9.0, 1.0, 1.0, 9.0, 0.0, 9.0, 9.0, 1.0], strict=True))
    samples = [replace(s, uid=key[0], outcome=rewards[key]) for s, key in zip(samples, keys, strict=True)]
    trainer, queue = make_trainer(make_config(models / "policy", "+algorithm.vimpo.actor_coeff=0.3"), monkeypatch)
    start = queue.start

    def start_with_outputs(samples):
        batch = start(samples)
        queue.rows = dict(zip(keys, queue.rows.values(), strict=True))
        queue.tags = dict(zip(keys, queue.tags.values(), strict=True))
        return type(batch)(keys, queue.tags_of(keys), batch.partition_id, extra_info=batch.extra_info)

    queue.start = start_with_outputs
    metrics = run_trainer_step(trainer, queue, samples)
    targets = {"p_0": 0.5, "p_1": -0.5, "q_0": 0.0, "q_1": 0.0}  # V0: the mean over the sessions of a prompt
    for key, row in queue.rows.items():
        assert row["returns"].unique().tolist() == [targets[key[:3]]], key
    # At the first step the policy is the reference: L_V is 1/2 * target^2, a mean over all outputs.
    assert metrics["vimpo/value_loss"] == pytest.approx(0.5 * 0.25 * 4 / 8, rel=1e-6)
    said = "step 1: the batch has 8 outputs for 4 sessions: two passes for this one and its like"
    assert trainer.passes.one and capsys.readouterr().out.count(said) == 1
    trainer.config.algorithm.rollout_correction.bypass_mode = True  # which has no two passes to fall back on
    with pytest.raises(NotImplementedError, match="8 outputs for 4 sessions"):
        run_trainer_step(trainer, queue, samples)


def test_a_batch_that_is_not_from_vimpos_trainer_is_refused(trainer_and_queue):
    """Neither update nor loss runs on a batch without kappa."""
    trainer, queue = trainer_and_queue
    run_trainer_step(trainer, queue, make_samples())
    group, stored = trainer.actor_rollout_wg, queue.rows
    from_the_trainer = {"vimpo_actor_coeff": 0.0, "vimpo_beta": 0.1, "vimpo_value_scale": 1.0}
    for missing in ("vimpo_is_real", "token_kl", *from_the_trainer):
        batch = queue.start(make_samples())
        queue.rows = {key: {n: v for n, v in row.items() if n != missing} for key, row in stored.items()}
        batch.extra_info.update(mini_batch_size=8, global_batch_size=8, temperature=1.0, calculate_entropy=False)
        batch.extra_info.update({name: value for name, value in from_the_trainer.items() if name != missing})
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


def poison_updates(monkeypatch, *poisoned):
    """The loss of the updates with these numbers, counted from 0, is NaN."""
    from verl_patches.value_branch import VimpoLoss
    from verl_patches.worker import VimpoTrainingWorker

    loss, train_batch, started = VimpoLoss._loss, VimpoTrainingWorker.train_batch, []

    def counted(self, data):
        started.append(None)
        return train_batch(self, data)

    def poison(self, *args):
        value, metrics = loss(self, *args)
        return (value * torch.nan if len(started) - 1 in poisoned else value), metrics

    monkeypatch.setattr(VimpoTrainingWorker, "train_batch", counted)
    monkeypatch.setattr(VimpoLoss, "_loss", poison)


def test_a_gradient_that_is_not_finite_is_counted_and_changes_nothing(trainer_and_queue, monkeypatch, capsys):
    trainer, queue = trainer_and_queue
    poison_updates(monkeypatch, 1)
    assert run_trainer_step(trainer, queue, make_samples())["vimpo/update_skipped"] == 0
    before = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert run_trainer_step(trainer, queue, make_samples())["vimpo/update_skipped"] == 1
    said = "step 1: the gradient is not finite in 1 of 1 mini-batches: verl has skipped the optimiser step, the weights are"
    assert said in capsys.readouterr().err
    after = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_of_several_mini_batches_those_skipped_are_counted(models, monkeypatch, capsys):
    config = make_config(
        models / "policy", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.ppo_epochs=2"
    )
    trainer, queue = make_trainer(config, monkeypatch)
    before = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    poison_updates(monkeypatch, 0, 2)
    metrics = run_trainer_step(trainer, queue, make_samples(tool_tokens=False))
    assert metrics["vimpo/update_skipped"] == 2
    said = capsys.readouterr().err
    assert "the gradient is not finite in 2 of 4 mini-batches" in said and "as before" not in said
    after = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def balance(trainer, queue, monkeypatch, samples, lost=()):
    """verl's stage in which the responses are counted; `lost`: prompts of which nothing came back."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, batch, metrics: batch)
    trainer.replay_buffer = Namespace(failure_keys={"train": set(lost)})
    batch, metrics = queue.start(samples), {}
    assert trainer._balance_batch(batch, metrics) is batch
    return metrics


@pytest.mark.parametrize("dropped", [0, 3])
def test_responses_that_verl_left_out_are_counted(trainer_and_queue, monkeypatch, capsys, dropped):
    """verl fills the batch with placeholders afterwards; a reward that raised would not be seen. The last prompt is lost."""
    trainer, queue = trainer_and_queue
    asked = trainer.config.data.train_batch_size * trainer.config.actor_rollout_ref.rollout.n
    metrics = balance(trainer, queue, monkeypatch, make_samples()[: asked - dropped], lost=["p3", "p2"][: dropped - 1])
    assert metrics == {"vimpo/missing_responses": dropped}
    assert (f"step 1: {dropped} of {asked} responses are missing" in capsys.readouterr().err) == (dropped > 0)


def submit(trainer, monkeypatch, **columns):
    """The data set's rows for four prompts, on their way to the rollout."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.utils import tensordict_utils as tu

    monkeypatch.setattr(PPOTrainer, "_submit_batch_to_rollout", lambda self, batch: len(batch))
    columns = {"uid": np.array([f"p{i}" for i in range(4)], dtype=object), **columns}
    assert trainer._submit_batch_to_rollout(tu.get_tensordict(columns)) == 4


@pytest.mark.parametrize("dtype", [object, np.int64])
def test_responses_are_counted_where_a_prompt_has_a_number_of_its_own(trainer_and_queue, monkeypatch, dtype):
    """verl's per-prompt rollout count: 4 of the first, 1 of the second and 2 of the others; then none is given."""
    trainer, queue = trainer_and_queue
    samples = make_samples(tool_tokens=False)  # 2 of each prompt
    own = [*samples[:2], *samples[:3], *samples[4:]]
    counts = np.array([4, 1, 2, 2], dtype=dtype)
    for kept, lost, missing in ((own, (), 0), (own[1:], (), 1), (own[:7], ("p3",), 2), (own[4:], ("p0",), 4)):
        submit(trainer, monkeypatch, __rollout_n__=counts)
        assert balance(trainer, queue, monkeypatch, kept, lost) == {"vimpo/missing_responses": missing}
    assert trainer.rollout_n == {}, "nothing is kept of prompts that are done"
    submit(trainer, monkeypatch)
    assert balance(trainer, queue, monkeypatch, samples[1:]) == {"vimpo/missing_responses": 1}


@pytest.mark.parametrize("scale, nats", [(1, None), (10, "15,000")])
def test_rewards_of_another_scale_are_named_once_with_what_they_ask_for(models, monkeypatch, capsys, scale, nats):
    """From 0 to 20, a group's mean at 5: up to 15 from it; at beta 1e-3 that is 15,000 nats."""
    config = make_config(models / "policy", "++algorithm.vimpo.beta=1e-3")
    trainer, queue = make_trainer(config, monkeypatch)
    samples = make_samples(tool_tokens=False, group_size=4, prompts=2)
    outcomes = [0.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    samples = [replace(s, outcome=scale * outcome) for s, outcome in zip(samples, outcomes, strict=True)]
    for _ in range(2):
        run_trainer_step(trainer, queue, samples)
    said = [line for line in capsys.readouterr().err.splitlines() if "nats" in line]
    if nats is None:
        assert said == []
    else:
        (line,) = said
        assert (
            f"step 1: rewards are up to 15 from their group's mean. At algorithm.vimpo.beta=0.001 that asks for {nats}"
            in line
        )
        assert "write +algorithm.vimpo.beta=0.0075" in line
