"""Claim: in separate_async, with a hybrid engine, every update of a cycle is the formula's, its old policy the cycle's first;
with bypass_mode its own, in one pass.

And how far the samples' policies lie behind it is logged, by verl, in VIMPO's runs as in all.

verl's own trainer stages and worker, which keeps weights on the host and restores them, in one process against float64. Not
covered: a whole run, for which verl needs a checkpoint engine that moves weights between GPUs; none works on a CPU.
"""

import engine_formula
import pytest
import torch
from engine_harness import parameters_of
from engine_samples import make_samples
from in_process import PARTITION, make_config, make_trainer, run_trainer_step
from test_off_policy import FORMULA, OVERRIDES, change, relative
from test_validation import BYPASS, refusals, validate, vimpo
from transfer_queue import KVBatchMeta

IN_ONE_PROCESS = (
    "trainer.v1.trainer_mode=separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
)
LAGS = ("staleness/mean", "staleness/max", "staleness_worst/max")  # verl's names, as in docs/metrics.md
SEPARATE = (*IN_ONE_PROCESS, "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl")  # which wants CUDA


@pytest.fixture
def kept_weights(monkeypatch):
    """verl copies to the host by Tensor.cpu(), which on a CPU copies nothing: the weights kept would move with the model."""
    import verl.utils.fsdp_utils as fsdp_utils

    save = fsdp_utils.fsdp2_sharded_save_to_cpu

    def copied(model):
        state, spec = save(model)
        return {name: (shard.clone(), of_shard) for name, (shard, of_shard) in state.items()}, spec

    monkeypatch.setattr(fsdp_utils, "fsdp2_sharded_save_to_cpu", copied)


def test_the_second_update_of_a_cycle(models, monkeypatch, kept_weights):
    batches = [make_samples(seed=seed, tool_tokens=False) for seed in (3, 4)]
    config = make_config(models / "policy", *OVERRIDES, *IN_ONE_PROCESS, "data.train_batch_size=8")
    trainer, queue = make_trainer(config, monkeypatch)
    engine, parameters, metrics = trainer.actor_rollout_wg.worker.actor.engine, [], []
    for trigger, samples in enumerate(batches):
        trainer.local_trigger_step = trigger
        metrics.append(run_trainer_step(trainer, queue, samples))
        parameters.append(parameters_of(engine))
    first = engine_formula.step(models, batches[0], **FORMULA)
    start = engine_formula.load(models / "policy")
    old = engine_formula.per_token(start, start, batches[1], 1.0)
    second = engine_formula.step(models, batches[1], **FORMULA, policy=first["policy"], old=old)
    for row, expected in zip(queue.rows.values(), old["log_probs"], strict=True):
        torch.testing.assert_close(row["old_log_probs"].double(), expected, rtol=1e-4, atol=1e-4)
        assert not row["token_kl"].any(), "of the policy that the cycle started with, which is the reference"
    assert metrics[0]["actor/ppo_kl"] == 0.0 != metrics[1]["actor/ppo_kl"]
    assert metrics[1]["vimpo/value_loss"] == pytest.approx(second["updates"][0]["value_loss"], rel=1e-4)
    moved, expected = change(*parameters), change(first["parameters"], second["parameters"])
    assert relative(moved, expected) < 1e-3
    unlike = engine_formula.step(models, batches[1], **FORMULA)
    assert relative(moved, change(first["parameters"], unlike["parameters"])) > 0.02


def test_with_bypass_mode_each_update_of_a_cycle_is_one_pass_at_its_own_policy(models, monkeypatch, kept_weights):
    """Of responses whose log-probs in the rollout are those of the policy that is updated, so that every ratio is 1."""
    value_only = ("+algorithm.vimpo.use_actor=false", *BYPASS, *IN_ONE_PROCESS, "data.train_batch_size=8")
    trainer, queue = make_trainer(make_config(models / "policy", *value_only), monkeypatch)
    engine = trainer.actor_rollout_wg.worker.actor.engine
    reference, policy = (engine_formula.load(models / "policy") for _ in range(2))
    of_formula = [{name: p.detach().clone() for name, p in policy.named_parameters()}]
    for trigger, seed in enumerate((3, 4)):
        samples, trainer.local_trigger_step = make_samples(seed=seed, tool_tokens=False), trigger
        own = engine_formula.per_token(policy, reference, samples, 1.0)["log_probs"]
        expected = engine_formula.step(models, samples, **FORMULA | {"coeff": 0.0}, policy=policy)
        of_formula.append(expected["parameters"])
        before = parameters_of(engine)
        metrics = run_trainer_step(trainer, queue, samples, [log_probs.float() for log_probs in own])
        assert trainer.takes_one_pass and (metrics["vimpo/kl"] > 0) == (trigger == 1)
        assert metrics["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-4)
        assert relative(change(before, parameters_of(engine)), change(*of_formula[-2:])) < 1e-3


def test_one_pass_without_bypass_mode_is_refused():
    (problem,) = refusals(vimpo(*SEPARATE, "+algorithm.vimpo.passes=one"))
    assert "trainer.v1.trainer_mode=separate_async" in problem and problem.endswith("write algorithm.vimpo.passes=auto")


def test_how_stale_the_samples_are_is_logged(models, monkeypatch):
    """In cycle 7 the old policy, and so kappa's, is version 6; responses of versions 3 to 5, one begun at 2."""
    config = make_config(models / "policy", *OVERRIDES, *IN_ONE_PROCESS, "data.train_batch_size=8")
    trainer, queue = make_trainer(config, monkeypatch)
    trainer.local_trigger_step = 0
    metrics, versions = run_trainer_step(trainer, queue, make_samples()), [3, 4, 5, 5, 3, 4, 5, 5]
    for i, (key, version) in enumerate(zip(queue.rows, versions, strict=True)):
        queue.tags[key] |= {"min_global_steps": version - (i == 0), "max_global_steps": version}
        queue.rows[key]["num_turns"] = 2
    trainer.use_critic, trainer._rollout_moe_lb_metrics_accumulator = False, None
    trainer._get_n_gpus_for_throughput = lambda: 1
    batch = KVBatchMeta(list(queue.rows), queue.tags_of(queue.rows), PARTITION, extra_info={})
    trainer._compute_metrics(batch, metrics, {"step": 1.0}, global_steps=7, epoch=0)
    lag = {name: metrics[f"training/off_policy/trajectory_{name}"] for name in LAGS}
    real = [version for version, sample in zip(versions, make_samples(), strict=True) if not sample.is_padding]
    assert lag["staleness/max"] == 6 - min(real) == 3 and lag["staleness/mean"] == 6 - sum(real) / len(real)
    assert lag["staleness_worst/max"] == 4


def test_trainer_and_worker_are_verls_with_vimpos_part():
    from verl.experimental.separation.engine_workers import DetachActorWorker
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from verl_patches.family_trainer import trainer_class
    from verl_patches.trainer import VimpoTrainer

    verls = TRAINER_REGISTRY["separate_async"]
    made = trainer_class(verls, vimpo(*SEPARATE))
    assert issubclass(made, VimpoTrainer) and issubclass(made, verls)
    worker = made.worker_in_place_of(DetachActorWorker)
    order = [cls.__name__ for cls in worker.__mro__]
    assert (
        order.index("VimpoActorRolloutRefWorker")
        < order.index("DetachActorWorker")
        < order.index("ActorRolloutRefWorker")
    )


def test_accepted_with_a_hybrid_engine_and_refused_without():
    validate(vimpo(*SEPARATE))
    (problem,) = refusals(vimpo(*SEPARATE, "actor_rollout_ref.hybrid_engine=False"))
    assert (
        "actor_rollout_ref.hybrid_engine=False" in problem and "write actor_rollout_ref.hybrid_engine=True" in problem
    )
