"""examples/math/run_math.sh: what it hands to verl, by verl's own Hydra configuration and validate_config.

Claimed: for every preset the two algorithms differ in keys under `algorithm.` only and hold the paper's recipe; verl
and vimpo_verl accept them, or refuse with what verl_patches.recipe_checks says; variables and trailing overrides
win; settings that cannot be are refused by name, all at once, in a dry run and before a run; nothing starts in a dry
run; a resumed run keeps the metrics of the earlier one. Not claimed: that a preset's memory settings fit a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/math/run_math.sh"
PRESETS = ("1gpu", "8gpu", "multinode", "lora")
ALGORITHMS = ("vimpo", "grpo")

_spec = importlib.util.spec_from_file_location("show_config", ROOT / "examples/math/show_config.py")
show_config = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(show_config)

PAPER = {
    "data.train_batch_size": 96,
    "data.max_prompt_length": 2048,
    "data.max_response_length": 4096,
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 96,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "algorithm.use_kl_in_reward": False,
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
}


@pytest.fixture
def python_stub(tmp_path):
    """Stands for the Python interpreter: writes its arguments, one a line, and starts nothing."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$STUB_OUTPUT"\n')
    stub.chmod(0o755)
    return stub


def run(
    stub: Path, *overrides: str, check: bool = True, **settings: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script's end and the arguments that the interpreter got."""
    output = stub.parent / "arguments"
    output.unlink(missing_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(stub.parent), "PYTHON": str(stub), "STUB_OUTPUT": str(output)}
    done = subprocess.run(
        ["bash", str(SCRIPT), *overrides], env={**env, **settings}, capture_output=True, text=True, cwd=stub.parent
    )
    assert not check or done.returncode == 0, done.stderr
    return done, output.read_text().splitlines() if output.exists() else []


def config_of(stub: Path, *overrides: str, **settings: str):
    _, arguments = run(stub, *overrides, DRY_RUN="1", NAME="twin", **settings)
    assert Path(arguments[0]).name == "show_config.py"
    return show_config.resolved_config(arguments[1:])


def flat(config) -> dict[str, object]:
    """Every key of a resolved configuration, by its dotted name."""

    def walk(node, prefix):
        if isinstance(node, dict) and node:
            for name, child in node.items():
                yield from walk(child, f"{prefix}.{name}" if prefix else str(name))
        else:
            yield prefix, node

    return dict(walk(OmegaConf.to_container(config, resolve=True), ""))


@pytest.mark.parametrize("noise", ("0", "0.2"))
@pytest.mark.parametrize("preset", PRESETS)
def test_algorithms_differ_in_algorithm_keys_only(python_stub, preset, noise):
    vimpo, grpo = (flat(config_of(python_stub, ALGO=algo, PRESET=preset, REWARD_NOISE=noise)) for algo in ALGORITHMS)
    different = {key for key in vimpo.keys() | grpo.keys() if vimpo.get(key) != grpo.get(key)}
    knobs = {f"algorithm.vimpo.{knob}" for knob in ("beta", "actor_coeff", "actor_trust")}
    assert different == {"algorithm.adv_estimator"} | knobs
    assert (
        vimpo.get("algorithm.reward_noise.flip_prob", 0)
        == grpo.get("algorithm.reward_noise.flip_prob", 0)
        == float(noise)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_recipe_is_the_papers(python_stub, preset):
    from vimpo_verl.config import PAPER_RECIPE

    config = config_of(python_stub, ALGO="vimpo", PRESET=preset)
    keys = flat(config)
    assert {key: keys[key] for key in PAPER} == PAPER
    assert keys["actor_rollout_ref.actor.optim.lr"] == (1e-5 if preset == "lora" else 1e-6)
    assert OmegaConf.to_container(config.algorithm.vimpo) == PAPER_RECIPE


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_verl_accepts_every_preset(python_stub, preset, algo):
    import verl.trainer.main_ppo  # noqa: F401  loads the plugin and what it wraps

    from verl_patches import recipe_checks

    config = config_of(python_stub, ALGO=algo, PRESET=preset)
    problems = recipe_checks.problems(config) if algo == "vimpo" else []
    if preset != "lora":
        assert problems == []
    if problems:
        with pytest.raises(ValueError) as refusal:
            show_config.check(config)
        assert all(problem in str(refusal.value) for problem in problems)
    else:
        show_config.check(config)


def test_presets_are_what_they_are_called(python_stub):
    sizes = {preset: config_of(python_stub, PRESET=preset) for preset in PRESETS}
    machines = {name: (config.trainer.nnodes, config.trainer.n_gpus_per_node) for name, config in sizes.items()}
    assert machines == {"1gpu": (1, 1), "8gpu": (1, 8), "multinode": (2, 8), "lora": (1, 1)}
    ranks = {name: config.actor_rollout_ref.model.lora_rank for name, config in sizes.items()}
    assert ranks == {"1gpu": 0, "8gpu": 0, "multinode": 0, "lora": 32}


REUSE = {
    "actor_rollout_ref.actor.ppo_mini_batch_size": 96,  # the whole batch
    "actor_rollout_ref.actor.ppo_epochs": 4,
    "actor_rollout_ref.actor.optim.lr": 3e-7,
}


@pytest.mark.parametrize("preset", ["8gpu", "lora"])
@pytest.mark.parametrize("algo", [*ALGORITHMS, "pacs", "v05"])
def test_reuse_changes_updates_and_rate_of_a_preset(python_stub, preset, algo):
    """And for VIMPO the form of the loss: this package's defaults, the value loss alone."""
    from vimpo_verl.config import PAPER_RECIPE

    once, reuse = (flat(config_of(python_stub, ALGO=algo, PRESET=name)) for name in (preset, f"{preset} reuse"))
    wanted = REUSE | ({"actor_rollout_ref.actor.optim.lr": 3e-6} if preset == "lora" else {})
    assert {key: reuse[key] for key in REUSE} == wanted
    absent = object()
    different = {key for key in once.keys() | reuse.keys() if once.get(key, absent) != reuse.get(key, absent)}
    different = {key for key in different if not key.startswith("critic.")}  # which follows the actor, and is not there
    knobs = {f"algorithm.vimpo.{knob}" for knob in (*PAPER_RECIPE, "use_actor")} if algo == "vimpo" else set()
    assert different - {*REUSE} == knobs
    assert {key: reuse[key] for key in knobs if key in reuse} == ({"algorithm.vimpo.use_actor": False} if knobs else {})


def test_reuse_is_accepted_alone_or_beside_a_machine(python_stub):
    """Alone it is 8gpu's; a run with it has a folder of its own; PPO_EPOCHS and LR win."""
    import verl.trainer.main_ppo  # noqa: F401  loads the plugin and what it wraps

    from verl_patches import recipe_checks

    alone, beside = (config_of(python_stub, ALGO="vimpo", PRESET=preset) for preset in ("reuse", "reuse 8gpu"))
    assert flat(alone) == flat(beside) and recipe_checks.problems(alone) == []
    show_config.check(alone)
    _, arguments = run(python_stub, DRY_RUN="1", PRESET="reuse")
    assert any("/vimpo-Qwen3-4B-Base-8gpu-reuse-seed1/" in argument for argument in arguments)
    given = flat(config_of(python_stub, PRESET="reuse", PPO_EPOCHS="2", LR="5e-7"))
    assert [given[key] for key in REUSE] == [96, 2, 5e-7]


def test_variables_win_over_presets_and_overrides_over_both(python_stub):
    config = config_of(
        python_stub, "data.train_batch_size=48", PRESET="1gpu", MODEL="some/model", GPUS="2", PROMPTS="64"
    )
    assert config.actor_rollout_ref.model.path == "some/model"
    assert config.trainer.n_gpus_per_node == 2
    assert (config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size) == (48, 64)


def test_paths_are_absolute(python_stub):
    config = config_of(python_stub, DATA="somewhere", OUT="results", VAL_SETS="a b")
    here = python_stub.parent
    assert list(config.data.val_files) == [f"{here}/somewhere/a.parquet", f"{here}/somewhere/b.parquet"]
    assert config.trainer.default_local_dir == f"{here}/results/checkpoints"
    env_vars = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert f"{here}/results/metrics.jsonl" == env_vars.VERL_FILE_LOGGER_PATH
    assert config.reward.custom_reward_function.path == "pkg://vimpo_verl.rewards.math"


def test_runs_of_different_settings_have_different_folders(python_stub):
    def folder(**settings):
        _, arguments = run(python_stub, DRY_RUN="1", **settings)
        return next(argument for argument in arguments if argument.startswith("trainer.default_local_dir="))

    variants = [{}, {"ALGO": "grpo"}, {"PRESET": "1gpu"}, {"SEED": "2"}, {"REWARD_NOISE": "0.2"}, {"MODEL": "a/b"}]
    assert len({folder(**settings) for settings in variants}) == len(variants)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ALGO": "ppo"}, "ALGO must be grpo, vimpo, pacs or v05, not 'ppo'"),
        ({"PRESET": "16gpu"}, "PRESET must be 1gpu, 8gpu, multinode or lora, with reuse or without, not '16gpu'"),
        (
            {"PRESET": "1gpu 8gpu"},
            "PRESET must be 1gpu, 8gpu, multinode or lora, with reuse or without, not '1gpu 8gpu'",
        ),
        ({"PRESET": "1gpu", "RESPONSE_LENGTH": "8192"}, "MAX_TOKENS=8192 cannot hold one sequence"),
        ({}, "data/guru_math.parquet: make it with examples/math/prepare_data.py"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(python_stub, settings, message):
    done, arguments = run(python_stub, check=False, DATA="data", OUT="out", **settings)
    assert done.returncode == 2 and arguments == []
    assert message in done.stderr
    assert not (python_stub.parent / "out").exists()


WHOLE_NUMBERS = ["PROMPTS", "PPO_EPOCHS", "RESPONSES", "PROMPT_LENGTH", "RESPONSE_LENGTH", "EPOCHS"]
WHOLE_NUMBERS += ["VAL_RESPONSES", "NNODES", "GPUS", "MAX_TOKENS", "ROLLOUT_TP"]
IMPOSSIBLE = [
    ("LR", "abc", "LR must be a number above 0, not 'abc'"),
    ("LR", "0.0e-5", "LR must be a number above 0, not '0.0e-5'"),
    ("LR", "-1e-6", "LR must be a number above 0, not '-1e-6'"),
    ("SEED", "one", "SEED must be a whole number, not 'one'"),
    ("SEED", "-1", "SEED must be a whole number, not '-1'"),
    ("STEPS", "0", "STEPS must be a whole number above 0, or null, not '0'"),
    ("STEPS", "1e3", "STEPS must be a whole number above 0, or null, not '1e3'"),
    ("KEEP", "0", "KEEP must be a whole number above 0, or null, not '0'"),
    ("TEST_FREQ", "0", "TEST_FREQ must be a whole number above 0, or -1 for never, not '0'"),
    ("SAVE_FREQ", "often", "SAVE_FREQ must be a whole number above 0, or -1 for never, not 'often'"),
    ("LORA_RANK", "x", "LORA_RANK must be a whole number, not 'x'"),
    ("GPU_MEMORY", "0", "GPU_MEMORY must be a number above 0, not '0'"),
    ("GPU_MEMORY", "1.5", "GPU_MEMORY must be at most 1, not '1.5'"),
    ("REWARD_NOISE", "20%", "REWARD_NOISE must be a probability, not '20%'"),
    ("REWARD_NOISE", "20", "REWARD_NOISE must be at most 1, not '20'"),
    ("OFFLOAD", "yes", "OFFLOAD must be True or False, not 'yes'"),
    ("DRY_RUN", "true", "DRY_RUN must be 0 or 1, not 'true'"),
    ("PROMPTS", "97", "PROMPTS * RESPONSES / UPDATES = 194 must be a multiple of the GPUs, NNODES * GPUS = 8"),
    ("ROLLOUT_TP", "3", "ROLLOUT_TP=3 must divide the GPUs, NNODES * GPUS = 8"),
    *(
        (name, value, f"{name} must be a whole number above 0, not '{value}'")
        for name in WHOLE_NUMBERS
        for value in ("0", "many")
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), IMPOSSIBLE)
def test_impossible_setting_is_refused_by_name_in_a_dry_run(python_stub, name, value, message):
    settings = {"DRY_RUN": "1", "RESPONSES": "2", name: value}
    done, arguments = run(python_stub, check=False, **settings)
    assert (done.returncode, arguments, done.stdout) == (2, [], "")
    assert done.stderr.splitlines() == [f"run_math.sh: {message}"]


def test_adapters_without_a_rank_are_refused(python_stub):
    done, _ = run(python_stub, check=False, DRY_RUN="1", PRESET="lora", LORA_RANK="0")
    assert done.returncode == 2 and "LORA_RANK must be above 0 with PRESET=lora" in done.stderr


@pytest.mark.parametrize("dry_run", ("0", "1"))
def test_all_that_is_wrong_is_named_at_once(python_stub, dry_run):
    wrong = {"ALGO": "ppo", "PRESET": "16gpu", "LR": "x", "GPUS": "0", "STEPS": "-3", "MAX_TOKENS": "100"}
    done, arguments = run(python_stub, check=False, DRY_RUN=dry_run, OUT="out", DATA="data", **wrong)
    assert done.returncode == 2 and arguments == [] and not (python_stub.parent / "out").exists()
    assert all(f"{name} must be" in done.stderr for name in wrong if name != "MAX_TOKENS")
    assert "MAX_TOKENS=100 cannot hold one sequence" in done.stderr
    assert done.stderr.count("make it with examples/math/prepare_data.py") == (5 if dry_run == "0" else 0)


@pytest.mark.parametrize(
    "settings", [{"LR": ".5"}, {"LR": "1E-5"}, {"LR": "3."}, {"STEPS": "7"}, {"SEED": "0"}, {"TEST_FREQ": "-1"}]
)
def test_possible_settings_are_taken_as_they_are(python_stub, settings):
    keys = {"LR": "actor_rollout_ref.actor.optim.lr", "STEPS": "trainer.total_training_steps"}
    keys |= {"SEED": "data.seed", "TEST_FREQ": "trainer.test_freq"}
    (name, value), config = next(iter(settings.items())), flat(config_of(python_stub, **settings))
    assert config[keys[name]] == float(value) and isinstance(config[keys[name]], float if name == "LR" else int)


def test_resumed_run_keeps_the_metrics_of_the_earlier_ones(python_stub):
    here = python_stub.parent
    (here / "data").mkdir()
    for name in ("train", "val"):
        (here / "data" / f"{name}.parquet").touch()
    settings = {"DATA": "data", "OUT": "out", "TRAIN_SET": "train", "VAL_SETS": "val"}
    for attempt in ("first\n", "second\n", "third\n"):
        _, arguments = run(python_stub, **settings)
        assert arguments[:2] == ["-m", "verl.trainer.main_ppo"]
        (here / "out/metrics.jsonl").write_text(attempt)
    kept = {path.name: path.read_text() for path in (here / "out").glob("metrics*.jsonl")}
    assert kept == {"metrics.1.jsonl": "first\n", "metrics.2.jsonl": "second\n", "metrics.jsonl": "third\n"}


@pytest.mark.timeout(300)
def test_dry_run_prints_the_configuration_and_starts_nothing(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", "OUT": str(tmp_path / "out"), "PRESET": "1gpu"}
    done = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["algorithm"]["adv_estimator"] == "vimpo"
    assert "VIMPO accepted with this configuration" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(300)
def test_dry_run_refuses_what_the_run_would_refuse(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", "OUT": str(tmp_path / "out"), "PRESET": "1gpu"}
    command = ["bash", str(SCRIPT), "algorithm.gamma=0.9", "+algorithm.vimpo.betta=1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "algorithm.gamma=0.9" in done.stderr and "did you mean algorithm.vimpo.beta?" in done.stderr
