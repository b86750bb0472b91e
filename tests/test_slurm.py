"""examples/slurm/train.sbatch with stand-ins for srun, scontrol and Ray (tests/slurm_stub), and its Ray step with the
real Ray.

Claimed: the cluster is started node by node, the run starts when all have joined and its exit status is the job's; a
node that never joins, a run that fails, a node that dies, the time limit and an end from outside have the stated
outcomes; every step that was started is ended and nothing else. Not claimed: what a real Slurm does with the options
that are handed to it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "examples/slurm/train.sbatch"
STUB = Path(__file__).parent / "slurm_stub"

pytestmark = pytest.mark.timeout(120)

RUN_WRITES_ITS_SETTINGS = (
    'echo "$RAY_ADDRESS $NNODES $GPUS seed=$SEED $*" >"$FAKE/run"; ls "$FAKE/joined" >"$FAKE/nodes_of_run"\n'
)


class Job:
    """A job of the stubbed Slurm in a folder of its own."""

    def __init__(self, folder: Path, nodes: str, run: str, **settings: str):
        self.folder = folder
        for name in ("joined", "kill", "pids"):
            (folder / name).mkdir()
        script = folder / "run.sh"
        script.write_text(run)
        self.env = {
            "PATH": f"{STUB / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": str(STUB),
            "PYTHON": sys.executable,
            "FAKE": str(folder),
            "ROOT": str(ROOT),
            "RUN": str(script),
            "LOGS": str(folder / "logs"),
            "RAY_TEMP": str(folder / "ray"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
            "HEAD_IP": "10.0.0.1",
            "JOIN_TIMEOUT": "30",
            "GRACE": "5",
            **settings,
        }

    def start(self, *arguments: str) -> subprocess.Popen:
        # To a file: a pipe would stay open for as long as a step that was left behind.
        with (self.folder / "output").open("w") as output:
            command = ["bash", str(SBATCH), *arguments]
            return subprocess.Popen(command, env=self.env, stdout=output, stderr=subprocess.STDOUT)

    def end(self, process: subprocess.Popen) -> tuple[int, str]:
        """Status and output of a started job, once it has ended."""
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            self.left_over()
            raise
        return process.returncode, self.read("output")

    def finish(self, *arguments: str) -> tuple[int, str]:
        return self.end(self.start(*arguments))

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{name} never appeared"
            time.sleep(0.05)

    def left_over(self) -> list[str]:
        """Steps whose process still exists a moment after the job's end, which are then killed."""
        steps = {path.name: int(path.read_text()) for path in (self.folder / "pids").iterdir()}
        deadline = time.monotonic() + 5
        while True:
            alive = {name: pid for name, pid in steps.items() if Path(f"/proc/{pid}").exists()}
            if not alive or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for pid in alive.values():
            os.kill(pid, signal.SIGKILL)
        return list(alive)


def test_one_node(tmp_path):
    job = Job(tmp_path, "node1", RUN_WRITES_ITS_SETTINGS, HEAD_IP="")
    status, output = job.finish("trainer.save_freq=7")
    assert status == 0, output
    assert job.read("run") == "127.0.0.1:21000 1 8 seed=1 trainer.save_freq=7\n"
    assert sorted(job.read("steps").splitlines()) == ["node1 join-1", "node1 ray-node1", "node1 run"]
    flags = job.read("ray-node1.args").splitlines()
    assert "--head" in flags and "--node-ip-address=127.0.0.1" in flags
    assert "--dashboard-host=127.0.0.1" in flags
    assert {"--num-gpus=8", "--num-cpus=64", "--port=21000"} <= set(flags)
    assert job.left_over() == [] and job.read("requeued") == ""


def test_three_nodes(tmp_path):
    job = Job(tmp_path, "node1,node2,node3", RUN_WRITES_ITS_SETTINGS, SLURM_ARRAY_TASK_ID="5")
    status, output = job.finish()
    assert status == 0, output
    assert job.read("run") == "10.0.0.1:21000 3 8 seed=5 \n"
    assert job.read("nodes_of_run").split() == ["node1", "node2", "node3"], "the run starts when all have joined"
    for node in ("node2", "node3"):
        flags = job.read(f"ray-{node}.args").splitlines()
        assert "--address=10.0.0.1:21000" in flags and "--head" not in flags
        assert (tmp_path / "logs" / f"ray-{node}.log").exists() and (tmp_path / f"ended-{node}").exists()
    assert job.left_over() == []


def test_every_port_is_given_and_in_the_jobs_range(tmp_path):
    job = Job(tmp_path, "node1", "true", PORT_BASE="15000")
    assert job.finish()[0] == 0
    flags = dict(flag.split("=") for flag in job.read("ray-node1.args").splitlines() if "=" in flag)
    ports = {name: int(value) for name, value in flags.items() if name.endswith("port")}
    assert len(ports) == 11 and len(set(ports.values())) == 11
    assert all(15000 <= port < 16000 for port in ports.values())
    others = set(ports) - {"--min-worker-port", "--max-worker-port"}
    assert all(not ports["--min-worker-port"] <= ports[name] <= ports["--max-worker-port"] for name in others)


def test_node_that_never_joins(tmp_path):
    job = Job(tmp_path, "node1,node2,node3", RUN_WRITES_ITS_SETTINGS, FAKE_NEVER_JOINS="node3", JOIN_TIMEOUT="4")
    status, output = job.finish()
    assert status == 71
    assert "2 of 3 nodes have joined: node1 node2; missing: node3" in output
    assert "sbatch --exclude=node3" in output
    assert job.read("run") == "", "the run must not start"
    assert job.left_over() == [] and job.read("requeued") == ""


def test_node_that_dies_while_the_others_join(tmp_path):
    job = Job(tmp_path, "node1,node2,node3", RUN_WRITES_ITS_SETTINGS, FAKE_NEVER_JOINS="node3", MAX_RESTARTS="0")
    (tmp_path / "kill/node3").touch()
    started = time.monotonic()
    status, output = job.finish()
    assert status == 70 and "node node3 is lost" in output
    assert time.monotonic() - started < 25, "it must not wait for JOIN_TIMEOUT"
    assert job.left_over() == []


@pytest.mark.parametrize("expected", (1, 3, 137))
def test_status_of_a_run_that_fails_is_the_jobs(tmp_path, expected):
    job = Job(tmp_path, "node1,node2", f"echo the reason of the failure; exit {expected}")
    status, output = job.finish()
    assert status == expected
    assert "the reason of the failure" in output, "the end of its log is shown"
    assert job.left_over() == [] and job.read("requeued") == ""


def test_node_that_dies_ends_the_run_and_requeues(tmp_path):
    job = Job(tmp_path, "node1,node2,node3", 'touch "$FAKE/kill/node2"; exec sleep 1000')
    started = time.monotonic()
    status, output = job.finish()
    assert status == 70
    assert time.monotonic() - started < 40, "it must not wait for the run"
    assert "ERROR: node node2 is lost: its Ray ended with status 1" in output
    assert "raylet: the stub's node dies" in output, "the end of the node's log is shown"
    assert job.read("requeued") == "4711\n"
    assert job.left_over() == []


def test_run_that_fails_because_of_a_node_that_only_ray_misses_is_requeued(tmp_path):
    """srun notices a node that went down minutes later than Ray does."""
    job = Job(tmp_path, "node1,node2", 'rm "$FAKE/joined/node2"; exit 1')
    status, output = job.finish()
    assert status == 70 and "not every node is alive" in output
    assert job.read("requeued") == "4711\n"


def test_restarts_are_limited(tmp_path):
    job = Job(
        tmp_path, "node1,node2", 'touch "$FAKE/kill/node2"; exec sleep 1000', SLURM_RESTART_COUNT="2", MAX_RESTARTS="2"
    )
    status, output = job.finish()
    assert status == 70 and "not requeued" in output
    assert job.read("requeued") == ""


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, "4711\n"), (signal.SIGTERM, "")])
def test_time_limit_requeues_and_an_end_from_outside_does_not(tmp_path, sent, requeued):
    job = Job(
        tmp_path,
        "node1,node2",
        'trap "touch $FAKE/asked_to_end; exit 0" TERM; touch "$FAKE/run"; while true; do sleep 0.1; done',
    )
    process = job.start()
    job.wait_for("run")
    process.send_signal(sent)
    status, output = job.end(process)
    assert status == 143, output
    assert (tmp_path / "asked_to_end").exists(), "the run is asked before it is made to end"
    assert job.read("requeued") == requeued
    assert job.left_over() == []


def test_processes_of_others_are_left_alone(tmp_path):
    """A Ray of somebody else, and a python, by name and command line like ours."""
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(100)", "ray", "start", "raylet", "gcs_server"]
    )
    try:
        assert Job(tmp_path, "node1,node2", 'touch "$FAKE/kill/node2"; exec sleep 1000').finish()[0] == 70
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SLURM_GPUS_ON_NODE": ""}, "is no number of GPUs: submit with --gpus-per-node"),
        ({"RUN": "/nowhere.sh"}, "RUN=/nowhere.sh does not exist"),
        ({"ROOT": "/nowhere"}, "submit from the repository root, or set ROOT"),
        ({"SLURM_JOB_NODELIST": "no-such-node.invalid,b", "HEAD_IP": ""}, "set HEAD_IP"),
        ({"SLURM_JOB_ID": ""}, "submit this file with sbatch"),
    ],
)
def test_wrong_set_up_is_refused_before_anything_starts(tmp_path, settings, message):
    job = Job(tmp_path, "node1", "true", **settings)
    status, output = job.finish()
    assert status == 72 and message in output
    assert job.read("steps") == ""


@pytest.mark.slow
def test_one_node_with_the_real_ray(tmp_path):
    """The flags are Ray's, the token is asked for, and Ray ends with the job and leaves its logs."""
    run = 'exec "$PYTHON" -c "import ray; ray.init(); print(ray.cluster_resources())" >"$FAKE/run"'
    job = Job(tmp_path, socket.gethostname(), run, HEAD_IP="", RAY=str(Path(sys.executable).parent / "ray"), GPUS="2")
    job.env |= {"PYTHONPATH": "", "SLURM_CPUS_PER_TASK": "4", "RAY_TEMP": f"/tmp/vimpo-{os.getpid()}", "GRACE": "40"}
    status, output = job.finish()
    assert status == 0, output
    assert "'GPU': 2.0" in job.read("run")
    assert job.left_over() == []
    assert list((tmp_path / "logs").glob("ray-*/raylet.out")) and not list(Path("/tmp").glob(f"vimpo-{os.getpid()}*"))
