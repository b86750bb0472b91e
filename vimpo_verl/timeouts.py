"""How long a stage of training may stand still: the knobs that every estimator has. Standard library only."""

from dataclasses import dataclass
from typing import Any

from vimpo_verl.section import number_where


@dataclass(frozen=True)
class Timeouts:
    """What happens when a stage stands still, where verl itself waits for ever (docs/reliability.md, "Standing still").

    Attributes:
        stage_timeout: seconds, > 0, for which a stage of a step (generation with rewards, update, checkpoint, weight
            sync, ...) may stand still before the run is ended; None, it is only said; "auto", it is said, and the run is
            ended after four hours where that can only mean that something is dead.
        validation_timeout: the same for a validation.
        startup_timeout: the same for what comes before the first step; "auto" never ends it.
    """

    stage_timeout: float | str | None = "auto"
    validation_timeout: float | str | None = "auto"
    startup_timeout: float | str | None = "auto"


KNOBS = tuple(Timeouts.__dataclass_fields__)

_seconds = number_where(lambda number: number > 0, "")


def timeout(value: Any) -> tuple[str, Any]:
    """The check of these knobs, as vimpo_verl.section has them."""
    if value is None or value == "auto":
        return "", value
    _, seconds = _seconds(value)
    complaint = "write auto, a number of seconds greater than 0, or null to be warned only" if seconds is None else ""
    return complaint, seconds


CHECKS = dict.fromkeys(KNOBS, timeout)
