"""Claim: on verl's real Megatron engine a step of VIMPO is the one on verl's FSDP engine, however Megatron splits the work.

With the same weights, through mbridge or Megatron-Bridge: old log-probs, entropy, reference log-probs and exact KL of every
response token, gradients before clipping, parameters after two updates, logged losses. Tensor, sequence, pipeline (also
interleaved), context, expert and data parallelism, packed and padded, dynamic batches, the fused head, kappa_policy=current,
sampled KLs, the distributed optimiser, offload, float16 with its scaled loss. The FSDP engine's step is that of the formula
(test_engine.py). With LoRA of Megatron-Bridge: the joint pass is verl's own two passes.

On gloo ranks of this machine, with what megatron_on_cpu.py stands in for. Not covered: Transformer Engine, verl's fused kernel
itself, its precision-aware optimiser, NCCL, GPUs, grouped kernels of experts, adapters that are loaded.
"""

from dataclasses import replace

import pytest
import torch
from engine_harness import Setting, gather_rows, joint_pass, make_models, run_on_ranks, run_step
from engine_samples import make_samples, response_part, to_tensordict
from megatron_harness import MegatronSetting, make_megatron_workers
from megatron_on_cpu import FOLDER

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="made by bash tests/run.sh --setup"),
    pytest.mark.timeout(2400),  # two ranks do all steps in one go
]


TOLERANCE = 2e-5  # float32 on both engines, whose sums are of different order
STEP = {"lr": 0.1, "epochs": 2, "knobs": {"actor_coeff": 0.3, "actor_trust": False}}
CURRENT = {"knobs": {**STEP["knobs"], "kappa_policy": "current"}}
K3 = {"knobs": {**STEP["knobs"], "kl_estimator": "k3"}}
BUCKETS = {"pad_to_length": True, "pad_to_length_bucket": 32}
LAST_EXPERT = 3  # of the mixtures
OFFLOADED = {"param_offload": True, "optimizer_offload": True}
ADAM = {"adam_eps": 1.0, "lr": 1.0}  # smooth in the gradients, whose rounding it would blow up otherwise
PER_TOKEN = {"transformer": {"calculate_per_token_loss": True}}

# Name -> how Megatron splits the work on two ranks, and what of the setting changes the result.
LAYOUTS = {
    "tensor parallel, with sequence parallelism": ({"tensor_parallel": 2}, {}),
    "tensor parallel, padded": ({"tensor_parallel": 2, "sequence_parallel": False, "use_remove_padding": False}, {}),
    "tensor parallel, padded to a length": ({"tensor_parallel": 2, "engine": BUCKETS}, {}),
    "tensor parallel, dynamic batches": ({"tensor_parallel": 2, "micro_batch_size": None}, {"temperature": 0.7}),
    "tensor parallel, fused head": ({"tensor_parallel": 2, "use_fused_kernels": True}, {"temperature": 0.7}),
    "tensor parallel, current kappa": ({"tensor_parallel": 2}, CURRENT),
    "pipeline": ({"pipeline_parallel": 2}, {}),
    "pipeline, interleaved": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
    "pipeline, dynamic batches": ({"pipeline_parallel": 2, "micro_batch_size": None}, {"temperature": 0.7}),
    "pipeline, fused head": ({"pipeline_parallel": 2, "use_fused_kernels": True}, {}),
    "pipeline, current kappa": ({"pipeline_parallel": 2}, CURRENT),
    "pipeline, k3": ({"pipeline_parallel": 2}, K3),
    "tensor parallel, adapters": ({"tensor_parallel": 2, "adapters": True}, {}),
    "pipeline, fused head, adapters, k3": ({"pipeline_parallel": 2, "adapters": True, "use_fused_kernels": True}, K3),
    "pipeline, fused head, adapters": ({"pipeline_parallel": 2, "adapters": True, "use_fused_kernels": True}, {}),
    "context parallel, loss per token": ({"context_parallel": 2, **PER_TOKEN}, {}),
    "context parallel, dynamic batches": ({"context_parallel": 2, "micro_batch_size": None, **PER_TOKEN}, {}),
    "context parallel, fused head": ({"context_parallel": 2, "use_fused_kernels": True, **PER_TOKEN}, {}),
    "data parallel": ({}, {}),
    "data parallel, distributed optimiser": ({"distributed_optimizer": True}, ADAM),
    "tensor parallel, offloaded": ({"tensor_parallel": 2, "distributed_optimizer": True, "engine": OFFLOADED}, ADAM),
    "pipeline, offloaded": ({"pipeline_parallel": 2, "distributed_optimizer": True, "engine": OFFLOADED}, ADAM),
}


# Through Megatron-Bridge, which verl takes unless it is told to take mbridge. The same steps.
BRIDGE = {"megatron_bridge": True}
LAYOUTS |= {
    "Megatron-Bridge, tensor parallel": ({**BRIDGE, "tensor_parallel": 2}, {}),
    "Megatron-Bridge, pipeline, fused head": ({**BRIDGE, "pipeline_parallel": 2, "use_fused_kernels": True}, {}),
    "Megatron-Bridge, offloaded": (
        {**BRIDGE, "tensor_parallel": 2, "distributed_optimizer": True, "engine": OFFLOADED},
        ADAM,
    ),
}
# With its LoRA: the reference is the policy without its adapters.
LORA = {
    "LoRA, tensor parallel": {**BRIDGE, "tensor_parallel": 2},
    "LoRA, pipeline, fused head": {**BRIDGE, "pipeline_parallel": 2, "use_fused_kernels": True},
}


# The same for a mixture of experts.
EXPERTS = {
    "expert parallel": {"expert_parallel": 2},
    "tensor and expert parallel": {
        "tensor_parallel": 2,
        "expert_parallel": 2,
        "engine": {"expert_tensor_parallel_size": 1},
    },
    "experts in a pipeline, fused head": {"pipeline_parallel": 2, "use_fused_kernels": True},
}
# With the routes recorded in the joint pass (R2), or given with the batch (R3): those of the first of these.
REPLAY = {
    "replay, expert parallel": {"expert_parallel": 2},
    "replay, pipeline": {"pipeline_parallel": 2},
    "replay, given": {"tensor_parallel": 2, "expert_parallel": 2, "engine": {"expert_tensor_parallel_size": 1}},
}
# In float16, as verl sets it up there: float32 masters, and the loss scaled by 32768 until the optimiser's step.
HALF = {"dtype": "fp16"}
FLOAT16 = {
    "float16, tensor parallel": {**HALF, **BRIDGE, "tensor_parallel": 2},
    "float16, tensor parallel, fused head": {**HALF, **BRIDGE, "tensor_parallel": 2, "use_fused_kernels": True},
    "float16, pipeline, fused head": {**HALF, "pipeline_parallel": 2, "use_fused_kernels": True},
}
# Name -> layouts in which policy and reference have the same weights, in bfloat16.
EQUAL = {
    "tensor parallel": {"tensor_parallel": 2},
    "tensor parallel, fused head": {"tensor_parallel": 2, "use_fused_kernels": True},
    "pipeline": {"pipeline_parallel": 2},
}
# And in float16, as a mixture of experts.
EQUAL_HALF = {**HALF, **REPLAY["replay, given"], "use_fused_kernels": True}


def even_samples():
    """Of an even number of tokens each: verl counts the tokens of a context-parallel rank by a division that rounds down."""
    return [replace(s, prompt=s.prompt[(len(s.prompt) + len(s.response)) % 2 :]) for s in make_samples()]


def fsdp_steps(rank, cases):
    return [run_step(models, setting, even_samples()) for models, setting in cases]


def megatron_steps(rank, cases):
    import megatron_on_cpu

    megatron_on_cpu.install()
    results, routes = [], None
    for models, setting in cases:
        if setting.routes is not None:
            given = [LAST_EXPERT - r for r in routes] if "others" in setting.routes else routes
            setting = replace(setting, routes=dict(zip(even_samples(), given, strict=True)))
        workers = make_megatron_workers(models, setting)
        require_offloaded(workers.actor.engine)
        if setting.lora_rank:
            results.append(steps_with_adapters(workers, models, setting))
        elif setting.equal_models:
            results.append(gather_rows(joint_pass(workers, even_samples(), setting)))
        else:
            results.append(run_step(models, setting, even_samples(), workers))
            require_offloaded(workers.actor.engine)
            routes = routes or results[-1].per_token.get("routed_experts")
        megatron_on_cpu.forget_groups()
    return results


def steps_with_adapters(workers, models, setting) -> dict:
    """Two steps, a joint pass after them, and verl's own two passes there."""
    samples = even_samples()
    steps = [run_step(models, setting, samples, workers) for _ in range(2)]
    verls = {}
    for name, adapters_off in (("log_probs", False), ("ref_log_probs", True)):
        data = to_tensordict(
            samples, temperature=1.0, calculate_entropy=False, compute_loss=False, no_lora_adapter=adapters_off
        )
        output = workers.actor.infer_batch(data)
        if output is not None:
            verls[name] = response_part(output["log_probs"].unbind(), samples)
    trained = {name for m in workers.actor.engine.module for name, p in m.named_parameters() if p.requires_grad}
    joint = gather_rows(joint_pass(workers, samples, setting))
    return {"steps": steps, "joint": joint, "verls": gather_rows(verls), "trained": trained}


def require_offloaded(engine):
    """Outside of a pass the device has given back the memory of weights and gradients, where that was asked for."""
    if engine.is_param_offload_enabled:
        sizes = [t.untyped_storage().size() for b in engine.module[0].buffers for t in (b.param_data, b.grad_data)]
        assert sizes and not any(sizes), sizes


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """Folder with a policy and a reference that a pipeline of two stages of two can share."""
    folder = tmp_path_factory.mktemp("four_layers")
    make_models(folder, layers=4)
    return folder


@pytest.fixture(scope="module")
def expected(four_layers, moe_models):
    """What changes the result -> the step on the FSDP engine."""
    changes = {repr(changed): changed for _, changed in LAYOUTS.values()}
    cases = [(four_layers, Setting(**{**STEP, **changed})) for changed in changes.values()]
    (results,) = run_on_ranks(
        1, fsdp_steps, [*cases, *((moe_models, Setting(**{**STEP, "epochs": n})) for n in (2, 1))]
    )
    return dict(zip([*changes, "experts", "replay"], results, strict=True))


@pytest.fixture(scope="module")
def found(four_layers, moe_models):
    """Layout -> the step on the Megatron engine, of each rank."""
    cases = [(four_layers, MegatronSetting(**{**STEP, **layout, **changed})) for layout, changed in LAYOUTS.values()]
    cases += [(moe_models, MegatronSetting(**{**STEP, **layout})) for layout in EXPERTS.values()]
    once, given = {**STEP, "epochs": 1, "router_replay": True}, REPLAY["replay, given"]
    for name, layout in REPLAY.items():
        cases.append((moe_models, MegatronSetting(**once, **layout, routes={} if "given" in name else None)))
    cases.append((moe_models, MegatronSetting(**once, **given, routes={"others": True})))
    cases += [(four_layers, MegatronSetting(equal_models=True, dtype="bf16", **layout)) for layout in EQUAL.values()]
    cases.append((moe_models, MegatronSetting(equal_models=True, **EQUAL_HALF)))
    cases += [(four_layers, MegatronSetting(**{**STEP, **layout})) for layout in FLOAT16.values()]
    cases += [
        (four_layers, MegatronSetting(**{**STEP, "lr": 1.0, "lora_rank": 4, **layout})) for layout in LORA.values()
    ]
    by_rank = run_on_ranks(2, megatron_steps, cases)
    names = [*LAYOUTS, *EXPERTS, *REPLAY, "other routes", *(f"{name}, equal weights" for name in EQUAL)]
    names += ["float16, experts, equal weights", *FLOAT16, *LORA]
    return {name: [results[i] for results in by_rank] for i, name in enumerate(names)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_the_fsdp_engine(expected, found, layout):
    for step in found[layout]:
        assert_same_step(step, expected[repr(LAYOUTS[layout][1])], gradients=not is_scattered(LAYOUTS[layout][0]))


@pytest.mark.parametrize("layout", [*EXPERTS, *REPLAY])
def test_a_step_of_a_mixture_of_experts_is_that_of_the_fsdp_engine(expected, found, layout):
    """With replay, of one update, at which the routes are the policy's own."""
    for step in found[layout]:
        for tensors in (*step.gradients, step.parameters):
            stack_experts(tensors)
        assert_same_step(step, expected["replay" if layout in REPLAY else "experts"])


def test_routes_that_are_given_are_the_policys_alone(expected, found):
    """Through other experts its log-probs are others; the reference's are what they were."""
    for step in found["other routes"]:
        tokens, wanted = step.per_token, expected["replay"].per_token
        assert_close(torch.cat(tokens["ref_log_probs"]), torch.cat(wanted["ref_log_probs"]))
        assert (torch.cat(tokens["log_probs"]) - torch.cat(wanted["log_probs"])).abs().max() > 0.1


def stack_experts(tensors):
    """A tensor for each expert, as in checkpoints, to one for all, as in transformers' modules. Changes `tensors`."""
    names = [name for name in tensors if ".experts.0.gate_proj" in name]
    for prefix in (name.split("0.gate_proj")[0] for name in names):
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{i}.{kind}_proj.weight") for i in range(4)])
            for kind in ("gate", "up", "down")
        )
        tensors[f"{prefix}gate_up_proj"], tensors[f"{prefix}down_proj"] = torch.cat([gate, up], dim=1), down


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_logged_as_those_of_the_global_mini_batch(expected, found, layout):
    wanted = expected[repr(LAYOUTS[layout][1])].metrics
    logged = next(step.metrics for step in found[layout] if "loss" in step.metrics)  # of ranks that collect
    for name in ("vimpo/value_loss", "vimpo/actor_loss", "loss", "vimpo/kl", "grad_norm"):
        assert logged[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("layout", FLOAT16)
def test_a_step_in_float16_is_that_in_float32_to_its_rounding(expected, found, layout):
    """Of which logits of 8 to 16 have 2^-8. The gradients are those that the optimiser has divided by the loss's scale."""
    wanted = expected[repr({})]
    for step in found[layout]:
        for name, rows in wanted.per_token.items():
            assert (torch.cat(step.per_token[name]) - torch.cat(rows)).abs().max() <= 0.02, name
        for mine, theirs in zip(step.gradients, wanted.gradients, strict=True):
            assert distance(mine, theirs) <= 0.01
        assert distance(step.parameters, wanted.parameters) <= 1e-3
    logged = next(step.metrics for step in found[layout] if "loss" in step.metrics)
    for name in ("vimpo/value_loss", "vimpo/actor_loss", "vimpo/kl", "grad_norm"):
        assert logged[name] == pytest.approx(wanted.metrics[name], rel=0.02, abs=1e-3), name


@pytest.mark.parametrize("layout", [*EQUAL, "float16, experts"])
def test_equal_weights_give_a_kl_of_exactly_zero(found, layout):
    """In bfloat16 or float16, in which the reference's hidden states have been to the host and back."""
    for rows in found[f"{layout}, equal weights"]:
        kl = torch.cat(rows["token_kl"])
        assert len(kl) > 0 and torch.equal(kl, torch.zeros_like(kl))
        assert torch.equal(torch.cat(rows["log_probs"]), torch.cat(rows["ref_log_probs"]))
        assert torch.cat(rows["entropy"]).min() > 0.1


def is_scattered(layout) -> bool:
    """Whether each rank has the sum over all ranks for its part of the gradients alone, as the distributed optimiser wants it."""
    split = layout.get("tensor_parallel", 1) * layout.get("pipeline_parallel", 1)
    return layout.get("distributed_optimizer", False) and split == 1


@pytest.mark.parametrize("layout", LORA)
def test_with_lora_the_reference_is_the_policy_without_its_adapters(found, layout):
    """Megatron-Bridge's adapters: kl is 0 while they are fresh; then the policy moves, and the reference does not."""
    for rank in found[layout]:
        (first, second), joint = rank["steps"], rank["joint"]
        assert rank["trained"] and all(".adapter." in name for name in rank["trained"])
        assert not torch.cat(first.per_token["token_kl"]).any()
        assert torch.cat(joint["token_kl"]).mean() > 0.1
        for name in ("log_probs", "ref_log_probs"):
            assert_close(torch.cat(joint[name]), torch.cat(rank["verls"][name]))
        for step in (first, second):
            assert_close(torch.cat(step.per_token["ref_log_probs"]), torch.cat(joint["ref_log_probs"]))


def assert_same_step(found, expected, gradients=True):
    for name, rows in expected.per_token.items():
        assert_close(torch.cat(found.per_token[name]), torch.cat(rows))
    assert len(found.gradients) == len(expected.gradients) >= 1
    for mine, theirs in zip(found.gradients, expected.gradients, strict=True) if gradients else ():
        assert_same_tensors(mine, theirs)
    assert_same_tensors(found.parameters, expected.parameters)


def assert_close(actual, wanted):
    assert wanted.abs().max() > 0
    assert (actual - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def assert_same_tensors(actual, wanted):
    assert distance(actual, wanted) <= TOLERANCE


def distance(actual, wanted) -> float:
    """Relative to the norm of them all."""
    assert actual.keys() == wanted.keys()
    difference = sum((actual[name].float() - wanted[name]).square().sum() for name in wanted)
    norm = sum(tensor.square().sum() for tensor in wanted.values())
    assert norm > 0
    return (difference / norm).sqrt().item()
