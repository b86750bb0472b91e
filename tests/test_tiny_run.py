"""Claim: examples/tiny/run_tiny.sh is one script for both algorithms, whose configurations differ in the algorithm keys only."""

import os
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

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
    assert done.returncode == 2 and "ALGO must be vimpo or grpo, not 'ppo'" in done.stderr
