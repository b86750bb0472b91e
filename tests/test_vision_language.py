"""Claim: VIMPO's step is right for vision-language models with images and videos, on verl's FSDP engine.

Qwen2.5-VL, Qwen3-VL and Qwen3.5 (whose linear attention is told where packed sequences begin), and, marked slow, Qwen3.5's
mixture of experts. Per-token results and gradients agree with the formula in float64 over transformers' own forward, with
padding kept and removed, with fixed and dynamic micro-batches, and with kappa recomputed in the update; the update
in one pass is that of two. In a batch, prompts with one image, with two, with a video, with both, and with none. Images and
videos are put together once for every forward of a model.

Not covered here: the processor and vLLM (test_vision_language_run.py), Ulysses with images, kernels
(vision_models.kernels_on_a_cpu), MiniCPM-o 2.6, whose classes are not transformers', GLM-4.1V, which verl 0.9.1 cannot run with
transformers 5.
"""

import engine_formula
import pytest
from engine_harness import Setting, run_on_ranks
from test_engine import TOLERANCE, assert_step_agrees
from test_one_pass import assert_same_gradients
from vision_models import make_vision_models, steps_on_rank, vision_samples

# verl replaces Qwen2.5-VL's attention for good where padding is removed: so that comes after.
SETTINGS = {
    "padding kept": Setting(use_remove_padding=False),
    "padding removed": Setting(),
    "dynamic batch, kappa in the update": Setting(
        micro_batch_size=None, max_token_len=96, knobs={"kappa_policy": "current"}
    ),
}


KINDS = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=KINDS)
def steps(request, tmp_path_factory):
    """What the engine and the formula make of the same step: ({setting: step}, formula, samples)."""
    folder = tmp_path_factory.mktemp(request.param)
    samples = vision_samples(make_vision_models(folder, request.param), request.param, with_video=True)
    expected = engine_formula.step(folder, samples)
    found = run_on_ranks(1, steps_on_rank, folder, samples, list(SETTINGS.values()))[0]
    for step in found:
        # Qwen3.5's state decays by up to exp(-16) a token: transformers' own gradient in float32 is off by 1.7e-5.
        step["of_gradients"] = 5e-5 if request.param.startswith("qwen3_5") else TOLERANCE
    return dict(zip(SETTINGS, found, strict=True)), expected, samples


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_agrees_with_the_formula(steps, setting):
    found, expected, _ = steps
    assert_step_agrees(found[setting]["result"], expected, found[setting]["of_gradients"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_update_in_one_pass_is_that_of_two(steps, setting):
    """Given the step's own statistics."""
    found = steps[0][setting]
    assert_same_gradients(found["one_pass"].gradients, found["result"].gradients)


def test_the_images_matter(steps):
    """Otherwise the agreement above would show nothing about them."""
    found, expected, samples = steps
    assert max(len(s.prompt) for s in samples) > 12 and expected["coeff"] > 1e-4


@pytest.mark.parametrize("setting", ["padding removed", "padding kept"])
def test_images_and_videos_are_put_together_once_a_forward(steps, setting):
    """Four micro-batches of two; joint pass with two models, update with one."""
    found, _, samples = steps
    of_micro_batches = [{**a.image.inputs, **b.image.inputs} for a, b in zip(samples[::2], samples[1::2], strict=True)]
    kinds = [sum(name.startswith("pixel_values") for name in inputs) for inputs in of_micro_batches]
    assert found[setting]["images"]["built"] == sum(kind > 0 for kind in kinds) * (2 + 1)
    # The vision tower sees images and videos one after the other; a blank image where a micro-batch has none.
    assert found[setting]["images"]["seen"] == sum(max(kind, 1) for kind in kinds) * (2 + 1)
