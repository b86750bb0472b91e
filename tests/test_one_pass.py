"""Claim: one pass (algorithm.vimpo.passes) does the update of two passes without a pass before it.

On verl's FSDP engine: with the value loss alone the gradient is that of two passes; with the actor loss, too, when both are
given the same statistics, however the batch is cut into micro-batches and ranks. The metrics of a batch are those that two
passes log. Through verl's trainer stages: the statistics of a step are those that the next one uses, the first has no actor
loss, both in a checkpoint; the reference and the policy run once a sequence. Not covered: that training learns as well with
the statistics of the batch before (docs/method.md, "One pass", has the comparison).
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_harness import Setting, make_workers, run_on_ranks, run_one_pass_step, run_step, run_step_both_ways
from engine_samples import make_samples, make_uneven_samples, placeholders
from in_process import make_config, make_trainer, run_trainer_step
from test_validation import BYPASS, vimpo

from vimpo_verl.one_pass import Statistics

BATCH_METRICS = {
    "vimpo/kl", "vimpo/residual_rms", "vimpo/target_rms", "vimpo/advantage_mean", "vimpo/advantage_std",
    "vimpo/outcome_correlation", "vimpo/value_explained_variance", "vimpo/outcome_auc", "vimpo/beta_fit",
}  # fmt: skip
UPDATE_METRICS = {"vimpo/value_loss", "vimpo/actor_loss", "grad_norm", "loss", "vimpo/actor_coeff", "vimpo/beta"}
SETTINGS = {
    "plain": {},
    "FSDP1": {"strategy": "fsdp"},
    "padding kept": {"use_remove_padding": False},
    "one micro-batch": {"micro_batch_size": 8},
    "dynamic batch size": {"micro_batch_size": None},
    "temperature": {"temperature": 0.7},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora_rank": 4},
    "lambda": {"lam": 0.6},
    "k2": {"knobs": {"kl_estimator": "k2"}},
    "k3": {"knobs": {"kl_estimator": "k3"}},
    "kappa of the current policy": {"knobs": {"kappa_policy": "current"}},
    "Huber": {"knobs": {"value_loss_type": "huber", "huber_delta": 0.1}},
    "entropy": {"actor": {"entropy_coeff": 0.02}},
    "KL loss": {"actor": {"use_kl_loss": True, "kl_loss_coef": 0.03}},
    "equal models": {"equal_models": True},
    # Where verl's own log-probs are rounded to half precision, those of the pass before the update are not.
    "bfloat16": {"dtype": "bf16"},
    "bfloat16, padding kept": {"dtype": "bf16", "use_remove_padding": False},
}


def with_knobs(changed: dict, **knobs) -> Setting:
    return Setting(**{**changed, "knobs": {**changed.get("knobs", {}), **knobs}})


def assert_same_gradients(found, expected, tolerance=1e-6):
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        difference = sum((mine[name].double() - theirs[name].double()).square().sum() for name in theirs)
        norm = sum(gradient.double().square().sum() for gradient in theirs.values())
        assert norm > 0 and (difference / norm).sqrt().item() <= tolerance


def assert_same_metrics(found, expected, names, rel=1e-5):
    for name in names & expected.keys():
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=rel, abs=1e-6), name


def adapters_on(engine) -> None:
    """Fresh adapters leave the policy the reference; these do not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:
                shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                shard.copy_(0.3 * torch.randn(shard.shape, generator=generator))


def two_then_one(models, changed: dict, samples, **knobs):
    """A step in two passes, and the same in one with that step's statistics for those of the batch before."""
    setting = with_knobs(changed, **knobs)
    workers = make_workers(models, setting)
    if setting.lora_rank:
        adapters_on(workers.actor.engine)
    return run_step_both_ways(models, setting, samples, workers)


@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_the_update_with_the_value_loss_alone_is_that_of_two_passes(models, changed):
    """No statistics are needed, and none are given."""
    setting, samples = with_knobs(changed, use_actor=False), make_samples()
    workers = make_workers(models, setting)
    two, one = (step(models, setting, samples, workers) for step in (run_step, run_one_pass_step))
    assert_same_gradients(one.gradients, two.gradients)
    assert_same_metrics(one.metrics, {**two.batch.metrics, **two.metrics}, BATCH_METRICS | UPDATE_METRICS)


WITH_ACTOR = {name: changed for name, changed in SETTINGS.items() if name != "equal models"}  # which have no advantages


@pytest.mark.parametrize("changed", WITH_ACTOR.values(), ids=WITH_ACTOR)
def test_the_update_with_the_actor_loss_is_that_of_two_passes_given_the_same_statistics(models, changed):
    two, one = two_then_one(models, changed, make_samples(), actor_coeff=0.3, actor_trust=False)
    assert_same_gradients(one.gradients, two.gradients)
    assert_same_metrics(one.metrics, two.metrics, BATCH_METRICS | UPDATE_METRICS)


def test_the_first_update_of_several_has_no_ratio_and_the_next_has_one(models):
    """In bfloat16, where the ratio of a policy that has not moved (lr=0) is noise around 1; without value_clip L_V has none."""
    halves, samples = Setting(dtype="bf16", mini_batches=2, knobs={"use_actor": False}), make_samples()
    found = run_step(models, halves, samples).gradients
    expected = run_step(models, replace(halves, knobs={"use_actor": False, "value_clip": None}), samples).gradients
    assert_same_gradients(found[:1], expected[:1])
    with pytest.raises(AssertionError):
        assert_same_gradients(found[1:], expected[1:], 1e-3)


def test_the_default_coefficient_follows_from_the_statistics(models):
    two, one = two_then_one(models, {}, make_samples(seed=1))
    assert two.batch.actor_coeff == pytest.approx(one.batch.actor_coeff, rel=1e-6) and one.batch.actor_coeff > 1e-4
    assert_same_gradients(one.gradients, two.gradients)


def test_raw_advantages(models):
    two, one = two_then_one(models, {}, make_samples(), actor_coeff=0.3, actor_trust=False, whiten=False)
    assert_same_gradients(one.gradients, two.gradients)


def test_uneven_groups_and_placeholders(models):
    samples = [*make_uneven_samples(), *placeholders(4)]
    two, one = two_then_one(models, {}, samples, actor_coeff=0.3, actor_trust=False)
    assert_same_gradients(one.gradients, two.gradients)
    assert_same_metrics(one.metrics, two.metrics, BATCH_METRICS | UPDATE_METRICS)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("use_remove_padding", [True, False])
def test_fused_kernels(tied_models, own_forward, strategy, use_remove_padding):
    changed = {"strategy": strategy, "use_remove_padding": use_remove_padding}
    plain = run_step(tied_models, with_knobs(changed, actor_coeff=0.3, actor_trust=False), make_samples())
    two, one = two_then_one(
        tied_models, {**changed, "use_fused_kernels": True}, make_samples(), actor_coeff=0.3, actor_trust=False
    )
    assert_same_gradients(one.gradients, two.gradients)
    assert_same_gradients(one.gradients, plain.gradients, 1e-5)
    assert_same_metrics(one.metrics, two.metrics, BATCH_METRICS | UPDATE_METRICS)


def test_the_entropy_is_that_of_the_old_pass(models):
    setting, samples = Setting(), make_samples()
    two, one = run_step(models, setting, samples), run_one_pass_step(models, setting, samples)
    entropy, mask = torch.cat(two.per_token["entropy"]), torch.tensor([m for s in samples for m in s.mask]).bool()
    assert one.metrics["actor/entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-6)


def test_without_a_batch_before_there_is_no_actor_loss(models):
    setting, samples = Setting(knobs={"actor_coeff": 0.3, "actor_trust": False}), make_samples()
    one = run_one_pass_step(models, setting, samples)
    value_only = run_one_pass_step(models, Setting(knobs={"use_actor": False}), samples)
    assert one.batch.actor_coeff == 0.0
    assert_same_gradients(one.gradients, value_only.gradients)
    nothing = Statistics(advantage_mean=0.0, advantage_std=0.0, residual_rms=0.5, outcome_correlation=0.0)
    assert run_one_pass_step(models, replace(setting, before=nothing), samples).batch.actor_coeff == 0.0


BEFORE = Statistics(advantage_mean=0.02, advantage_std=0.3, residual_rms=0.5, outcome_correlation=0.4)


def on_a_rank(rank, models, setting, samples):
    return run_one_pass_step(models, setting, samples)


@pytest.mark.parametrize("ranks, sp_size", [(2, 1), (2, 2)], ids=["two ranks", "Ulysses"])
def test_ranks_change_nothing(models, ranks, sp_size):
    setting, samples = Setting(before=BEFORE, knobs={"actor_coeff": 0.3}), make_samples()
    one = run_one_pass_step(models, setting, samples)
    found = run_on_ranks(ranks, on_a_rank, models, replace(setting, sp_size=sp_size), samples)
    assert_same_gradients(found[0].gradients, one.gradients, 1e-5)
    assert_same_metrics(found[0].metrics, one.metrics, BATCH_METRICS | UPDATE_METRICS | {"actor/entropy"})
    for name in BATCH_METRICS & one.metrics.keys():
        if sp_size == 1:
            assert found[1].metrics[name] == found[0].metrics[name], name


def with_a_nan_on_rank_1(rank, models, samples, folder):
    """The plugin that tests/test_faults.py puts into whole runs."""
    os.environ.update(INCIDENT="joint_pass:1:nan:rank-1", INCIDENT_FILE=str(folder / "incident"))
    sys.path.insert(0, str(Path(__file__).parent / "plugins"))
    import incidents  # noqa: F401

    run_one_pass_step(models, Setting(), samples)


def test_a_reference_that_is_nan_on_one_rank_is_named_with_it(models, tmp_path):
    wanted = r"step 1: ref_log_prob is nan at response token \d+ of sample number [4-7] .*on rank 1 "
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=wanted):
        run_on_ranks(2, with_a_nan_on_rank_1, models, make_samples(), tmp_path)
    assert (tmp_path / "incident").read_text() == "joint_pass"


def test_each_model_runs_once(models):
    setting = Setting()
    workers, forwards = make_workers(models, setting), {"actor": 0, "ref": 0}

    def count(name):
        def hook(*_):
            forwards[name] += 1

        return hook

    for name in forwards:
        getattr(workers, name).engine.module.register_forward_pre_hook(count(name))
    run_one_pass_step(models, setting, make_samples(), workers)
    assert forwards == {"actor": 4, "ref": 4}  # micro-batches


def test_two_passes_after_one_are_as_before(models):
    setting = Setting()
    workers, samples = make_workers(models, setting), make_samples()
    expected = run_step(models, setting, samples, workers)
    run_one_pass_step(models, setting, samples, workers)
    found = run_step(models, setting, samples, workers)
    for name, gradient in expected.gradients[0].items():
        assert torch.equal(found.gradients[0][name], gradient), name


# ---- through verl's trainer ------------------------------------------------------------------------------------------

ONE = "+algorithm.vimpo.passes=one"
FIXED = ("+algorithm.vimpo.actor_coeff=0.3", "+algorithm.vimpo.actor_trust=false")


def trainer_steps(models, monkeypatch, *overrides, steps=3, samples=None):
    trainer, queue = make_trainer(make_config(models / "policy", *overrides), monkeypatch)
    samples = samples or make_samples(tool_tokens=False)
    return trainer, queue, [run_trainer_step(trainer, queue, samples) for _ in range(steps)]


def test_value_only_steps_are_those_of_two_passes(models, monkeypatch):
    value_only = "+algorithm.vimpo.use_actor=false"
    _, _, two = trainer_steps(models, monkeypatch, value_only)
    _, _, one = trainer_steps(models, monkeypatch, value_only, ONE)
    for found, expected in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        assert_same_metrics(found, expected, {n for n in expected if "perf" not in n and "mfu" not in n}, rel=1e-4)


def test_the_statistics_of_a_step_are_those_that_the_next_uses(models, monkeypatch):
    trainer, queue, steps = trainer_steps(models, monkeypatch, ONE, *FIXED)
    first, second, third = steps
    assert first["vimpo/kl"] == 0.0 and first["vimpo/residual_rms"] == first["vimpo/target_rms"] > 0
    assert first["vimpo/actor_coeff"] == second["vimpo/actor_coeff"] == 0.0, "the first batch's advantages are all 0"
    assert third["vimpo/actor_coeff"] == 0.3 and second["vimpo/advantage_std"] > 0
    assert third["vimpo/actor_loss"] != 0.0
    assert trainer.before == Statistics.of_metrics(third)
    # verl logs the advantages that were trained on, of which the driver has none.
    mean, std = second["vimpo/advantage_mean"], second["vimpo/advantage_std"]
    white = (third["vimpo/advantage_mean"] - mean) / (std**2 + 1e-8) ** 0.5
    assert trainer.trained_advantages["critic/advantages/mean"] == pytest.approx(white, rel=1e-6)
    assert {"critic/advantages/mean", "critic/advantages/max", "critic/advantages/min"} == set(
        trainer.trained_advantages
    )


def test_a_refreshed_reference_ends_the_statistics(models, monkeypatch):
    trainer, _ = make_trainer(make_config(models / "policy", ONE, "+algorithm.vimpo.ref_refresh_every=2"), monkeypatch)
    trainer.local_trigger_step, trainer.parameter_sync_step, kept = 0, 1, []
    for trainer.global_steps in (1, 2):
        run_trainer_step(trainer, trainer.actor_rollout_wg.queue, make_samples(tool_tokens=False))
        kept.append(trainer.before)
    assert kept[0] is not None and kept[1] is None


def test_the_statistics_are_in_the_checkpoint(models, monkeypatch, tmp_path, capsys):
    trainer, queue, _ = trainer_steps(models, monkeypatch, ONE, steps=2)
    trainer.save_state(tmp_path)
    resumed, _ = make_trainer(make_config(models / "policy", ONE), monkeypatch)
    resumed.load_state(tmp_path)
    assert resumed.before == trainer.before
    assert resumed.run_beta.found == trainer.run_beta.found
    state = json.loads((tmp_path / "vimpo_state.json").read_text())
    (tmp_path / "vimpo_state.json").write_text(json.dumps({n: v for n, v in state.items() if n != "one_pass"}))
    resumed.load_state(tmp_path)
    assert resumed.before is None and "has no statistics of its last batch" in capsys.readouterr().out
    (tmp_path / "vimpo_state.json").write_text(json.dumps({**state, "one_pass": {"advantage_std": "much"}}))
    with pytest.raises(ValueError, match="vimpo_state.json: the statistics of the batch before cannot be read"):
        resumed.load_state(tmp_path)


def test_a_non_finite_model_is_named_with_sample_and_token(models, monkeypatch):
    trainer, queue = make_trainer(make_config(models / "policy", ONE), monkeypatch)
    worker = trainer.actor_rollout_wg.worker.ref
    with torch.no_grad():
        next(p for n, p in worker.engine.module.named_parameters() if "norm" in n).fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match=r"step 1: ref_log_prob is nan at response token 0 of sample number 0 .*on rank 0 "
    ):
        run_trainer_step(trainer, queue, make_samples(tool_tokens=False))


def test_a_reward_that_is_not_finite_is_named(models, monkeypatch):
    trainer, queue = make_trainer(make_config(models / "policy", ONE), monkeypatch)
    samples = make_samples(tool_tokens=False)
    samples[1] = replace(samples[1], outcome=torch.nan)
    with pytest.raises(FloatingPointError, match="step 1: reward is nan .* of sample p0_1_0"):
        run_trainer_step(trainer, queue, samples)


def test_a_batch_of_several_updates_takes_two_passes(models, monkeypatch, capsys):
    """As where prompts have numbers of responses of their own; the recipe's own batch is one update."""
    trainer, queue = make_trainer(make_config(models / "policy", ONE), monkeypatch)
    few, many = make_samples(tool_tokens=False), make_samples(prompts=8, tool_tokens=False)
    run_trainer_step(trainer, queue, few)
    assert "old_log_probs" not in next(iter(queue.rows.values()))
    metrics = run_trainer_step(trainer, queue, many)
    assert "old_log_probs" in next(iter(queue.rows.values()))
    assert trainer.before == Statistics.of_metrics(metrics)
    assert "the batch has 16 responses, 2 mini-batches: two passes" in capsys.readouterr().out
    run_trainer_step(trainer, queue, few)
    assert "old_log_probs" not in next(iter(queue.rows.values()))


HALF = "++actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"


def with_old_log_probs_of_its_own() -> type:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class Own(PPOTrainerSync):
        def _compute_old_log_prob(self, batch, metrics):
            batch = super()._compute_old_log_prob(batch, metrics)
            for row in self.actor_rollout_wg.queue.rows.values():
                row["old_log_probs"] = row["old_log_probs"] + 0.1
            return batch

    return Own


def test_in_two_passes_the_ratio_of_the_one_update_is_exactly_1_in_half_precision(models, monkeypatch):
    trainer, queue, steps = trainer_steps(models, monkeypatch, "+algorithm.vimpo.passes=two", HALF, *FIXED)
    assert all(metrics["actor/ppo_kl"] == metrics["actor/pg_clipfrac"] == 0.0 for metrics in steps)
    assert any((row["old_log_probs"] != row["old_log_probs"].bfloat16()).any() for row in queue.rows.values())
    assert steps[2]["vimpo/advantage_std"] > 0 and steps[2]["vimpo/actor_coeff"] == 0.3


def test_old_log_probs_of_a_trainer_of_ones_own_keep_their_ratio(models, monkeypatch):
    trainer, queue = make_trainer(make_config(models / "policy"), monkeypatch, stock=with_old_log_probs_of_its_own())
    metrics = run_trainer_step(trainer, queue, make_samples(tool_tokens=False))
    assert metrics["actor/ppo_kl"] == pytest.approx(0.1, rel=1e-4)


def test_with_bypass_mode_the_ratio_is_to_the_rollouts_log_probs(models, monkeypatch):
    trainer, queue = make_trainer(make_config(models / "policy", *BYPASS, *FIXED), monkeypatch)
    samples = make_samples(tool_tokens=False)
    rollout = [torch.full((len(sample.response),), -3.5) for sample in samples]
    steps = [run_trainer_step(trainer, queue, samples, rollout) for _ in range(3)]
    assert steps[0]["vimpo/kl"] == 0.0 < steps[1]["vimpo/kl"]
    for row in queue.rows.values():
        assert torch.equal(row["old_log_probs"], row["rollout_log_probs"])
    assert steps[2]["actor/ppo_kl"] != 0.0 and steps[2]["vimpo/actor_coeff"] == 0.3


SAME_BY_DESIGN = {
    "one update": (("+algorithm.vimpo.use_actor=false",), True, "one update a batch"),
    "no weight of the actor loss": (("+algorithm.vimpo.actor_coeff=0",), True, "one update a batch"),
    "the actor loss": ((), True, "one update a batch"),
    "a reference that is refreshed": (("+algorithm.vimpo.ref_refresh_every=20",), False, "ref_refresh_every=20"),
    "the same without the actor loss": (
        ("+algorithm.vimpo.ref_refresh_every=20", "+algorithm.vimpo.use_actor=false"),
        True,
        "one update a batch",
    ),
    "mini-batches": (("actor_rollout_ref.actor.ppo_mini_batch_size=2",), False, "several updates a batch"),
    "epochs": (("actor_rollout_ref.actor.ppo_epochs=2",), False, "actor.ppo_epochs=2"),
    "importance weights": (
        ("+algorithm.vimpo.use_actor=false", "algorithm.rollout_correction.rollout_is=token"),
        False,
        "rollout_is=token",
    ),
    "bypass": (BYPASS, True, "bypass_mode"),
    "Megatron": (
        ("+algorithm.vimpo.use_actor=false", "actor_rollout_ref.actor.strategy=megatron"),
        False,
        "strategy=megatron",
    ),
    "asked for two": (("+algorithm.vimpo.passes=two",), False, "passes=two"),
    "asked for one": (("+algorithm.vimpo.passes=one",), True, "passes=one"),
}


@pytest.mark.parametrize("overrides, one, why", SAME_BY_DESIGN.values(), ids=SAME_BY_DESIGN)
def test_auto_takes_one_pass_where_it_is_the_same(overrides, one, why):
    from verl_patches.passes import decide
    from verl_patches.switch import knobs_of as knobs

    config = vimpo(*overrides)
    passes = decide(config, knobs(config)[0])
    assert passes.one == one and why in passes.why
    assert str(passes).startswith("one pass a step" if one else "two passes a step")
