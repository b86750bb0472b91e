"""Lines runs up, a value a seed, and says which differences between sides are outside the noise of their seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vimpo_verl.compare.metrics import AXES, Axis, Quantity, quantities
from vimpo_verl.compare.runs import RunLog
from vimpo_verl.compare.statistics import Interval, difference_interval, mean_interval

OUTSIDE, INSIDE = "outside the seeds' noise", "inside the seeds' noise"
TOO_FEW = "unknown: needs 2 seeds a side"
OTHER_KEY = "unknown: not the same metric"


@dataclass
class Side:
    """Runs that differ in their seed only."""

    label: str
    runs: list[RunLog]


@dataclass(frozen=True)
class Difference:
    """One side against the first: other - first, with what to make of it."""

    interval: Interval
    verdict: str


@dataclass
class Row:
    """One quantity at the same place of an axis.

    Attributes:
        quantity: what is compared.
        values: label -> a value a seed, runs without the quantity left out.
        intervals: label -> mean over the seeds; None where no run has the quantity.
        differences: label -> difference to the first side; None where there is nothing to compare.
    """

    quantity: Quantity
    values: dict[str, list[float]]
    intervals: dict[str, Interval | None]
    differences: dict[str, Difference | None]


@dataclass
class Table:
    """All quantities where every run has come to `end` on an axis; a value is the mean over (start, end]."""

    axis: Axis
    start: float
    end: float
    rows: list[Row]


@dataclass
class Comparison:
    """Everything that is printed and written."""

    sides: list[Side]
    quantities: list[Quantity]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(
    sides: Sequence[Side], axes: Sequence[Axis] = AXES, last: float = 0.1, confidence: float = 0.95
) -> Comparison:
    """Compare sides at the end of what all their runs have reached.

    Args:
        sides: at least one, each with at least one run; the first is what the others are compared with.
        axes: what to align by.
        last: a run's value is the mean over this last fraction of the common range, or its last value before the end.
        confidence: of every interval.
    """
    runs = [run for side in sides for run in side.runs]
    result = Comparison(list(sides), [])
    result.quantities = [quantity for quantity in quantities(runs) if any(quantity.series(run) for run in runs)]
    for axis in axes:
        without = [run.name for run in runs if axis.positions(run) is None]
        if without:
            result.notes.append(f"not aligned by {axis.name}: no {axis.key} at some steps of {', '.join(without)}")
            continue
        result.tables.append(_table(result, axis, last, confidence))
    result.notes += [note for quantity in result.quantities for note in _notes(quantity, sides)]
    result.notes += _late_starts(runs)
    return result


def _table(result: Comparison, axis: Axis, last: float, confidence: float) -> Table:
    runs = [run for side in result.sides for run in side.runs]
    end = min(max(axis.positions(run).values()) for run in runs)
    start = end * (1 - last)
    rows = [_row(quantity, result.sides, axis, start, end, confidence) for quantity in result.quantities]
    for side in result.sides:
        old = [
            row.quantity.name
            for row in rows
            if not row.values[side.label] and any(row.quantity.series(run) for run in side.runs)
        ]
        if old:
            result.notes.append(
                f"at equal {axis.name}, {side.label} has no value in the second half of what is "
                f"common: {', '.join(old)}"
            )
    return Table(axis, start, end, rows)


def _row(quantity: Quantity, sides: list[Side], axis: Axis, start: float, end: float, confidence: float) -> Row:
    values = {}
    for side in sides:
        each = (value_at(quantity, run, axis, start, end) for run in side.runs)
        values[side.label] = [value for value in each if value is not None]
    intervals = {label: mean_interval(found, confidence) if found else None for label, found in values.items()}
    first, *others = sides
    differences = {other.label: _difference(quantity, first, other, values, confidence) for other in others}
    return Row(quantity, values, intervals, differences)


def value_at(quantity: Quantity, run: RunLog, axis: Axis, start: float, end: float) -> float | None:
    """Mean over the records in (start, end] of the axis, or the last record in the second half of what is common.

    None without either: an older value, such as a validation before training, says nothing about the end.
    """
    positions = axis.positions(run) or {}
    series = quantity.series(run)
    recent = [
        (positions[step], value) for step, value in series.items() if end / 2 < positions[step] <= end * (1 + 1e-12)
    ]
    inside = [value for position, value in recent if position > start]
    if inside:
        return math.fsum(inside) / len(inside)
    return recent[-1][1] if recent else None


def _difference(
    quantity: Quantity, first: Side, other: Side, values: dict[str, list[float]], confidence: float
) -> Difference | None:
    a, b = values[first.label], values[other.label]
    if not a or not b:
        return None
    interval = difference_interval(a, b, confidence)
    if not _is_one_metric(quantity, [first, other]):
        return Difference(interval, OTHER_KEY)
    outside = interval.excludes_zero
    return Difference(interval, TOO_FEW if outside is None else OUTSIDE if outside else INSIDE)


def _is_one_metric(quantity: Quantity, sides: Sequence[Side]) -> bool:
    """Whether all runs that have the quantity have the same one."""
    if quantity.parts:
        return all(_is_one_metric(part, sides) for part in quantity.parts)
    return quantity.alike or len(set.union(*(_keys(quantity, side) for side in sides))) <= 1


def _keys(quantity: Quantity, side: Side) -> set[str]:
    """verl's names that this side's runs have the quantity under."""
    return {key for run in side.runs if (key := quantity.key_of(run))}


def _notes(quantity: Quantity, sides: Sequence[Side]) -> list[str]:
    """Which side lacks a quantity, or has it under another name."""
    if quantity.parts:
        return []
    keys = {side.label: _keys(quantity, side) for side in sides}
    because = f" ({quantity.note})" if quantity.note else ""
    notes = [f"{quantity.name}: {label} has none{because}" for label, found in keys.items() if not found]
    if not _is_one_metric(quantity, sides):
        each = "; ".join(f"{label}: {', '.join(sorted(found))}" for label, found in keys.items() if found)
        notes.append(f"{quantity.name} is not the same metric everywhere{because}: {each}")
    for side in sides:
        lacking = [run.name for run in side.runs if not quantity.series(run)]
        if 0 < len(lacking) < len(side.runs):
            notes.append(f"{quantity.name}: {side.label} without {', '.join(lacking)}, which has none")
    return notes


def _late_starts(runs: Sequence[RunLog]) -> list[str]:
    """Runs whose earlier log is missing: their tokens and hours start at 0 where the log does."""
    return [
        f"{run.name} starts at step {min(run.steps)}: its tokens and hours are counted from there; were earlier "
        "metrics overwritten?"
        for run in runs
        if min(run.steps) > 1
    ]
