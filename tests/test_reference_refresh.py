"""Claim: with ref_refresh_every the policy becomes the reference, shard by shard and exactly, at the steps it says; a checkpoint
has it and a resumed run goes on with it; what cannot be refreshed is refused by name.
"""

import pytest
import torch
from engine_harness import Setting, make_workers, run_on_ranks
from engine_samples import make_samples
from in_process import make_config, make_trainer, run_trainer_step
from omegaconf import OmegaConf
from test_validation import vimpo

from verl_patches import recipe_checks, reference_refresh
from verl_patches.checkpoints import NEEDED

SAMPLES = make_samples(tool_tokens=False)


def trainer_of(models, monkeypatch, *overrides):
    trainer, queue = make_trainer(make_config(models / "policy", *overrides), monkeypatch)
    trainer.local_trigger_step, trainer.parameter_sync_step = 0, 1
    return trainer, queue


def weights(worker) -> dict[str, torch.Tensor]:
    """This rank's shards."""
    found = ((name, p.detach()) for name, p in worker.engine.module.named_parameters())
    return {name: (p.to_local() if hasattr(p, "to_local") else p).clone() for name, p in found}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_every_second_step(models, monkeypatch, strategy):
    trainer, queue = trainer_of(
        models, monkeypatch, "+algorithm.vimpo.ref_refresh_every=2", f"actor_rollout_ref.actor.strategy={strategy}"
    )
    worker = trainer.actor_rollout_wg.worker
    logged, same = [], []
    for trainer.global_steps in (1, 2, 3, 4):
        logged.append(run_trainer_step(trainer, queue, SAMPLES))
        same.append(equal(weights(worker.actor), weights(worker.ref)))
    assert same == [False, True, False, True]
    assert [step["vimpo/reference_refreshed"] for step in logged] == [0, 1, 0, 1]
    kl = [step["vimpo/kl"] for step in logged]
    assert kl[0] == kl[2] == 0.0 and kl[1] > 0 and kl[3] > 0, "exactly 0 where the policy is its own reference"
    assert logged[2]["vimpo/actor_coeff"] == 0.0 and logged[2]["vimpo/beta"] == logged[0]["vimpo/beta"]
    assert logged[2]["vimpo/residual_rms"] == logged[2]["vimpo/target_rms"], "values start from 0 again"


def test_without_the_knob_the_reference_stays(models, monkeypatch):
    trainer, queue = trainer_of(models, monkeypatch)
    before = weights(trainer.actor_rollout_wg.worker.ref)
    assert "vimpo/reference_refreshed" not in run_trainer_step(trainer, queue, SAMPLES)
    assert equal(weights(trainer.actor_rollout_wg.worker.ref), before)


def test_only_after_the_last_update_of_a_step(models, monkeypatch):
    trainer, queue = trainer_of(models, monkeypatch, "+algorithm.vimpo.ref_refresh_every=1")
    trainer.parameter_sync_step = 2
    logged = [
        run_trainer_step(trainer, queue, SAMPLES)["vimpo/reference_refreshed"] for trainer.local_trigger_step in (0, 1)
    ]
    assert logged == [0, 1]


def test_a_checkpoint_has_it(models, monkeypatch, tmp_path):
    """Saved from one worker, loaded into another, whose reference was the initial model."""
    trainer, queue = trainer_of(models, monkeypatch, "+algorithm.vimpo.ref_refresh_every=1")
    run_trainer_step(trainer, queue, SAMPLES)
    first = trainer.actor_rollout_wg.worker
    reference_refresh.save(first.ref.engine.module, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "reference_world_size_1_rank_0.pt" and NEEDED.fullmatch(f"actor/{file.name}")
    other = trainer_of(models, monkeypatch)[0].actor_rollout_wg.worker
    assert not equal(weights(other.ref), weights(first.ref))
    assert reference_refresh.load(other.ref.engine.module, tmp_path) is True
    assert equal(weights(other.ref), weights(first.ref))
    assert reference_refresh.load(other.ref.engine.module, tmp_path / "none") is False
    file.rename(tmp_path / "reference_world_size_4_rank_0.pt")
    with pytest.raises(RuntimeError, match="of another number of ranks: reference_world_size_4_rank_0.pt"):
        reference_refresh.load(other.ref.engine.module, tmp_path)


def test_models_that_are_not_alike_are_named():
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    with pytest.raises(RuntimeError, match="not sharded alike .2 tensors, such as bias"):
        reference_refresh.copy_weights(one, other)


def on_a_rank(rank, models, folder):
    workers = make_workers(models, Setting(strategy="fsdp2"))
    before = equal(weights(workers.actor), weights(workers.ref))
    reference_refresh.copy_weights(workers.actor.engine.module, workers.ref.engine.module)
    reference_refresh.save(workers.ref.engine.module, folder)
    return before, equal(weights(workers.actor), weights(workers.ref))


@pytest.mark.slow
def test_two_ranks(models, tmp_path):
    assert run_on_ranks(2, on_a_rank, models, tmp_path) == [(False, True)] * 2
    assert {path.name for path in tmp_path.iterdir()} == {f"reference_world_size_2_rank_{rank}.pt" for rank in (0, 1)}


@pytest.mark.parametrize(
    "override, reason",
    [
        ("actor_rollout_ref.model.lora_rank=8", "without its adapters"),
        ("actor_rollout_ref.actor.strategy=veomni", "write actor_rollout_ref.actor.strategy=fsdp2"),
    ],
)
def test_what_cannot_be_refreshed_is_refused(override, reason):
    config = vimpo("+algorithm.vimpo.ref_refresh_every=5")
    key, value = override.split("=")
    OmegaConf.update(config, key, int(value) if value.isdigit() else value)
    assert any("ref_refresh_every" in found and reason in found for found in recipe_checks._reference_refresh(config))
