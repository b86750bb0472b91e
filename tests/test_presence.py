"""Claim: a process of the run whose environment lacks this package is named at its start, with what to do, before any rollout.

On a real Ray whose workers are started by another Python, of an environment with verl and without vimpo_verl, as where `uv run`
starts them in a project that does not have it. And where the trainer's node has the package and another node has not: the trainer
asks before it makes workers.
"""

import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_validation import validate, vimpo

from verl_patches.presence import RESOLVER

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def other_python(tmp_path_factory) -> str:
    """A Python that sees the packages of this one, but not vimpo_verl, which a clone's environment has by a .pth file."""
    folder = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "the_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin/python")
    found = run(
        python, "import importlib.util as u; print(u.find_spec('verl') is None, u.find_spec('vimpo_verl') is None)"
    )
    if found.split() != ["False", "True"]:
        pytest.skip(f"this environment has vimpo_verl in its site-packages: {found}")
    return python


def run(python: str, code: str, *arguments: str) -> str:
    """What a Python says, run outside the clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(sys.prefix), env=env)
    return done.stdout + done.stderr


def test_the_configuration_says_so_where_the_plugin_is_not_loaded(other_python, tmp_path):
    """verl's task runner resolves it in its first lines: before that the plugin is not asked for anything."""
    config = vimpo()
    validate(config)
    OmegaConf.save(config, tmp_path / "config.yaml")
    code = """
        import sys
        import verl
        from omegaconf import OmegaConf
        print(OmegaConf.to_container(OmegaConf.load(sys.argv[1]), resolve=True)["algorithm"]["adv_estimator"], "resolved")
    """
    said = run(other_python, code, str(tmp_path / "config.yaml"))
    assert f"Unsupported interpolation type {RESOLVER}" in said and "policy_loss._target_" in said, said[-2000:]
    assert "vimpo resolved" in run(sys.executable, code, str(tmp_path / "config.yaml"))


def test_resolved_it_is_the_class_that_carries_the_knobs():
    config = vimpo()
    validate(config)
    resolved = OmegaConf.to_container(config, resolve=True)["actor_rollout_ref"]["actor"]["policy_loss"]
    assert resolved["_target_"] == "verl_patches.policy_loss_config.VimpoPolicyLossConfig"


@pytest.mark.parametrize("lacking", [True, False])
def test_the_trainer_names_nodes_whose_workers_lack_the_package(other_python, lacking):
    code = """
        import sys
        import ray
        from verl_patches.presence import require_on_every_node
        ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, object_store_memory=10**8,
                 runtime_env={"py_executable": sys.argv[1]})
        require_on_every_node()
        print("every node has it")
    """
    said = run(sys.executable, code, other_python if lacking else sys.executable)
    assert ("every node has it" in said) != lacking, said[-3000:]
    if lacking:
        assert "no vimpo_verl" in said and "Install it there" in said and "vimpo check" in said, said[-3000:]
