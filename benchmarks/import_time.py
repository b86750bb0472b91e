"""`import verl` with and without the plugin, in fresh processes, alternating.

    python benchmarks/import_time.py --repeats 10 --json benchmarks/results/import_time.json
"""

import os
import statistics
import subprocess
import sys

from report import arguments, show

MODULES = ("verl", "verl.trainer.main_ppo")
_TIMED = (
    "import time, importlib; t = time.perf_counter(); importlib.import_module({!r}); print(time.perf_counter() - t)"
)


def seconds_to_import(module: str, plugins: str) -> float:
    """In a process of its own; plugins is "none" or "auto", as in VERL_USE_EXTERNAL_PLUGINS."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins}
    command = [sys.executable, "-W", "ignore", "-c", _TIMED.format(module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(module: str, repeats: int) -> dict:
    taken = {"none": [], "auto": []}
    for repeat in range(repeats + 1):
        for plugins in taken:
            value = seconds_to_import(module, plugins)
            if repeat:  # the first of each fills the page cache
                taken[plugins].append(value)
    without, with_plugin = statistics.median(taken["none"]), statistics.median(taken["auto"])
    return {
        "module": module,
        "without s": without,
        "with s": with_plugin,
        "difference s": with_plugin - without,
        "ratio": with_plugin / without,
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=10)
    show("Import time", [measure(module, options.repeats) for module in MODULES], options.json)


if __name__ == "__main__":
    main()
