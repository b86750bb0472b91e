"""The knobs of VIMPO: the only place with their defaults.

They are read from `algorithm.vimpo` of verl's configuration (`+algorithm.vimpo.beta=1e-3` on the command line). lambda
is verl's own `algorithm.lam`. Imports the standard library only.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

SECTION = "algorithm.vimpo"

KL_ESTIMATORS = ("exact", "k2", "k3")
VALUE_LOSS_TYPES = ("squared_error", "huber")
KAPPA_POLICIES = ("old", "current")
BASELINES = ("group_mean", "leave_one_out")


@dataclass(frozen=True)
class VimpoConfig:
    """Knobs under `algorithm.vimpo`; what each does to the equations is in docs/configuration.md.

    Attributes:
        beta: weight of the reference in rho and kappa, in units of reward a nat; > 0.
        actor_coeff: c_A, weight of the actor loss beside the value loss: a number >= 0, or "auto" for
            actor_alpha * beta * mean_length * rms_over_tokens(residual), the same push at any response length.
        actor_alpha: the push of actor_coeff "auto", relative to the value loss; >= 0.
        actor_trust: multiply c_A by max(0, correlation of the policy's judgement with the outcomes).
        kl_estimator: kappa: "exact" (whole vocabulary, the paper's), or from the sampled token alone "k2" or "k3".
        kappa_policy: the policy that kappa in L_V belongs to: "old", the one before the update (the same for one update a
            batch, as in the paper), or "current", recomputed in every update for a reference forward more.
        whiten: whiten the advantages over the whole batch.
        use_actor: False trains with the value loss alone.
        value_loss_type: "squared_error" (the paper's) or "huber".
        huber_delta: where huber turns linear, in units of reward; > 0.
        baseline: V0: "group_mean" (the paper's) or "leave_one_out".
        baseline_cap: upper bound of V0, or None.
    """

    beta: float = 5e-4
    actor_coeff: float | str = "auto"
    actor_alpha: float = 0.1
    actor_trust: bool = True
    kl_estimator: str = "exact"
    kappa_policy: str = "old"
    whiten: bool = True
    use_actor: bool = True
    value_loss_type: str = "squared_error"
    huber_delta: float = 0.5
    baseline: str = "group_mean"
    baseline_cap: float | None = None


# The paper's recipe where it differs from the defaults (section 5: c_A = 5e-3, no trust factor).
PAPER_RECIPE = {"actor_coeff": 5e-3, "actor_trust": False}


def parse_config(section: Mapping[str, Any] | None) -> tuple[VimpoConfig, list[str]]:
    """Read `algorithm.vimpo`, collecting every problem instead of stopping at the first.

    Args:
        section: the mapping under `algorithm.vimpo`, or None if the user gave none.

    Returns:
        The configuration (defaults where a value was unusable) and the problems found, each a sentence that names the
        key and says what to write instead. The configuration may be used only if there are none.
    """
    if section is None:
        return VimpoConfig(), []
    if not isinstance(section, Mapping):
        return VimpoConfig(), [f"{SECTION}={section!r} is not a section: write +{SECTION}.<name>=<value>"]
    known = {field.name for field in fields(VimpoConfig)}
    problems = [_unknown_key(name, known) for name in section if name not in known]
    values = {}
    for name in known & set(section):
        complaint, value = _CHECKS[name](section[name])
        if complaint:
            problems.append(f"{SECTION}.{name}={section[name]!r}: {complaint}")
        else:
            values[name] = value
    return VimpoConfig(**values), sorted(problems) + _contradictions(VimpoConfig(**values))


def _unknown_key(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {SECTION}.{near[0]}?" if near else "the keys are " + ", ".join(sorted(known))
    return f"{SECTION}.{name} does not exist: {hint}"


def _contradictions(config: VimpoConfig) -> list[str]:
    if config.use_actor and not config.whiten and config.actor_coeff == "auto":
        return [
            f"{SECTION}.actor_coeff=auto is worked out for whitened advantages: with {SECTION}.whiten=false write a "
            f"number, such as +{SECTION}.actor_coeff=5e-3"
        ]
    return []


# ---- one check a field: value -> (complaint or "", value in its type) ------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite number, also from text such as 5e-4, which YAML 1.1 leaves a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> tuple[str, Any]:
    number = _number(value)
    return ("", number) if number is not None and number > 0 else ("write a number greater than 0", None)


def _not_negative(value: Any) -> tuple[str, Any]:
    number = _number(value)
    return ("", number) if number is not None and number >= 0 else ("write a number, 0 or greater", None)


def _actor_coeff(value: Any) -> tuple[str, Any]:
    if value == "auto":
        return "", value
    complaint, number = _not_negative(value)
    return ("write auto or a number, 0 or greater" if complaint else ""), number


def _number_or_none(value: Any) -> tuple[str, Any]:
    if value is None:
        return "", None
    number = _number(value)
    return ("", number) if number is not None else ("write a number, or null for no cap", None)


def _flag(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, bool) else ("write true or false", None)


def _one_of(*choices: str):
    def check(value: Any) -> tuple[str, Any]:
        return ("", value) if value in choices else (f"write one of {', '.join(choices)}", None)

    return check


def _kl_estimator(value: Any) -> tuple[str, Any]:
    if value == "k1":
        return (
            "k1 is the log-ratio itself, so rho - kappa would be zero for every token and nothing would be learnt; "
            "write exact, k2 or k3"
        ), None
    return _one_of(*KL_ESTIMATORS)(value)


_CHECKS = {
    "beta": _positive,
    "actor_coeff": _actor_coeff,
    "actor_alpha": _not_negative,
    "actor_trust": _flag,
    "kl_estimator": _kl_estimator,
    "kappa_policy": _one_of(*KAPPA_POLICIES),
    "whiten": _flag,
    "use_actor": _flag,
    "value_loss_type": _one_of(*VALUE_LOSS_TYPES),
    "huber_delta": _positive,
    "baseline": _one_of(*BASELINES),
    "baseline_cap": _number_or_none,
}
