"""One pass or two: what `algorithm.vimpo.passes` comes to with a recipe. No seam: driver and trainer ask it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vimpo_verl.config import SECTION, VimpoConfig

NOT_ON = "megatron"  # the engine whose update hands one pass nothing but kappa
SEPARATE = "separate_async"  # verl's trainer mode with rollouts on GPUs of their own


@dataclass(frozen=True)
class Passes:
    """What a run does."""

    one: bool
    why: str

    def __str__(self) -> str:
        return f"{'one pass' if self.one else 'two passes'} a step ({self.why})"


def decide(config: Any, knobs: VimpoConfig) -> Passes:
    """What `passes` comes to with this recipe, which `problems` has found nothing against.

    Args:
        config: verl's configuration, a DictConfig.
        knobs: those of algorithm.vimpo.
    """
    if bypasses_old_log_probs(config):
        return Passes(True, "algorithm.rollout_correction.bypass_mode=True")
    if knobs.passes != "auto":
        return Passes(knobs.passes == "one", f"{SECTION}.passes={knobs.passes}")
    obstacle = next(_obstacles(config, knobs), None) or _without_statistics(knobs)
    return Passes(obstacle is None, obstacle or "one update a batch")


def _without_statistics(knobs: VimpoConfig) -> str | None:
    """Why `auto` keeps to two passes where one would do without the actor loss every so often, not only at a run's start."""
    if knobs.use_actor and knobs.actor_coeff != 0 and knobs.ref_refresh_every is not None:
        return (
            f"{SECTION}.ref_refresh_every={knobs.ref_refresh_every}: in one pass each refresh would cost two steps their actor "
            "loss, in two passes one"
        )
    return None


def problems(config: Any, knobs: VimpoConfig) -> list[str]:
    """Why `passes` cannot be what is asked for. Arguments as for `decide`."""
    if bypasses_old_log_probs(config):
        found = list(_against_bypass(config, knobs))
        asked = "algorithm.rollout_correction.bypass_mode=True, which is one pass"
        instead = "algorithm.rollout_correction.bypass_mode=False"
        if knobs.passes == "two":
            asked = f"{SECTION}.passes=two with algorithm.rollout_correction.bypass_mode=True"
            instead = instead if found else f"{SECTION}.passes=one or auto, or {instead}"
            found.insert(0, "that recipe has no pass before the update")
    else:
        found = list(_obstacles(config, knobs)) if knobs.passes == "one" else []
        asked, instead = f"{SECTION}.passes=one", f"{SECTION}.passes=auto"
    return [f"{asked}: {why}; write {instead}" for why in found]


def _against_bypass(config: Any, knobs: VimpoConfig) -> Iterator[str]:
    """What needs the pass that `bypass_mode` is without."""
    yield from _switches(knobs)
    if config.actor_rollout_ref.actor.strategy == NOT_ON:
        yield f"actor_rollout_ref.actor.strategy={NOT_ON}: one pass does not run there yet"


def warnings(config: Any) -> Iterator[str]:
    """What `bypass_mode` leaves out, and what one pass means where a batch has several updates, which it alone can bring.
    `config` as for `decide`."""
    if not bypasses_old_log_probs(config):
        return
    for name, value in _corrections(config):
        yield (
            f"algorithm.rollout_correction.{name}={value} with bypass_mode=True: nothing is corrected there (of verl's losses "
            "loss_mode=bypass_mode alone does it); write algorithm.rollout_correction.bypass_mode=False for the correction"
        )
    actor, cycle = config.actor_rollout_ref.actor, _updates_a_cycle(config)
    if _mini_batches(config) > 1 or actor.ppo_epochs > 1 or cycle > 1:
        counts = (
            f"data.train_batch_size={config.data.train_batch_size}, actor_rollout_ref.actor.ppo_mini_batch_size="
            f"{actor.ppo_mini_batch_size}, actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs}"
        )
        if cycle > 1:
            counts += f", trainer.v1.{SEPARATE}.parameter_sync_step={cycle}"
        yield (
            f"algorithm.rollout_correction.bypass_mode=True with several updates ({counts}): there is no pass before the first, "
            "so kappa, values and advantages are those of the policy of each update, and not of the one that all of them start "
            "from. For that one's, in a pass more a step: algorithm.rollout_correction.bypass_mode=False"
        )


def is_separate(config: Any) -> bool:
    """Whether rollouts have GPUs of their own, and a cycle of updates one old policy."""
    return config.trainer.get("v1", {}).get("trainer_mode") == SEPARATE


def _updates_a_cycle(config: Any) -> int:
    """Batches that verl trains on before the rollout has the policy's weights again."""
    if not is_separate(config):
        return 1
    return config.trainer.v1.get(SEPARATE, {}).get("parameter_sync_step") or 1


def _mini_batches(config: Any) -> float:
    """Of a batch."""
    return config.data.train_batch_size / config.actor_rollout_ref.actor.ppo_mini_batch_size


def _corrections(config: Any) -> Iterator[tuple[str, Any]]:
    """Settings of the rollout correction that take the log-probs of a pass before the update."""
    correction = config.algorithm.get("rollout_correction") or {}
    for name in ("rollout_is", "rollout_rs"):
        if correction.get(name) is not None:
            yield name, correction.get(name)


def bypasses_old_log_probs(config: Any) -> bool:
    """Whether verl is to take the rollout's log-probs for the old ones."""
    return bool((config.algorithm.get("rollout_correction") or {}).get("bypass_mode", False))


def _switches(knobs: VimpoConfig) -> Iterator[str]:
    """Knobs whose part is worked out before the update."""
    usual = {"kl_estimator": ("exact", "k2", "k3"), "kappa_detach": (True,), "value_type": ("raw",)}
    usual |= {"actor_advantage": ("implied",)}
    for name, values in usual.items():
        if getattr(knobs, name) not in values:
            yield f"{SECTION}.{name}={getattr(knobs, name)} needs the pass before the update"
    if knobs.actor_coeff == "gradient" and knobs.use_actor:
        yield f"{SECTION}.actor_coeff=gradient needs the advantages before the update"


def _obstacles(config: Any, knobs: VimpoConfig) -> Iterator[str]:
    """Why one pass would not be the same as two."""
    yield from _switches(knobs)
    actor = config.actor_rollout_ref.actor
    if _mini_batches(config) > 1:
        yield (
            f"data.train_batch_size={config.data.train_batch_size} and actor_rollout_ref.actor.ppo_mini_batch_size="
            f"{actor.ppo_mini_batch_size} make several updates a batch, and after the first the policy is not the one before "
            "the update"
        )
    if actor.ppo_epochs > 1:
        yield (
            f"actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs}: after the first epoch the policy is not the one before the "
            "update"
        )
    if actor.strategy == NOT_ON:
        yield f"actor_rollout_ref.actor.strategy={NOT_ON}: one pass does not run there yet"
    if is_separate(config):
        yield (
            f"trainer.v1.trainer_mode={SEPARATE}: verl takes old log-probs at the policy that a cycle starts with, whose weights "
            "it brings back for that pass"
        )
    for name, value in _corrections(config):
        yield (
            f"algorithm.rollout_correction.{name}={value}: it compares the rollout's log-probs with those of the pass before the "
            "update"
        )
