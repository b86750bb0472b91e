"""What VIMPO needs of a verl recipe, as pure functions of verl's configuration.

Every check yields sentences that name the key, say what is wrong and what to write instead. verl_patches.validation
calls them in the driver, before Ray starts.
"""

from collections.abc import Iterator
from typing import Any

from verl_patches import passes
from verl_patches.engine_checks import engine_problems, has_lora
from verl_patches.group_switch import budget_of
from verl_patches.loss_checks import adjust_losses, loss_problems, loss_warnings
from verl_patches.passes import SEPARATE, is_separate
from verl_patches.switch import knobs_of, section_of
from vimpo_verl.config import VimpoConfig

# Trainer modes of verl.trainer.ppo.v1 that FamilyTrainer can be put in front of.
TRAINER_MODES = ("sync", "colocate_async")


def problems(config: Any) -> list[str]:
    """Everything in the recipe that VIMPO cannot run with.

    Args:
        config: verl's configuration, a DictConfig, with algorithm.adv_estimator=vimpo.

    Returns:
        One sentence a problem; empty if the recipe fits.
    """
    found = list(type_problems(config))
    if found:
        return found  # the other checks compute with these values
    for check in (_switches, _reference_refresh, _algorithm, _passes, _trainer, engine_problems, _model, loss_problems):
        found += check(config)
    return found


def warnings(config: Any, knobs: VimpoConfig) -> list[str]:
    """What runs, but perhaps not as meant. `config` as for `problems`; knobs: those of algorithm.vimpo."""
    found = []
    if config.actor_rollout_ref.rollout.n == 1 and budget_of(config)[0] is None:
        found.append(
            "actor_rollout_ref.rollout.n=1: every group has one response, so V0 = R and the value loss only pulls the "
            "policy to the reference; the paper uses 8"
        )
    found += _taken_over(config)
    found += passes.warnings(config)
    found += loss_warnings(config, knobs)
    return found


def plan(config: Any, knobs: VimpoConfig) -> str:
    """What a step of an accepted recipe will be. Arguments as for `warnings`."""
    return str(passes.decide(config, knobs))


def adjust(config: Any) -> None:
    """Set right what the recipe has no reason to say otherwise, or is told by a warning. Changes `config`.

    Called once the recipe is accepted and its warnings are given.
    """
    adjust_losses(config)
    config.algorithm.use_kl_in_reward = False


def noise_problems(config: Any) -> list[str]:
    """Everything in the recipe that reward noise cannot run with, for any estimator.

    Args:
        config: verl's configuration, a DictConfig, with a section algorithm.reward_noise.
    """
    return [*trainer_problems(config, "algorithm.reward_noise"), *_noise_rewards(config)]


def _noise_rewards(config: Any) -> Iterator[str]:
    overlong = (config.reward.get("reward_kwargs") or {}).get("overlong_buffer_cfg") or {}
    if overlong.get("enable", False):
        yield (
            "reward.reward_kwargs.overlong_buffer_cfg.enable=True: its penalty makes rewards that are neither 0 nor 1, "
            "and algorithm.reward_noise flips 0 and 1 only; write reward.reward_kwargs.overlong_buffer_cfg.enable=False"
        )


# Keys whose values the checks compute with, or look into.
_INTEGERS = (
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.model.lora_rank",
    "actor_rollout_ref.model.lora.rank",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size",
    "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size",
    "actor_rollout_ref.actor.veomni.ulysses_parallel_size",
    "actor_rollout_ref.ref.veomni.ulysses_parallel_size",
    "trainer.v1.separate_async.parameter_sync_step",
)
_COUNTS = (
    "data.train_batch_size",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_epochs",
)
_SECTIONS = (
    "algorithm.rollout_correction",
    "actor_rollout_ref.model.lora",
    "actor_rollout_ref.actor.fsdp_config.qat",
    "actor_rollout_ref.actor.veomni.router_replay",
    "distillation",
    "critic",
    "trainer.v1.separate_async",
)


def type_problems(config: Any) -> Iterator[str]:
    """What is neither left out nor of the type that verl documents for it."""
    from omegaconf import DictConfig, OmegaConf

    for key in _SECTIONS:
        value = OmegaConf.select(config, key)
        if value is not None and not isinstance(value, DictConfig):
            yield f"{key}={value!r}: this is a section with keys of its own, as in verl's configuration; remove it"
    for key in _INTEGERS:
        value = OmegaConf.select(config, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            yield f"{key}={value!r}: write an integer"
    for key in _COUNTS:
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"{key}={_written(value)}: write a whole number of at least 1"


def _written(value: Any) -> str:
    return "null" if value is None else repr(value)


def _switches(config: Any) -> Iterator[str]:
    """Kappa that takes whole logits of both models, which fused heads do not make and Megatron's ranks do not have."""
    knobs, _ = knobs_of(config)
    asked = {"kl_estimator": knobs.kl_estimator == "topk", "kappa_detach": not knobs.kappa_detach}
    for name in [name for name, is_set in asked.items() if is_set]:
        if config.actor_rollout_ref.model.get("use_fused_kernels", False):
            yield (
                f"actor_rollout_ref.model.use_fused_kernels=True with algorithm.vimpo.{name}={getattr(knobs, name)}: there are "
                "no logits to take kappa from; write actor_rollout_ref.model.use_fused_kernels=False"
            )
        if config.actor_rollout_ref.actor.strategy == "megatron":
            yield (
                f"actor_rollout_ref.actor.strategy=megatron with algorithm.vimpo.{name}={getattr(knobs, name)}: a rank has a "
                "part of the vocabulary, and this kappa takes the whole; write actor_rollout_ref.actor.strategy=fsdp2"
            )


def _reference_refresh(config: Any) -> Iterator[str]:
    section = section_of(config, "vimpo")
    if not isinstance(section, dict) or not section.get("ref_refresh_every"):
        return
    if has_lora(config.actor_rollout_ref.model):
        yield (
            "algorithm.vimpo.ref_refresh_every with LoRA: the reference is the policy without its adapters and cannot become "
            "another; write algorithm.vimpo.ref_refresh_every=null"
        )
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy not in ("fsdp", "fsdp2"):
        yield (
            f"algorithm.vimpo.ref_refresh_every with actor_rollout_ref.actor.strategy={strategy}: weights are copied between "
            "models that verl's FSDP engine has sharded; write actor_rollout_ref.actor.strategy=fsdp2"
        )


def _algorithm(config: Any) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.gamma != 1.0:
        yield f"algorithm.gamma={algorithm.gamma}: VIMPO's equations have discount 1; write algorithm.gamma=1.0"
    if not isinstance(algorithm.lam, (int, float)) or not 0.0 <= algorithm.lam <= 1.0:
        yield f"algorithm.lam={algorithm.lam!r}: lambda is a number in [0, 1]; the paper's is algorithm.lam=1.0"
    if config.get("critic") is not None and config.critic.get("enable"):
        yield "critic.enable=True: VIMPO's values are implied by the policy, there is no critic; remove critic.enable"


def trainer_problems(config: Any, what: str) -> Iterator[str]:
    """The trainer that a recipe asks for, where it is none that `what` can be put in front of."""
    if not config.trainer.get("use_v1", True):
        yield f"trainer.use_v1=False: {what} is built on verl's v1 trainer; write trainer.use_v1=True"
    mode = config.trainer.get("v1", {}).get("trainer_mode", "sync")
    if mode not in TRAINER_MODES:
        yield (
            f"trainer.v1.trainer_mode={mode}: {what} has no trainer for it; write trainer.v1.trainer_mode=sync or "
            "colocate_async"
        )


def _passes(config: Any) -> Iterator[str]:
    knobs, _ = knobs_of(config)
    yield from passes.problems(config, knobs)


def _trainer(config: Any) -> Iterator[str]:
    # VIMPO has a worker for SEPARATE, where policy and reference are in one.
    if not is_separate(config) or not config.trainer.get("use_v1", True):
        yield from trainer_problems(config, "VIMPO")
    elif not config.actor_rollout_ref.get("hybrid_engine", True):
        yield (
            f"actor_rollout_ref.hybrid_engine=False with trainer.v1.trainer_mode={SEPARATE}: policy and reference would be two "
            "workers, and VIMPO's pass runs through both in one; write actor_rollout_ref.hybrid_engine=True"
        )


def _model(config: Any) -> Iterator[str]:
    model = config.actor_rollout_ref.model
    if config.actor_rollout_ref.actor.strategy == "megatron":
        return  # verl_patches.megatron_checks
    if model.get("lora_adapter_path") is not None:
        yield (
            f"actor_rollout_ref.model.lora_adapter_path={model.lora_adapter_path}: the reference is the model with its adapters "
            "off, not the adapter's start, so what it has learnt already would be read as values; merge the adapter into the "
            "model of actor_rollout_ref.model.path and write actor_rollout_ref.model.lora_adapter_path=null"
        )
    elif has_lora(model) and not (model.get("lora_rank") or 0) > 0:
        yield (
            "actor_rollout_ref.model.lora_rank=0 with actor_rollout_ref.model.lora.rank: verl's FSDP engine makes adapters by "
            "lora_rank alone, and verl keeps no other reference; write actor_rollout_ref.model.lora_rank"
        )


def _taken_over(config: Any) -> Iterator[str]:
    """Settings that had no effect, or another, in the recipe that they come from."""
    if config.algorithm.get("use_kl_in_reward", False):
        yield (
            "algorithm.use_kl_in_reward=True: kappa is the KL to the reference already, so R is the reward without verl's "
            "penalty, and algorithm.kl_ctrl has no effect. Write algorithm.use_kl_in_reward=False; how strongly the reference "
            "pulls is algorithm.vimpo.beta"
        )
    lam = config.algorithm.lam
    if lam != 1:
        yield (
            f"algorithm.lam={lam}: GRPO and its like do not look at it, VIMPO does: a token's advantage counts what comes after "
            f"it with lambda to the distance, which reaches about {1 / (1 - lam):.3g} tokens. The paper's is algorithm.lam=1.0"
        )
    if config.actor_rollout_ref.actor.get("use_prefix_grouper", False):
        yield (
            "actor_rollout_ref.actor.use_prefix_grouper=True: verl's v1 trainer and its engines do not look at it, with any "
            "estimator: prompts that responses share are computed for each of them"
        )
