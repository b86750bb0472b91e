"""Runs a grid of the learning study; what is there already is not run again.

python -m benchmarks.learning tune_noise                 # one line a run in benchmarks/learning/results/tune_noise.jsonl
python -m benchmarks.learning tune_noise --smoke         # three short runs, written nowhere
python -m benchmarks.learning --list
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from benchmarks.learning.grids import GRIDS
from benchmarks.learning.run import run_named
from benchmarks.learning.settings import Setting

RESULTS = Path(__file__).parent / "results"


def finished(path: Path) -> set[str]:
    """Names of the runs that a results file has."""
    return {json.loads(line)["name"] for line in path.read_text().splitlines()} if path.exists() else set()


def run_grid(settings: list[Setting], path: Path, workers: int) -> None:
    """Run what is missing, and append each result as it comes."""
    done = finished(path)
    missing = [setting for setting in settings if setting.name not in done]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, path.open("a") as out:
        futures = [pool.submit(run_named, setting) for setting in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc=path.stem):
            out.write(json.dumps(future.result()) + "\n")
            out.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", choices=sorted(GRIDS))
    parser.add_argument("--list", action="store_true", help="the grids, with their numbers of runs")
    parser.add_argument("--smoke", action="store_true", help="three short runs of the grid, printed only")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    if args.list or args.grid is None:
        for name, grid in GRIDS.items():
            print(f"{name:24} {len(grid())} runs")
        return
    settings = list(dict.fromkeys(GRIDS[args.grid]()))
    if not settings:
        parser.error(f"{args.grid} takes each arm's best trial from tune_{args.grid}: run that to its end first")
    if args.smoke:
        for setting in settings[:: max(1, len(settings) // 3)][:3]:
            print(json.dumps(run_named(replace(setting, batches=4))))
        return
    RESULTS.mkdir(exist_ok=True)
    run_grid(settings, RESULTS / f"{args.grid}.jsonl", args.workers)


if __name__ == "__main__":
    main()
