"""Run a command of verl, print a line a step from its metrics file, and leave nothing behind.

The command's own output goes to a log file. A run that is killed leaves shared-memory files and sometimes processes; both
are told from those of other runs: processes by a variable in their environment, files by having appeared during the run
and being in nobody's use any more.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

TAG = "VIMPO_TINY_RUN"
SHARED_MEMORY = Path("/dev/shm")
LEFTOVERS = ("psm_*", "verl_weights_*")
SHOWN = {
    "reward": "critic/score/mean",
    "kl": "vimpo/kl",
    "entropy": "actor/entropy",
    "seconds": "timing_s/step",
}


def shared_memory_files() -> set[Path]:
    return {path for pattern in LEFTOVERS for path in SHARED_MEMORY.glob(pattern)}


def _readable(paths):
    """The contents of those files under /proc that this user may read."""
    for path in paths:
        try:
            yield path, path.read_bytes()
        except OSError:
            continue


def processes_of(run: str) -> list[int]:
    """Processes that carry this run's tag, this one excepted."""
    tag = f"{TAG}={run}".encode()
    found = [int(path.parent.name) for path, text in _readable(Path("/proc").glob("[0-9]*/environ")) if tag in text]
    return [pid for pid in found if pid != os.getpid()]


def end_processes(run: str, patience: float = 10.0) -> None:
    """Ask this run's remaining processes to end, then make them."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_of(run):
            try:
                os.kill(pid, kind)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + patience
        while processes_of(run) and time.monotonic() < deadline:
            time.sleep(0.2)


def remove_leftovers(before: set[Path]) -> None:
    """Delete shared-memory files that appeared since `before` and that no process has mapped."""
    mapped = b"\n".join(text for _, text in _readable(Path("/proc").glob("[0-9]*/maps")))
    for path in shared_memory_files() - before:
        if str(path).encode() not in mapped:
            path.unlink(missing_ok=True)


class MetricsFile:
    """The records that verl's file logger has written since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0

    def new_records(self) -> list[dict]:
        if not self.path.exists():
            return []
        with self.path.open() as file:
            file.seek(self.position)
            text = file.read()
        complete = text[: text.rfind("\n") + 1]
        self.position += len(complete.encode())
        return [json.loads(line) for line in complete.splitlines()]


def describe(record: dict) -> str:
    """One line: what of the interesting there is in this record."""
    metrics = record["data"]
    parts = [f"{name} {metrics[key]:.4f}" for name, key in SHOWN.items() if key in metrics]
    parts += [f"validation {value:.3f}" for key, value in metrics.items() if key.startswith("val-core/")]
    return "  ".join(parts)


def watch(process: subprocess.Popen, args: argparse.Namespace) -> int:
    """Print new steps until the command ends; returns its exit status."""
    metrics = MetricsFile(args.metrics)
    started = time.monotonic()
    while True:
        status = process.poll()
        for record in metrics.new_records():
            elapsed = time.monotonic() - started
            print(
                f"[{args.name}] step {record['step']}/{args.steps}  {describe(record)}  ({elapsed:.0f} s)", flush=True
            )
        if status is not None:
            return status
        time.sleep(0.5)


def report_failure(args: argparse.Namespace, status: int) -> None:
    reason = "ran out of time" if status == 124 else f"ended with status {status}"
    tail = args.log.read_text(errors="replace").splitlines()[-25:]
    print("\n".join(tail), file=sys.stderr)
    print(f"[{args.name}] the run {reason}; above: the end of {args.log}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """The command, from start to a clean machine."""
    run_id, before = uuid.uuid4().hex, shared_memory_files()
    with args.log.open("w") as log:
        process = subprocess.Popen(
            args.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, TAG: run_id}, start_new_session=True
        )
        try:
            status = watch(process, args)
        finally:
            end_processes(run_id)
            process.wait()
            remove_leftovers(before)
    if status != 0:
        report_failure(args, status)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", required=True)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"[{args.name}] starting verl (its output: {args.log}); importing takes the first minutes", flush=True)
    sys.exit(run(args))


if __name__ == "__main__":
    main()
