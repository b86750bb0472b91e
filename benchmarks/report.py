"""What every benchmark script shares: the machine in words, timing, a table, a JSON file."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse `--json FILE` and one option for each of `defaults`; lists take several values, False none: `--name` is True."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    for name, default in defaults.items():
        if default is False:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
            continue
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if several else None, default=default)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """The machine that the figures belong to."""
    processor = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    versions = {name: _version(name) for name in ("torch", "triton", "verl", "vllm", "vimpo_verl")}
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }


# "cpu" counts this process's processor seconds, for a machine that is not quiet; with one thread, or they say little.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, clock: str = "wall") -> dict[str, list[float]]:
    """Times of each function's calls, round by round, after a round that is not counted; waits for the GPU.

    In turn, so that what else the machine does in the meantime falls on all of them alike.
    """
    now = CLOCKS[clock]
    taken = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            _wait()
            start = now()
            function()
            _wait()
            if repeat:
                taken[name].append(now() - start)
    return taken


def spread(values: Iterable[float]) -> str:
    """Smallest and largest, for a table."""
    values = list(values)
    return f"{min(values):.3g} to {max(values):.3g}"


def signed(value: float, half_width: float | None) -> str:
    """A difference and its interval, where there is one, for a table."""
    if half_width is None:
        return f"{value:+.3f}"
    return f"{value:+.3f} ({value - half_width:+.3f} to {value + half_width:+.3f})"


def markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def available_bytes(device: str) -> int:
    """Memory that is free on a device now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    kilobytes = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), 0)
    return 1024 * int(kilobytes)


def show(title: str, rows: list[dict[str, Any]], json_file: Path | None, **extra: Any) -> None:
    """Print the rows as a table with the machine under it, and write them as JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], (int, float)) else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console(width=160)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None))
    save(title, rows, json_file, **extra)


def save(title: str, rows: list[dict[str, Any]], json_file: Path | None, **extra: Any) -> None:
    """Write the rows as JSON; also after each of them, where a run is long and may be cut short."""
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"title": title, "machine": machine(), **extra, "rows": rows}, indent=1) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
