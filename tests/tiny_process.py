"""One run of examples/tiny/run_tiny.sh as a process that may fail, hang or be killed; used by the tests of resume and faults."""

import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent
WATCHED = b"VIMPO_TINY_RUN="  # examples/tiny/watch.py gives it to verl's driver, which all others inherit it from
RESULTS = ("vimpo/", "critic/", "actor/")


class TinyRun:
    """Starts at once.

    Args:
        folder: OUT of the run; its checkpoints are in `checkpoints`.
        overrides: verl's options, as Hydra overrides.
        environment: settings of run_tiny.sh, plugins.
    """

    def __init__(self, folder: Path, *overrides: str, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tag, self.started = folder, f"TINY_PROCESS={uuid.uuid4().hex}", time.monotonic()
        self.incident_file = folder / "incident.txt"
        self.incident_file.unlink(missing_ok=True)
        name, _, value = self.tag.partition("=")
        env = {
            **os.environ,
            "PROMPTS": "8",
            "RESPONSES": "4",
            "ALGO": "vimpo",
            "OUT": str(folder),
            "PYTHONPATH": f"{ROOT / 'tests/plugins'}:{ROOT}",  # this tree, not what is installed
            "INCIDENT_FILE": str(self.incident_file),
            name: value,
            **environment,
        }
        env.pop("TRITON_INTERPRET", None)  # of the kernel's tests
        command = [
            "bash",
            "examples/tiny/run_tiny.sh",
            "trainer.val_before_train=False",
            "trainer.test_freq=-1",
            *overrides,
        ]
        self.output = (folder / "output.txt").open("w")
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=self.output, stderr=subprocess.STDOUT)

    def wait(self, timeout: float) -> int:
        """The exit status; a run that is still there after `timeout` seconds is killed, and raises TimeoutExpired."""
        try:
            return self.process.wait(timeout)
        finally:
            self.end()

    def kill_at_incident(self, timeout: float) -> None:
        """SIGKILL to verl's driver and every process of the run, once the incident's point is reached."""
        try:
            deadline = time.monotonic() + timeout
            while not self.incident_file.exists():
                assert self.process.poll() is None, f"ended before the incident:\n{self.log[-4000:]}"
                assert time.monotonic() < deadline, f"no incident within {timeout} s:\n{self.log[-4000:]}"
                time.sleep(0.02)
            assert len(self._kill()) > 3, "driver, Ray, workers, vLLM"
            self.process.wait(60)  # watch.py, which is left, tidies up
        finally:
            self.end()

    def end(self) -> None:
        """Nothing of the run is left."""
        if self.process.poll() is None:
            self._kill()
            self.process.wait(60)
        self.output.close()

    def _kill(self) -> set[int]:
        killed: set[int] = set()
        while new := self._processes() - killed:
            for pid in new:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            killed |= new
        return killed

    def _processes(self) -> set[int]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes()
            except OSError:
                continue
            if self.tag.encode() in environment and WATCHED in environment:
                found.add(int(path.parent.name))
        return found

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    @property
    def steps(self) -> dict[int, dict[str, float]]:
        """Step -> what training computed; without times and memory."""
        metrics, found = self.folder / "metrics.jsonl", {}
        for line in metrics.read_text().splitlines() if metrics.exists() else []:  # a run that ended early has none
            record = json.loads(line)
            found[record["step"]] = {
                name: value
                for name, value in record["data"].items()
                if name.startswith(RESULTS) and not name.startswith("actor/perf")
            }
        return found
