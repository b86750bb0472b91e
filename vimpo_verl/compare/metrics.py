"""Which of verl's metrics are compared, and where a run stands on the axes: steps, tokens, wall-clock."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vimpo_verl.compare.runs import RunLog

_VALIDATION = re.compile(r"^val-core/(?P<set>.+)/(?P<what>acc|reward|score)/mean@(?P<n>\d+)$")


@dataclass(frozen=True)
class Quantity:
    """One row of the table and one plot.

    Attributes:
        name: what the reader sees.
        keys: verl's names for it, the first that a run has is used. Empty for a mean over `parts`.
        parts: quantities whose mean over all of them it is.
        alike: the keys are one quantity under two names, so that runs with different keys can be compared.
        note: said where a side has another key than the others, or lacks it.
    """

    name: str
    keys: tuple[str, ...] = ()
    parts: tuple["Quantity", ...] = ()
    alike: bool = False
    note: str = ""

    def key_of(self, run: RunLog) -> str | None:
        """verl's name for it in this run; None if the run has none."""
        if self.parts:
            return self.name if all(part.key_of(run) for part in self.parts) else None
        return next((key for key in self.keys if key in run.keys), None)

    def series(self, run: RunLog) -> dict[int, float]:
        """step -> value, by rising step; empty if the run has none."""
        if self.parts:
            each = [part.series(run) for part in self.parts]
            common = set(each[0]).intersection(*each[1:])
            return {step: sum(series[step] for series in each) / len(each) for step in sorted(common)}
        key = self.key_of(run)
        return run.series(key) if key else {}

    @property
    def slug(self) -> str:
        """The name as a file's name."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


# Without reward noise verl's score is the clean one.
REWARD = Quantity("reward", ("reward_noise/clean_mean", "critic/score/mean"), alike=True)
TRAINING = (
    Quantity(
        "kl",
        ("vimpo/kl", "actor/kl_loss"),
        note="vimpo/kl is exact, actor/kl_loss verl's estimator; GRPO without a KL loss has neither",
    ),
    Quantity("response length", ("response_length/mean",)),
    Quantity("entropy", ("actor/entropy",)),
    Quantity("value explained variance", ("vimpo/value_explained_variance",), note="only VIMPO has values"),
    Quantity("outcome AUC", ("vimpo/outcome_auc",), note="only VIMPO has a judgement of its answers"),
    Quantity("rollouts a prompt", ("budget/rollouts_per_prompt",), note="only where rollouts are bought on demand"),
    Quantity("seconds a step", ("timing_s/step",)),
)


def quantities(runs: Sequence[RunLog]) -> list[Quantity]:
    """Reward, validation accuracy (each data set, and their mean where there are several) and training metrics."""
    validation = _validation(runs)
    if len(validation) > 1:
        validation.insert(0, Quantity("validation accuracy", parts=tuple(validation), note="mean over the data sets"))
    return [REWARD, *validation, *TRAINING]


def _validation(runs: Sequence[RunLog]) -> list[Quantity]:
    """One quantity a data set: accuracy where verl has it, else reward; of the most samples a prompt."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for key in {key for run in runs for key in run.keys}:
        match = _VALIDATION.match(key)
        if match:
            rank = ("acc", "score", "reward").index(match["what"])
            found.setdefault(match["set"], []).append((rank, -int(match["n"]), key))
    return [
        Quantity(
            f"validation {name}", tuple(key for *_, key in sorted(keys)), note="not the same number of samples a prompt"
        )
        for name, keys in sorted(found.items())
    ]


@dataclass(frozen=True)
class Axis:
    """What runs are aligned by: `key`, summed up over the steps in units of `unit`; no key for the step itself."""

    name: str
    label: str
    key: str | None
    unit: float = 1.0

    def positions(self, run: RunLog) -> dict[int, float] | None:
        """step -> position, by rising step; None if a step of training lacks what is summed up.

        A resumed run whose earlier log is missing starts to count where its log does.
        """
        positions, total = {}, 0.0
        for step, values in sorted(run.steps.items()):
            if self.key is None:
                total = float(step)
            elif self.key in values:
                total += values[self.key] / self.unit
            elif "critic/score/mean" in values:
                return None
            positions[step] = total
        return positions


AXES = (
    Axis("step", "step", None),
    Axis("tokens", "million tokens", "perf/total_num_tokens", 1e6),
    Axis("hours", "hours of training", "timing_s/step", 3600.0),
)
