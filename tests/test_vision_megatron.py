"""Claim: VIMPO's step is right for Qwen3-VL and its mixture of experts with images on verl's real Megatron engine, through
Megatron-Bridge.

Log-probs, entropy, reference log-probs and exact KL of every response token, and the gradient of the language model and of the
vision tower, agree with the formula in float64 over transformers' own forward. Tensor, pipeline and expert parallelism, padding
kept and removed, dynamic batches, the fused head, kappa_policy=current. The reference gets the images of the policy's
micro-batch: its log-probs are those of its own forward with them, and they are put together once for every forward of a model.

On two gloo ranks of this machine, with what megatron_on_cpu.py and vision_on_megatron.py stand in for. Not covered: padding
removed with several sequences a micro-batch, and context parallelism, which Megatron-Bridge 0.3.1 has not for these models;
Qwen2.5-VL, whose part of it is for transformers 4; one pass, which is refused on Megatron.
"""

import engine_formula
import pytest
import torch
from engine_harness import run_on_ranks
from megatron_harness import MegatronSetting
from megatron_on_cpu import FOLDER
from test_engine import assert_step_agrees
from vision_models import make_vision_models, transposed_experts, vision_samples
from vision_on_megatron import steps_on_rank

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="made by bash tests/run.sh --setup"),
    pytest.mark.timeout(900),
]

PADDED = {"use_remove_padding": False}
ONE_SEQUENCE = {"micro_batch_size": 1}
TENSOR = {"tensor_parallel": 2, "sequence_parallel": False}
LAYOUTS = {
    "tensor parallel": {**TENSOR, **PADDED},
    "tensor parallel, dynamic batches, current kappa": {
        **TENSOR, **PADDED, "micro_batch_size": None, "max_token_len": 96, "knobs": {"kappa_policy": "current"},
    },
    "tensor parallel, padding removed": {**TENSOR, **ONE_SEQUENCE},
    "pipeline": {"pipeline_parallel": 2, **PADDED},
    "pipeline, padding removed, fused head": {"pipeline_parallel": 2, **ONE_SEQUENCE, "use_fused_kernels": True},
}  # fmt: skip
# Megatron-Bridge 0.3.1 has the mixture learn by its mergers alone, unless told otherwise; the fusion is Transformer Engine's.
MIXTURE = {
    **PADDED,
    "transformer": {
        "freeze_language_model": False,
        "freeze_vision_model": False,
        "moe_permute_fusion": False,
        "moe_aux_loss_coeff": 0.0,
    },
}
MIXTURES = {
    "expert parallel": {**MIXTURE, "expert_parallel": 2},
    "experts in a pipeline": {**MIXTURE, "pipeline_parallel": 2},
}
# With which Megatron-Bridge 0.3.1 averages the tower's gradient over ranks, also where each has had its own part of the sequence.
SEQUENCE_PARALLEL = {
    "tensor parallel, with sequence parallelism": {"tensor_parallel": 2, **PADDED},
    "tensor and expert parallel": {
        **MIXTURE,
        "tensor_parallel": 2,
        "expert_parallel": 2,
        "engine": {"expert_tensor_parallel_size": 1},
    },
}
EQUAL = {"equal weights, bfloat16": {**TENSOR, **PADDED, "dtype": "bf16", "equal_models": True}}
KINDS = ("qwen3_vl", "qwen3_vl_moe")


def kind_of(layout: str) -> str:
    return "qwen3_vl_moe" if "expert" in layout else "qwen3_vl"


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """(Layout -> what rank 0 found, kind of model -> the formula's step, samples)."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    samples = {kind: vision_samples(make_vision_models(folder, kind), kind) for kind, folder in folders.items()}
    layouts = {**LAYOUTS, **MIXTURES, **SEQUENCE_PARALLEL, **EQUAL}
    cases = [
        (folders[kind_of(name)], samples[kind_of(name)], MegatronSetting(megatron_bridge=True, **layout))
        for name, layout in layouts.items()
    ]
    found = dict(zip(layouts, run_on_ranks(2, steps_on_rank, cases)[0], strict=True))
    for name in layouts:
        if kind_of(name) == "qwen3_vl_moe":
            found[name]["result"].gradients = [transposed_experts(g) for g in found[name]["result"].gradients]
    return found, {kind: engine_formula.step(folders[kind], samples[kind]) for kind in KINDS}, samples["qwen3_vl"]


@pytest.mark.parametrize("layout", [*LAYOUTS, *MIXTURES])
def test_a_step_agrees_with_the_formula(steps, layout):
    found, expected = steps[0][layout]["result"], steps[1][kind_of(layout)]
    assert_step_agrees(found, expected)
    tower = [name for name in expected["updates"][0]["gradients"] if ".visual." in name]
    assert tower and set(tower) <= found.gradients[0].keys()


@pytest.mark.parametrize("layout", SEQUENCE_PARALLEL)
def test_with_sequence_parallelism_all_but_the_vision_tower_agrees(steps, layout):
    result, expected = steps[0][layout]["result"], steps[1][kind_of(layout)]
    update = expected["updates"][0]
    of_text = {name: g for name, g in update["gradients"].items() if ".visual." not in name}
    result.gradients[0] = {name: result.gradients[0][name] for name in of_text}
    assert_step_agrees(result, {**expected, "updates": [{**update, "gradients": of_text}]})


@pytest.mark.parametrize("layout", EQUAL)
def test_equal_weights_give_a_kl_of_exactly_zero(steps, layout):
    rows = steps[0][layout]["result"]
    kl = torch.cat(rows["token_kl"])
    assert len(kl) > 0 and torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(torch.cat(rows["log_probs"]), torch.cat(rows["ref_log_probs"]))
    assert torch.cat(rows["entropy"]).min() > 0.1


def test_images_are_put_together_once_a_forward(steps):
    """Micro-batches of two, one of them without images; joint pass with two models, update with one."""
    found, _, samples = steps
    with_images = sum(bool(a.image.inputs or b.image.inputs) for a, b in zip(samples[::2], samples[1::2], strict=True))
    assert 0 < with_images < 4
    assert found["tensor parallel"]["images"] == {"built": with_images * 3, "seen": with_images * 3}
