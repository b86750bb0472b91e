"""Claim: dropout of the policy's model does not reach kappa, values and advantages.

In train mode, in which verl's engine makes its updates, a model applies the dropout of its configuration; in a pass without
gradients, in eval mode, it does not. So a run takes the pass before the update, one pass is refused by name, and where a recipe
has no other (bypass_mode) it is said. Qwen's models have none; transformers' Seed-OSS has 0.1. LoRA: verl's FSDP engine makes
adapters without dropout.
"""

import pytest
import torch
from engine_harness import Setting, make_workers, run_one_pass_step, run_step
from engine_samples import make_samples
from in_process import make_config, make_trainer, run_trainer_step

from verl_patches.dropout import noise_in

DROPOUT = {"attention_dropout": 0.5}
OVERRIDE = "+actor_rollout_ref.model.override_config.attention_dropout=0.5"
EQUAL = {"equal_models": True, "knobs": {"use_actor": False}}


def test_the_joint_pass_has_no_dropout_and_the_update_has(models):
    """The same policy and reference: the pass before the update gives their KL, the update's own forward does not."""
    samples, setting = make_samples(), Setting(**EQUAL, model_config=DROPOUT)
    workers = make_workers(models, setting)
    two = run_step(models, setting, samples, workers)
    without = run_step(models, Setting(**EQUAL), samples)
    assert two.metrics["vimpo/kl"] == 0.0
    for name, rows in without.per_token.items():
        assert torch.equal(torch.cat(two.per_token[name]), torch.cat(rows)), name
    assert run_one_pass_step(models, setting, samples, workers).metrics["vimpo/kl"] > 0.01
    assert run_one_pass_step(models, Setting(**EQUAL), samples).metrics["vimpo/kl"] == 0.0


def test_a_run_takes_the_pass_before_the_update(models, monkeypatch):
    trainer, queue = make_trainer(make_config(models / "policy", OVERRIDE), monkeypatch)
    assert not trainer.passes.one and "the model has attention_dropout=0.5" in trainer.settings()
    metrics = run_trainer_step(trainer, queue, make_samples(tool_tokens=False))
    assert metrics["vimpo/kl"] == 0.0 and "old_log_probs" in next(iter(queue.rows.values()))


def test_without_dropout_it_takes_one(models, monkeypatch):
    trainer, _ = make_trainer(make_config(models / "policy"), monkeypatch)
    assert trainer.passes.one


def test_one_pass_is_refused_by_name(models, monkeypatch):
    config = make_config(models / "policy", OVERRIDE, "+algorithm.vimpo.passes=one")
    with pytest.raises(
        ValueError, match=r"passes=one: the model has attention_dropout=0.5, .*config.attention_dropout=0$"
    ):
        make_trainer(config, monkeypatch)


def test_a_recipe_without_another_pass_says_what_it_means(models, monkeypatch, capsys):
    bypass = ("algorithm.rollout_correction.bypass_mode=True", "actor_rollout_ref.rollout.calculate_log_probs=True")
    trainer, _ = make_trainer(make_config(models / "policy", OVERRIDE, *bypass), monkeypatch)
    assert trainer.passes.one
    assert "bypass_mode=True, which is one pass: the model has attention_dropout=0.5" in capsys.readouterr().err


def test_what_a_configuration_has_of_it():
    from transformers import GPT2Config, PhimoeConfig, Qwen3Config, Qwen3VLConfig, SeedOssConfig

    def found(config):
        return dict(noise_in(config.to_dict()))

    assert found(Qwen3Config()) == found(Qwen3VLConfig()) == {}
    assert found(SeedOssConfig()) == {"attention_dropout": 0.1, "residual_dropout": 0.1}
    assert found(Qwen3VLConfig(text_config={"attention_dropout": 0.2})) == {"text_config.attention_dropout": 0.2}
    assert found(PhimoeConfig()) == {"router_jitter_noise": 0.01}
    assert found(GPT2Config()) == {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}


def test_adapters_have_none(models):
    workers = make_workers(models, Setting(lora_rank=4))
    assert workers.actor.engine.module.peft_config["default"].lora_dropout == 0.0
