"""A whole step through real verl, stage by stage: VIMPO against GRPO with and without KL, on the tiny CPU run.

Runs examples/tiny/run_tiny.sh for each recipe, --runs times in turn, and reports the median over the steps of each of
verl's own stage timers, the first step of a run left out. Ratios are to GRPO and to GRPO with KL. "All but generation" is verl's
timer of the step less that of generation: the stages and whatever lies between them. The learning rate is next to
nothing, so that all recipes work on responses of the same length. VIMPO in two passes and in one.

    python benchmarks/verl_step.py --runs 2 --json benchmarks/results/verl_step_cpu.json
"""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from report import arguments, show, spread

RUN_TINY = Path(__file__).parent.parent / "examples/tiny/run_tiny.sh"
RECIPES = {
    "grpo": ("grpo", []),
    "grpo_kl": ("grpo", ["actor_rollout_ref.actor.use_kl_loss=True"]),
    "vimpo": ("vimpo", ["+algorithm.vimpo.passes=two"]),
    "vimpo_one_pass": ("vimpo", ["+algorithm.vimpo.passes=one"]),
}
STAGES = ("gen", "old_log_prob", "ref", "adv", "update_actor", "update_weights")


def run(recipe: str, steps: int) -> list[dict[str, float]]:
    """Metrics of each step but the first."""
    algo, overrides = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ALGO": algo, "STEPS": str(steps), "LR": "1e-9", "OUT": folder}
        command = ["bash", str(RUN_TINY), "trainer.val_before_train=False", "trainer.test_freq=-1", *overrides]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["data"] for line in lines][1:]


def row_of(recipe: str, records: list[dict[str, float]]) -> dict:
    def median(stage: str) -> float:
        return statistics.median(record.get(f"timing_s/{stage}", 0.0) for record in records)

    row = {"recipe": recipe, **{f"{stage} s": median(stage) for stage in STAGES}}
    rest = [record["timing_s/step"] - record["timing_s/gen"] for record in records]
    row["all but generation s"], row["steps"] = statistics.median(rest), spread(rest)
    row["response tokens"] = statistics.mean(record["response_length/mean"] for record in records)
    return row


def main() -> None:
    options = arguments(__doc__.splitlines()[0], steps=12, runs=1)
    records = {recipe: [] for recipe in RECIPES}
    for _ in range(options.runs):
        for recipe in RECIPES:
            records[recipe] += run(recipe, options.steps)
    rows = [row_of(recipe, found) for recipe, found in records.items()]
    for other in ("grpo", "grpo_kl"):
        base = rows[list(RECIPES).index(other)]["all but generation s"]
        for row in rows:
            row[f"to {other}"] = row["all but generation s"] / base
    show("A step through verl on the tiny CPU run", rows, options.json)


if __name__ == "__main__":
    main()
