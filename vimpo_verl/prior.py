"""What a prompt's mean reward is taken to be before it is answered: the prior of `fused`, `posterior_mean` and the budget rule.

Three sources: the prompt's own past in this run, a column of the data set, or a function, such as a pretrained value model.
The own past is a Beta posterior, with successes and failures that fade with age. At a step t, for a prompt with past visits
v of s_v successes and f_v failures at steps t_v,

    m = ( 1 + sum over all visits of the run of d^(t - t_v) s_v ) / ( 2 + ... of d^(t - t_v) (s_v + f_v) )
    a = 2 m       + sum over the prompt's visits of d^(t - t_v) s_v
    b = 2 (1 - m) + sum over the prompt's visits of d^(t - t_v) f_v
    prior = a / (a + b), which counts as a + b past answers

so a prompt that has not been seen starts from the run's mean m, and that from 1/2. Rewards between 0 and 1 count as parts
of a success. Imports the standard library only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vimpo_verl import section as section_reader

SECTION = "algorithm.prior"
STATE = "vimpo_prior.json"  # in a checkpoint's folder
START = 2.0  # answers that the run's mean counts for in a prompt's prior; 1/2 counts for as many in the run's mean


@dataclass(frozen=True)
class PriorConfig:
    """Knobs under `algorithm.prior`; with none of column and path the prior is the prompt's own past.

    Attributes:
        column: column of the data set that holds each prompt's prior, from 0 to 1; a key of a column that is a mapping
            after a dot, such as "extra_info.pass_rate".
        path: file, or module as pkg://package.module, that holds the function to ask, as in
            reward.custom_reward_function.path.
        name: the function's name.
        discount: what a step leaves of the own past, in (0, 1]; 1 forgets nothing.
        weight: past answers that a prior of a column or a function counts for in `posterior_mean`; > 0.
    """

    column: str | None = None
    path: str | None = None
    name: str | None = None
    discount: float = 0.99
    weight: float = 8.0

    @property
    def source(self) -> str:
        """ "own_past", "column" or "function"."""
        return "function" if self.path else "column" if self.column else "own_past"


class Prior(NamedTuple):
    """Of one prompt."""

    mean: float  # from 0 to 1
    weight: float  # past answers that it counts for, > 0


def parse_config(section: Mapping[str, Any] | None) -> tuple[PriorConfig, list[str]]:
    """Read `algorithm.prior`, collecting every problem.

    Args:
        section: the mapping under `algorithm.prior`, or None if the user gave none.

    Returns:
        The configuration (defaults where a value was unusable) and the problems found, each a sentence that names the
        key and says what to write instead. The configuration may be used only if there are none.
    """
    values, problems = section_reader.read(section, SECTION, _CHECKS, f"+{SECTION}.<name>=<value>")
    config = PriorConfig(**values)
    if (config.path is None) != (config.name is None):
        problems.append(f"{SECTION}.path and {SECTION}.name name a function together: write both, or neither")
    if config.path and config.column:
        problems.append(f"{SECTION}.column and {SECTION}.path are two priors: write one of them")
    return config, problems


class PastRewards:
    """The rewards of a run so far, discounted by age; the state that a checkpoint keeps.

    Args:
        discount: what a step leaves of the past, in (0, 1].
    """

    def __init__(self, discount: float):
        self.discount = discount
        self.of_prompt: dict[str, _Counts] = {}
        self.of_run = _Counts(0.0, 0.0, 0)

    def prior(self, prompt: str, step: int) -> Prior:
        """What the past says of a prompt.

        Args:
            prompt: its name in the data set.
            step: the step that it is to be answered in.
        """
        successes, failures = self._at(self.of_run, step)
        run_mean = (1 + successes) / (2 + successes + failures)
        successes, failures = self._at(self.of_prompt.get(prompt, _NEVER), step)
        a, b = START * run_mean + successes, START * (1 - run_mean) + failures
        return Prior(a / (a + b), a + b)

    def has_seen(self, prompt: str) -> bool:
        return prompt in self.of_prompt

    def add(self, prompt: str, rewards: Sequence[float], step: int) -> None:
        """Take in a visit.

        Args:
            prompt: its name in the data set.
            rewards: of its answers, each from 0 to 1.
            step: the step that trains on them.
        """
        successes = sum(rewards)
        failures = len(rewards) - successes
        self.of_prompt[prompt] = self._with(self.of_prompt.get(prompt, _NEVER), successes, failures, step)
        self.of_run = self._with(self.of_run, successes, failures, step)

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"of_run": self.of_run, "of_prompt": self.of_prompt}
        (folder / STATE).write_text(json.dumps(state, separators=(",", ":")))

    def load(self, folder: Path) -> bool:
        """Take the state of a checkpoint's folder; False if it has none.

        Raises:
            ValueError: the file cannot be read.
        """
        file = folder / STATE
        if not file.exists():
            return False
        try:
            state = json.loads(file.read_text())
            self.of_run = _Counts(*state["of_run"])
            self.of_prompt = {prompt: _Counts(*counts) for prompt, counts in state["of_prompt"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
        return True

    def _at(self, counts: "_Counts", step: int) -> tuple[float, float]:
        kept = self.discount ** max(0, step - counts.step)
        return kept * counts.successes, kept * counts.failures

    def _with(self, counts: "_Counts", successes: float, failures: float, step: int) -> "_Counts":
        past_successes, past_failures = self._at(counts, step)
        return _Counts(past_successes + successes, past_failures + failures, max(step, counts.step))


class _Counts(NamedTuple):
    """Discounted to `step`."""

    successes: float
    failures: float
    step: int


_NEVER = _Counts(0.0, 0.0, 0)


def prior_metrics(priors: Sequence[Prior], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """How good the priors of a batch were.

    Args:
        priors: of each prompt.
        rewards: of each prompt's answers, each from 0 to 1; a prompt without any counts nowhere.

    Returns:
        prior/mean, prior/bias, the mean of prior - rbar, and prior/squared_distance, that of ( prior - rbar )^2. With more
        than one answer rbar has a noise that can be told: prior/squared_error is the mean, over the prompts with two or
        more, of ( prior - rbar )^2 - var / k, an estimate of the prior's own squared error, which may come out below 0.
    """
    answered = [(prior.mean, found) for prior, found in zip(priors, rewards, strict=True) if len(found)]
    if not answered:
        return {}
    distances = [prior - sum(found) / len(found) for prior, found in answered]
    metrics = {
        "prior/mean": _mean([prior for prior, _ in answered]),
        "prior/bias": _mean(distances),
        "prior/squared_distance": _mean([distance**2 for distance in distances]),
    }
    beyond_noise = [
        distance**2 - _variance(found) / len(found)
        for distance, (_, found) in zip(distances, answered, strict=True)
        if len(found) > 1
    ]
    return metrics | ({"prior/squared_error": _mean(beyond_noise)} if beyond_noise else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    """Unbiased."""
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _word_or_none(value: Any) -> tuple[str, Any]:
    return ("", value) if value is None or isinstance(value, str) and value else ("write a name, or null", None)


_CHECKS = {
    "column": _word_or_none,
    "path": _word_or_none,
    "name": _word_or_none,
    "discount": section_reader.number_where(lambda number: 0 < number <= 1, "write a number in (0, 1], such as 0.99"),
    "weight": section_reader.number_where(lambda number: number > 0, "write a number greater than 0"),
}
