"""Claim: on verl's real Megatron engine a step of VIMPO with DeepSeek-V3's architecture is that of the FSDP engine.

Latent attention, a dense layer before a mixture of experts, whose router has sigmoid scores and chooses with a bias in groups;
two ranks over gloo, through Megatron-Bridge: log-probs, entropy, KL, gradients, parameters. Marked slow.

Not covered: what test_megatron.py names; gradients of tensor-parallel ranks; rotary frequencies stretched by
YaRN, a router bias that moves.
"""

import pytest
import torch
from architectures import make_architecture
from engine_harness import Setting, run_on_ranks
from megatron_harness import MegatronSetting
from megatron_on_cpu import FOLDER
from test_megatron import assert_close, assert_same_step, fsdp_steps, megatron_steps, stack_experts

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="made by bash tests/run.sh --setup"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

STEP = {"lr": 0.1, "knobs": {"actor_coeff": 0.3, "actor_trust": False}}
# Fusions are Transformer Engine's; what Megatron-Bridge 0.3.1 does not find where transformers 5 has it in a configuration.
LATENT = {
    "rope_type": "rope", "rotary_scaling_factor": 1.0, "moe_router_score_function": "sigmoid", "moe_router_bias_update_rate": 0.0,
    "moe_permute_fusion": False, "moe_shared_expert_overlap": False, "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
}  # fmt: skip
LAYOUTS = {
    "expert parallel": {"expert_parallel": 2},
    "pipeline, fused head": {"pipeline_parallel": 2, "use_fused_kernels": True},
}
# Megatron Core's layers for latent attention without Transformer Engine do not add up the ranks' gradients of the key that all
# heads share: the joint pass alone.
TENSOR = {
    "tensor and expert parallel": {
        "tensor_parallel": 2,
        "expert_parallel": 2,
        "engine": {"expert_tensor_parallel_size": 1},
    },
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """(The step on the FSDP engine, layout -> that on the Megatron engine, of each rank)."""
    folder = tmp_path_factory.mktemp("deepseek_v3")
    make_architecture(folder, "deepseek_v3")
    expected = run_on_ranks(1, fsdp_steps, [(folder, Setting(**STEP))])[0][0]
    cases = [
        (folder, MegatronSetting(megatron_bridge=True, transformer=LATENT, **STEP, **layout))
        for layout in (*LAYOUTS.values(), *TENSOR.values())
    ]
    found = zip(*run_on_ranks(2, megatron_steps, cases), strict=True)
    return expected, dict(zip([*LAYOUTS, *TENSOR], found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_deepseek_v3_is_that_of_the_fsdp_engine(steps, layout):
    expected, found = steps
    for step in found[layout]:
        for tensors in (*step.gradients, step.parameters):
            stack_experts(tensors)
            for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:  # a buffer
                del tensors[name]
        assert_same_step(step, expected)


@pytest.mark.parametrize("layout", TENSOR)
def test_the_joint_pass_of_tensor_parallel_ranks_is_that_of_the_fsdp_engine(steps, layout):
    expected, found = steps
    for step in found[layout]:
        for name, rows in expected.per_token.items():
            assert_close(torch.cat(step.per_token[name]), torch.cat(rows))
