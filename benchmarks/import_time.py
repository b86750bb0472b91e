"""`import verl` with and without the plugin, in fresh processes, alternating: medians, and the rounds' differences.

python benchmarks/import_time.py --repeats 10 --json benchmarks/results/import_time.json
"""

import os
import statistics
import subprocess
import sys

from report import arguments, show, spread

MODULES = ("verl", "verl.trainer.main_ppo")
_TIMED = """
import importlib, time
wall, cpu = time.perf_counter(), time.process_time()
importlib.import_module({!r})
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def seconds_to_import(module: str, plugins: str) -> tuple[float, float]:
    """By the clock and of the processor, in a process of its own; plugins as in VERL_USE_EXTERNAL_PLUGINS."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins}
    command = [sys.executable, "-W", "ignore", "-c", _TIMED.format(module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, cpu = done.stdout.split()[-2:]
    return float(wall), float(cpu)


def measure(module: str, repeats: int) -> dict:
    taken = {"none": [], "auto": []}
    for repeat in range(repeats + 1):
        for plugins in taken:
            value = seconds_to_import(module, plugins)
            if repeat:  # the first of each fills the page cache
                taken[plugins].append(value)
    row = {"module": module}
    for clock, name in enumerate(("s", "processor s")):
        without, with_plugin = ([times[clock] for times in taken[plugins]] for plugins in ("none", "auto"))
        differences = [b - a for a, b in zip(without, with_plugin, strict=True)]
        row[f"without, {name}"] = statistics.median(without)
        row[f"with, {name}"] = statistics.median(with_plugin)
        row[f"difference, {name}"] = statistics.median(differences)
        row[f"rounds, {name}"] = spread(differences)
    return row


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=10)
    show("Import time", [measure(module, options.repeats) for module in MODULES], options.json)


if __name__ == "__main__":
    main()
