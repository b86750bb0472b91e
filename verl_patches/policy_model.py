"""Seam: what of a policy's own architecture would make its log-probs depend on more than its answer.

Touches the modules that verl's engine has built of the policy, and nothing of verl. Checked against verl 0.9.1 with transformers
5.10; no upstream issue.

Dropout. verl's update runs the policy in training mode, the passes before it and the reference in eval mode. A published
configuration with dropout (Seed-OSS has 0.1, twice) is noise in every log-prob of the update. VIMPO reads log-ratios to the
reference as values, so it would learn from that noise: with equal weights the KL of one pass was 0.35 nats a token instead of 0.

Packed sequences. Where padding is removed, verl tells a model where a sequence begins by position_ids that start again. Layers
that carry a state along (linear attention, Mamba, convolutions) do not look at them, and of those models verl tells Qwen3.5
alone in another way. So a response's log-probs depend on what was packed before it, with any estimator. That is verl's to mend
and it is said, not refused: policy and reference see the same.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

_NOISE = re.compile(r"dropout|pdrop$|drop_path|layerdrop|jitter_noise$|jitter_eps$")  # also of a mixture's router
_STATEFUL = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "rwkv"}
_PACKING_BY_POSITIONS = ("fsdp", "fsdp2", "fsdp_turbo")  # VeOmni tells its own models where sequences begin


def turn_off_dropout(modules: Iterable[torch.nn.Module]) -> dict[str, float]:
    """Set every rate of dropout, and of noise in a mixture's router, to 0: of torch's layers, of modules that keep their own, and
    of configurations they look into.

    Args:
        modules: the policy as verl's engine holds it. Changed; so is the configuration that its checkpoints are saved with.

    Returns:
        Name of a rate -> what it was, of those that were not 0.
    """
    found = {}
    for module in (part for whole in modules for part in whole.modules()):
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p:
            found["dropout"] = module.p
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            for name in [name for name in getattr(owner, "__dict__", ()) if _NOISE.search(name)]:
                rate = getattr(owner, name)
                if isinstance(rate, float) and rate > 0:
                    found[name] = rate
                    setattr(owner, name, 0.0)
    return found


def packing_problem(engine: Any) -> str | None:
    """Why a sequence's log-probs depend on the one packed before it, in one sentence; None: they do not, as far as is known.

    Args:
        engine: verl's engine of the policy.
    """
    if engine.engine_config.strategy not in _PACKING_BY_POSITIONS or not engine.use_remove_padding:
        return None
    config = engine.model_config.hf_config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if layers & _STATEFUL and not engine.pass_packed_cu_seqlens:
        return f"its layers of {', '.join(sorted(layers & _STATEFUL))} are not told where a packed sequence begins"
    if config.model_type == "gpt_oss" and config._attn_implementation == "eager":
        return "transformers' eager attention of gpt_oss does not look where a packed sequence begins"
    return None


def fit(worker: Any) -> None:
    """Turn the policy's dropout off, and say so; say where its packed sequences see each other.

    Args:
        worker: verl's TrainingWorker of the policy, whose engine has been built.
    """
    engine = worker.engine
    rates = turn_off_dropout(engine.module if isinstance(engine.module, list) else [engine.module])
    if torch.distributed.get_rank() != 0:
        return
    if rates:
        print(
            f"vimpo_verl: dropout of the policy is off ({', '.join(f'{name} was {rate}' for name, rate in rates.items())}): "
            "the reference has none, and its noise would be read as log-ratios",
            flush=True,
        )
    problem = packing_problem(engine)
    if problem:
        print(
            f"vimpo_verl: actor_rollout_ref.model.use_remove_padding=True with a {engine.model_config.hf_config.model_type} "
            f"model: {problem}, so log-probs depend on what else is in a micro-batch, with any estimator. Write "
            "actor_rollout_ref.model.use_remove_padding=False",
            flush=True,
        )
