"""Claim: SECURITY.md's promises hold in the source: no code from outside is run, nothing listens beyond the loopback
address.

Read from the syntax trees and scripts, so a promise is broken where it is written, not where it is run. The reward's
hostile answers are in test_math_reward.py, the page's in test_credit.py. The listening sockets of a whole run: marked
slow.
"""

import ast
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("vimpo_verl", "verl_patches", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")) + [ROOT / "setup.py"]
SCRIPTS = sorted(
    path for folder in FOLDERS for suffix in ("sh", "sbatch") for path in (ROOT / folder).rglob(f"*.{suffix}")
)

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
RUNS_SHELL = {"system", "popen", "getoutput", "getstatusoutput"}


def problems(tree: ast.AST) -> list[str]:
    """What a source file must not do, as "line: what"."""
    return [f"{node.lineno}: {what}" for node in ast.walk(tree) for what in _of_node(node)]


def _of_node(node: ast.AST):
    if isinstance(node, ast.Import):
        yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in PICKLES)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
        yield f"imports {node.module}"
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call):
    function = node.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    given = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
    if isinstance(function, ast.Name) and name in RUNS_TEXT:
        yield f"calls {name}"
    if owner in ("os", "subprocess", "commands") and name in RUNS_SHELL or given.get("shell", False) is not False:
        yield f"runs a shell: {owner}.{name}"
    if owner == "torch" and name == "load" and given.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if owner == "yaml" and name in ("load", "unsafe_load", "full_load"):
        yield f"yaml.{name}"
    if given.get("trust_remote_code", False) is not False or given.get("allow_pickle", False) is not False:
        yield "trust_remote_code or allow_pickle"
    if name in ("read_pickle", "to_pickle"):
        yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source(path):
    assert problems(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "eval(answer)", "exec(answer)", "os.system(answer)",
        "subprocess.run(answer, shell=True)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust)", "pandas.read_pickle(path)",
    ],
)  # fmt: skip
def test_what_is_looked_for_is_found(text):
    assert problems(ast.parse(text))


def test_what_is_allowed_is_not_found():
    assert not problems(ast.parse("model.eval(); torch.load(p, weights_only=True); subprocess.run([x]); re.compile(x)"))


def commands(path: Path) -> str:
    """A script without its comments."""
    return re.sub(r"(^|\s)#[^\n]*", r"\1", path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script(path):
    text = commands(path)
    assert not re.search(r"trust[_-]remote[_-]code", text)
    assert "0.0.0.0" not in text and not re.search(r"(^|\s)eval\s", text)
    if "ray start" in text or '"$RAY" start' in text:
        assert "--dashboard-host=127.0.0.1" in text


def test_there_are_sources_and_scripts():
    assert len(SOURCES) > 40 and len(SCRIPTS) >= 6


def environment_of_verl(script: str, tmp_path: Path, **settings: str) -> dict[str, str]:
    """What a script's verl would get: PYTHON is a stub that writes its environment down."""
    stub, seen = tmp_path / "python", tmp_path / "environment"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *main_ppo*) env > {seen} ;; esac\n')
    stub.chmod(0o755)
    for name in ("guru_math", "math500", "aime2024", "aime2025", "olympiadbench"):
        (tmp_path / f"{name}.parquet").touch()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(stub), "OUT": str(tmp_path / "out")}
    env |= {"DATA": str(tmp_path), "RAY_TMPDIR": str(tmp_path), **settings}
    subprocess.run(["bash", str(ROOT / script)], env=env, check=True, capture_output=True, cwd=tmp_path)
    return dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)


LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "VLLM_HOST_IP": "127.0.0.1"}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"PRESET": "1gpu"}, LOOPBACK),
        ({"PRESET": "8gpu"}, LOOPBACK),
        ({"PRESET": "multinode"}, {}),
        ({"PRESET": "1gpu", "RAY_ADDRESS": "10.0.0.1:6379"}, {}),
        ({"PRESET": "1gpu", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}, {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}),
    ],
    ids=["one GPU", "one node", "several nodes", "a Ray that is there", "told otherwise"],
)
def test_the_math_recipe_on_one_node_stays_on_the_loopback_address(tmp_path, settings, expected):
    found = environment_of_verl("examples/math/run_math.sh", tmp_path, **settings)
    assert {name: found[name] for name in LOOPBACK if name in found} == expected


def test_a_ray_that_keeps_off_the_network_is_what_the_variable_makes():
    """Ray's own reading of the variable, which is named after other systems."""
    code = "from ray._private.services import get_node_ip_address as ip; print(ip())"
    env = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split() == [
        "127.0.0.1"
    ]


def listeners(root: psutil.Process) -> Iterator[tuple[str, str]]:
    """(process name, address) of every listening TCP socket below a process."""
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield process.name(), connection.laddr.ip.removeprefix("::ffff:")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_run_listens_on_the_loopback_address_only(tmp_path):
    """But for the store of torch's process group, which always listens on every address."""
    command = [
        "bash",
        str(ROOT / "examples/tiny/run_tiny.sh"),
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
    ]
    env = {**os.environ, "STEPS": "2", "PROMPTS": "8", "RESPONSES": "4", "OUT": str(tmp_path)}
    found: set[tuple[str, str]] = set()
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            found |= set(listeners(psutil.Process(run.pid)))
            time.sleep(1)
    assert run.returncode == 0
    assert {"raylet", "gcs_server"} <= {name for name, _ in found}
    beyond = {name for name, address in found if address not in ("127.0.0.1", "::1")}
    assert all(name.startswith("ray::WorkerDict") for name in beyond), found
