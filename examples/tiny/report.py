"""Compare finished tiny runs: a table on the screen and their curves in a PNG.

python report.py --runs grpo=outputs/tiny/grpo vimpo=outputs/tiny/vimpo --png outputs/tiny/curves.png
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

REWARD, SECONDS, KL = "critic/score/mean", "timing_s/step", "vimpo/kl"
VALIDATION = "val-core/"
ENDS = 5  # steps averaged at the start and at the end: one step's reward is noisy
COLOURS = {"grpo": "tab:orange", "vimpo": "tab:blue", "pacs": "tab:green", "v05": "tab:purple"}


@dataclass
class Run:
    """The metrics of one run, by step."""

    name: str
    steps: dict[int, dict[str, float]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged."""
        found = {step: metrics[key] for step, metrics in self.steps.items() if key in metrics}
        return list(found), list(found.values())

    def validation(self) -> tuple[list[int], list[float]]:
        """Steps and values of the (one) validation metric."""
        keys = {key for metrics in self.steps.values() for key in metrics if key.startswith(VALIDATION)}
        return self.series(min(keys)) if keys else ([], [])


def read_run(name: str, folder: Path) -> Run:
    """verl's file logger writes a line a call, and may write a step in two."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {}).update(record["data"])
    return Run(name, steps)


def shown(values: list[float], summary, digits: int = 3) -> str:
    """A summary of the values, or a dash where there are none."""
    return f"{summary(values):.{digits}f}" if values else "-"


def row(run: Run) -> list[str]:
    """One line of the table."""
    rewards, seconds, kl = (run.series(key)[1] for key in (REWARD, SECONDS, KL))
    validation = run.validation()[1]
    return [
        run.name,
        str(len(rewards)),
        shown(rewards[:ENDS], mean),
        shown(rewards[-ENDS:], mean),
        shown(validation[:1], mean),
        shown(validation[-1:], mean),
        shown(seconds, median, digits=1),
        shown(kl[-1:], mean, digits=4),
    ]


HEADER = ["run", "steps", "reward start", "reward end", "val. start", "val. end", "s/step", "kl end"]


def table(runs: list[Run]) -> str:
    """Aligned columns."""
    rows = [HEADER, *(row(run) for run in runs)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in rows)


def meaning(runs: list[Run]) -> str:
    """What the table says, and what it does not."""
    steps = min(len(run.series(REWARD)[1]) for run in runs)
    if steps < 2 * ENDS:
        caution = f"{steps} steps are too few to show learning: the first and last {ENDS} overlap."
    else:
        caution = "One seed a side is no comparison: README.md has several."
    return (
        f"Reward start and end: mean over the first and last {ENDS} steps. Validation: 256 held-out prompts, sampled.\n"
        f"kl: exact KL to the reference per token; GRPO without a KL term has no reference, so none is measured.\n{caution}"
    )


def plot(runs: list[Run], path: Path) -> None:
    """Reward of each step, and validation as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        colour = COLOURS.get(run.name)
        (line,) = axes.plot(*run.series(REWARD), color=colour, linewidth=2, label=f"{run.name}: reward of the batch")
        axes.plot(*run.validation(), "o", color=line.get_color(), label=f"{run.name}: validation", markersize=7)
    axes.set(xlabel="step", ylabel="share of sampled answers that are right", ylim=(0, 1))
    axes.set_title("Running sums modulo 10, a Qwen3 of 0.1 million parameters, verl on a CPU", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=150)


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=named_folder, nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--png", type=Path, required=True)
    args = parser.parse_args()

    runs = [read_run(name, folder) for name, folder in args.runs]
    print(table(runs))
    print(f"\n{meaning(runs)}")
    plot(runs, args.png)
    print(f"Curves: {args.png.resolve()}")


if __name__ == "__main__":
    main()
