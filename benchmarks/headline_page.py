"""The tables of whole runs in README, study and method, and the README's picture, from benchmarks/results/headline.json alone.

python -m benchmarks.headline_page
"""

import json
import re
from pathlib import Path
from statistics import mean, median

from benchmarks import report
from benchmarks.headline import CELLS, RESULTS, ROOT
from vimpo_verl.compare.statistics import difference_interval

README, STUDY, METHOD = ROOT / "README.md", ROOT / "docs/study.md", ROOT / "docs/method.md"
PICTURE = ROOT / "docs/pictures/quickstart.png"
BEGIN, END = "<!-- made by benchmarks/headline_page.py: begin -->", "<!-- made by benchmarks/headline_page.py: end -->"
LAST = 5  # steps averaged at the end: one step's reward is noisy
CONFIDENCE = 0.95
SHARE, VALIDATION = f"share of right answers, last {LAST} steps", "validation at the end"
TITLES = {
    "clean": "The quickstart",
    "noise_20": "A fifth of the groups flipped",
    "reuse": "Four updates a batch",
}
NAMES = {
    "grpo": "GRPO",
    "grpo-kl-loss": "GRPO, KL loss 0.1",
    "grpo-kl-loss-0.1": "GRPO, KL loss 0.1",
    "grpo-kl-loss-0.3": "GRPO, KL loss 0.3",
    "kl-in-reward": "KL in the reward",
    "vimpo": "VIMPO",
}
COLOURS = {"grpo": "tab:orange", "grpo-kl-loss": "tab:orange", "vimpo": "tab:blue"}


def by_arm(rows: list[dict], cell: str) -> dict[str, list[dict]]:
    """Arm -> its runs, the first one being what the others are compared with."""
    found = {arm: [row for row in rows if (row["cell"], row["arm"]) == (cell, arm)] for arm in CELLS[cell].arms}
    return {arm: runs for arm, runs in found.items() if runs}


def rate(cell: str, arm: str) -> str:
    """The learning rate, as it is given to run_tiny.sh."""
    settings = CELLS[cell].settings | CELLS[cell].arms[arm].settings
    return settings.get("LR", "3e-4" if settings.get("PRESET") == "reuse" else "1e-3")


def last_reward(run: dict) -> float:
    return mean(run["rewards"][-LAST:])


def last_rewards(runs: list[dict]) -> list[float]:
    return [last_reward(run) for run in runs]


def last_validation(run: dict) -> float:
    return max(run["validation"].items(), key=lambda item: int(item[0]))[1]


def each(values: list[float]) -> str:
    """Mean, and each seed where there are several."""
    seeds = f" ({' '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{seeds}"


def last_validations(runs: list[dict]) -> str:
    return each([last_validation(run) for run in runs])


def ahead(first: list[float], other: list[float]) -> str:
    """How far the other side is ahead of the first, with the interval of `vimpo compare`."""
    found = difference_interval(first, other, CONFIDENCE)
    return report.signed(found.value, found.half_width)


def table(rows: list[dict]) -> str:
    """A Markdown table: each cell's sides, one a row."""
    heads = ["", "learning rate", f"{SHARE}: mean (each seed)", "ahead of GRPO (95 %)", VALIDATION, "seconds a step"]
    lines = []
    for cell in TITLES:
        arms = by_arm(rows, cell)
        if not arms:
            continue
        lines.append([f"**{TITLES[cell]}**, {CELLS[cell].settings['STEPS']} steps", *[""] * (len(heads) - 1)])
        first = last_rewards(next(iter(arms.values())))
        for number, (arm, runs) in enumerate(arms.items()):
            rewards = last_rewards(runs)
            seconds = median(second for run in runs for second in run["seconds"])
            lead = ahead(first, rewards) if number else ""
            lines.append([NAMES[arm], rate(cell, arm), each(rewards), lead, last_validations(runs), f"{seconds:.1f}"])
    return report.markdown(heads, lines)


def table_of_rivals(rows: list[dict]) -> str:
    """A Markdown table: every arm of the noisy cell, and how far VIMPO is ahead of it."""
    arms = by_arm(rows, "noise_20") | by_arm(rows, "noise_20_rivals")
    vimpo = last_rewards(arms["vimpo"])
    lines = []
    for arm, runs in sorted(arms.items(), key=lambda item: -mean(last_rewards(item[1]))):
        rewards, cell = last_rewards(runs), runs[0]["cell"]
        lead = "" if arm == "vimpo" else ahead(rewards, vimpo)
        lines.append([NAMES[arm], rate(cell, arm), str(len(runs)), each(rewards), last_validations(runs), lead])
    return report.markdown(["arm", "learning rate", "seeds", SHARE, VALIDATION, "VIMPO ahead by"], lines)


def table_of_passes(rows: list[dict]) -> str:
    """A Markdown table: VIMPO in one pass beside two, in the cells that have both."""
    lines = []
    for cell in ("clean", "noise_20"):
        one, two = by_arm(rows, cell)["vimpo"], by_arm(rows, f"{cell}_two_passes")["vimpo-two-passes"]
        apart = ahead(last_rewards(two), last_rewards(one))
        for passes, runs, difference in (("one", one, apart), ("two", two, "")):
            lines.append([TITLES[cell], passes, each(last_rewards(runs)), difference, last_validations(runs)])
    return report.markdown(["cell", "passes", f"{SHARE}: mean (each seed)", "one to two (95 %)", VALIDATION], lines)


def with_table(page: str, made: str) -> str:
    """The page with its made part replaced."""
    part = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return part.sub(lambda _: f"{BEGIN}\n{made}\n{END}", page)


def draw(rows: list[dict], path: Path) -> None:
    """A panel a cell: the share of right answers at every step, the mean over the seeds and lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    cells = [cell for cell in TITLES if by_arm(rows, cell)]
    figure, panels = pyplot.subplots(1, len(cells), figsize=(4.3 * len(cells), 3.6), sharey=True, squeeze=False)
    for axes, cell in zip(panels[0], cells, strict=True):
        for arm, runs in by_arm(rows, cell).items():
            rewards = np.array([run["rewards"] for run in runs])
            steps = np.arange(1, rewards.shape[1] + 1)
            label = f"{NAMES[arm]} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            axes.plot(steps, rewards.mean(0), color=COLOURS[arm], linewidth=2, label=label)
            axes.fill_between(steps, rewards.min(0), rewards.max(0), color=COLOURS[arm], alpha=0.2, linewidth=0)
        axes.set_title(TITLES[cell], fontsize=10)
        axes.set(xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    panels[0][0].set_ylabel("share of sampled answers that are right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    README.write_text(with_table(README.read_text(), table(rows)))
    STUDY.write_text(with_table(STUDY.read_text(), table_of_rivals(rows)))
    METHOD.write_text(with_table(METHOD.read_text(), table_of_passes(rows)))
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
