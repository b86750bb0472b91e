"""What VIMPO needs of verl's training engines (actor_rollout_ref.actor.strategy), as pure functions of verl's configuration.

The joint pass runs on verl's Megatron engine (verl_patches.megatron_checks), on its FSDP engine, and on the two that derive from
that, VeOmni and FSDP-Turbo, whose methods for inputs, outputs and forward are FSDP's (tests/test_derived_engines.py). They
differ in where their configuration stands and what it is called, which is the table ENGINES. Every other engine is refused with
its reason.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from verl_patches.megatron_checks import fit_megatron_reference, megatron_problems
from verl_patches.reference_precision import dtype_of, stored_in

# Keys of verl's fsdp_config that decide how a forward rounds, with verl's defaults. model_dtype because a model that is
# stored in half precision has its buffers in it, too (rotary frequencies); what that allows is in reference_precision.
FSDP_ROUNDING = {"dtype": "bfloat16", "model_dtype": "fp32", "mixed_precision": None}
# VeOmni's kernels and the attention round differently, too; `*_implementation` stands for all that are in the section.
VEOMNI_ROUNDING = {"mixed_precision": True, "force_use_huggingface": False, "attn_implementation": "flash_attention_2",
                   "moe_implementation": "fused", "qat_implementation": "none"}  # fmt: skip
VEOMNI_KERNEL, VEOMNI_KERNEL_DEFAULT = "_implementation", "eager"


@dataclass(frozen=True)
class Engine:
    """Where verl keeps what the joint pass has to know of an engine.

    Attributes:
        section: of actor_rollout_ref.actor and .ref, with the engine's configuration.
        sequence_parallel: keys with the Ulysses size, dotted, below `section`; verl takes the largest.
        rounding: keys below `section` that decide how a forward rounds -> verl's default.
        chosen_by: what selects the section, beside the strategy.
    """

    section: str
    sequence_parallel: tuple[str, ...]
    rounding: dict[str, Any] = field(default_factory=dict)
    chosen_by: str = ""


_FSDP = Engine("fsdp_config", ("ulysses_sequence_parallel_size",), FSDP_ROUNDING)
_TURBO = "turbo_config.distributed"
ENGINES = {
    "fsdp": _FSDP,
    "fsdp2": _FSDP,
    "fsdp_turbo": Engine(
        "fsdp_config",
        ("ulysses_sequence_parallel_size", f"{_TURBO}.ulysses_parallel_size"),
        {**FSDP_ROUNDING, f"{_TURBO}.fsdp_plan.param_dtype": "bf16", f"{_TURBO}.fsdp_plan.output_dtype": "bf16"},
    ),
    "veomni": Engine("veomni", ("ulysses_parallel_size",), VEOMNI_ROUNDING, chosen_by="model_engine=veomni"),
}
# Engines of verl, and of packages around it, that VIMPO does not run on.
_NO_HOOK = "it hands its logits to no hook, and kappa needs both distributions"
REFUSED = {
    "torchtitan": _NO_HOOK,
    "automodel": _NO_HOOK,
    "mindspeed": "it is verl's Megatron engine for Ascend NPUs, on which VIMPO has not run",
    "mlite": "it is an engine from outside verl, which VIMPO has not been tried on",
}


def engine_problems(config: Any) -> Iterator[str]:
    """What VIMPO cannot run with in the engines of policy and reference.

    Args:
        config: verl's configuration, a DictConfig.
    """
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    if actor.strategy == "megatron":
        yield from megatron_problems(config)
        return
    if actor.strategy not in ENGINES:
        yield (
            f"actor_rollout_ref.actor.strategy={actor.strategy}: {_reason(actor.strategy)}; write "
            "actor_rollout_ref.actor.strategy=fsdp2 (or fsdp), and leave model_engine out if the recipe has it"
        )
        return  # the keys below are those of the engine
    engine = ENGINES[actor.strategy]
    if actor.get(engine.section) is None:
        yield (
            f"actor_rollout_ref.actor.strategy={actor.strategy}: there is no section actor_rollout_ref.actor."
            f"{engine.section}; write {engine.chosen_by or 'actor_rollout_ref.actor.strategy=fsdp2'}"
        )
        return
    if ref.strategy != actor.strategy:
        yield (
            f"actor_rollout_ref.ref.strategy={ref.strategy} differs from the actor's {actor.strategy}: both share one "
            "pass; remove actor_rollout_ref.ref.strategy"
        )
        return
    lora = has_lora(config.actor_rollout_ref.model)
    yield from _sequence_parallel(engine, actor, ref)
    if not lora:  # with LoRA the reference is the policy's own model
        yield from _precision(engine, actor, ref)
    yield from _padded_to_length(engine, actor, ref)
    if actor.strategy in _OF_ONE_ENGINE:
        yield from _OF_ONE_ENGINE[actor.strategy](config, lora)


def _reason(strategy: Any) -> str:
    return REFUSED.get(strategy, "the joint pass runs on verl's FSDP engine, those derived from it, and Megatron")


def _sequence_parallel(engine: Engine, actor: Any, ref: Any) -> Iterator[str]:
    policys, references = (sequence_parallel_size(role) for role in (actor, ref))
    fits = references == policys if _has_own_plan(ref) else references in (1, policys)
    if not fits:
        yield (
            f"actor_rollout_ref.ref.{engine.section}.{engine.sequence_parallel[-1]}={references} differs from the actor's "
            f"{policys}: both share one pass over the same slices; remove it"
        )


def _precision(engine: Engine, actor: Any, ref: Any) -> Iterator[str]:
    """Equal weights must give equal logits: a difference of rounding is read as log-ratios and KL."""
    for name, default in rounding_keys(engine, actor).items():
        given, policys = _get(ref[engine.section], name), _get(actor[engine.section], name)
        if name == "model_dtype" and dtype_of(given) == dtype_of(stored_in(actor.strategy, actor[engine.section])):
            continue
        if given != default and given != policys:
            yield (
                f"actor_rollout_ref.ref.{engine.section}.{name}={given} differs from the actor's {policys}: equal weights "
                "would give different logits, and the first step would learn from rounding; remove it, and the "
                "reference follows the policy"
            )
    if (_get(actor[engine.section], "qat") or {}).get("enable", False):
        yield (
            "actor_rollout_ref.actor.fsdp_config.qat.enable=True: the policy would be quantised and verl quantises no "
            "reference, so the two would differ from the first step on; write "
            "actor_rollout_ref.actor.fsdp_config.qat.enable=False"
        )


def _padded_to_length(engine: Engine, actor: Any, ref: Any) -> Iterator[str]:
    for name, role in (("actor", actor), ("ref", ref)):
        if role.get("pad_to_length", False) or role[engine.section].get("pad_to_length", False):
            yield (
                f"actor_rollout_ref.{name}.{engine.section}.pad_to_length=True: verl does not allow it together with the "
                "logits hook that kappa comes from; write pad_to_length=False"
            )


def _of_veomni(config: Any, lora: bool) -> Iterator[str]:
    model, veomni = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.veomni
    if lora:
        yield (
            "actor_rollout_ref.model.lora_rank with actor_rollout_ref.actor.strategy=veomni: verl's VeOmni engine makes no "
            "adapters, so there would be no reference; write actor_rollout_ref.model.lora_rank=0"
        )
    if model.get("use_fused_kernels", False):
        yield (
            "actor_rollout_ref.model.use_fused_kernels=True with actor_rollout_ref.actor.strategy=veomni: VeOmni's fused "
            "loss returns log-probs and no logits, and has no place for the reference; write "
            "actor_rollout_ref.model.use_fused_kernels=False"
        )
    mode = (veomni.get("router_replay") or {}).get("mode", "disabled")
    if mode != "disabled":
        yield (
            f"actor_rollout_ref.actor.veomni.router_replay.mode={mode}: the reference runs inside the policy's forward, and "
            "VeOmni would record the experts of both as the policy's; write "
            "actor_rollout_ref.actor.veomni.router_replay.mode=disabled"
        )


def _of_fsdp_turbo(config: Any, lora: bool) -> Iterator[str]:
    if lora:
        yield (
            "actor_rollout_ref.model.lora_rank with actor_rollout_ref.actor.strategy=fsdp_turbo: not tried; write "
            "actor_rollout_ref.actor.strategy=fsdp2, or actor_rollout_ref.model.lora_rank=0"
        )


_OF_ONE_ENGINE = {"veomni": _of_veomni, "fsdp_turbo": _of_fsdp_turbo}


def sequence_parallel_size(role: Any) -> int:
    """Ulysses size of verl's actor or ref section; the key beside the engine's own section is verl's older spelling."""
    engine = ENGINES[role.strategy]
    others = [_get(role[engine.section], key) or 1 for key in engine.sequence_parallel[1:]]
    return max([_verls_own_size(role), *others])


def _verls_own_size(role: Any) -> int:
    engine = ENGINES[role.strategy]
    sizes = role.get("ulysses_sequence_parallel_size"), role[engine.section].get(engine.sequence_parallel[0])
    return max(size or 1 for size in sizes)


def rounding_keys(engine: Engine, actor: Any) -> dict[str, Any]:
    """Keys below the engine's section that decide how a forward rounds -> verl's default."""
    keys = dict(engine.rounding)
    if engine.section == "veomni":
        kernels = [name for name in actor.veomni if name.endswith(VEOMNI_KERNEL)]
        keys |= {name: VEOMNI_KERNEL_DEFAULT for name in kernels if name not in keys}
    return keys


def has_lora(model: Any) -> bool:
    """Whether verl's model section asks for LoRA adapters."""
    rank = (model.get("lora") or {}).get("rank", 0) or model.get("lora_rank", 0) or 0
    return rank > 0 or model.get("lora_adapter_path") is not None


def fit_reference(actor: Any, ref: Any) -> None:
    """Give the reference's engine the slices and the rounding of the policy's. Changes `ref`.

    Args:
        actor, ref: verl's sections, which engine_problems has nothing against.
    """
    from omegaconf import OmegaConf, open_dict

    if actor.strategy == "megatron":
        fit_megatron_reference(actor, ref)
        return
    engine = ENGINES[actor.strategy]
    policys, references = actor[engine.section], ref[engine.section]
    with open_dict(references):
        references[engine.sequence_parallel[0]] = _verls_own_size(actor)
        if actor.strategy == "fsdp_turbo" and not _has_own_plan(ref):
            references.turbo_config = copy.deepcopy(policys.get("turbo_config"))
        for name in rounding_keys(engine, actor):
            if _get(references, name) != _get(policys, name):
                OmegaConf.update(references, name, copy.deepcopy(_get(policys, name)), force_add=True)
        if "model_dtype" in engine.rounding:
            references.model_dtype = stored_in(actor.strategy, policys)


def _has_own_plan(role: Any) -> bool:
    """Whether FSDP-Turbo's configuration has been written for this role: it is a plan of modules and patches, not a number."""
    if role.strategy != "fsdp_turbo":
        return False
    from importlib.resources import files

    from omegaconf import OmegaConf

    verls = OmegaConf.create(files("verl.trainer.config").joinpath("engine/fsdp.yaml").read_text())
    return role.fsdp_config.get("turbo_config") != verls.get("turbo_config")


def _get(section: Any, dotted: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(section, dotted)
