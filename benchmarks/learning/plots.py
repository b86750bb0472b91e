"""Pictures of the study, from its results files alone.

python -m benchmarks.learning.plots noise_20 --out docs/pictures              # learning curves
python -m benchmarks.learning.plots axis_dilution axis_dilution_noise_20      # accuracy along axes, a panel each
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning.analysis import accuracy, by_trial, load, mean_interval, smoothed
from benchmarks.learning.grids import AXES, AXIS_SEEDS
from benchmarks.learning.settings import Setting

COLOURS = {
    "GRPO": "#7f7f7f",
    "GRPO, KL loss": "#1f77b4",
    "RLOO": "#bcbd22",
    "KL in the reward": "#2ca02c",
    "VIMPO, paper's constants": "#e377c2",
    "VIMPO, value loss": "#d62728",
    "VIMPO, actor 0.1": "#ff7f0e",
    "VIMPO, clipped": "#9467bd",
    "VIMPO, clipped, old kappa": "#8c564b",
    "PACS": "#17becf",
    "V0.5": "#9edae5",
    "oracle": "#000000",
}


def curves(grid: str, path: Path) -> None:
    """Share of right answers over the batches: mean over seeds, with its interval; smoothed over five batches."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for trial, results in sorted(by_trial(load(grid)).items(), key=lambda item: item[0].label):
        rewards = np.array([result["rewards"] for result in results.values()])
        smooth = np.stack([smoothed(row, 5) for row in rewards])
        middle, low, high = np.array([mean_interval(column) for column in smooth.T]).T
        batches = np.arange(len(middle)) + 3
        colour = COLOURS[trial.label]
        axes.plot(batches, middle, label=f"{trial.label} ({len(rewards)} seeds)", color=colour)
        axes.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("batches sampled")
    axes.set_ylabel("share of right answers")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# The fields that an axis moves, as pictures call them; the last that an axis moves is its x.
MOVED = {
    "flip_prob": "share of flipped rewards",
    "responses": "responses a prompt",
    "staleness": "batches that answers are old",
    "tokens": "tokens",
}
DILUTION = "tokens for each that decides"


def along_axes(grids: list[str], path: Path) -> None:
    """Accuracy at the end of every arm along axes, each in a panel: mean over seeds, with its interval."""
    figure, panels = plt.subplots(1, len(grids), figsize=(4.2 * len(grids) + 1, 3.8), sharey=True, squeeze=False)
    for grid, panel in zip(grids, panels[0], strict=True):
        found = points(grid)
        field = [name for name in MOVED if any(name in point for point in AXES[grid.removeprefix("axis_")].points)][-1]
        is_dilution = next(iter(found)).task == "needles"
        for label in dict.fromkeys(trial.label for trial in found):
            of_arm = {getattr(trial, field): values for trial, values in found.items() if trial.label == label}
            x = np.array(sorted(of_arm))
            middle, low, high = np.array([mean_interval(of_arm[value]) for value in x]).T
            x = x / next(iter(found)).decisions if is_dilution else x
            panel.plot(x, middle, "o-", markersize=3, label=label, color=COLOURS[label])
            panel.fill_between(x, low, high, color=COLOURS[label], alpha=0.15, linewidth=0)
        panel.set_title(grid.removeprefix("axis_").replace("_", " "), fontsize=10)
        panel.set_xlabel(DILUTION if is_dilution else MOVED[field])
        if field in ("responses", "tokens"):
            panel.set_xscale("log", base=2)
        ticks = sorted({value for line in panel.lines for value in line.get_xdata().tolist()})
        panel.set_xticks(ticks, [f"{value:g}" for value in ticks])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("accuracy at the end")
    panels[0][0].set_ylim(0, 1.02)
    lines = {line.get_label(): line for panel in panels[0] for line in panel.lines}
    panels[0][-1].legend(lines.values(), lines.keys(), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def points(grid: str) -> dict[Setting, np.ndarray]:
    """Trial -> accuracies of an axis and, where it has the same trials, of its centre: those of the axis's seeds."""
    axis = load(grid)
    centre = load(AXES[grid.removeprefix("axis_")].centre)
    tuned = {(setting.label, setting.trial) for setting in axis}
    kept = {setting: result for setting, result in centre.items() if (setting.label, setting.trial) in tuned}
    found = by_trial({s: r for s, r in (kept | axis).items() if s.seed in AXIS_SEEDS})
    return {trial: np.array([accuracy(result) for result in results.values()]) for trial, results in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", help="one, or several axes")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    path = args.out / f"study_{args.grid[0]}.png"
    if args.grid[0].startswith("axis_"):
        along_axes(args.grid, path)
    else:
        curves(args.grid[0], path)


if __name__ == "__main__":
    main()
