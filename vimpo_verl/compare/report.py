"""The comparison as text (tables in Markdown, to paste into docs/recipes.md) and as JSON."""

from collections.abc import Iterator

from vimpo_verl.compare.comparison import OUTSIDE, Comparison, Difference, Row, Side, Table
from vimpo_verl.compare.statistics import Interval


def text(comparison: Comparison, unreadable: list[str], confidence: float) -> str:
    """Everything to read: the sides, a table an axis, how many differences chance would make, and what is missing."""
    parts = ["\n".join(_sides(comparison.sides))]
    parts += [_table(table, comparison.sides) for table in comparison.tables]
    parts.append("\n".join(_reading(comparison, confidence)))
    if comparison.notes:
        parts.append("Notes:\n" + "\n".join(f"- {note}" for note in comparison.notes))
    problems = unreadable + [
        f"{run.name}: {problem}" for side in comparison.sides for run in side.runs for problem in run.problems
    ]
    parts.append("Could not read:\n" + "\n".join(f"- {problem}" for problem in problems or ["nothing: all was read"]))
    return "\n\n".join(parts) + "\n"


def _sides(sides: list[Side]) -> Iterator[str]:
    for side in sides:
        yield f"{side.label}: {len(side.runs)} run{'s' if len(side.runs) > 1 else ''}"
        for run in side.runs:
            yield f"  {run.name}  ({run.source}; steps {min(run.steps)} to {max(run.steps)})"


def _reading(comparison: Comparison, confidence: float) -> Iterator[str]:
    level = f"{100 * confidence:g} %"
    yield (
        f"A value is the mean over its seeds, with their number in brackets; after +- half the {level} interval over the "
        "seeds (Student's t; Welch's for a difference)."
    )
    decided = [
        d
        for table in comparison.tables
        for row in table.rows
        for d in row.differences.values()
        if d and d.interval.half_width is not None
    ]
    if decided:
        outside = sum(d.verdict == OUTSIDE for d in decided)
        yield (
            f"{outside} of {len(decided)} differences are outside the seeds' noise; without any true difference about "
            f"{(1 - confidence) * len(decided):.1g} would be."
        )


def _table(table: Table, sides: list[Side]) -> str:
    first, *others = [side.label for side in sides]
    header = ["", first, *others]
    for other in others:
        header += [f"{other} - {first}", "which is"]
    rows = [header, *(_cells(row, first, others) for row in table.rows)]
    span = f"{_number(table.start)} to {_number(table.end)}"
    return f"At equal {table.axis.name} (mean over {table.axis.label} {span}):\n\n" + _markdown(rows)


def _cells(row: Row, first: str, others: list[str]) -> list[str]:
    cells = [row.quantity.name]
    cells += [_interval(row.intervals[label], len(row.values[label])) for label in (first, *others)]
    for other in others:
        difference = row.differences[other]
        cells += [_signed(difference), difference.verdict if difference else ""]
    return cells


def _interval(interval: Interval | None, seeds: int) -> str:
    if interval is None:
        return "none"
    width = "" if interval.half_width is None else f" +- {_number(interval.half_width)}"
    return f"{_number(interval.value)}{width} ({seeds})"


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return ""
    interval = difference.interval
    width = "" if interval.half_width is None else f" +- {_number(interval.half_width)}"
    return f"{interval.value:+.3g}{width}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def as_json(comparison: Comparison, unreadable: list[str], confidence: float) -> dict:
    """The same as data: plain dictionaries, lists, numbers and strings."""
    return {
        "confidence": confidence,
        "sides": {
            side.label: [{"run": run.name, "source": run.source, "problems": run.problems} for run in side.runs]
            for side in comparison.sides
        },
        "tables": [
            {
                "axis": table.axis.name,
                "unit": table.axis.label,
                "start": table.start,
                "end": table.end,
                "rows": {row.quantity.name: _row_as_json(row) for row in table.rows},
            }
            for table in comparison.tables
        ],
        "notes": comparison.notes,
        "unreadable": unreadable,
    }


def _row_as_json(row: Row) -> dict:
    return {
        "values": row.values,
        "intervals": {label: interval and vars(interval) for label, interval in row.intervals.items()},
        "differences": {
            label: difference and {**vars(difference.interval), "verdict": difference.verdict}
            for label, difference in row.differences.items()
        },
    }
