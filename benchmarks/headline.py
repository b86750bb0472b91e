"""The README's cells through real verl and vLLM, by examples/tiny/run_tiny.sh: GRPO and VIMPO, several seeds a side.

    python -m benchmarks.headline run noise_20 --seeds 1 2 3     # whole runs, minutes each; finished ones are left alone
    python -m benchmarks.headline collect                        # outputs/headline -> benchmarks/results/headline.json
    python -m benchmarks.headline_page                           # the README's table and picture, from that file alone

With a fifth of the groups flipped each side has the learning rate and the KL loss's weight that were best of six on other seeds
(101 to 103), in the study's plain loop with the same model and steps (`tune_qwen3_noise_20`, docs/study.md). A cell's folders are
what `vimpo compare outputs/headline/CELL/*` takes: runs that differ in the seed only are one side. One run at a time: two on one
machine would need a /tmp of their own (docs/troubleshooting.md).
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from vimpo_verl.compare.runs import RunLog, UnreadableRun, read_run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/headline.json"
FOREIGN_WEIGHTS = 0.01  # largest difference of a token's probability between vLLM and the trainer; here 1e-5 is usual
GAP = "training/rollout_probs_diff_max"
REWARD, CLEAN_REWARD, SECONDS, KL = "critic/score/mean", "reward_noise/clean_mean", "timing_s/step", "vimpo/kl"


@dataclass(frozen=True)
class Arm:
    """One side of a cell: settings and Hydra overrides of run_tiny.sh, beside the cell's."""

    algo: str
    settings: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    settings: dict[str, str]
    arms: dict[str, Arm]
    overrides: tuple[str, ...] = ()


def kl_loss(coeff: float) -> tuple[str, ...]:
    return ("actor_rollout_ref.actor.use_kl_loss=True", f"actor_rollout_ref.actor.kl_loss_coef={coeff}")


# The study's "KL in the reward": no standard deviation, k1, and beta * T = 0.5 at the first batch's 10.9 tokens.
KL_IN_REWARD = (
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_penalty=kl",
    "algorithm.kl_ctrl.kl_coef=0.046",
    "algorithm.norm_adv_by_std_in_grpo=False",
)
TWO_PASSES = ("+algorithm.vimpo.passes=two",)
NOISE_20 = ("+algorithm.reward_noise.flip_prob=0.2", "+algorithm.reward_noise.seed={seed}")
CELLS = {
    "clean": Cell({"STEPS": "36", "LR": "1e-3"}, {"grpo": Arm("grpo"), "vimpo": Arm("vimpo")}),  # the quickstart's
    "noise_20": Cell(
        {"STEPS": "80"},
        {
            "grpo-kl-loss": Arm("grpo", {"LR": "5e-4"}, kl_loss(0.1)),
            "vimpo": Arm("vimpo", {"LR": "7e-4"}),
        },
        NOISE_20,
    ),
    # Has GRPO been given its best? At twice the rate, where the plain loop puts it lower; and the closest rival.
    "noise_20_rivals": Cell(
        {"STEPS": "80", "LR": "1e-3"},
        {
            "grpo-kl-loss-0.1": Arm("grpo", overrides=kl_loss(0.1)),
            "grpo-kl-loss-0.3": Arm("grpo", overrides=kl_loss(0.3)),
            "kl-in-reward": Arm("grpo", overrides=KL_IN_REWARD),
        },
        NOISE_20,
    ),
    # One pass, the default, against two.
    "clean_two_passes": Cell({"STEPS": "36", "LR": "1e-3"}, {"vimpo-two-passes": Arm("vimpo", overrides=TWO_PASSES)}),
    "noise_20_two_passes": Cell(
        {"STEPS": "80", "LR": "7e-4"}, {"vimpo-two-passes": Arm("vimpo", overrides=TWO_PASSES)}, NOISE_20
    ),
    "reuse": Cell({"STEPS": "20", "PRESET": "reuse"}, {"grpo": Arm("grpo"), "vimpo": Arm("vimpo")}),
}


def folder(out: Path, cell: str, arm: str, seed: int) -> Path:
    return out / cell / f"{arm}-seed{seed}"


def is_finished(run: Path, steps: int) -> bool:
    """The last step has been logged, with its validation."""
    try:
        last = read_run(run).steps.get(steps, {})
    except UnreadableRun:  # not begun, or in its first step
        return False
    return any(name.startswith("val-core/") for name in last)


def start(out: Path, cell: str, arm: str, seed: int) -> int:
    """One whole run; its exit status."""
    setting, side, run = CELLS[cell], CELLS[cell].arms[arm], folder(out, cell, arm, seed)
    if is_finished(run, int(setting.settings["STEPS"])):
        return 0
    overrides = [override.format(seed=seed) for override in setting.overrides] + list(side.overrides)
    settings = setting.settings | side.settings | {"ALGO": side.algo, "SEED": str(seed), "OUT": str(run)}
    command = ["bash", str(ROOT / "examples/tiny/run_tiny.sh"), *overrides]
    return subprocess.run(command, env={**os.environ, **settings}).returncode


def row(run: RunLog, cell: str, arm: str, seed: int) -> dict:
    """What is kept of a run. Rewards are those before flips.

    Raises:
        ValueError: vLLM had other weights than the trainer, as when two runs share verl's socket.
    """
    gap = run.series(GAP)
    if gap and max(gap.values()) > FOREIGN_WEIGHTS:
        raise ValueError(f"{cell}/{arm}-seed{seed}: {GAP} is {max(gap.values()):.2g}: vLLM had weights of another run")
    rewards = run.series(CLEAN_REWARD) or run.series(REWARD)
    (validation,) = {name for name in run.keys if name.startswith("val-core/")}
    return {
        "cell": cell,
        "arm": arm,
        "seed": seed,
        "rewards": [round(value, 4) for value in rewards.values()],
        "validation": {step: round(value, 4) for step, value in run.series(validation).items()},
        "kl": [round(value, 5) for value in run.series(KL).values()],
        "seconds": [round(value, 2) for value in run.series(SECONDS).values()],
    }


def collect(out: Path) -> list[dict]:
    """The finished runs of every cell, in order."""
    rows = []
    for cell, setting in CELLS.items():
        for arm in setting.arms:
            found = {int(path.name.rpartition("-seed")[2]): path for path in (out / cell).glob(f"{arm}-seed*")}
            for seed, path in sorted(found.items()):
                if is_finished(path, int(setting.settings["STEPS"])):
                    rows.append(row(read_run(path), cell, arm, seed))
    return rows


def described() -> dict:
    """The cells, for the results file."""
    return {
        name: {
            "settings": cell.settings,
            "overrides": cell.overrides,
            "arms": {arm: vars(side) for arm, side in cell.arms.items()},
        }
        for name, cell in CELLS.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/headline")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("cell", choices=CELLS)
    run.add_argument("--arms", nargs="+")
    run.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    commands.add_parser("collect")
    args = parser.parse_args()
    if args.command == "collect":
        report.save("GRPO and VIMPO through verl and vLLM", collect(args.out), RESULTS, cells=described())
        return 0
    arms = args.arms or list(CELLS[args.cell].arms)
    ends = [start(args.out, args.cell, arm, seed) for seed in args.seeds for arm in arms]
    return max(ends)


if __name__ == "__main__":
    sys.exit(main())
