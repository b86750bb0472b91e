"""What VIMPO needs of the losses of a verl recipe, as pure functions of verl's configuration (verl_patches.recipe_checks).

The recipe's policy loss stays: it is the form of L_A, with VIMPO's advantages in it. Checked against verl 0.9.1, whose policy
losses are in verl.trainer.ppo.core_algos; losses that a user has registered are taken as they are.
"""

from collections.abc import Iterator
from typing import Any

from verl_patches.family import FAMILY
from verl_patches.loss_aggregation import agg_mode, full_length_weight, recipe_loss_mode
from vimpo_verl.config import VimpoConfig

# Policy losses that are no form of L_A, each with the reason and what to write instead.
NO_FORM = {
    "geo_mean": (
        "one ratio a sequence, the geometric mean, multiplies the mean of its advantages, so token-level advantages would "
        "cancel, while each token's ratio is clipped by the sign of its own; verl's code says that it supports sequence-level "
        "advantages only, and averages over a micro-batch, so that its weight depends on their number. Write vanilla, or gspo, "
        "whose sequence-level ratio takes token-level advantages"
    ),
    "bypass_mode": (
        "it works out importance weights and rejections from the rollout's log-probs in every update and then calls another "
        "loss. Write that loss (vanilla for ppo_clip) and algorithm.rollout_correction.rollout_is, rollout_rs"
    ),
}


def loss_problems(config: Any) -> Iterator[str]:
    """The recipe's policy loss, where VIMPO's actor loss cannot take its form, and losses of which kappa's hook is part."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    actor = config.actor_rollout_ref.actor
    mode, key = recipe_loss_mode(actor), "actor_rollout_ref.actor.policy_loss.loss_mode"
    if mode in NO_FORM:
        yield f"{key}={mode}: {NO_FORM[mode]}"
    elif mode in FAMILY or (
        mode not in POLICY_LOSS_REGISTRY and not config.actor_rollout_ref.model.get("external_lib")
    ):
        known = ", ".join(sorted(POLICY_LOSS_REGISTRY.keys() - NO_FORM.keys() - FAMILY.keys()))
        yield f"{key}={mode}: verl has no such policy loss; VIMPO's actor loss takes the form of {known}"
    if mode == "dro" and not (actor.policy_loss.get("dro_beta") or 0) > 0:
        yield f"{key}=dro without actor_rollout_ref.actor.policy_loss.dro_beta, which verl wants to be a positive number"
    if (config.get("distillation") or {}).get("enabled", False):
        yield (
            "distillation.enabled=True: with distillation_loss.use_task_rewards=False, as verl's examples have it, the policy "
            "learns from a teacher alone and there is no reward for VIMPO; with task rewards the teacher's loss takes the one "
            "logits hook that kappa comes from. Write distillation.enabled=False"
        )


def adjust_losses(config: Any) -> None:
    """Give `seq-mean-token-sum-norm` its horizon where the recipe has none. Changes `config`."""
    actor = config.actor_rollout_ref.actor
    if _lacks_horizon(actor):
        actor.loss_scale_factor = config.data.max_response_length


def _lacks_horizon(actor: Any) -> bool:
    return actor.get("loss_agg_mode") == "seq-mean-token-sum-norm" and actor.get("loss_scale_factor") is None


def loss_warnings(config: Any, knobs: VimpoConfig) -> Iterator[str]:
    """Losses that weigh otherwise beside L_V than in the recipe."""
    if _lacks_horizon(config.actor_rollout_ref.actor):
        yield (
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm without a loss_scale_factor: verl would divide each "
            "micro-batch by its own longest response, and the actor loss's weight beside the value loss would depend on the "
            f"micro-batches. It is divided by data.max_response_length={config.data.max_response_length} instead"
        )
    yield from _fixed_coefficient(config, knobs)
    yield from _extra_terms(config, knobs)


def _fixed_coefficient(config: Any, knobs: VimpoConfig) -> Iterator[str]:
    """A number for c_A multiplies whatever loss_agg_mode makes of L_A; the paper's is meant for a mean over tokens."""
    if not knobs.use_actor or knobs.actor_coeff in ("auto", 0):
        return
    weight = full_length_weight(config)
    if abs(weight - 1) > 1e-6:
        yield (
            f"actor_rollout_ref.actor.loss_agg_mode={agg_mode(config.actor_rollout_ref.actor)} makes L_A {weight:.3g} times "
            f"its mean over tokens where responses have {config.data.max_response_length} of them, and "
            f"algorithm.vimpo.actor_coeff={knobs.actor_coeff} does not allow for it. The paper's 5e-3 is for token-mean: write "
            "actor_rollout_ref.actor.loss_agg_mode=token-mean, or algorithm.vimpo.actor_coeff=auto, which is the same "
            "push in every mode"
        )


def _extra_terms(config: Any, knobs: VimpoConfig) -> Iterator[str]:
    """Terms that verl adds to the loss weigh more beside L_V than beside GRPO's loss (docs/method.md, "Scale")."""
    actor = config.actor_rollout_ref.actor
    length = config.data.max_response_length
    grpo = full_length_weight(config)
    if knobs.beta == "auto":  # for rewards of 0 and 1
        beta_length, at = knobs.beta_scale, f"beta*T = {knobs.beta_scale:g} (beta_scale)"
    else:
        beta_length, at = knobs.beta * length, f"T = {length} tokens"
    share = beta_length * 0.5 / grpo
    scale = (
        f"VIMPO's loss pushes a token with about beta*T*|residual| where GRPO's pushes with {grpo:.3g}: at {at} "
        f"and |residual| = 0.5 that is {share:.2g} of it, so"
    )
    if actor.use_kl_loss:
        yield (
            f"actor_rollout_ref.actor.use_kl_loss=True is kept. {scale} kl_loss_coef={actor.kl_loss_coef} weighs as "
            f"{actor.kl_loss_coef / share:.2g} would with GRPO. The paper turns it off: "
            "actor_rollout_ref.actor.use_kl_loss=False"
        )
    if actor.entropy_coeff != 0:
        yield (
            f"actor_rollout_ref.actor.entropy_coeff={actor.entropy_coeff} is kept. {scale} it weighs as "
            f"{actor.entropy_coeff / share:.2g} would with GRPO. The paper has none: "
            "actor_rollout_ref.actor.entropy_coeff=0"
        )
