"""Claim: the driver accepts the engines on which the joint pass runs, and gives the reference the policy's slices and rounding.

The overrides are those of verl's own scripts for these engines (examples/grpo_trainer of its main branch: run_qwen3_30b_veomni,
run_qwen3_vl_30b_moe_veomni, run_qwen3_5_27b_fsdp_turbo), without what no check looks at. That the engines then do what VIMPO
wants is tests/test_derived_engines.py.
"""

import pytest
from omegaconf import OmegaConf
from test_validation import refusals, validate, vimpo

A, R = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
VEOMNI = [
    "model_engine=veomni",
    f"{A}.veomni.param_offload=True",
    f"{A}.veomni.fsdp_size=-1",
    f"{R}.veomni.param_offload=True",
]
PLAN = (
    "{fully_shard_parallel_size:8,ulysses_parallel_size:SIZE,"
    "fsdp_plan:{param_dtype:bf16,output_dtype:bf16,hook_modules:['model.language_model.layers.{*}']}}"
)


def turbo(role, size=1):
    return f"{role}.fsdp_config.turbo_config.distributed={PLAN.replace('SIZE', str(size))}"


def forced(override):
    return "++" + override


ACCEPTED = {
    "veomni": VEOMNI,
    "veomni, sequence parallel": [
        *VEOMNI,
        f"{R}.strategy=veomni",
        f"{R}.veomni.expert_parallel_size=1",
        f"{A}.veomni.ulysses_parallel_size=2",
        f"{A}.veomni.attn_implementation=veomni_flash_attention_2_with_sp",
    ],
    "fsdp_turbo": [f"{A}.strategy=fsdp_turbo", f"{R}.strategy=fsdp_turbo", forced(turbo(A)), forced(turbo(R))],
    "fsdp_turbo, sequence parallel": [
        f"{A}.strategy=fsdp_turbo", f"{R}.strategy=fsdp_turbo", forced(turbo(A, 2)), forced(turbo(R, 2))
    ],
}  # fmt: skip


@pytest.mark.parametrize("engine", ACCEPTED)
def test_verls_own_recipes_are_accepted(engine):
    config = vimpo(*ACCEPTED[engine])
    for _ in range(2):  # validating again finds nothing to refuse
        validate(config)


def test_the_reference_on_veomni_follows_the_policy():
    kernels = {
        "attn_implementation": "sdpa",
        "rms_norm_implementation": "triton",
        "causal_conv1d_implementation": "fla",
    }
    config = vimpo(
        *VEOMNI, f"{A}.veomni.ulysses_parallel_size=2", f"{A}.veomni.mixed_precision=false",
        *(f"{A}.veomni.{name}={value}" for name, value in kernels.items()),
    )  # fmt: skip
    validate(config)
    reference = config.actor_rollout_ref.ref.veomni
    assert reference.ulysses_parallel_size == 2 and reference.mixed_precision is False
    assert {name: reference[name] for name in kernels} == kernels


def test_the_reference_on_fsdp_turbo_gets_the_policys_plan_where_it_has_none():
    config = vimpo(f"{A}.strategy=fsdp_turbo", forced(turbo(A, 2)))
    validate(config)
    ref, actor = config.actor_rollout_ref.ref, config.actor_rollout_ref.actor
    assert ref.fsdp_config.turbo_config == actor.fsdp_config.turbo_config
    assert ref.fsdp_config.turbo_config.distributed.ulysses_parallel_size == 2


# what is asked for -> what the one refusal must say
REFUSED = {
    (f"++{A}.strategy=torchtitan",): ("no hook", f"{A}.strategy=fsdp2"),
    (f"++{A}.strategy=automodel",): ("no hook", f"{A}.strategy=fsdp2"),
    (f"++{A}.strategy=mindspeed",): ("Ascend", f"{A}.strategy=fsdp2"),
    (f"++{A}.strategy=mlite",): ("outside verl", f"{A}.strategy=fsdp2"),
    (f"++{A}.strategy=another",): ("FSDP engine", f"{A}.strategy=fsdp2"),
    (f"{A}.strategy=veomni",): ("no section", "model_engine=veomni"),
    (*VEOMNI, "actor_rollout_ref.model.lora_rank=8"): ("no adapters", "lora_rank=0"),
    (*VEOMNI, "actor_rollout_ref.model.use_fused_kernels=True"): ("no logits", "use_fused_kernels=False"),
    (*VEOMNI, f"{A}.veomni.router_replay.mode=R2"): ("experts of both", "router_replay.mode=disabled"),
    (*VEOMNI, f"{R}.veomni.ulysses_parallel_size=4"): (f"{R}.veomni.ulysses_parallel_size=4", "remove it"),
    (*VEOMNI, f"{R}.veomni.rms_norm_implementation=triton"): (f"{R}.veomni.rms_norm_implementation", "remove it"),
    (*VEOMNI, f"{R}.veomni.mixed_precision=false"): (f"{R}.veomni.mixed_precision", "remove it"),
    (f"{A}.strategy=fsdp_turbo", "actor_rollout_ref.model.lora_rank=8"): ("not tried", "lora_rank=0"),
    (f"{A}.strategy=fsdp_turbo", forced(turbo(A, 2)), forced(turbo(R, 1))): (
        f"{R}.fsdp_config.turbo_config.distributed.ulysses_parallel_size=1",
        "remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides", REFUSED, ids=lambda overrides: overrides[-1].split("=")[0] + overrides[-1][-8:])
def test_what_does_not_fit_is_refused_by_name(overrides):
    (problem,) = refusals(vimpo(*overrides))
    for words in REFUSED[overrides]:
        assert words in problem


def test_padding_to_a_length_is_refused_on_veomni():
    """verl's key beside the section reaches policy and reference."""
    problems = refusals(vimpo(*VEOMNI, f"{A}.pad_to_length=True"))
    assert len(problems) == 2 and all("veomni.pad_to_length=True" in problem for problem in problems)


def test_refusing_leaves_the_section_of_the_engine_alone():
    config = vimpo(*VEOMNI, "algorithm.gamma=0.9")
    before = OmegaConf.to_container(config, resolve=False)
    refusals(config)
    assert OmegaConf.to_container(config, resolve=False) == before
