"""Claim: the reference is stored in the precision that it is computed in, and nothing that it computes is another number for it.

On verl's FSDP engines, one rank and two, dense and mixture of experts: reference log-probs and kappa are bit for bit those of a
reference that is stored in float32, and with equal weights the KL is exactly 0; without the policy's buffers it is not. Through
verl's configuration: which recipes get it. Not covered: time and memory on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from engine_harness import (
    Setting,
    gather_rows,
    joint_pass,
    make_workers,
    run_on_ranks,
    run_one_pass_step,
    slice_of_rank,
)
from engine_samples import make_samples
from test_validation import refusals, validate, vimpo

from verl_patches import reference_precision

ACTOR, REF = "actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config"
BF16 = Setting(dtype="bf16", ref_model_dtype="bf16")
RESULTS = ("log_probs", "ref_log_probs", "token_kl")


def parts_of(engine) -> list[torch.Tensor]:
    """This rank's part of each parameter."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in engine.module.parameters()]


def passes_on_a_rank(rank, models, settings):
    """Of each setting: the joint pass, the KL of one pass, the bytes of the reference's parameters and of the policy's."""
    samples, found = make_samples(), []
    for setting in settings:
        workers = make_workers(models, setting)
        engines = (workers.ref.engine, workers.actor.engine)
        size, policys = (sum(part.numel() * part.element_size() for part in parts_of(engine)) for engine in engines)
        ranks = engines[0].get_data_parallel_size()
        mine = slice_of_rank(len(samples), rank, ranks)
        per_token = gather_rows(joint_pass(workers, samples[mine], setting))
        kl = run_one_pass_step(models, setting, samples, workers).metrics["vimpo/kl"]
        found.append((per_token, kl, size, policys))
    return found


def assert_same_bits(found, expected):
    for name in RESULTS:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[name], expected[name], strict=True)), name


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_two_ranks(models, strategy):
    setting = replace(BF16, strategy=strategy)
    settings = [setting, replace(setting, ref_model_dtype="fp32"), replace(setting, equal_models=True)]
    (half, kl, size, policys), (whole, its_kl, its_size, _), (equal, no_kl, *_) = run_on_ranks(
        2, passes_on_a_rank, models, settings
    )[0]
    assert_same_bits(half, whole)
    assert kl == its_kl > 0 and 2 * size == its_size == policys
    assert no_kl == 0.0 and all((row == 0).all() for row in equal["token_kl"])
    assert all(map(torch.equal, equal["log_probs"], equal["ref_log_probs"]))


SETTINGS = {
    "padding kept": {"use_remove_padding": False},
    "float16": {"dtype": "fp16", "ref_model_dtype": "fp16"},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_one_rank(models, changed):
    setting = replace(BF16, **changed)
    (half, *_), (whole, *_) = passes_on_a_rank(0, models, [setting, replace(setting, ref_model_dtype="fp32")])
    assert_same_bits(half, whole)


def test_a_mixture_of_experts(moe_models):
    (half, *_), (whole, *_) = passes_on_a_rank(0, moe_models, [BF16, replace(BF16, ref_model_dtype="fp32")])
    assert_same_bits(half, whole)


def test_with_fused_kernels(tied_models, own_forward):
    setting = replace(BF16, use_fused_kernels=True)
    (half, *_), (whole, *_) = passes_on_a_rank(0, tied_models, [setting, replace(setting, ref_model_dtype="fp32")])
    assert_same_bits(half, whole)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_without_the_policys_buffers_equal_weights_would_have_a_kl(models, monkeypatch, strategy):
    monkeypatch.setattr(reference_precision, "take_buffers", lambda reference, policy: None)
    setting = replace(BF16, strategy=strategy, equal_models=True)
    ((_, kl, *_),) = passes_on_a_rank(0, models, [setting])
    assert kl > 1e-6


def test_other_buffers_are_named():
    one, other = torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="different buffers .6, such as"):
        reference_precision.take_buffers(one, other)


# overrides -> what the reference is stored in
STORED = {
    "verl's defaults": ((), "bf16"),
    "said": ((f"{REF}.model_dtype=bfloat16",), "bf16"),
    "float16": ((f"+{ACTOR}.mixed_precision.param_dtype=fp16",), "fp16"),
    "float32": ((f"+{ACTOR}.mixed_precision.param_dtype=fp32",), "fp32"),
    "no dtype of the policy": ((f"{ACTOR}.model_dtype=null",), "bf16"),
    "a policy that is stored in half precision": ((f"{ACTOR}.model_dtype=bf16",), "bf16"),
    "that in another": ((f"{ACTOR}.model_dtype=fp16",), "fp16"),
    "FSDP1": (("actor_rollout_ref.actor.strategy=fsdp",), "bf16"),
    "FSDP-Turbo": (("actor_rollout_ref.actor.strategy=fsdp_turbo",), "fp32"),
}


@pytest.mark.parametrize("overrides, dtype", STORED.values(), ids=STORED)
def test_what_a_recipe_gets(overrides, dtype):
    config = vimpo(*overrides)
    for _ in range(2):  # validating again finds nothing to refuse
        validate(config)
        assert config.actor_rollout_ref.ref.fsdp_config.model_dtype == dtype
        assert (
            config.actor_rollout_ref.actor.fsdp_config.model_dtype
            == vimpo(*overrides).actor_rollout_ref.actor.fsdp_config.model_dtype
        )


@pytest.mark.parametrize("dtype", ["fp16", "nonsense"])
def test_another_precision_is_refused(dtype):
    (problem,) = refusals(vimpo(f"{REF}.model_dtype={dtype}"))
    assert f"{REF}.model_dtype={dtype} differs from the actor's fp32" in problem
