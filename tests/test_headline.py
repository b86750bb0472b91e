"""Claim: each page's table of whole runs is what benchmarks/results/headline.json says, and that file what the runs logged."""

import json
from pathlib import Path

import pytest

from benchmarks import headline
from benchmarks.headline import CELLS, RESULTS, collect
from benchmarks.headline_page import (
    BEGIN,
    END,
    METHOD,
    README,
    STUDY,
    TITLES,
    ahead,
    by_arm,
    last_reward,
    table,
    table_of_passes,
    table_of_rivals,
    with_table,
)

STORED = json.loads(RESULTS.read_text())
ROWS = STORED["rows"]


@pytest.mark.parametrize("path, made", [(README, table), (STUDY, table_of_rivals), (METHOD, table_of_passes)])
def test_the_page_has_the_results_table(path, made):
    page = path.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert with_table(page, made(ROWS)) == page, "run python -m benchmarks.headline_page"


def test_the_results_are_of_the_cells_as_they_are():
    """Same settings as in the code, whole runs, and in the README's cells as many seeds on one side as on the other."""
    assert json.loads(json.dumps(headline.described())) == STORED["cells"]
    for cell in {row["cell"] for row in ROWS}:
        setting, sides = CELLS[cell], by_arm(ROWS, cell)
        if cell in TITLES:
            assert len(sides) == len(setting.arms)
            assert len({tuple(run["seed"] for run in runs) for runs in sides.values()}) == 1
        for run in (run for runs in sides.values() for run in runs):
            assert len(run["rewards"]) == len(run["seconds"]) == int(setting.settings["STEPS"])
            assert str(setting.settings["STEPS"]) in run["validation"]


def run_of(rewards: list[float]) -> dict:
    return {
        "cell": "clean", "arm": "grpo", "seed": 1, "rewards": rewards, "validation": {"0": 0.3, "36": 0.75}, "kl": [],
        "seconds": [5.0, 6.0, 10.0],
    }  # fmt: skip


def test_the_table_is_that_of_the_formulas():
    """Two seeds a side: means 0.5 and 0.7, Welch's interval with both standard errors 0.1 and 2 degrees of freedom."""
    grpo = [run_of([0.9, *[0.4] * 5]), run_of([0.9, *[0.6] * 5])]
    vimpo = [run_of([0.0, *[0.6] * 5]) | {"arm": "vimpo"}, run_of([0.0, *[0.8] * 5]) | {"arm": "vimpo"}]
    first, other = ([last_reward(run) for run in side] for side in (grpo, vimpo))
    assert first == pytest.approx([0.4, 0.6]) and other == pytest.approx([0.6, 0.8])
    width = 4.302653 * (0.1**2 + 0.1**2) ** 0.5  # Student's t at 2 degrees of freedom
    assert ahead(first, other) == f"+0.200 ({0.2 - width:+.3f} to {0.2 + width:+.3f})"
    assert ahead(first[:1], other[:1]) == "+0.200"
    *_, first_row, second_row = table([*grpo, *vimpo]).splitlines()
    assert first_row == "| GRPO | 1e-3 | 0.500 (0.40 0.60) |  | 0.750 (0.75 0.75) | 6.0 |"
    assert second_row.startswith("| VIMPO | 1e-3 | 0.700 (0.60 0.80) | +0.200 (-0.408 to +0.808) |")


def log(folder: Path, steps: int, **metrics: float) -> None:
    """As verl's file logger writes it: validation has a line of its own."""
    folder.mkdir(parents=True)
    lines = [{"step": step, "data": {"timing_s/step": 5.0} | metrics} for step in range(1, steps + 1)]
    lines += [{"step": step, "data": {"val-core/tiny/acc/mean@1": step / 100}} for step in (0, steps)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_finished_runs_are_collected_with_the_rewards_before_flips(tmp_path):
    log(tmp_path / "clean/vimpo-seed2", 36, **{"critic/score/mean": 0.5, "vimpo/kl": 0.1})
    log(tmp_path / "clean/grpo-seed1", 35, **{"critic/score/mean": 0.5})  # not at its end yet
    log(tmp_path / "noise_20/vimpo-seed1", 80, **{"critic/score/mean": 0.4, "reward_noise/clean_mean": 0.6})
    log(tmp_path / "noise_20/grpo-kl-loss-seed1", 80, **{"critic/score/mean": 0.4, "reward_noise/clean_mean": 0.7})
    (tmp_path / "reuse/grpo-seed1").mkdir(parents=True)
    (tmp_path / "reuse/grpo-seed1/metrics.jsonl").touch()  # in its first step
    rows = collect(tmp_path)
    assert [(row["cell"], row["arm"], row["seed"]) for row in rows] == [
        ("clean", "vimpo", 2), ("noise_20", "grpo-kl-loss", 1), ("noise_20", "vimpo", 1),
    ]  # fmt: skip
    assert [row["rewards"] for row in rows] == [[0.5] * 36, [0.7] * 80, [0.6] * 80]
    assert rows[0]["validation"] == {0: 0.0, 36: 0.36} and rows[0]["kl"] == [0.1] * 36


def test_a_run_with_foreign_weights_is_not_collected(tmp_path):
    log(tmp_path / "clean/vimpo-seed1", 36, **{"critic/score/mean": 0.5, headline.GAP: 0.4})
    with pytest.raises(ValueError, match="clean/vimpo-seed1.*weights of another run"):
        collect(tmp_path)
