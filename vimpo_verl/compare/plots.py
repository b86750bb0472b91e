"""PNG plots: one a quantity, over every axis, and one page with all of them over the steps."""

from collections.abc import Sequence
from pathlib import Path

from vimpo_verl.compare.comparison import Comparison, Side
from vimpo_verl.compare.metrics import Axis, Quantity
from vimpo_verl.compare.runs import RunLog
from vimpo_verl.compare.statistics import mean_interval

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GRID = 200  # points at which seeds are averaged
_FEW = 40  # points up to which each is marked


def draw(comparison: Comparison, folder: Path, confidence: float) -> list[Path]:
    """Write the plots and return their paths. Needs matplotlib.

    Args:
        comparison: what to draw; the axes are those of its tables.
        folder: where to; made if missing.
        confidence: of the bands over the seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    axes = [table.axis for table in comparison.tables]
    paths = [_draw_quantity(quantity, comparison.sides, axes, folder, confidence) for quantity in comparison.quantities]
    return [_draw_overview(comparison, axes[0], folder, confidence), *paths]


def _draw_quantity(
    quantity: Quantity, sides: list[Side], axes: Sequence[Axis], folder: Path, confidence: float
) -> Path:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(axes), figsize=(4.4 * len(axes), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes, panels[0], strict=True):
        _panel(panel, quantity, sides, axis, confidence)
        panel.set_xlabel(axis.label)
    panels[0][0].set_ylabel(quantity.name)
    _legend(figure, panels[0][0])
    return _save(figure, folder / f"{quantity.slug}.png")


def _draw_overview(comparison: Comparison, axis: Axis, folder: Path, confidence: float) -> Path:
    from matplotlib import pyplot

    columns = min(3, len(comparison.quantities))
    rows = -(-len(comparison.quantities) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4.4 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for panel, quantity in zip(panels.flat, comparison.quantities, strict=False):
        _panel(panel, quantity, comparison.sides, axis, confidence)
        panel.set_title(quantity.name, fontsize="medium")
        panel.set_xlabel(axis.label)
    for panel in panels.flat[len(comparison.quantities) :]:
        panel.set_visible(False)
    _legend(figure, panels[0][0])
    return _save(figure, folder / "overview.png")


def _panel(panel, quantity: Quantity, sides: list[Side], axis: Axis, confidence: float) -> None:
    """Every seed thin, the mean thick, its interval as a band where there are two seeds or more.

    The band is cut off at the range of the seeds.
    """
    drawn: list[float] = []
    for number, side in enumerate(sides):
        colour = COLOURS[number % len(COLOURS)]
        curves = [curve for curve in (_curve(quantity, run, axis) for run in side.runs) if curve[0]]
        drawn += [value for _, y in curves for value in y]
        label = f"{side.label} ({len(side.runs)})" if len(side.runs) > 1 else side.label
        style = (
            {"color": colour, "marker": "o", "markersize": 3}
            if any(len(x) <= _FEW for x, _ in curves)
            else {"color": colour}
        )
        if len(curves) == 1:
            panel.plot(*curves[0], label=label, linewidth=1.6, **style)
        elif curves:
            for x, y in curves:
                panel.plot(x, y, linewidth=0.7, alpha=0.35, **style)
            _mean_and_band(panel, curves, colour, label, confidence)
        else:
            panel.plot([], [], color=colour, label=label)
    margin = 0.08 * (max(drawn) - min(drawn)) or 0.05 * abs(drawn[0]) or 0.05
    panel.set_ylim(min(drawn) - margin, max(drawn) + margin)
    panel.grid(alpha=0.25)
    panel.margins(x=0.02)


def _mean_and_band(
    panel, curves: list[tuple[list[float], list[float]]], colour: str, label: str, confidence: float
) -> None:
    """Over the range that all seeds share, between records by straight lines."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = [start + (end - start) * i / (_GRID - 1) for i in range(_GRID)] if end > start else [end]
    intervals = [mean_interval([_interpolated(x, y, at) for x, y in curves], confidence) for at in grid]
    panel.plot(grid, [interval.value for interval in intervals], color=colour, linewidth=1.8, label=label)
    low = [interval.value - interval.half_width for interval in intervals]
    high = [interval.value + interval.half_width for interval in intervals]
    panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)


def _curve(quantity: Quantity, run: RunLog, axis: Axis) -> tuple[list[float], list[float]]:
    positions = axis.positions(run) or {}
    series = quantity.series(run)
    return [positions[step] for step in series], list(series.values())


def _interpolated(x: list[float], y: list[float], at: float) -> float:
    """y at a place within [x[0], x[-1]], x rising."""
    from bisect import bisect_right

    right = min(max(bisect_right(x, at), 1), len(x) - 1) if len(x) > 1 else 0
    if right == 0 or x[right] == x[right - 1]:
        return y[right]
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def _legend(figure, panel) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
