"""Claim: in train mode, in which verl runs an update, a policy gives the log-probs of its eval mode, whatever noise it came with.

Dropout of transformers' models by whatever name, drop paths, noise in the router of a mixture of experts, and dropout of LoRA's
adapters. On verl's engines: test_architectures.py. Not covered: Phi's mixtures, which draw their experts in train mode.
"""

import pytest
import torch

from verl_patches.policy_model import turn_off_dropout

SMALL = {"vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
TOKENS = torch.arange(40).view(2, 20)


def models():
    """Name -> (a function that makes it, the rates that it has)."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    experts = {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    qwen3 = Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, attention_dropout=0.4)
    adapters = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return {
        "attention": (lambda: Qwen3ForCausalLM(qwen3), {"attention_dropout"}),
        "adapters": (lambda: get_peft_model(Qwen3ForCausalLM(qwen3), adapters), {"attention_dropout", "dropout"}),
        "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_head=4, n_layer=2)), {"dropout"}),
        "router": (
            lambda: MixtralForCausalLM(MixtralConfig(**experts, router_jitter_noise=0.5)),
            {"jitter_noise"},
        ),
    }


@pytest.mark.parametrize("name", models())
def test_train_mode_is_eval_mode(name):
    torch.manual_seed(0)
    make, rates = models()[name]
    model = make().eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        noisy = model.train()(TOKENS).logits
        found = turn_off_dropout([model])
        quiet = model(TOKENS).logits
    assert rates <= found.keys() and all(rate > 0 for rate in found.values())
    assert (noisy - expected).abs().max() > 1e-3, "or this model shows nothing"
    assert model.training and torch.allclose(quiet, expected, atol=1e-6)
    assert turn_off_dropout([model]) == {}
