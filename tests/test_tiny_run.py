"""Claim: examples/tiny/run_tiny.sh is one script for both algorithms, whose configurations differ in the algorithm keys only.

Its report says no more than there is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from verl_patches import recipe_checks
from vimpo_verl.config import parse_config

ROOT = Path(__file__).parent.parent
RUN_TINY = ROOT / "examples/tiny/run_tiny.sh"


@pytest.fixture
def python_stub(tmp_path) -> Path:
    """Stands for .venv/bin/python and writes down the Hydra overrides that verl would get."""
    stub = tmp_path / "python"
    stub.write_text(
        "#!/usr/bin/env bash\n"
        'while (($#)); do [[ $1 == verl.trainer.main_ppo ]] && { shift; printf "%s\\n" "$@" > "$OUT/overrides"; }; shift; done\n'
        "exit 0\n"
    )
    stub.chmod(0o755)
    return stub


def overrides(stub: Path, out: Path, *more: str, **environment: str) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHON": str(stub), "OUT": str(out), "DEVICE": "cpu", **environment}
    subprocess.run(["bash", str(RUN_TINY), *more], env=env, check=True, capture_output=True)
    return (out / "overrides").read_text().splitlines()


def resolved(given: list[str]) -> dict[str, object]:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[o for o in given if not o.startswith(("hydra.", "+ray_kwargs"))])
    flat: dict[str, object] = {}

    def walk(node, prefix):
        for key, value in node.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else flat.update({f"{prefix}{key}": value})

    walk(OmegaConf.to_container(config, resolve=True), "")
    return flat


def test_algorithms_differ_in_algorithm_keys_only(python_stub, tmp_path):
    grpo, vimpo = (resolved(overrides(python_stub, tmp_path / "run", ALGO=algo)) for algo in ("grpo", "vimpo"))
    different = {key for key in grpo.keys() | vimpo.keys() if grpo.get(key) != vimpo.get(key)}
    assert different == {"algorithm.adv_estimator"}
    assert vimpo["algorithm.adv_estimator"] == "vimpo" and grpo["algorithm.adv_estimator"] == "grpo"


def test_overrides_after_the_name_win(python_stub, tmp_path):
    given = overrides(python_stub, tmp_path / "run", "algorithm.lam=0.5", "+algorithm.vimpo.beta=1e-3", ALGO="vimpo")
    config = resolved(given)
    assert config["algorithm.lam"] == 0.5 and float(config["algorithm.vimpo.beta"]) == 1e-3


@pytest.mark.parametrize("prompts, micro_batch", [("32", 64), ("8", 32)])
def test_micro_batch_divides_a_small_batch(python_stub, tmp_path, prompts, micro_batch):
    config = resolved(overrides(python_stub, tmp_path / "run", ALGO="grpo", PROMPTS=prompts, RESPONSES="4"))
    expected = min(micro_batch, int(prompts) * 4)
    assert config["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"] == expected


def test_an_unknown_algorithm_is_refused():
    done = subprocess.run(["bash", str(RUN_TINY)], env={**os.environ, "ALGO": "ppo"}, capture_output=True, text=True)
    assert done.returncode == 2 and "ALGO must be grpo, vimpo, pacs or v05, not 'ppo'" in done.stderr


def test_an_unknown_preset_is_refused():
    env = {**os.environ, "ALGO": "vimpo", "PRESET": "paper"}
    done = subprocess.run(["bash", str(RUN_TINY)], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "PRESET must be empty or reuse, not 'paper'" in done.stderr


UPDATES = {  # verl's keys that decide how often, and how far, a batch moves the policy
    "mini-batch": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "epochs": "actor_rollout_ref.actor.ppo_epochs",
    "rate": "actor_rollout_ref.actor.optim.lr",
}


@pytest.mark.parametrize("algo", ["grpo", "vimpo", "pacs", "v05"])
def test_reuse_is_four_updates_on_each_whole_batch_at_a_lower_rate(python_stub, tmp_path, algo):
    """And nothing else, but for VIMPO's form of the loss; the driver's checks take it."""
    once, reuse = (
        resolved(overrides(python_stub, tmp_path / "run", ALGO=algo, PRESET=preset)) for preset in ("", "reuse")
    )
    assert {name: reuse[key] for name, key in UPDATES.items()} == {"mini-batch": 32, "epochs": 4, "rate": 3e-4}
    mini_batch = 16 if algo == "pacs" else 32  # with one update PACS is RLOO
    assert {name: once[key] for name, key in UPDATES.items()} == {"mini-batch": mini_batch, "epochs": 1, "rate": 1e-3}
    different = {key for key in once.keys() | reuse.keys() if once.get(key) != reuse.get(key)} - {*UPDATES.values()}
    different = {key for key in different if not key.startswith("critic.")}  # which follows the actor, and is not there
    assert different == ({"algorithm.vimpo.use_actor"} if algo == "vimpo" else set())


def test_reuse_is_accepted_and_is_the_clipped_value_loss_alone(python_stub, tmp_path):
    given = overrides(python_stub, tmp_path / "run", ALGO="vimpo", PRESET="reuse")
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[o for o in given if not o.startswith(("hydra.", "+ray_kwargs"))])
    assert recipe_checks.problems(config) == []
    knobs, problems = parse_config(OmegaConf.to_container(config.algorithm.vimpo))
    assert problems == [] and not knobs.use_actor
    assert (knobs.beta, knobs.beta_scale, knobs.value_clip, knobs.kappa_policy) == ("auto", 0.5, 0.2, "old")


def test_variables_win_over_reuse(python_stub, tmp_path):
    settings = {"ALGO": "grpo", "PRESET": "reuse", "LR": "7e-4", "PPO_EPOCHS": "2", "UPDATES": "2"}
    config = resolved(overrides(python_stub, tmp_path / "run", **settings))
    assert {name: config[key] for name, key in UPDATES.items()} == {"mini-batch": 16, "epochs": 2, "rate": 7e-4}


JOINED = {"ALGO": "vimpo", "RAY_ADDRESS": "10.0.0.1:11000", "NNODES": "2", "GPUS": "4"}


def test_it_joins_the_cluster_of_a_slurm_job(python_stub, tmp_path):
    """With all of the job's nodes; nothing that ray.init refuses when it connects to a cluster that is there."""
    given = overrides(python_stub, tmp_path / "run", **JOINED)
    config = resolved(given)
    assert config["trainer.nnodes"] == 2 and config["trainer.n_gpus_per_node"] == 4
    assert config["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"] == 32 * 8 // 8
    assert config["trainer.resume_mode"] == "auto" and config["trainer.save_freq"] == 10
    ray_init = [option for option in given if "ray_init." in option]
    assert ray_init and all(option.startswith("+ray_kwargs.ray_init.runtime_env.env_vars.") for option in ray_init)


def test_rays_processes_get_the_environment_of_a_run_that_joins(python_stub, tmp_path):
    """As strings, as Ray asks for. They were started before, so what the run exports does not reach them."""
    given = overrides(python_stub, tmp_path / "run", **JOINED)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[o for o in given if not o.startswith("hydra.")])
    variables = OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env.env_vars)
    assert all(isinstance(value, str) for value in variables.values())
    assert variables["VERL_FILE_LOGGER_PATH"] == str(tmp_path / "run/metrics.jsonl")
    assert variables["VERL_PLATFORM"] == "cpu" and variables["TORCHDYNAMO_DISABLE"] == "1"
    assert not {"VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"} & variables.keys(), (
        "several nodes do not meet on a loopback address"
    )


def test_metrics_of_earlier_starts_are_kept(python_stub, tmp_path):
    for start in (1, 2):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/metrics.jsonl").write_text(f"start {start}\n")
        overrides(python_stub, tmp_path / "run", **JOINED)
    assert [(tmp_path / f"run/metrics.{start}.jsonl").read_text() for start in (1, 2)] == ["start 1\n", "start 2\n"]


@pytest.mark.parametrize("variables", [{}, {"RAY_ADDRESS": "10.0.0.1:11000"}, {"NNODES": "2"}])
def test_otherwise_it_has_its_own_ray(python_stub, tmp_path, variables):
    given = overrides(python_stub, tmp_path / "run", ALGO="vimpo", **variables)
    assert "+ray_kwargs.ray_init.address=local" in given
    config = resolved(given)
    assert config["trainer.nnodes"] == 1 and config["trainer.n_gpus_per_node"] == 1
    assert config["trainer.resume_mode"] == "disable" and config["trainer.save_freq"] == -1


@pytest.mark.parametrize(
    "steps, said", [(9, "9 steps are too few to show learning"), (10, "One seed a side is no comparison")]
)
def test_the_report_does_not_say_more_than_there_is(tmp_path, steps, said):
    lines = [{"step": step, "data": {"critic/score/mean": step / 100, "timing_s/step": 1.0}} for step in range(steps)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, ROOT / "examples/tiny/report.py", "--runs", f"grpo={tmp_path}", f"vimpo={tmp_path}"]
    done = subprocess.run([*command, "--png", tmp_path / "curves.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and (tmp_path / "curves.png").stat().st_size > 0
