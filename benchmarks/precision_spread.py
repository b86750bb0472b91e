"""How far apart the results of one update are, by how it is computed: float32 and bfloat16, on verl's own FSDP engine.

The engine and the batch of tests/test_invariance.py; everything is compared with micro-batches of 2 in the same
precision. The gradient: norm of the difference, relative to the norm. Metrics: the largest relative difference of any
`vimpo/` metric. The last row compares bfloat16 with float32: what the precision itself costs, beside which the others
are to be seen.

    python benchmarks/precision_spread.py --json benchmarks/results/precision_spread.json
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import before_verl  # noqa: F401  first: verl reads it when it is imported
import engine_harness as harness
from engine_samples import make_samples

BASE = harness.Setting(lr=0.0, knobs={"actor_coeff": 0.1})
HOW = {
    "micro-batches of 1": {"micro_batch_size": 1},
    "one micro-batch": {"micro_batch_size": 8},
    "dynamic batch": {"micro_batch_size": None},
    "padding kept": {"use_remove_padding": False},
    "FSDP1": {"strategy": "fsdp"},
}
RANKS = (2, 4)
SEQUENCE_PARALLEL = 2


def on_rank(rank: int, models: Path, setting: harness.Setting) -> harness.StepResult:
    return harness.run_step(models, setting, make_samples())


def difference(actual: harness.StepResult, expected: harness.StepResult) -> dict[str, float]:
    """Relative differences of the first gradient and of the metrics."""
    found, wanted = actual.gradients[0], expected.gradients[0]
    square = sum((found[name].double() - wanted[name].double()).square().sum() for name in wanted)
    norm = sum(gradient.double().square().sum() for gradient in wanted.values())
    # At ratio 1 the actor loss is a sum of advantages that cancel: zero, up to rounding. Nor is there a share of nothing skipped.
    left_out = ("vimpo/actor_loss", "vimpo/update_skipped")
    values = {
        name: float(value)
        for name, value in expected.metrics.items()
        if name.startswith("vimpo/") and name not in left_out
    }
    worst = max(values, key=lambda name: abs(float(actual.metrics[name]) - values[name]) / abs(values[name]))
    return {
        "gradient": (square / norm).sqrt().item(),
        "metrics": abs(float(actual.metrics[worst]) - values[worst]) / abs(values[worst]),
        "worst_metric": worst,
    }


def measure(models: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Precision -> how -> differences."""
    found, bases = {}, {}
    for dtype in ("fp32", "bf16"):
        setting = replace(BASE, dtype=dtype)
        bases[dtype] = harness.run_step(models, setting, make_samples())
        results = {how: on_rank(0, models, replace(setting, **changed)) for how, changed in HOW.items()}
        for ranks in RANKS:
            results[f"{ranks} data-parallel ranks"] = harness.run_on_ranks(ranks, on_rank, models, setting)[0]
        parallel = replace(setting, sp_size=SEQUENCE_PARALLEL)
        results["2 sequence-parallel ranks"] = harness.run_on_ranks(SEQUENCE_PARALLEL, on_rank, models, parallel)[0]
        found[dtype] = {how: difference(result, bases[dtype]) for how, result in results.items()}
    found["bf16"]["against float32"] = difference(bases["bf16"], bases["fp32"])
    return found


def table(found: dict) -> str:
    """Markdown."""
    lines = [
        "| | gradient, float32 | gradient, bfloat16 | metrics, float32 | metrics, bfloat16 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for how in found["bf16"]:
        cells = [
            f"{found[dtype][how][what]:.1e}" if how in found[dtype] else ""
            for what in ("gradient", "metrics")
            for dtype in ("fp32", "bf16")
        ]
        lines.append(f"| {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        harness.make_models(Path(folder))
        harness.start_process_group()
        found = measure(Path(folder))
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
