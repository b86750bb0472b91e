"""Megatron-Bridge's Qwen3-VL on a CPU, for tests/test_vision_megatron.py: what megatron_on_cpu.py does for its language models.

Its layers are Transformer Engine's, its vision tower is transformers' own. Stood in for, beside what megatron_on_cpu.py names:
the specification of a layer, by Megatron Core's own with that file's norms and attention; and the form in which transformers 5
hands on what the tower has found, which Megatron-Bridge 0.3.1, written for transformers 4, takes for a pair.
"""

from pathlib import Path

import torch
from engine_harness import StepResult, gather_rows, joint_pass, run_step
from megatron_harness import MegatronSetting, make_megatron_workers


def install() -> None:
    """Once in a process, before verl's Megatron engine is imported."""
    import megatron_on_cpu

    megatron_on_cpu.install()
    _layers()
    _weight_names()
    _vision_tower()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None


def _layers() -> None:
    import megatron.core.transformer.transformer_block as block
    from megatron.bridge.models.qwen_vl import qwen3_vl_provider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron_on_cpu import Norm, replace_kernels

    def layer(num_experts, moe_grouped_gemm, qk_layernorm, fp8):
        """Arguments are those of get_gpt_layer_with_transformer_engine_spec, as Megatron-Bridge calls it."""
        spec = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=qk_layernorm, normalization="RMSNorm")
        replace_kernels(spec, qk_layernorm, has_experts=num_experts is not None)
        return spec

    qwen3_vl_provider.get_gpt_layer_with_transformer_engine_spec = layer
    block.LayerNormImpl = Norm


def _weight_names() -> None:
    from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLBridge
    from megatron_on_cpu import know_norms

    know_norms(Qwen3VLBridge, "language_model.decoder.layers", "model.language_model.layers")


def _vision_tower() -> None:
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import model

    class VisionModel(model.Qwen3VLVisionModelHF):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            return found.pooler_output, found.deepstack_features

    model.Qwen3VLVisionModelHF = VisionModel


def steps_on_rank(rank: int, cases: list[tuple[Path, list, MegatronSetting]]) -> list[dict]:
    """For each (models, samples, setting): the StepResult, or with equal models the joint pass's rows, and how often images were
    put together."""
    install()
    import megatron_on_cpu
    import verl.workers.engine.megatron.transformer_impl as implementation
    from vision_models import counted_images

    results = []
    for models, samples, setting in cases:
        workers = make_megatron_workers(models, setting)
        with counted_images(implementation) as count:
            if setting.equal_models:
                result = gather_rows(joint_pass(workers, samples, setting))
            else:
                result: StepResult = run_step(models, setting, samples, workers)
        results.append({"result": result, "images": count})
        megatron_on_cpu.forget_groups()
    return results
