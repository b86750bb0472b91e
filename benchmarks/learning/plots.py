"""Pictures of the study, from its results files alone.

python -m benchmarks.learning.plots noise --out docs/pictures
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning.analysis import by_trial, load, mean_interval, smoothed

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    curves(args.grid, args.out / f"study_{args.grid}.png")


if __name__ == "__main__":
    main()
