"""The knobs of VIMPO: the only place with their defaults.

They are read from `algorithm.vimpo` of verl's configuration (`+algorithm.vimpo.beta=1e-3` on the command line). lambda
is verl's own `algorithm.lam`. Imports the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vimpo_verl import section as section_reader
from vimpo_verl import timeouts
from vimpo_verl.section import flag, one_of
from vimpo_verl.timeouts import Timeouts

SECTION = "algorithm.vimpo"

KL_ESTIMATORS = ("exact", "topk", "k2", "k3")
VALUE_LOSS_TYPES = ("squared_error", "huber")
KAPPA_POLICIES = ("old", "current")
VALUE_TYPES = ("raw", "soft")
ACTOR_ADVANTAGES = ("implied", "grpo")
PASSES = ("auto", "two", "one")
BASELINES_WITH_PRIOR = ("fused", "posterior_mean")
BASELINES = ("group_mean", "leave_one_out", "shrunk", *BASELINES_WITH_PRIOR)


@dataclass(frozen=True)
class VimpoConfig(Timeouts):
    """Knobs under `algorithm.vimpo`; what each does to the equations is in docs/configuration.md.

    Attributes:
        beta: weight of the reference in rho and kappa, in units of reward a nat: a number > 0, or "auto" for
            beta_scale * (range of the rewards) / (mean response length) of the run's first batch (vimpo_verl/beta.py).
        beta_scale: beta "auto" times the mean response length, for rewards of range 1; > 0.
        actor_coeff: c_A, weight of the actor loss beside the value loss: a number >= 0, or "auto" for
            actor_alpha * beta * mean_length * rms_over_tokens(residual) / (what verl's loss_agg_mode makes of a loss of 1),
            the same push at any response length and in every mode; "gradient" divides that by the root mean square of the
            advantages, so that the two gradients' is actor_alpha also where they are not whitened.
        actor_advantage: "implied", A_t of the implied values (the paper's), or "grpo", the group-normalised reward.
        actor_alpha: the push of actor_coeff "auto" or "gradient", relative to the value loss; >= 0.
        actor_trust: multiply c_A by max(0, correlation of the policy's judgement with the outcomes).
        kl_estimator: kappa: "exact" (whole vocabulary, the paper's), "topk", its part on the policy's kl_top_k most likely
            tokens, or from the sampled token alone "k2" or "k3".
        kl_top_k: for "topk", >= 1.
        kappa_detach: False lets the gradient of L_V flow through kappa, too; with kappa_policy "current".
        kappa_policy: the policy that kappa in L_V belongs to: "old", the one before the update (the same for one update a
            batch, as in the paper), or "current", recomputed in every update for a reference forward more.
        passes: "two", a pass over policy and reference before the update; "one", the update's own forward finds everything, with
            statistics of the batch before; "auto", one where that is the same by design, else two.
        whiten: whiten the advantages over the whole batch.
        use_actor: False trains with the value loss alone.
        value_type: "raw" (the paper's), or "soft": V0 of the KL-regularised problem and the value loss without kappa.
        value_coeff: weight of L_V, > 0.
        value_normalised: divide L_V by the mean square of its targets over the batch.
        value_loss_type: "squared_error" (the paper's) or "huber".
        huber_delta: where huber turns linear, in units of reward; > 0.
        value_clip: from the second update of a batch on, how far a token's ratio to the old policy may be from 1 before L_V
            pushes it no further, > 0; None: the paper's L_V, which knows no ratio. The same for one update a batch.
        baseline: V0: "group_mean" (the paper's), "leave_one_out", "shrunk", to the mean of the batch's other prompts, or, of
            the rewards and a prior of the prompt (algorithm.prior), "fused" or "posterior_mean".
        baseline_cap: upper bound of V0, or None.
        ref_refresh_every: steps after which the policy becomes the reference, again and again; None: it stays as it is.
        preset: "paper" for the constants of PRESETS, under whatever else is given; None for the defaults above.
        stage_timeout, validation_timeout, startup_timeout: see Timeouts.
    """

    beta: float | str = "auto"
    beta_scale: float = 0.5
    actor_coeff: float | str = "auto"
    actor_alpha: float = 0.1
    actor_trust: bool = True
    actor_advantage: str = "implied"
    kl_estimator: str = "exact"
    kl_top_k: int | None = None
    kappa_detach: bool = True
    kappa_policy: str = "old"
    passes: str = "auto"
    whiten: bool = True
    use_actor: bool = True
    value_type: str = "raw"
    value_coeff: float = 1.0
    value_normalised: bool = False
    value_loss_type: str = "squared_error"
    huber_delta: float = 0.5
    value_clip: float | None = 0.2
    baseline: str = "group_mean"
    baseline_cap: float | None = None
    ref_refresh_every: int | None = None
    preset: str | None = None


# The paper's recipe where it differs from the defaults (section 5: beta = 5e-4, c_A = 5e-3, no trust factor).
PAPER_RECIPE = {"beta": 5e-4, "actor_coeff": 5e-3, "actor_trust": False, "value_clip": None}
PRESETS = {"paper": PAPER_RECIPE}


def parse_config(section: Mapping[str, Any] | None) -> tuple[VimpoConfig, list[str]]:
    """Read `algorithm.vimpo`, collecting every problem instead of stopping at the first.

    Args:
        section: the mapping under `algorithm.vimpo`, or None if the user gave none.

    Returns:
        The configuration (defaults where a value was unusable) and the problems found, each a sentence that names the
        key and says what to write instead. The configuration may be used only if there are none.
    """
    values, problems = section_reader.read(section, SECTION, _CHECKS, f"+{SECTION}.<name>=<value>")
    config = VimpoConfig(**{**PRESETS.get(values.get("preset"), {}), **values})
    return config, problems + _contradictions(config)


def _contradictions(config: VimpoConfig) -> list[str]:
    found = []
    if config.use_actor and not config.whiten and config.actor_coeff == "auto" and config.actor_advantage == "implied":
        found.append(
            f"{SECTION}.actor_coeff=auto is worked out for whitened advantages: with {SECTION}.whiten=false write gradient, or "
            f"a number, such as +{SECTION}.actor_coeff=5e-3"
        )
    if (config.kl_estimator == "topk") != (config.kl_top_k is not None):
        found.append(
            f"{SECTION}.kl_top_k={config.kl_top_k} with {SECTION}.kl_estimator={config.kl_estimator}: kl_estimator=topk needs "
            f"a number of tokens, such as +{SECTION}.kl_top_k=128, and no other takes one"
        )
    if not config.kappa_detach and config.kappa_policy != "current":
        found.append(
            f"{SECTION}.kappa_detach=false with {SECTION}.kappa_policy={config.kappa_policy}: kappa of the old policy has no "
            f"gradient; write +{SECTION}.kappa_policy=current"
        )
    if config.value_type == "soft":
        found += _soft_contradictions(config)
    return found


def _soft_contradictions(config: VimpoConfig) -> list[str]:
    """The soft value has no kappa in its loss, and V0 of its own; as its authors we give it no actor loss."""
    wanted = {"use_actor": False, "baseline": "group_mean", "kappa_detach": True, "kappa_policy": "old"}
    return [
        f"{SECTION}.{name}={getattr(config, name)} with {SECTION}.value_type=soft: write {SECTION}.{name}={str(value).lower()}"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]


# ---- one check a field: value -> (complaint or "", value in its type) ------------------------------------------------

_positive = section_reader.number_where(lambda number: number > 0, "write a number greater than 0")
_not_negative = section_reader.number_where(lambda number: number >= 0, "write a number, 0 or greater")
_cap = section_reader.number_where(lambda number: True, "write a number, or null for no cap")


def _word_or(check: section_reader.Check, complaint: str, *words: str) -> section_reader.Check:
    """A check for some words and for what another check takes."""

    def word_or(value: Any) -> tuple[str, Any]:
        if value in words:
            return "", value
        refused, number = check(value)
        return (complaint if refused else ""), number

    return word_or


def _number_or_none(value: Any) -> tuple[str, Any]:
    return ("", None) if value is None else _cap(value)


def _clip(value: Any) -> tuple[str, Any]:
    if value is None:
        return "", None
    complaint, number = _positive(value)
    return ("write a number greater than 0, or null for the paper's loss without a ratio" if complaint else ""), number


def _count_or_none(value: Any) -> tuple[str, Any]:
    if value is None:
        return "", None
    complaint, count = section_reader.integer(value)
    return ("write a whole number above 0, or null", None) if complaint or count < 1 else ("", count)


def _preset(value: Any) -> tuple[str, Any]:
    return ("", None) if value is None else one_of(*PRESETS)(value)


def _kl_estimator(value: Any) -> tuple[str, Any]:
    if value == "k1":
        return (
            "k1 is the log-ratio itself, so rho - kappa would be zero for every token and nothing would be learnt; "
            "write exact, topk, k2 or k3"
        ), None
    return one_of(*KL_ESTIMATORS)(value)


_CHECKS = {
    "beta": _word_or(_positive, "write auto or a number greater than 0", "auto"),
    "beta_scale": _positive,
    "actor_coeff": _word_or(_not_negative, "write auto, gradient or a number, 0 or greater", "auto", "gradient"),
    "actor_advantage": one_of(*ACTOR_ADVANTAGES),
    "actor_alpha": _not_negative,
    "actor_trust": flag,
    "kl_estimator": _kl_estimator,
    "kl_top_k": _count_or_none,
    "kappa_detach": flag,
    "kappa_policy": one_of(*KAPPA_POLICIES),
    "passes": one_of(*PASSES),
    "whiten": flag,
    "use_actor": flag,
    "value_type": one_of(*VALUE_TYPES),
    "value_coeff": _positive,
    "value_normalised": flag,
    "value_loss_type": one_of(*VALUE_LOSS_TYPES),
    "huber_delta": _positive,
    "value_clip": _clip,
    "baseline": one_of(*BASELINES),
    "baseline_cap": _number_or_none,
    "ref_refresh_every": _count_or_none,
    "preset": _preset,
    **timeouts.CHECKS,
}
