"""examples/slurm/train.sbatch on a real Slurm, in a virtual cluster on this machine (cluster.sh): `bash tests/run.sh -m slow -s
tests/slurm_cluster`. Needs root and the packages slurm-wlm, munge and iproute2; takes about half an hour on two cores.

Claimed: with the real srun, scancel, squeue, scontrol and Ray, one and two nodes train real verl (on the CPU, over gloo,
with Ray's token); a node without power, a Ray that is killed, a node that does not join, scancel, the time limit and a
job array have the outcomes of docs/slurm.md, and nothing is left on a node. Not claimed: GPUs, containers, cgroups, other
users than root, slurmdbd.
"""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from virtual_cluster import ROOT, Cluster, Job, missing

# On a busy machine a Ray may miss the 30 s that it gives itself to start, and the job is requeued once more: so the tests do
# not count starts.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(missing()), reason=f"a virtual Slurm cluster needs {', '.join(missing())}"),
]

TINY = ROOT / "examples/tiny/run_tiny.sh"
SMALL = {"PROMPTS": "8", "RESPONSES": "4", "WORK": str(ROOT / "outputs/tiny")}
QUIET = ("trainer.val_before_train=False", "trainer.test_freq=-1")
WAITS = 'touch "$SHARED/running"; while true; do sleep 0.2; done\n'
ENDS_WHEN_RESTARTED = "[[ ! -e $SHARED/running ]] || exit 0\n"


@pytest.fixture(scope="module")
def nodes():
    made = Cluster(3)
    yield made
    made.down()


@pytest.fixture
def cluster(nodes):
    """Without jobs of an earlier test, also of one that failed."""
    yield nodes
    nodes.end_jobs()


def say(text: str) -> None:
    print(f"[times] {text}", flush=True)


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    path = folder / name
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def listening(cluster: Cluster, node: str) -> list[tuple[str, str, int]]:
    """Process, address and port of what listens for jobs; srun's own are Slurm's matter (SrunPortRange)."""
    lines = cluster.run(node, "ss", "--listening", "--tcp", "--numeric", "--processes", "--no-header").splitlines()
    found = []
    for line in lines:
        process = re.search(r'users:\(\("([^"]+)"', line)
        address, _, port = line.split()[3].rpartition(":")
        found.append((process[1] if process else "", address.strip("[]").removeprefix("::ffff:"), int(port)))
    return [entry for entry in found if entry[0] not in ("slurmd", "srun", "slurmstepd")]


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


# ---------------------------------------------------------------------------------------------------- verl


def test_one_node_trains(cluster):
    """STEPS is the user's; nothing listens where others could reach it; nothing is left."""
    job = Job(cluster, TINY, "--nodes=1", arguments=QUIET, STEPS="3", OUT=str(cluster.folder / "one"), **SMALL)
    first = job.wait_for(lambda: steps(cluster.folder / "one"), 900, "first step")
    of_torch = ("ray::WorkerDict", "*")  # the store of its process group, which listens on every address
    reachable = [
        (process, address, port)
        for process, address, port in listening(cluster, job.info()["NodeList"])
        if not is_loopback(address) and (process, address) != of_torch
    ]
    assert job.wait_for_end(600) == ("COMPLETED", 0), job.report()
    say(f"one node: first step {first:.0f} s after sbatch, three steps and the end after {job.age:.0f} s")
    assert steps(cluster.folder / "one") == [1, 2, 3]
    assert reachable == []
    cluster.assert_clean()


def test_two_nodes_train(cluster):
    """Each has a rank; who has no token is not let in."""
    out = cluster.folder / "two"
    job = Job(cluster, TINY, "--nodes=2", arguments=QUIET, STEPS="3", OUT=str(out), **SMALL)
    first = job.wait_for(lambda: steps(out), 900, "first step")
    address = re.search(r"have joined (\S+);", job.output())[1]
    for node in ("n1", "n2"):
        assert "ray::WorkerDict" in cluster.run(node, "ps", "-eo", "args"), f"{node} takes part"
    (job.shared / "stranger.py").write_text(f"import ray\nray.init(address='{address}')\nprint('let in')\n")
    stranger = f"timeout 60 '{sys.executable}' '{job.shared}/stranger.py' 2>&1 || true"
    answer = cluster.run("n3", "bash", "-c", stranger, RAY_AUTH_MODE="token")
    assert "let in" not in answer and "oken" in answer, answer
    assert job.wait_for_end(600) == ("COMPLETED", 0), job.report()
    say(f"two nodes: first step {first:.0f} s after sbatch, three steps and the end after {job.age:.0f} s")
    assert steps(out) == [1, 2, 3]
    assert (job.logs / "ray-n1").is_dir() and (job.logs / "ray-n2").is_dir()
    cluster.assert_clean()


def test_power_loss(cluster):
    """verl waits for the node for ever; the job does not, and its restart, on other nodes, resumes from the last checkpoint."""
    out = cluster.folder / "power"
    settings = {"STEPS": "6", "SAVE_FREQ": "2", "OUT": str(out), "GRACE": "20"}
    job = Job(cluster, TINY, "--nodes=2", arguments=QUIET, **settings, **SMALL)
    job.wait_for((out / "checkpoints/latest_checkpointed_iteration.txt").exists, 900, "a checkpoint")
    cluster.power_off("n2")
    noticed = job.wait_for_text("ERROR: node n2 is lost: Ray does not hear from it", 240)
    requeued = job.wait_for(lambda: job.info()["JobState"] != "RUNNING", 400, "the requeue")
    restarted = job.wait_for(lambda: job.info()["JobState"] == "RUNNING", 240, "the restart")
    assert "n2" not in job.info()["NodeList"]
    cluster.boot("n2")
    assert job.wait_for_end(900) == ("COMPLETED", 0) and job.restarts() >= 1, job.report()
    say(
        f"power loss: noticed after {noticed:.0f} s, requeued {requeued:.0f} s and started again {restarted:.0f} s later"
    )
    say(f"power loss: completed {job.age:.0f} s after sbatch")
    before, after = steps(out, "metrics.1.jsonl"), steps(out)
    assert before[0] == 1 and after[0] in (3, 5) and after == list(range(after[0], 7)), (
        f"{before}, then {after}: a resume"
    )
    cluster.assert_clean("n1", "n3")  # what n2 had in /tmp lies on its disk
    cluster.run("n2", "bash", "-c", "rm -rf /tmp/*")


# ---------------------------------------------------------------------------------------------------- Slurm and Ray alone


def test_killed_ray(cluster):
    """Also what its processes left in /dev/shm goes; and which variables Ray's workers have."""
    run = (
        ENDS_WHEN_RESTARTED
        + """export AFTER_SBATCH=1
"$PYTHON" - >"$SHARED/environment" 2>"$SHARED/error" <<'END'
import os, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init()
@ray.remote(num_gpus=1)
def look():
    open(f"/dev/shm/psm_of_{os.uname().nodename}", "w").close()
    return sorted(name for name in os.environ if name.endswith(("SBATCH", "VISIBLE_DEVICES")))
for node in ray.nodes():
    print(*ray.get(look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()))
END
"""
        + WAITS
    )
    job = Job(cluster, run, "--nodes=2", BEFORE_SBATCH="1", PORT_BASE="15000")
    job.wait_for_file("running", 400)
    assert (job.shared / "environment").read_text().split("\n")[:2] == ["BEFORE_SBATCH CUDA_VISIBLE_DEVICES"] * 2
    ports = {port for node in ("n1", "n2") for *_, port in listening(cluster, node)}
    assert ports and all(15000 <= port < 16000 for port in ports), "every port of Ray's is in the range"
    assert "/dev/shm/psm_of_n2" in cluster.left_on("n2")
    cluster.run("n2", "bash", "-c", "kill -KILL $(ps -eo pid=,comm= | awk '$2 == \"raylet\" { print $1 }')")
    noticed = job.wait_for_text("ERROR: node n2 is lost: its Ray ended with status", 60)
    ended = job.wait_for(lambda: job.info()["JobState"] != "RUNNING", 120, "the requeue")
    assert "/dev/shm/psm_of_n2" not in cluster.left_on("n2")
    assert job.wait_for_end(600) == ("COMPLETED", 0) and job.restarts() >= 1, job.report()
    say(f"killed Ray: noticed after {noticed:.0f} s, ended and requeued {ended:.0f} s later")
    assert job.output().count("all 2 nodes have joined") == 2
    cluster.assert_clean()


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ('[[ $(hostname) != n2 ]] || exec sleep 1000\nexec "$REAL_RAY" "$@"\n', "gave up on n2: leave them out"),
        ("exit 127\n", "node n1 never joined"),
    ],
    ids=["never joins", "wrong RAY"],
)
def test_node_that_never_joins(cluster, wrapper, message):
    ray = cluster.folder / f"ray-{len(wrapper)}"
    ray.write_text(f"#!/usr/bin/env bash\n{wrapper}")
    ray.chmod(0o755)
    real = str(Path(sys.executable).parent / "ray")
    job = Job(cluster, "true", "--nodes=2", RAY=str(ray), REAL_RAY=real, JOIN_TIMEOUT="120", GRACE="20")
    assert job.wait_for_end(400) == ("FAILED", 71), job.report()
    say(f"{message!r}: ended {job.age:.0f} s after sbatch")
    assert message in job.output()
    cluster.assert_clean()


@pytest.mark.parametrize("options", [(), ("--batch", "--signal=TERM")], ids=["scancel", "scancel --batch"])
def test_scancel(cluster, options):
    """Within KillWait, with the logs saved. With --batch, the script asks the run first and Ray when the run has ended."""
    trap = 'trap \'sleep 3; if (exec 3<>"/dev/tcp/127.0.0.1/$PORT_BASE"); then echo Ray; fi >"$SHARED/ended"; exit 0\' TERM\n'
    job = Job(cluster, trap + WAITS, "--nodes=1")
    job.wait_for_file("running", 400)
    started = time.monotonic()
    job.cancel(*options)
    ended = job.wait_for_end(60)
    job.wait_for(lambda: not cluster.run("ctl", "squeue", "--noheader", "--jobs", job.id), 60, "the job's end")
    took = time.monotonic() - started
    say(f"{' '.join(('scancel', *options))}: ended after {took:.0f} s")
    assert ended == ("FAILED" if options else "CANCELLED", 143), job.report()
    assert took < 30, "KillWait"
    assert "ended from outside" in job.output()
    assert (job.shared / "ended").exists(), "the run was asked and had its time"
    assert not options or (job.shared / "ended").read_text() == "Ray\n"
    assert list(job.logs.glob("ray-n*/raylet.out"))
    cluster.assert_clean()


def test_grace(cluster):
    """A run that does not listen is made to end after GRACE seconds, and its Ray is still asked."""
    job = Job(cluster, "trap '' TERM\n" + WAITS, "--nodes=1", GRACE="15")
    job.wait_for_file("running", 400)
    job.cancel("--batch", "--signal=TERM")
    assert job.wait_for_end(90) == ("FAILED", 143), job.report()
    assert "did not end within GRACE=15 s of SIGTERM: run" in job.output()
    cluster.assert_clean()


def test_time_limit(cluster):
    """Slurm asks up to a minute early, so three minutes with a lead of one leave one or two."""
    asked = "trap 'touch \"$SHARED/asked\"; exit 0' TERM\n"
    options = ("--nodes=1", "--time=3", "--signal=B:USR1@60")
    job = Job(cluster, ENDS_WHEN_RESTARTED + asked + WAITS, *options, SIGNAL_LEAD="60")
    after = job.wait_for_text("the time limit is near; requeueing", 400)
    assert job.wait_for_end(600) == ("COMPLETED", 0) and job.restarts() >= 1, job.report()
    say(f"time limit of 180 s, lead of 60 s: asked {after:.0f} s after sbatch, requeued and completed")
    assert (job.shared / "asked").exists()
    cluster.assert_clean()


def test_time_limit_within_the_lead(cluster):
    job = Job(cluster, "true", "--nodes=1", "--time=4")
    assert job.wait_for_end(60) == ("FAILED", 72), job.report()
    assert "submit with a longer --time" in job.output()


def test_array(cluster):
    """The last task's job number is the array's own; only this task is requeued."""
    run = ENDS_WHEN_RESTARTED + "[[ $SEED == 2 ]] || exit 0\n" + WAITS
    job = Job(cluster, run, "--nodes=1", "--array=1-2")
    assert job.wait_for_end(600, task=1) == ("COMPLETED", 0), job.report(1)
    job.wait_for_file("running", 400)
    node, restarts = job.info(2)["NodeList"], job.restarts(1)
    cluster.run(node, "bash", "-c", "kill -KILL $(ps -eo pid=,comm= | awk '$2 == \"raylet\" { print $1 }')")
    assert job.wait_for_end(600, task=2) == ("COMPLETED", 0) and job.restarts(2) >= 1, job.report(2)
    assert job.info(2)["JobId"] == job.id, "Slurm's naming, which this is about"
    assert job.wait_for_end(1, task=1) == ("COMPLETED", 0) and job.restarts(1) == restarts, job.report(1)
    assert f"requeueing job {job.id}_2" in job.output(2)
    cluster.assert_clean()
