"""Tiny models of the architectures that verl's example scripts train beside Qwen2.5 and Qwen3, for tests/test_architectures.py.

Their classes are transformers', their weights random and large enough for distributions far from uniform. A model's
`e_score_correction_bias`, which decides between experts and is a buffer, is random, too, and the same in policy and reference.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from engine_harness import Setting, make_workers, run_step_both_ways, save_near_each_other
from engine_samples import EOS, VOCABULARY, make_samples

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS, "initializer_range": 0.2,
}  # fmt: skip
_DENSE = {"intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
# 32 layers of linear attention to one of full attention would be many; one of each shows both.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# Name -> transformers' configuration class, and what of it is not _COMMON.
CONFIGURATIONS = {
    "mistral": ("MistralConfig", {**_DENSE, "sliding_window": None}),
    # Layers with a window shorter than the sequences, attention sinks, biases everywhere.
    "gpt_oss": ("GptOssConfig", {**_DENSE, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    # As published: dropout in attention and after it.
    "seed_oss": ("SeedOssConfig", {**_DENSE, "attention_dropout": 0.1, "residual_dropout": 0.1}),
    "qwen3_next": ("Qwen3NextConfig", {**_DENSE, **LINEAR, **EXPERTS}),
    # Latent attention; sigmoid scores, chosen with a bias in groups of experts; a dense layer first.
    "deepseek_v3": ("DeepseekV3Config", {
        "num_hidden_layers": 2, "num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "routed_scaling_factor": 1.5}),
    # Logits through a soft cap.
    "gemma2": ("Gemma2Config", {**_DENSE, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 5}),
}  # fmt: skip


def make_architecture(folder: Path, name: str) -> None:
    """Write a `policy` and a `ref` near it."""
    import transformers

    kind, rest = CONFIGURATIONS[name]
    config = getattr(transformers, kind)(**{**_COMMON, **rest})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn_like(buffer))
    save_near_each_other(model, folder)


def attention_of(name: str, packed: bool) -> str:
    """An attention that runs on a CPU: torch's own has neither gpt-oss's sinks nor gemma2's soft cap."""
    if name == "gpt_oss" and packed:
        return _register_sinks()
    return "eager" if name in ("gpt_oss", "gemma2") else "sdpa"


def _register_sinks() -> str:
    """gpt-oss's attention over packed sequences, which a kernel of flash-attention is for; returns transformers' name for it."""
    from transformers import AttentionInterface

    AttentionInterface.register("sinks_on_cpu", _attention_with_sinks)
    return "sinks_on_cpu"


def _attention_with_sinks(module, query, key, value, attention_mask, scaling, sliding_window, s_aux, position_ids, **_):
    """[1, heads, n, D]: causal in each sequence, in a window; a head attends to its sink, too, which has no value."""
    n = query.shape[2]
    sequence = (position_ids[0] == 0).cumsum(0)
    distance = torch.arange(n).unsqueeze(1) - torch.arange(n)
    allowed = (sequence.unsqueeze(1) == sequence) & (distance >= 0) & (distance < (sliding_window or n))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -torch.inf)
    sinks = s_aux.view(1, -1, 1, 1).expand(1, -1, n, 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), None


def step(models: Path, setting: Setting) -> dict:
    """The StepResult in two passes and in one, and what was printed of the model. verl's change of its class is taken back."""
    if setting.attention == "sinks_on_cpu":
        _register_sinks()
    said = io.StringIO()
    with _class_left_as_it_was(models / "policy"):
        with contextlib.redirect_stdout(said):
            workers = make_workers(models, setting)
        two, one = run_step_both_ways(models, setting, make_samples(), workers)
    return {"result": two, "one_pass": one, "said": said.getvalue()}


@contextlib.contextmanager
def _class_left_as_it_was(model: Path) -> Iterator[None]:
    """verl puts its fused head into a model's class for good."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    of_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(model))]
    forward = of_model.forward
    try:
        yield
    finally:
        of_model.forward = forward
