"""Claim: VIMPO's step is the same on the engines that verl derives from its FSDP engine, VeOmni and FSDP-Turbo.

VeOmni: verl's engine with the real VeOmni, two ranks over gloo, a dense and a mixture-of-experts model: per-token results
and gradients agree with the formula in float64, with parameters and optimizer offloaded, padding kept, and kappa recomputed
in the update; and in bfloat16, which is all that verl gives VeOmni, equal weights give a KL of exactly 0. One pass gives the
gradients of two. The same with images: Qwen3-VL and its mixture of experts.

FSDP-Turbo is not on a package index. verl's engine class is run with FSDP2 in the place of the package's sharding
(fsdp_turbo_stand_in.py): so verl's part is shown to do with VIMPO what it does on FSDP, and the package's is not.

Not covered: their sequence and expert parallelism and their kernels, which need GPUs.
"""

import engine_formula
import fsdp_turbo_stand_in
import pytest
import torch
import veomni_on_cpu
from engine_harness import Setting, make_workers, run_on_ranks, run_one_pass_step, run_step
from engine_samples import make_samples
from test_engine import assert_gradients_close, assert_step_agrees
from test_one_pass import assert_same_gradients
from verl.workers.engine import FSDPEngineWithLMHead, FSDPTurboEngineWithLMHead
from vision_models import make_vision_models, vision_samples

# What joint pass, update and worker call on an engine, or count on being called by it.
RELIED_ON = ("prepare_model_inputs", "prepare_model_outputs", "forward_step", "forward_backward_batch", "infer_batch",
             "train_batch", "eval_mode", "train_mode", "_gather_and_unpad_packed", "disable_adapter")  # fmt: skip


def test_fsdp_turbo_changes_nothing_that_vimpo_relies_on():
    for name in RELIED_ON:
        assert getattr(FSDPTurboEngineWithLMHead, name) is getattr(FSDPEngineWithLMHead, name), name


@pytest.mark.parametrize("use_remove_padding", [True, False])
def test_a_step_on_verls_part_of_fsdp_turbo_agrees_with_the_formula(models, monkeypatch, use_remove_padding):
    fsdp_turbo_stand_in.install(monkeypatch)
    setting = Setting(strategy="fsdp_turbo", use_remove_padding=use_remove_padding, epochs=2, lr=0.1)
    workers = make_workers(models, setting)
    assert isinstance(workers.actor.engine, FSDPTurboEngineWithLMHead)
    assert isinstance(workers.ref.engine, FSDPTurboEngineWithLMHead)
    for worker in (workers.actor, workers.ref):  # verl has no key for it, and takes bfloat16
        worker.engine._autocast_dtype = torch.float32
    result = run_step(models, setting, make_samples(), workers)
    expected = engine_formula.step(models, make_samples(), lr=0.1, epochs=2)
    assert_step_agrees(result, expected)
    assert_gradients_close(result.parameters, expected["parameters"])


def test_one_pass_on_verls_part_of_fsdp_turbo_is_two(models, monkeypatch):
    fsdp_turbo_stand_in.install(monkeypatch)
    setting, samples = Setting(strategy="fsdp_turbo", knobs={"use_actor": False}), make_samples()
    workers = make_workers(models, setting)
    for worker in (workers.actor, workers.ref):
        worker.engine._autocast_dtype = torch.float32
    two, one = (step(models, setting, samples, workers) for step in (run_step, run_one_pass_step))
    assert_same_gradients(one.gradients, two.gradients)
    assert one.metrics["vimpo/kl"] == pytest.approx(two.batch.metrics["vimpo/kl"], rel=1e-5)


# name -> (setting, parameters and optimizer offloaded)
VEOMNI = {
    "plain": (Setting(), False),
    "offloaded, padding kept": (Setting(use_remove_padding=False), True),
    "kappa in the update, dynamic batch": (Setting(micro_batch_size=None, knobs={"kappa_policy": "current"}), True),
    "bfloat16, equal weights": (Setting(dtype="bf16", equal_models=True), False),
}


# The same with images: kind of model, setting, offloaded.
VALUE_LOSS = Setting(knobs={"use_actor": False})
IMAGES = {
    "images, mixture of experts": ("qwen3_vl_moe", Setting(), False),
    "images, offloaded, padding kept": ("qwen3_vl", Setting(use_remove_padding=False), True),
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """Kind of model -> (folder with a policy and a reference, samples)."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("qwen3_vl", "qwen3_vl_moe")}
    return {kind: (folder, vision_samples(make_vision_models(folder, kind), kind)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def veomni_steps(models, moe_models, vision):
    """Name -> the step of rank 0; all in one pair of processes, because to start one takes longer than its steps."""
    if not veomni_on_cpu.is_there():
        pytest.skip(f"VeOmni is not in {veomni_on_cpu.FOLDER}: bash tests/run.sh --setup puts it there")
    samples = make_samples()
    cases = {name: (models, samples, *case, False) for name, case in VEOMNI.items()}
    cases |= {"moe": (moe_models, samples, Setting(), False, False)}
    cases |= {name: (*vision[kind], *case, False) for name, (kind, *case) in IMAGES.items()}
    for name, of in {"": (models, samples), "images, ": vision["qwen3_vl_moe"]}.items():
        cases |= {f"{name}two passes": (*of, VALUE_LOSS, True, False), f"{name}one pass": (*of, VALUE_LOSS, True, True)}
    cases["images, bfloat16, equal weights"] = (*vision["qwen3_vl_moe"], *VEOMNI["bfloat16, equal weights"], False)
    results = run_on_ranks(2, veomni_on_cpu.steps_on_rank, list(cases.values()))[0]
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("case", [name for name in VEOMNI if "bfloat16" not in name])
def test_a_step_on_veomni_agrees_with_the_formula(models, veomni_steps, case):
    assert_step_agrees(veomni_steps[case], engine_formula.step(models, make_samples()))


def test_a_step_of_a_mixture_of_experts_on_veomni_agrees_with_the_formula(moe_models, veomni_steps):
    assert_step_agrees(veomni_steps["moe"], engine_formula.step(moe_models, make_samples()))


@pytest.mark.parametrize("case", IMAGES)
def test_a_step_with_images_on_veomni_agrees_with_the_formula(vision, veomni_steps, case):
    folder, samples = vision[IMAGES[case][0]]
    assert_step_agrees(veomni_steps[case], engine_formula.step(folder, samples))


@pytest.mark.parametrize("of", ["", "images, "])
def test_one_pass_on_veomni_is_two(veomni_steps, of):
    one, two = veomni_steps[f"{of}one pass"], veomni_steps[f"{of}two passes"]
    assert_same_gradients(one.gradients, two.gradients)
    assert one.metrics["vimpo/kl"] == pytest.approx(two.batch.metrics["vimpo/kl"], rel=1e-5)


@pytest.mark.parametrize("of", ["", "images, "])
def test_equal_weights_on_veomni_give_exactly_zero_in_bfloat16(veomni_steps, of):
    step = veomni_steps[f"{of}bfloat16, equal weights"]
    assert step.metrics["vimpo/kl"] == 0.0
    assert all(
        torch.equal(p, q)
        for p, q in zip(*(step.per_token[name] for name in ("log_probs", "ref_log_probs")), strict=True)
    )
