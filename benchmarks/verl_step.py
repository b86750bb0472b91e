"""A whole step through real verl, stage by stage: VIMPO against GRPO with and without KL, on the tiny CPU run.

Runs examples/tiny/run_tiny.sh once for each recipe and reports the median of each of verl's own stage timers, the first step
left out. Ratios are to GRPO with KL. Generation is listed but not part of "all but generation".

    python benchmarks/verl_step.py --steps 12 --json benchmarks/results/verl_step.json
"""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from report import arguments, show

RUN_TINY = Path(__file__).parent.parent / "examples/tiny/run_tiny.sh"
RECIPES = {
    "grpo": ("grpo", []),
    "grpo_kl": ("grpo", ["actor_rollout_ref.actor.use_kl_loss=True"]),
    "vimpo": ("vimpo", []),
}
STAGES = ("gen", "old_log_prob", "ref", "adv", "update_actor", "update_weights")


def run(recipe: str, steps: int) -> list[dict[str, float]]:
    """Metrics of each step."""
    algo, overrides = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ALGO": algo, "STEPS": str(steps), "OUT": folder}
        command = ["bash", str(RUN_TINY), "trainer.val_before_train=False", "trainer.test_freq=-1", *overrides]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["data"] for line in lines]


def row_of(recipe: str, records: list[dict[str, float]]) -> dict:
    def median(stage: str) -> float:
        return statistics.median(record.get(f"timing_s/{stage}", 0.0) for record in records[1:])

    row = {"recipe": recipe, **{f"{stage} s": median(stage) for stage in STAGES}}
    row["all but generation s"] = statistics.median(
        sum(record.get(f"timing_s/{stage}", 0.0) for stage in STAGES[1:]) for record in records[1:]
    )
    return row


def main() -> None:
    options = arguments(__doc__.splitlines()[0], steps=12)
    rows = [row_of(recipe, run(recipe, options.steps)) for recipe in RECIPES]
    base = rows[list(RECIPES).index("grpo_kl")]["all but generation s"]
    for row in rows:
        row["ratio"] = row["all but generation s"] / base
    show("A step through verl on the tiny CPU run", rows, options.json)


if __name__ == "__main__":
    main()
