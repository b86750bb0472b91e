"""What VIMPO needs of verl's Megatron engine (actor_rollout_ref.actor.strategy=megatron), as pure functions of its configuration.

Whatever has not run anywhere is refused by name; docs/compatibility.md says what has. Settings that decide only how Megatron
lays a model out or how fast it is (offload, recomputation, fused operators, where layers are split) are verl's and are not
looked at.
"""

from collections.abc import Iterator
from typing import Any

# verl makes one set of process groups for both models, by whichever engine comes first, and looks at no second one's sizes.
SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# Keys below `megatron` that are false unless a recipe sets them -> why they are refused.
NOT_RUN = {
    "dynamic_context_parallel": "its micro-batches are made by another scheduler, with which VIMPO has not run",
    "use_megatron_fsdp": "VIMPO has not run with Megatron-FSDP",
    "override_transformer_config.should_pad_vocab": (
        "verl's log-probs of the update would count the padding, and the joint pass does not, so the ratio of the two would not "
        "start at 1"
    ),
    "qat.enable": "the policy would be quantised and verl quantises no reference, so the two would differ from the first step on",
}


def megatron_problems(config: Any) -> Iterator[str]:
    """Everything in the recipe's Megatron engines and model that VIMPO cannot run with.

    Args:
        config: verl's configuration, a DictConfig, with strategy=megatron for the actor.
    """
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    if actor.get("megatron") is None:
        yield (
            "actor_rollout_ref.actor.strategy=megatron: there is no section actor_rollout_ref.actor.megatron; write "
            "model_engine=megatron"
        )
        return
    if ref.strategy != "megatron":
        yield (
            f"actor_rollout_ref.ref.strategy={ref.strategy} differs from the actor's megatron: both share one pass; remove "
            "actor_rollout_ref.ref.strategy"
        )
        return
    yield from _sizes(actor.megatron, ref.megatron)
    yield from _not_run(actor.megatron, ref.megatron)
    yield from _model(config.actor_rollout_ref.model, bool(actor.megatron.get("vanilla_mbridge", False)))
    yield from _kappa(config)


def fit_megatron_reference(actor: Any, ref: Any) -> None:
    """Give the reference's engine the rounding of the policy's. Changes `ref`.

    Args:
        actor, ref: verl's sections, which megatron_problems has nothing against.
    """
    ref.megatron.dtype = actor.megatron.dtype


def _sizes(policys: Any, references: Any) -> Iterator[str]:
    for name in SIZES:
        if references.get(name) != policys.get(name):
            yield (
                f"actor_rollout_ref.ref.megatron.{name}={references.get(name)} differs from the actor's {policys.get(name)}: "
                "verl makes the groups of one of them for both models; remove it, and the reference follows the policy"
            )


def _not_run(policys: Any, references: Any) -> Iterator[str]:
    from omegaconf import OmegaConf

    for name, reason in NOT_RUN.items():
        for role, section in (("actor", policys), ("ref", references)):
            if OmegaConf.select(section, name):
                key = f"actor_rollout_ref.{role}.megatron.{name}"
                yield f"{key}=True: {reason}; write {key}=False"
    mode = OmegaConf.select(references, "router_replay.mode") or "disabled"
    if mode != "disabled":
        yield (
            f"actor_rollout_ref.ref.megatron.router_replay.mode={mode}: the routes are the policy's, and the reference goes its "
            "own; write actor_rollout_ref.ref.megatron.router_replay.mode=disabled"
        )
    if references.get("dtype") not in ("bfloat16", policys.get("dtype")):
        yield (
            f"actor_rollout_ref.ref.megatron.dtype={references.dtype} differs from the actor's {policys.dtype}: equal weights "
            "would give different logits, and the first step would learn from rounding; remove it, and the reference "
            "follows the policy"
        )


def _model(model: Any, vanilla: bool) -> Iterator[str]:
    if (model.get("mtp") or {}).get("enable", False):
        yield (
            "actor_rollout_ref.model.mtp.enable=True: VIMPO has not run beside multi-token prediction, whose heads go through "
            "the output matrix that the reference's states are kept at; write actor_rollout_ref.model.mtp.enable=False"
        )
    rank = (model.get("lora") or {}).get("rank", 0) or 0
    if not rank and ((model.get("lora_rank") or 0) > 0 or model.get("lora_adapter_path") is not None):
        yield (
            "actor_rollout_ref.model.lora.rank=0 with actor_rollout_ref.model.lora_rank or lora_adapter_path: verl's Megatron "
            "engine makes and loads adapters by lora.rank alone, and verl keeps no other reference; write "
            "actor_rollout_ref.model.lora.rank"
        )
    if rank and vanilla:
        yield (
            "actor_rollout_ref.model.lora.rank with actor_rollout_ref.actor.megatron.vanilla_mbridge=True: adapters are "
            "Megatron-Bridge's; write actor_rollout_ref.actor.megatron.vanilla_mbridge=False"
        )


def _kappa(config: Any) -> Iterator[str]:
    knobs = config.algorithm.get("vimpo") or {}
    if knobs.get("ref_refresh_every") is not None:
        yield (
            "algorithm.vimpo.ref_refresh_every with actor_rollout_ref.actor.strategy=megatron: the weights of Megatron's engine "
            "have not been handed over yet; write algorithm.vimpo.ref_refresh_every=null"
        )
    current = knobs.get("kappa_policy", "old") == "current" and knobs.get("kl_estimator", "exact") == "exact"
    if current and config.actor_rollout_ref.model.get("use_fused_kernels", False):
        yield (
            "algorithm.vimpo.kappa_policy=current with actor_rollout_ref.model.use_fused_kernels=True and "
            "actor_rollout_ref.actor.strategy=megatron: verl's fused head hands a loss log-probs and entropy alone; write "
            "algorithm.vimpo.kappa_policy=old, or actor_rollout_ref.model.use_fused_kernels=False"
        )
