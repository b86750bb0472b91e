"""examples/slurm/train.sbatch with stand-ins for Slurm's commands and Ray (tests/slurm_stub), and its Ray step with the real Ray.

Claimed: the cluster is started node by node, the run starts when all have joined and its exit status is the job's; a
node that never joins, a run that fails, a node that dies or loses its power, the time limit and an end from outside have
the stated outcomes; every step that was started is asked, then made to end, and nothing else is signalled. Not claimed:
what a real Slurm does with the options that are handed to it; tests/slurm_cluster is for that.
"""

import mmap
import os
import re
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


def in_seconds(seconds: int) -> str:
    """As squeue prints a job's end."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))


class Job:
    """A job of the stubbed Slurm in a folder of its own."""

    def __init__(self, folder: Path, nodes: str, run: str, **settings: str):
        self.folder = folder
        for name in ("joined", "kill", "pids", "power_lost"):
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
    given = dict(line.split("=", 1) for line in job.read("ray-node1.env").splitlines() if "=" in line)
    metrics = {int(given["AUTOSCALER_METRIC_PORT"]), int(given["DASHBOARD_METRIC_PORT"])}
    assert len(metrics) == 2 and all(15000 <= port < 15020 for port in metrics) and not metrics & set(ports.values())
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


def test_wrong_ray_is_not_tried_again(tmp_path):
    """Status 127 on every start: a requeue would only meet it again."""
    job = Job(tmp_path, "node1,node2", RUN_WRITES_ITS_SETTINGS, RAY="/nowhere/ray")
    status, output = job.finish()
    assert status == 71, output
    assert "node node1 never joined: RAY=/nowhere/ray ended with status 127 there" in output
    assert job.read("requeued") == "" and job.read("run") == "" and job.left_over() == []


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


def test_node_without_power_ends_the_run_and_requeues(tmp_path):
    """Its srun knows nothing, the run waits for it for ever: the watching step asks Ray. It cannot be asked to end. Where
    Slurm does not notice either, the script requeues."""
    job = Job(tmp_path, "node1,node2", 'touch "$FAKE/power_lost/node2"; exec sleep 1000', GRACE="2")
    started = time.monotonic()
    status, output = job.finish()
    assert status == 70, output
    assert time.monotonic() - started < 60, "it must not wait for the run, nor for the dead node's srun"
    assert "ERROR: node node2 is lost: Ray does not hear from it" in output
    assert job.read("requeued") == "4711\n"
    assert job.left_over() == []


def test_slurm_requeues_a_job_with_a_dead_node(tmp_path):
    """Requeued by the script while the node is silent, a job starts again without its GPUs (seen with Slurm 22.05)."""
    settings = {"GRACE": "2", "FAKE_SLURMD_TIMEOUT": "60"}
    job = Job(tmp_path, "node1,node2", 'touch "$FAKE/power_lost/node2"; exec sleep 1000', **settings)
    process = job.start()
    deadline = time.monotonic() + 60
    while "waiting for Slurm to give up the node" not in job.read("output"):
        assert time.monotonic() < deadline, job.read("output")
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # as Slurm does when it requeues
    status, output = job.end(process)
    assert status == 143 and job.read("requeued") == "", output
    assert job.left_over() == []


def test_watching_step_that_ends_by_itself_is_no_loss(tmp_path):
    run = """until [[ -s $FAKE/pids/nodes ]]; do sleep 0.1; done
        kill -KILL "$(<"$FAKE/pids/nodes")"; sleep 3; echo done >"$FAKE/run"
    """
    job = Job(tmp_path, "node1,node2", run)
    status, output = job.finish()
    assert status == 0 and job.read("run") == "done\n"
    assert "WARNING: the step that watches the nodes ended with status 137" in output


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


def test_step_has_grace_to_end(tmp_path):
    """srun's own answer to a SIGTERM is SIGKILL for its step, at once."""
    ends_slowly = 'trap "sleep 3; touch $FAKE/saved; exit 0" TERM; touch "$FAKE/run"; while true; do sleep 0.1; done'
    job = Job(tmp_path, "node1,node2", ends_slowly, GRACE="20")
    process = job.start()
    job.wait_for("run")
    process.send_signal(signal.SIGTERM)
    status, output = job.end(process)
    assert status == 143 and (tmp_path / "saved").exists(), output
    assert (tmp_path / "ended-node1").exists() and (tmp_path / "ended-node2").exists(), "Ray was asked, too"
    assert (tmp_path / "logs/ray-node1").is_dir() and not list(tmp_path.glob("ray-node?/")), (
        "logs saved, folder removed"
    )


def test_step_that_does_not_end_is_made_to(tmp_path):
    job = Job(tmp_path, "node1", 'trap "" TERM; touch "$FAKE/run"; while true; do sleep 0.1; done', GRACE="2")
    process = job.start()
    job.wait_for("run")
    process.send_signal(signal.SIGTERM)
    status, output = job.end(process)
    assert status == 143 and "did not end within GRACE=2 s of SIGTERM: run" in output
    assert job.left_over() == []


def test_scancel_reaches_every_process_of_the_script(tmp_path):
    """Also its sleep, whose status must not end it."""
    job = Job(tmp_path, "node1", 'touch "$FAKE/run"; exec sleep 1000')
    process = job.start()
    job.wait_for("run")
    sleeps, deadline = [], time.monotonic() + 20
    while not sleeps:
        assert time.monotonic() < deadline
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        sleeps = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
    for pid in [*sleeps, process.pid]:
        os.kill(pid, signal.SIGTERM)
    status, output = job.end(process)
    assert status == 143 and "ended from outside" in output
    assert job.left_over() == []


def test_task_of_an_array_is_requeued_alone(tmp_path):
    """The number of the last task is the array's own, which to scontrol means every task."""
    array = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}
    job = Job(tmp_path, "node1,node2", 'touch "$FAKE/kill/node2"; exec sleep 1000', **array)
    status, output = job.finish()
    assert status == 70 and "requeueing job 4711_3" in output
    assert job.read("requeued") == "4711_3\n"


def test_run_has_the_users_variables(tmp_path):
    """The script's own variables hide none: STEPS was once one of them, and 30 steps ran where 3 were asked for."""
    names = ("STEPS", "NODES", "HEAD", "HERE", "JOB", "NAME", "STATUS", "OUTCOME", "RESTARTS", "OUT", "MODEL", "LR")
    run = "\n".join(f'echo "{name}=${name}" >>"$FAKE/run"' for name in names)
    job = Job(tmp_path, "node1", run, **{name: f"the user's {name}" for name in names})
    assert job.finish()[0] == 0
    assert job.read("run").splitlines() == [f"{name}=the user's {name}" for name in names]


def test_capitals_are_settings():
    """What the script sets in capitals is a setting, or what it hands on, by docs/slurm.md."""
    script, page = SBATCH.read_text(), (ROOT / "docs/slurm.md").read_text()
    assigned = set(re.findall(r"^\s*(?:export )?([A-Z][A-Z_]+)=", script, flags=re.MULTILINE))
    assigned |= set(re.findall(r"(?<= )([A-Z][A-Z_]+)=\$\{", script))
    assert len(assigned) > 15
    assert [name for name in sorted(assigned) if f"`{name}`" not in page] == []


def test_gpus_of_amd_stay_visible_and_verl_gets_one_variable(tmp_path):
    """verl refuses ROCR_VISIBLE_DEVICES beside CUDA_VISIBLE_DEVICES, and Slurm sets both."""
    run = 'echo "${CUDA_VISIBLE_DEVICES-none} ${ROCR_VISIBLE_DEVICES-none}" >>"$FAKE/run"'
    for cuda, seen in (("0,1", "0,1 none"), ("", " 0,1")):
        (tmp_path / seen).mkdir()
        job = Job(tmp_path / seen, "node1", run, FAKE_CUDA_DEVICES=cuda)
        assert job.finish()[0] == 0
        assert job.read("run") == f"{seen}\n"
        assert ("ROCR_VISIBLE_DEVICES=0,1" in job.read("ray-node1.env").splitlines()) == (cuda == "")


def test_one_node_keeps_to_the_loopback_address_and_several_do_not(tmp_path):
    variables = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0", "VLLM_HOST_IP=127.0.0.1", "GLOO_SOCKET_IFNAME=lo"}
    for nodes, address in (("node1", ""), ("node1,node2", "10.0.0.1")):
        (tmp_path / nodes).mkdir()
        job = Job(tmp_path / nodes, nodes, "true", HEAD_IP=address)
        assert job.finish()[0] == 0
        given = set(job.read("ray-node1.env").splitlines())
        assert variables & given == (variables if nodes == "node1" else set())


def test_what_killed_processes_left_in_shared_memory_is_removed(tmp_path):
    """And nothing that was there before, or that a process still uses."""
    files = {name: Path(f"/dev/shm/psm_vimpo_{os.getpid()}_{name}") for name in ("before", "used", "left")}
    try:
        files["before"].touch()
        time.sleep(0.1)
        run = f"echo x >{files['left']}; echo x >{files['used']}; until [[ -e $FAKE/mapped ]]; do sleep 0.1; done"
        job = Job(tmp_path, "node1", run)
        process = job.start()
        while not files["used"].exists() or files["used"].stat().st_size == 0:
            assert process.poll() is None
            time.sleep(0.05)
        with files["used"].open("r+b") as opened, mmap.mmap(opened.fileno(), 1):
            (tmp_path / "mapped").touch()
            status, output = job.end(process)
        assert status == 0, output
        assert {name for name, file in files.items() if file.exists()} == {"before", "used"}
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


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
        ({"FAKE_END_TIME": in_seconds(240)}, "within the SIGNAL_LEAD=300 s of --signal: submit with a longer --time"),
    ],
)
def test_wrong_set_up_is_refused_before_anything_starts(tmp_path, settings, message):
    job = Job(tmp_path, "node1", "true", **settings)
    status, output = job.finish()
    assert status == 72 and message in output
    assert job.read("steps") == ""


@pytest.mark.parametrize("end", ["in 600 s", "NONE", "Unknown"])
def test_time_limit_that_leaves_time_is_no_error(tmp_path, end):
    end = in_seconds(600) if end == "in 600 s" else end  # not when the tests are collected
    assert Job(tmp_path, "node1", "true", FAKE_END_TIME=end).finish()[0] == 0


def test_lead_is_the_one_that_slurm_is_told():
    script = SBATCH.read_text()
    assert re.search(r"#SBATCH --signal=B:USR1@(\d+)", script)[1] == re.search(r"SIGNAL_LEAD:-(\d+)", script)[1]


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
