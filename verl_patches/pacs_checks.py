"""What PACS needs of a verl recipe, as pure functions of verl's configuration; as verl_patches.recipe_checks, for VIMPO."""

from collections.abc import Iterator
from typing import Any

from verl_patches.recipe_checks import trainer_problems, type_problems
from vimpo_verl.pacs_config import PacsConfig

STRATEGIES = ("fsdp", "fsdp2")


def problems(config: Any) -> list[str]:
    """Everything in the recipe that PACS cannot run with.

    Args:
        config: verl's configuration, a DictConfig, with algorithm.adv_estimator=pacs.

    Returns:
        One sentence a problem; empty if the recipe fits.
    """
    found = list(type_problems(config))
    if found:
        return found
    return [*_algorithm(config), *_rewards(config), *trainer_problems(config, "PACS"), *_actor(config)]


def warnings(config: Any, knobs: PacsConfig) -> list[str]:
    """What runs, but perhaps not as meant. `config` as for `problems`; knobs: those of algorithm.pacs."""
    found = []
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if rollout.n == 1 and knobs.score != "plain":
        found.append(
            "actor_rollout_ref.rollout.n=1: a response has nobody to be compared with, so nothing is learnt; the authors use 8"
        )
    if actor.ppo_mini_batch_size >= config.data.train_batch_size and actor.ppo_epochs == 1:
        found.append(
            "one update a step: with it PACS is RLOO with class weights. The authors make four: write "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={max(config.data.train_batch_size // 4, 1)}"
        )
    if knobs.score == "group_normalised" and not (actor.optim.get("clip_grad") or 0) > 0:
        found.append(
            "algorithm.pacs.score=group_normalised without actor_rollout_ref.actor.optim.clip_grad: in the first update of a "
            "step it divides by 1e-6; write actor_rollout_ref.actor.optim.clip_grad=1.0"
        )
    return found


def _algorithm(config: Any) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.get("use_kl_in_reward", False):
        yield (
            "algorithm.use_kl_in_reward=True: PACS takes rewards as labels, 0 or 1, and this adds a KL to them; write "
            "algorithm.use_kl_in_reward=False (actor_rollout_ref.actor.use_kl_loss works)"
        )
    correction = algorithm.get("rollout_correction") or {}
    if correction.get("bypass_mode", False):
        yield (
            "algorithm.rollout_correction.bypass_mode=True: the first update of a step needs the old log-probs of the policy "
            "itself; write algorithm.rollout_correction.bypass_mode=False"
        )
    for name in ("rollout_is", "rollout_rs"):
        if correction.get(name) is not None:
            yield (
                f"algorithm.rollout_correction.{name}={correction[name]}: PACS's loss is one of whole groups and has no weights "
                f"of tokens; write algorithm.rollout_correction.{name}=null"
            )
    if config.get("critic") is not None and config.critic.get("enable"):
        yield "critic.enable=True: PACS has no critic, its score is the policy's own log-ratio; remove critic.enable"


def _rewards(config: Any) -> Iterator[str]:
    overlong = (config.reward.get("reward_kwargs") or {}).get("overlong_buffer_cfg") or {}
    if overlong.get("enable", False):
        yield (
            "reward.reward_kwargs.overlong_buffer_cfg.enable=True: its penalty makes rewards that are neither 0 nor 1, and PACS "
            "takes rewards as labels; write reward.reward_kwargs.overlong_buffer_cfg.enable=False"
        )


def _actor(config: Any) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    if actor.strategy not in STRATEGIES:
        yield (
            f"actor_rollout_ref.actor.strategy={actor.strategy}: PACS's worker is built on verl's FSDP engine; write "
            "actor_rollout_ref.actor.strategy=fsdp2 (or fsdp), and leave model_engine out if the recipe has it"
        )
    mode = actor.policy_loss.get("loss_mode", "vanilla")
    if mode not in ("vanilla", "pacs"):
        yield (
            f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}: PACS brings its own policy loss; remove "
            "actor_rollout_ref.actor.policy_loss.loss_mode"
        )
    if actor.get("shuffle", False):
        yield (
            "actor_rollout_ref.actor.shuffle=True: each rank would shuffle its own share and tear the groups apart; write "
            "actor_rollout_ref.actor.shuffle=False"
        )
    if actor.get("use_prefix_grouper", False):
        yield (
            "actor_rollout_ref.actor.use_prefix_grouper=True: it needs a group in one place, and PACS deals its members out to "
            "the ranks by length; write actor_rollout_ref.actor.use_prefix_grouper=False"
        )
    if (config.get("distillation") or {}).get("enabled", False):
        yield "distillation.enabled=True: PACS and distillation both bring a loss of their own; write distillation.enabled=False"
