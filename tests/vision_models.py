"""Tiny Qwen2.5-VL and Qwen3-VL, samples with images, and verl's engine on them, for tests/test_vision_language.py.

verl replaces methods of transformers' classes for these models, for good. So its engine runs in a process of its own here, and
the float64 reference, which is transformers' own forward, in the process of the test.

With padding removed, verl's Qwen2.5-VL calls flash-attention whatever the configuration says. There is none on a CPU:
`attention_without_flash` puts the same computation in torch's words in its place. Qwen3-VL needs nothing.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from engine_harness import Setting, StepResult, make_workers, run_step, run_step_both_ways
from engine_samples import EOS, VOCABULARY, Sample, make_samples

IMAGE, VIDEO, START, END = range(VOCABULARY, VOCABULARY + 4)  # beside the tokens that samples are drawn from
GRIDS = ((4, 4), (4, 8))  # patches of an image
MERGE, PATCH_VALUES = 2, 3 * 2 * 4 * 4  # patches a token, squared; channels x frames x patch x patch


@dataclass(frozen=True)
class Image:
    """Images of one sample.

    Attributes:
        inputs: verl's `multi_modal_inputs`: pixel_values [patches, D], image_grid_thw [images, 3].
        position_ids: [4, T], those of the text and of time, row and column.
        is_image: [1, T], 1 where a token stands for a piece of an image.
    """

    inputs: dict
    position_ids: torch.Tensor
    is_image: torch.Tensor

    def for_transformers(self) -> dict:
        """What transformers' forward takes: it works out positions by itself."""
        if not self.inputs:
            return {}
        pixels = self.inputs["pixel_values"].double()
        return {**self.inputs, "pixel_values": pixels, "mm_token_type_ids": self.is_image}


def configuration(kind: str):
    """A configuration of two layers for text and two for vision; kind: "qwen2_5_vl", "qwen3_vl" or "qwen3_vl_moe"."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": VOCABULARY + 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS, "rope_parameters": rope,
        "tie_word_embeddings": False,  # Megatron-Bridge asks the text's configuration
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "patch_size": 4,
        "spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": 32, "initializer_range": 0.2,
    }  # fmt: skip
    tokens = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    text |= {"head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    if kind == "qwen3_vl":
        return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)


def make_vision_models(folder: Path, kind: str):
    """Write a `policy` and a `ref` near it; returns the policy."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(configuration(kind))
    model.save_pretrained(folder / "policy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "ref")
    if kind == "qwen3_vl_moe":
        for name in ("policy", "ref"):
            _save_experts_as_published(folder / name / "model.safetensors")
    return model


def transposed_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From transformers 5's modules to the layout in which these mixtures are published, or back."""
    return {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()}


def _save_experts_as_published(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(transposed_experts(load_file(file)), file, metadata={"format": "pt"})


def vision_samples(model, kind: str) -> list[Sample]:
    """Samples whose prompts begin with one or two images, but for some of text alone.

    For Qwen3-VL a whole micro-batch of two: verl 0.9.1 runs the vision tower on a blank image then, and for Qwen2.5-VL that
    fails with transformers 5, for GRPO too. So there it is one of two.
    """
    text_only = (2,) if kind == "qwen2_5_vl" else (2, 3)
    generator = torch.Generator().manual_seed(7)
    samples = make_samples()
    for i, sample in enumerate(samples):
        if i in text_only:
            samples[i] = replace(sample, image=_image(model, sample, []))  # verl stores [4, T] positions here, too
            continue
        grids = GRIDS[: 1 + i % 2]
        tokens = [t for h, w in grids for t in (START, *[IMAGE] * (h * w // MERGE**2), END)]
        sample = replace(sample, prompt=(*tokens, *sample.prompt))
        samples[i] = replace(sample, image=_image(model, sample, grids, generator))
    return samples


def _image(model, sample: Sample, grids, generator=None) -> Image:
    tokens = torch.tensor([sample.prompt + sample.response])
    is_image = (tokens == IMAGE).int()
    text = torch.arange(tokens.shape[1]).unsqueeze(0)
    if not grids:
        return Image({}, text.expand(4, -1), is_image)
    grid = torch.tensor([(1, h, w) for h, w in grids])
    pixels = torch.randn(int(grid.prod(-1).sum()), PATCH_VALUES, generator=generator)
    positions, _ = model.model.get_rope_index(tokens, is_image, image_grid_thw=grid)
    return Image({"pixel_values": pixels, "image_grid_thw": grid}, torch.cat([text, positions.squeeze(1)]), is_image)


def steps_on_rank(rank: int, models: Path, samples: list[Sample], settings: list[Setting]) -> list[dict]:
    """For each setting: the StepResult in two passes and in one, and how often images were put together in the two passes."""
    return [_step(models, samples, setting) for setting in settings]


def _step(models: Path, samples: list[Sample], setting: Setting) -> dict:
    import verl.workers.engine.fsdp.transformer_impl as implementation

    with attention_without_flash():
        workers = make_workers(models, setting)
        with counted_images(implementation) as count:
            result: StepResult = run_step(models, setting, samples, workers)
        _, one_pass = run_step_both_ways(models, setting, samples, workers)
    return {"result": result, "one_pass": one_pass, "images": count}


@contextmanager
def counted_images(implementation):
    """Counts what verl's engine does with images: `built`, its calls that found some; `seen`, forwards of a vision tower.

    implementation: the module of verl's engine.
    """
    count = {"built": 0, "seen": 0}
    original = implementation.extract_multi_modal_inputs

    def extract(*args, **kwargs):
        found = original(*args, **kwargs)
        count["built"] += "pixel_values" in found
        return found

    def seen(module, inputs, kwargs):
        count["seen"] += "VisionTransformer" in type(module).__name__ or type(module).__name__.endswith("VisionModel")

    implementation.extract_multi_modal_inputs = extract
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: seen(module, inputs, {}))
    try:
        yield count
    finally:
        implementation.extract_multi_modal_inputs = original
        handle.remove()


@contextmanager
def attention_without_flash():
    """verl's Qwen2.5-VL attention, with torch's attention where it calls flash-attention."""
    import verl.models.transformers.qwen2_vl as verls

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal):
        """q, k, v [tokens, heads, D], sequences behind one another."""
        parts = [x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)]
        return torch.cat([_attend(*(x.unsqueeze(0) for x in part), causal)[0] for part in zip(*parts, strict=True)])

    def one(q, k, v, attention_mask, query_length, is_causal, **_):
        assert attention_mask is None
        return _attend(q, k, v, is_causal)

    replaced = {
        "flash_attn_varlen_func": varlen,
        "_flash_attention_forward": one,
        "fa_peft_integration_check": lambda q, k, v, target_dtype: (q, k, v),  # flash-attention knows no float32
        # Defined only where flash-attention is installed.
        "_flash_supports_window_size": False,
        "_flash_supports_deterministic": False,
        "_flash_use_top_left_mask": False,
    }
    original = {name: getattr(verls, name, None) for name in replaced}
    verls.__dict__.update(replaced)
    try:
        yield
    finally:
        verls.__dict__.update(original)


def _attend(q, k, v, causal):
    """[B, T, heads, D] each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
