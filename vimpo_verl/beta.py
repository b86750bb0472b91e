"""beta, the weight of the reference, where it is measured instead of given: the run's number, its file and its diagnosis.

S = sum_t td_t = beta * sum_t (log-ratio - KL) is what the value loss fits to R - V0. So beta is in units of reward a nat, and
the number that suits goes with the rewards and against the length of the responses (docs/method.md, "Scale"). Standard
library only; sums are exact, so the order of the samples changes no bit.
"""

import dataclasses
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

STATE = "vimpo_state.json"  # in global_step_N: the fields of Beta
_ROUNDING = 1e-6  # of float32 rewards that are sums over tokens, relative to the largest


@dataclass(frozen=True)
class Beta:
    """The number of a run.

    Attributes:
        value: beta, in units of reward a nat; > 0.
        beta_scale: the knob it was measured with; None, as the rest: the number was given.
        mean_length: tokens that the policy wrote in a response of the first batch.
        reward_range: in units of reward, of the first batch.
        range_is_known: False: all rewards of that batch were equal, and reward_range is that of 0/1 rewards.
    """

    value: float
    beta_scale: float | None = None
    mean_length: float | None = None
    reward_range: float | None = None
    range_is_known: bool = True


def auto_beta(lengths: Sequence[int], outcomes: Sequence[float], groups: Sequence[Hashable], beta_scale: float) -> Beta:
    """beta = beta_scale * (range of the rewards) / (mean length), the `beta: auto` of one batch.

    The range is the largest max R - min R inside a prompt's group, because R - V0 is about differences inside a group; where
    no group's rewards differ, that of all rewards; where all are equal, 1, that of 0/1 rewards. So with 0/1 rewards it is 1 in
    any batch, however rare successes are, and it goes with the rewards' unit but not with their origin.

    Args:
        lengths: [B], tokens that the policy wrote, of the real sequences.
        outcomes: [B], R.
        groups: [B], equal for the responses to one prompt.
        beta_scale: > 0, beta * T for rewards of range 1 (the paper's: 5e-4 times about 1,000 tokens).

    Raises:
        ValueError: there is no token, a reward is not finite, or the arguments do not fit each other.
    """
    if not len(lengths) == len(outcomes) == len(groups):
        raise ValueError(
            f"{len(lengths)} lengths, {len(outcomes)} outcomes and {len(groups)} groups do not fit each other"
        )
    if not sum(lengths):
        raise ValueError(
            "algorithm.vimpo.beta=auto: no response of the batch has a valid token, so there is no length to go by. Write "
            "a number, such as +algorithm.vimpo.beta=5e-4"
        )
    if not all(map(math.isfinite, outcomes)):
        raise ValueError("algorithm.vimpo.beta=auto: a reward is not finite")
    mean_length, reward_range = sum(lengths) / len(lengths), _reward_range(outcomes, groups)
    known = reward_range is not None
    reward_range = reward_range if known else 1.0
    return Beta(beta_scale * reward_range / mean_length, beta_scale, mean_length, reward_range, known)


def _reward_range(outcomes: Sequence[float], groups: Sequence[Hashable]) -> float | None:
    """None where all rewards are equal, but for rounding."""
    members: dict[Hashable, list[float]] = {}
    for outcome, group in zip(outcomes, groups, strict=True):
        members.setdefault(group, []).append(outcome)
    inside_a_group = max(max(rewards) - min(rewards) for rewards in members.values())
    rounding = _ROUNDING * max(map(abs, outcomes))
    candidates = (inside_a_group, max(outcomes) - min(outcomes))
    return next((found for found in candidates if found > rounding), None)


def beta_fit(judgements: Sequence[float], targets: Sequence[float], beta: float) -> float | None:
    """The beta at which the policy's summed td would fit the targets best, by least squares.

        argmin_b sum_i (b * G_i - y_i)^2 = sum_i G_i y_i / sum_i G_i^2,   G_i = S_i / beta = sum_t (log-ratio - KL)

    Args:
        judgements: [B], S_i = sum_t td_t, in units of reward.
        targets: [B], y_i = R - V0.
        beta: the one that is in S.

    Returns:
        In units of reward a nat; None where every S is 0, as at the first step.
    """
    squares = math.fsum(s * s for s in judgements)
    if squares == 0.0:
        return None
    return beta * math.fsum(s * y for s, y in zip(judgements, targets, strict=True)) / squares


def save(beta: Beta, folder: Path) -> None:
    """Write STATE of a checkpoint, global_step_N; the folder is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE).write_text(json.dumps(dataclasses.asdict(beta), indent=1))


def load(folder: Path) -> Beta | None:
    """The beta of a checkpoint, bit for bit; None where there is no STATE: GRPO's, or of a version before `beta: auto`.

    Raises:
        ValueError: the file cannot be read, naming it.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    names = {field.name for field in dataclasses.fields(Beta)}
    try:
        beta = Beta(**{name: value for name, value in json.loads(path.read_text()).items() if name in names})
        if not 0.0 < beta.value < math.inf:
            raise ValueError(f"beta is {beta.value}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the run's beta cannot be read ({type(error).__name__}: {error})") from error
    return beta
