"""From results to tables: which trial of an arm is the best, and how arms differ, paired by seed.

python -m benchmarks.learning.analysis noise_20             # a Markdown table: how far VIMPO is ahead of every arm
python -m benchmarks.learning.analysis noise_20 v05 pacs    # with arms that have grids of their own at the same condition
python -m benchmarks.learning.analysis tune_noise_20        # a Markdown table of every trial
python -m benchmarks.learning.analysis axis_noise axis_groups   # a Markdown table: every point of these axes
python -m benchmarks.learning.analysis qwen3_reuse --one-update qwen3_clean   # how many rollouts several updates a batch save
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.learning.settings import Setting

RESULTS = Path(__file__).parent / "results"
RESAMPLES, CONFIDENCE = 10_000, 0.95


def load(grid: str) -> dict[Setting, dict]:
    """Setting -> result of a grid's results file; empty if it has not been run."""
    path = RESULTS / f"{grid}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Setting(**row["setting"]): row for row in rows}


def accuracy(result: dict) -> float:
    """At the end, on held-out prompts."""
    return result["accuracy"]


def area(result: dict) -> float:
    """Area under the learning curve: the mean reward, without noise, over the batches."""
    return float(np.mean(result["rewards"]))


def by_trial(results: dict[Setting, dict]) -> dict[Setting, dict[int, dict]]:
    """Trial (a setting with seed 0) -> seed -> result."""
    trials: dict[Setting, dict[int, dict]] = defaultdict(dict)
    for setting, result in results.items():
        trials[replace(setting, seed=0)][setting.seed] = result
    return trials


def best_trial(trials: Iterable[Setting], results: dict[Setting, dict]) -> Setting:
    """The trial with the highest mean accuracy at the end over the tuning seeds, as the setting with seed 0.

    Args:
        trials: settings with seed 0, as they stand in the results.
        results: of the tuning grid.

    Raises:
        ValueError: a trial has not been run.
    """
    found = by_trial(results)
    missing = [trial.name for trial in trials if trial not in found]
    if missing:
        raise ValueError(f"these trials have not been run: {', '.join(missing)}")
    return max(trials, key=lambda trial: _mean_accuracy(found[trial]))


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of one value a seed, with its bootstrap interval (percentiles of the means of resampled seeds)."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(values.mean()), float(low), float(high)


def paired_difference(a: dict[int, dict], b: dict[int, dict], of=accuracy):
    """mean_interval of b - a over the seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return mean_interval(np.array([of(b[seed]) - of(a[seed]) for seed in seeds]))


def table(grid: str, reference: str, beside: Iterable[str] = ()) -> str:
    """A Markdown table of a headline grid: accuracy and area of every arm, and by how much the arm `reference` is ahead.

    Args:
        grid: a headline grid.
        reference: an arm's label, with its trial behind it where the grid has two.
        beside: headline grids of the same condition, which have other arms.

    Raises:
        ValueError: the grid has no such arm, or not exactly one trial of it.
    """
    trials = by_trial({setting: result for name in (grid, *beside) for setting, result in load(name).items()})
    chosen = [trial for trial in trials if reference in (trial.label, f"{trial.label}, {trial.trial}")]
    if len(chosen) != 1:
        raise ValueError(
            f"{grid} has {len(chosen)} trials of {reference!r}; it has {sorted(f'{t.label}, {t.trial}' for t in trials)}"
        )
    lines = [
        f"| arm | trial | seeds | accuracy at the end | area under the curve | {reference} ahead by, at the end | by area |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for trial, results in sorted(trials.items(), key=lambda item: -_mean_accuracy(item[1])):
        cells = [trial.label, trial.trial, str(len(results))]
        for value in (accuracy, area):
            cells.append(cell(mean_interval(np.array([value(result) for result in results.values()]))))
        for value in (accuracy, area):
            ahead = paired_difference(results, trials[chosen[0]], value)
            cells.append("" if trial == chosen[0] else cell(ahead, sign=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table(grid: str) -> str:
    """A Markdown table of a whole tuning grid: mean accuracy at the end of every trial, the best of an arm in bold."""
    arms: dict[str, dict[Setting, float]] = defaultdict(dict)
    for trial, results in by_trial(load(grid)).items():
        arms[trial.label][trial] = _mean_accuracy(results)
    width = max(len(trials) for trials in arms.values())
    lines = ["| arm |" + " trial: accuracy |" * width, "| --- " * (width + 1) + "|"]
    for label, trials in sorted(arms.items()):
        best = max(trials.values())
        cells = [
            f"{trial.trial}: " + (f"**{mean:.2f}**" if mean == best else f"{mean:.2f}")
            for trial, mean in trials.items()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def axis_table(grids: Iterable[str], reference: str) -> str:
    """A Markdown table of axes: a point a row, accuracy at the end of every arm, and how far the arm `reference` is ahead.

    Raises:
        ValueError: a point has an arm with more than one trial, or not the arm `reference`.
    """
    points: dict[str, dict[str, dict[int, dict]]] = defaultdict(dict)
    for grid in grids:
        for trial, results in by_trial(load(grid)).items():
            if trial.label in points[trial.point]:
                raise ValueError(f"{grid} has several trials of {trial.label!r} at {trial.point!r}")
            points[trial.point][trial.label] = results
    arms = sorted({label for arms in points.values() for label in arms} - {reference})
    heads = ["", "seeds", reference, *arms, *(f"ahead of {arm}" for arm in arms)]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for point, found in points.items():
        if reference not in found:
            raise ValueError(f"{point!r} has no arm {reference!r}")
        cells = [point, str(len(found[reference])), f"{_mean_accuracy(found[reference]):.2f}"]
        cells += [f"{_mean_accuracy(found[arm]):.2f}" if arm in found else "" for arm in arms]
        cells += [
            cell(paired_difference(found[arm], found[reference]), sign=True) if arm in found else "" for arm in arms
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share_of_rollouts(grid: str, with_one_update: str, batches: int, window: int = 5) -> str:
    """What share of the batches each trial of a grid needs to be where the best rival is with one update a batch.

    Curves are means over seeds, smoothed over `window` batches; a rival is any arm that is neither VIMPO nor the oracle.

    Args:
        grid: a headline grid with several updates a batch.
        with_one_update: a headline grid of the same condition with one.
        batches: how many batches the best rival has had.

    Returns:
        A Markdown table; "more" where a trial does not get there in the batches it has.
    """
    slow = {trial: _smooth_curve(results, window) for trial, results in by_trial(load(with_one_update)).items()}
    rivals = {trial: curve[batches - window] for trial, curve in slow.items() if trial.arm not in ("oracle", "vimpo")}
    best = max(rivals, key=rivals.get)
    goal = rivals[best]
    lines = [
        f"| batches to {goal:.2f}, where {best.label} ({best.trial}) is after {batches} | batches | share |",
        "| --- | --- | --- |",
    ]
    for trial, results in by_trial(load(grid)).items():
        curve = _smooth_curve(results, window)
        reached = int(np.argmax(curve >= goal)) + window if (curve >= goal).any() else None
        cells = (str(reached), f"{reached / batches:.0%}") if reached else ("more", "")
        lines.append(f"| {trial.label}, {trial.trial} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _smooth_curve(results: dict[int, dict], window: int) -> np.ndarray:
    """[batches - window + 1]: the mean reward of `window` batches in a row, over seeds."""
    mean = np.mean([result["rewards"] for result in results.values()], axis=0)
    return smoothed(mean, window)


def smoothed(curve: np.ndarray, window: int) -> np.ndarray:
    """[n] -> [n - window + 1]: the mean of every `window` values in a row."""
    return np.convolve(curve, np.ones(window) / window, mode="valid")


def _mean_accuracy(results: dict[int, dict]) -> float:
    return float(np.mean([accuracy(result) for result in results.values()]))


def cell(interval: tuple[float, float, float], sign: bool = False) -> str:
    """Mean and interval, for a table."""
    form = "{:+.3f}" if sign else "{:.3f}"
    return "{} ({} to {})".format(*(form.format(value) for value in interval))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", help="one; several axes; or headline grids of one condition")
    parser.add_argument(
        "--reference",
        default="VIMPO, value loss",
        help="the arm that is compared with the others; with its trial behind it where an arm has two",
    )
    parser.add_argument(
        "--one-update", metavar="GRID", help="how many batches GRID's best rival needs more, see share_of_rollouts"
    )
    parser.add_argument("--batches", type=int, default=20, help="of GRID's best rival")
    args = parser.parse_args()
    grid = args.grid[0]
    if args.one_update:
        print(share_of_rollouts(grid, args.one_update, args.batches))
    elif grid.startswith("axis_"):
        print(axis_table(args.grid, args.reference))
    else:
        print(tuning_table(grid) if grid.startswith("tune_") else table(grid, args.reference, args.grid[1:]))


if __name__ == "__main__":
    main()
