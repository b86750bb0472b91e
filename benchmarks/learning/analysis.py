"""From results to tables: which trial of an arm is the best, and how arms differ, paired by seed.

python -m benchmarks.learning.analysis headline_noise        # a Markdown table of every arm against every other
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
    return max(trials, key=lambda trial: np.mean([result["accuracy"] for result in found[trial].values()]))


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of one value a seed, with its bootstrap interval (percentiles of the means of resampled seeds)."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(values.mean()), float(low), float(high)


def paired_difference(a: dict[int, dict], b: dict[int, dict], of=lambda result: result["accuracy"]):
    """mean_interval of b - a over the seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return mean_interval(np.array([of(b[seed]) - of(a[seed]) for seed in seeds]))


def table(grid: str, reference: str) -> str:
    """A Markdown table of a grid's trials: accuracy, area, and the difference to the trials of the arm `reference`."""
    trials = by_trial(load(grid))
    rivals = [trial for trial in trials if trial.arm == reference]
    lines = ["| trial | seeds | accuracy | area | accuracy minus " + " | ".join(trial.name for trial in rivals) + " |"]
    lines.append("| --- " * (4 + len(rivals)) + "|")
    for trial, results in sorted(trials.items(), key=lambda item: item[0].name):
        accuracy = mean_interval(np.array([result["accuracy"] for result in results.values()]))
        curve = mean_interval(np.array([area(result) for result in results.values()]))
        cells = [trial.name, str(len(results)), _cell(accuracy), _cell(curve)]
        cells += [_cell(paired_difference(trials[rival], results), sign=True) for rival in rivals]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(interval: tuple[float, float, float], sign: bool = False) -> str:
    form = "{:+.3f}" if sign else "{:.3f}"
    return "{} ({} to {})".format(*(form.format(value) for value in interval))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--reference", default="vimpo", help="the arm that the others are compared with")
    args = parser.parse_args()
    print(table(args.grid, args.reference))


if __name__ == "__main__":
    main()
