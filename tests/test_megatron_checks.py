"""Claim: the driver accepts verl's own Megatron recipes as far as VIMPO has run them, and names what it has not.

The overrides are those of verl's scripts (examples/grpo_trainer of its main branch: run_qwen3_8b_megatron,
run_qwen3_30b_a3b_megatron, run_qwen3_vl_30b_a3b_megatron). That the engine then does what VIMPO wants is tests/test_megatron.py.
"""

import pytest
from test_validation import refusals, validate, vimpo

A, R, M = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.model"
MEGATRON = ["model_engine=megatron", "trainer.n_gpus_per_node=8"]
OFFLOAD = [f"{A}.megatron.{kind}_offload=True" for kind in ("param", "optimizer")] + [
    f"{R}.megatron.param_offload=True"
]

ACCEPTED = {
    "tensor and pipeline parallel": [
        f"{A}.megatron.tensor_model_parallel_size=2",
        f"{A}.megatron.pipeline_model_parallel_size=2",
        f"{R}.megatron.tensor_model_parallel_size=2",
        f"{R}.megatron.pipeline_model_parallel_size=2",
    ],
    "context and expert parallel, offload": [
        *OFFLOAD,
        f"{A}.megatron.tensor_model_parallel_size=2",
        f"{A}.megatron.context_parallel_size=2",
        f"{A}.megatron.expert_model_parallel_size=8",
        f"{A}.megatron.expert_tensor_parallel_size=1",
        f"+{A}.megatron.override_transformer_config.recompute_granularity=full",
        f"+{A}.megatron.override_transformer_config.moe_router_dtype=fp32",
    ],
    "interleaved": [
        f"{A}.megatron.pipeline_model_parallel_size=2",
        f"{A}.megatron.virtual_pipeline_model_parallel_size=2",
    ],
    "vanilla mbridge": [f"{A}.megatron.use_mbridge=True", f"{A}.megatron.vanilla_mbridge=True"],
    "fused kernels": [f"{M}.use_fused_kernels=True"],
    "current kappa": ["+algorithm.vimpo.kappa_policy=current"],
    "router replay": [f"{A}.megatron.router_replay.mode=R3"],
    "LoRA": [f"{M}.lora.rank=32", f"{M}.lora.alpha=64", f"{M}.use_fused_kernels=True"],
    "sampled KL": ["+algorithm.vimpo.kl_estimator=k3", f"{A}.megatron.pipeline_model_parallel_size=4"],
}


@pytest.mark.parametrize("recipe", ACCEPTED)
def test_verls_own_recipes_are_accepted(recipe):
    overrides = [o.replace("+" + A, "++" + A) for o in ACCEPTED[recipe]]
    config = vimpo(*MEGATRON, *overrides)
    for _ in range(2):  # validating again finds nothing to refuse
        validate(config)


def test_the_reference_follows_the_policys_precision():
    config = vimpo(*MEGATRON, f"{A}.megatron.dtype=float16")
    validate(config)
    assert config.actor_rollout_ref.ref.megatron.dtype == "float16"


REFUSED = {
    f"{R}.megatron.tensor_model_parallel_size=2": "differs from the actor's 1: verl makes the groups of one of them",
    f"{R}.megatron.pipeline_model_parallel_size=2": "differs from the actor's 1: verl makes the groups of one of them",
    f"{R}.megatron.context_parallel_size=2": "differs from the actor's 1: verl makes the groups of one of them",
    f"{A}.megatron.dynamic_context_parallel=True": "another scheduler",
    f"{A}.megatron.use_megatron_fsdp=True": "Megatron-FSDP",
    f"++{A}.megatron.override_transformer_config.should_pad_vocab=True": "would count the padding",
    f"{A}.megatron.qat.enable=True": "verl quantises no reference",
    f"{R}.megatron.router_replay.mode=R3": "the routes are the policy's",
    f"{R}.megatron.dtype=float16": "equal weights would give different logits",
    f"{M}.lora_rank=8": "makes and loads adapters by lora.rank alone",
    f"{M}.mtp.enable=True": "multi-token prediction",
    "+algorithm.vimpo.ref_refresh_every=10": "have not been handed over",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_has_not_run_is_refused_by_name(override):
    messages = refusals(vimpo(*MEGATRON, override))
    assert any(override.split("=")[0].lstrip("+") in m and REFUSED[override] in m for m in messages), messages


def test_current_kappa_at_the_fused_head_is_refused():
    messages = refusals(vimpo(*MEGATRON, "+algorithm.vimpo.kappa_policy=current", f"{M}.use_fused_kernels=True"))
    assert any("verl's fused head hands a loss log-probs and entropy alone" in m for m in messages), messages


def test_adapters_through_vanilla_mbridge_are_refused():
    messages = refusals(vimpo(*MEGATRON, f"{M}.lora.rank=8", f"{A}.megatron.vanilla_mbridge=True"))
    assert any("adapters are Megatron-Bridge's" in m for m in messages), messages


def test_a_megatron_section_that_is_missing_is_named():
    messages = refusals(vimpo(f"{A}.strategy=megatron"))
    assert any("write model_engine=megatron" in m for m in messages), messages
