"""Jobs of examples/slurm/train.sbatch on the virtual cluster that cluster.sh makes."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CLUSTER_SH = Path(__file__).parent / "cluster.sh"
COMMANDS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing() -> list[str]:
    """What this machine lacks for a virtual cluster, by name."""
    lacking = {package for command, package in COMMANDS.items() if shutil.which(command) is None}
    found = [f"the package {package}" for package in sorted(lacking)]
    if os.geteuid() != 0:
        return [*found, "root"]
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True).returncode != 0:
        found.append("the right to make namespaces")
    for path in (ROOT, Path(sys.prefix)):
        if Path("/tmp") in path.resolve().parents:
            found.append(f"a place outside /tmp, which is each node's own, for {path}")
    return found


def wait_until(condition: Callable[[], object], seconds: float, what: str, report: Callable[[], str] = str) -> float:
    """Seconds until `condition` was true; an AssertionError with `report()` if it was not within `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what}: not within {seconds} s\n{report()}"
        time.sleep(0.5)
    return time.monotonic() - started


class Cluster:
    """Nodes n1, n2, ... and the controller's host, ctl; all of it ends with down().

    Its folder is the root of the jobs: examples is a link to this repository's, outputs/slurm has their logs.
    """

    def __init__(self, nodes: int):
        self.folder = Path(tempfile.mkdtemp(prefix="vimpo-slurm-", dir="/var/tmp"))
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "CLUSTER": str(self.folder / "cluster"),
            "NAME": f"vimpo{os.getpid()}",
        }
        (self.folder / "cluster").mkdir()
        (self.folder / "examples").symlink_to(ROOT / "examples")
        try:
            self._cluster_sh("up", str(nodes))
            wait_until(lambda: self.run("ctl", "sinfo", "--noheader", "--format=%T") == "idle", 60, "nodes are idle")
        except BaseException:
            self.down()
            raise

    def _cluster_sh(self, *arguments: str, **environment: str) -> str:
        """Its output. To a file, which a daemon that is left behind may keep open."""
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                ["bash", str(CLUSTER_SH), *arguments],
                cwd=self.folder,
                env=self.env | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
            output.seek(0)
            text = output.read().strip()
        assert done.returncode == 0, f"cluster.sh {' '.join(arguments)}: status {done.returncode}\n{text}"
        return text

    def run(self, node: str, *command: str, **environment: str) -> str:
        """Output of a command on a node, which must succeed."""
        return self._cluster_sh("exec", node, *command, **environment)

    def power_off(self, node: str) -> None:
        self._cluster_sh("poweroff", node)

    def boot(self, node: str) -> None:
        self._cluster_sh("boot", node)

    def left_on(self, node: str) -> list[str]:
        """What jobs left there: processes other than the node's own, files in /dev/shm and /tmp."""
        own = ("bash", "slurmd", "sleep", "ps")
        processes = [name for name in self.run(node, "ps", "-eo", "comm=").split("\n") if name not in own]
        return processes + self.run(node, "find", "/dev/shm", "/tmp", "-mindepth", "1", "-maxdepth", "1").split()

    def assert_clean(self, *nodes: str, seconds: float = 30) -> None:
        for node in nodes or self.nodes:
            left = functools.partial(self.left_on, node)
            wait_until(lambda left=left: not left(), seconds, f"{node} is clean", lambda left=left: str(left()))

    def end_jobs(self) -> None:
        self.run("ctl", "scancel", "--quiet", "--user=root")
        wait_until(lambda: not self.run("ctl", "squeue", "--noheader"), 120, "the jobs end")

    def down(self) -> None:
        try:
            self._cluster_sh("down")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class Job:
    """A submitted job.

    Args:
        cluster: where.
        run: a script's text, or the path of one; `$SHARED` is a folder of the job's own.
        options: of sbatch.
        settings: of train.sbatch and the run, exported before sbatch.
    """

    def __init__(
        self, cluster: Cluster, run: str | Path, *options: str, arguments: tuple[str, ...] = (), **settings: str
    ):
        self.cluster = cluster
        self.shared = Path(tempfile.mkdtemp(dir=cluster.folder))
        if isinstance(run, str):
            (self.shared / "run.sh").write_text(run)
            run = self.shared / "run.sh"
        environment = {
            "RUN": str(run),
            "SHARED": str(self.shared),
            "PYTHON": sys.executable,
            "RAY": str(Path(sys.executable).parent / "ray"),
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            **settings,
        }
        common = ("--parsable", "--gpus-per-node=1", "--cpus-per-task=16", f"--output={self.shared}/job-%a.out")
        submitted = cluster.run(
            "ctl", "sbatch", *common, *options, "examples/slurm/train.sbatch", *arguments, **environment
        )
        self.id, self.submitted = submitted, time.monotonic()

    def output(self, task: int | None = None) -> str:
        """The script's own; %a of a job that is no array is the number 4294967294."""
        name = f"job-{4294967294 if task is None else task}.out"
        return self._read(self.shared / name)

    @property
    def logs(self) -> Path:
        """Folder of the latest start."""
        return self.cluster.folder / f"outputs/slurm/{self.id}-{self.restarts()}"

    @staticmethod
    def _read(path: Path) -> str:
        return path.read_text(errors="replace") if path.exists() else ""

    def info(self, task: int | None = None) -> dict[str, str]:
        """What scontrol says, by its names: JobState, Restarts, ExitCode, NodeList, ..."""
        name = self.id if task is None else f"{self.id}_{task}"
        words = self.cluster.run("ctl", "scontrol", "show", "job", "--oneliner", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def age(self) -> float:
        """Seconds since sbatch."""
        return time.monotonic() - self.submitted

    def report(self, task: int | None = None) -> str:
        """For a failed assertion."""
        parts = [str(self.info(task)), self.output(task)]
        for path in sorted(self.logs.parent.glob("*/*.log")):
            parts += [f"--- {path}", *self._read(path).splitlines()[-15:]]
        return "\n".join(parts)

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        return wait_until(condition, seconds, what, self.report)

    def wait_for_text(self, text: str, seconds: float, task: int | None = None) -> float:
        return wait_until(lambda: text in self.output(task), seconds, f"'{text}'", lambda: self.report(task))

    def wait_for_file(self, name: str, seconds: float) -> float:
        return self.wait_for((self.shared / name).exists, seconds, name)

    def restarts(self, task: int | None = None) -> int:
        return int(self.info(task)["Restarts"])

    def wait_for_end(self, seconds: float, task: int | None = None) -> tuple[str, int]:
        """State and exit status."""
        wait_until(
            lambda: self.info(task)["JobState"] in ENDED, seconds, f"job {self.id} ends", lambda: self.report(task)
        )
        info = self.info(task)
        return info["JobState"], int(info["ExitCode"].split(":")[0])

    def cancel(self, *options: str) -> None:
        self.cluster.run("ctl", "scancel", *options, self.id)
