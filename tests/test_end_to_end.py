"""Whole runs: `python -m verl.trainer.main_ppo` with Ray, FSDP and a real vLLM server, on the CPU, by examples/tiny/run_tiny.sh.

Claimed: VIMPO trains through stock verl by the one switch, in one pass; kl is exactly 0 at the first step and positive after; a
run resumes from its checkpoint, the statistics of the batch before with it; two data-parallel ranks work, in two passes; a step
takes the model forwards of GRPO without a reference, in two passes those of GRPO with one;
a GRPO run with the package installed has the metrics of one without, bit for bit, also from a `__main__` runner, with a trainer
derived from the registered one and with a checkpoint callback. Not claimed here: that it learns (three
steps are too few; examples/quickstart.sh shows that) and anything about GPUs.
"""

import json
import math
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PLUGINS = ROOT / "tests/plugins"
RUN_TINY = ROOT / "examples/tiny/run_tiny.sh"
SEQUENCES = 32  # a step
VIMPO_STEPS, GRPO_STEPS = 5, 3
SMALL = {"PROMPTS": "8", "RESPONSES": "4"}
# verl's own runs are not repeatable: which answer draws which random number depends on when it reaches vLLM.
REPRODUCIBLE = {"VERL_USE_EXTERNAL_MODULES": "count_forwards,reproducible_rollout"}
GRPO = ("actor_rollout_ref.actor.use_kl_loss=True",)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

VIMPO_METRICS = {
    "vimpo/kl",
    "vimpo/value_loss",
    "vimpo/actor_loss",
    "vimpo/actor_coeff",
    "vimpo/residual_rms",
    "vimpo/target_rms",
    "vimpo/advantage_std",
    "vimpo/outcome_correlation",
    "vimpo/value_explained_variance",
    "vimpo/beta",
}


class Run:
    """A finished run: its metrics a step, its forwards, its log."""

    def __init__(self, folder: Path):
        self.folder = folder
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.steps: dict[int, dict[str, float]] = {}
        for record in records:
            self.steps.setdefault(record["step"], {}).update(record["data"])
        self.log = (folder / "log.txt").read_text(errors="replace")
        self.forwards = Counter()
        for line in (folder / "forwards.txt").read_text().splitlines():
            model, kind, sequences = line.split()
            self.forwards[model, kind] += int(sequences)


def run_tiny(folder: Path, algo: str, steps: int, *overrides: str, **environment: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forwards.txt").unlink(missing_ok=True)
    env = {
        **os.environ,
        **SMALL,
        "ALGO": algo,
        "STEPS": str(steps),
        "OUT": str(folder),
        "VERL_USE_EXTERNAL_MODULES": "count_forwards",
        "PYTHONPATH": os.pathsep.join((str(PLUGINS), str(ROOT))),
        "COUNT_FORWARDS": str(folder / "forwards.txt"),
        **environment,
    }
    env.pop("TRITON_INTERPRET", None)  # of the kernel's tests
    command = ["bash", str(RUN_TINY), "trainer.val_before_train=False", "trainer.test_freq=-1", *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return Run(folder)


@pytest.fixture(scope="module")
def vimpo_run(tmp_path_factory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("vimpo")
    return folder, run_tiny(folder, "vimpo", VIMPO_STEPS, "trainer.save_freq=3", **REPRODUCIBLE)


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory) -> Run:
    """The package is installed."""
    return run_tiny(tmp_path_factory.mktemp("grpo"), "grpo", GRPO_STEPS, *GRPO, **REPRODUCIBLE)


def test_five_steps_of_vimpo(vimpo_run):
    _, run = vimpo_run
    assert sorted(run.steps) == [1, 2, 3, 4, 5]
    for step in run.steps.values():
        assert step.keys() >= VIMPO_METRICS
        assert all(math.isfinite(value) for name, value in step.items() if name.startswith("vimpo/"))
    assert run.steps[1]["vimpo/kl"] == 0.0
    assert run.steps[2]["vimpo/kl"] > 0.0 and run.steps[3]["vimpo/kl"] > 0.0
    assert run.steps[1]["vimpo/residual_rms"] == run.steps[1]["vimpo/target_rms"] > 0
    assert run.steps[1]["actor/grad_norm"] > 0
    assert len({step["critic/score/mean"] for step in run.steps.values()}) > 1, "the reward moves"


def test_first_step_is_half_the_mean_square_of_the_targets(vimpo_run):
    """All responses are at most 12 tokens, so over-token and over-sequence means agree to within their lengths."""
    _, run = vimpo_run
    first = run.steps[1]
    assert first["vimpo/value_loss"] == pytest.approx(0.5 * first["vimpo/target_rms"] ** 2, rel=0.2)
    assert first["vimpo/actor_coeff"] == 0.0 and first["vimpo/outcome_correlation"] == 0.0
    second, *others = (run.steps[step]["vimpo/actor_coeff"] for step in range(2, VIMPO_STEPS + 1))
    assert second == 0.0 < max(others), "the first batch's policy is the reference: its statistics say nothing"


def test_the_trainer_says_that_vimpo_is_in_force(vimpo_run):
    _, run = vimpo_run
    assert run.log.count("VIMPO in force on verl") == 1
    assert "one pass a step (one update a batch)" in run.log


def test_beta_is_that_of_the_first_batch_at_every_step(vimpo_run):
    _, run = vimpo_run
    (beta,) = {step["vimpo/beta"] for step in run.steps.values()}
    lengths = [step["response_length/mean"] for _, step in sorted(run.steps.items())]
    assert beta == pytest.approx(0.5 / lengths[0], rel=1e-6) and len(set(lengths)) > 1
    assert run.log.count("step 1: algorithm.vimpo.beta=auto is beta=") == 1


def test_resume_goes_on_from_the_checkpoint(vimpo_run):
    """As the uninterrupted run did from there: the reference is again the model that the run started from, beta the number of
    its first batch, and what whitens step 4 and weighs its actor loss the statistics of step 3."""
    folder, uninterrupted = vimpo_run
    kept = json.loads((folder / "checkpoints/global_step_3/vimpo_state.json").read_text())["one_pass"]
    assert kept == {name: uninterrupted.steps[3][f"vimpo/{name}"] for name in kept} and len(kept) == 4
    checkpoint = f"trainer.resume_from_path={folder}/checkpoints/global_step_3"
    resumed = run_tiny(folder, "vimpo", VIMPO_STEPS, "trainer.resume_mode=resume_path", checkpoint, **REPRODUCIBLE)
    assert sorted(resumed.steps) == [4, 5]
    for step in (4, 5):
        expected = _results(uninterrupted.steps[step])
        assert expected.keys() >= VIMPO_METRICS and _results(resumed.steps[step]) == expected
    assert "has no statistics of its last batch" not in resumed.log
    assert "beta=auto is beta=" not in resumed.log and f"as in the checkpoint {checkpoint.split('=')[1]}" in resumed.log


@pytest.mark.slow  # the default, one pass, is the next
def test_two_data_parallel_ranks_in_two_passes(tmp_path, grpo_run):
    """Besides generation, a step is the forwards of GRPO with a reference."""
    run = run_tiny(tmp_path, "vimpo", GRPO_STEPS, "+algorithm.vimpo.passes=two", RANKS="2")
    assert "two passes a step (algorithm.vimpo.passes=two)" in run.log
    once = GRPO_STEPS * SEQUENCES
    assert run.forwards == {("policy", "infer"): once, ("reference", "infer"): once, ("policy", "train"): once}
    assert run.forwards == grpo_run.forwards
    require_the_start_of_a_run(run)
    assert run.steps[1]["vimpo/actor_coeff"] == 0.0


def require_the_start_of_a_run(run: Run) -> None:
    """Every metric, and the first step's at the reference."""
    for step in run.steps.values():
        assert step.keys() >= VIMPO_METRICS | {"actor/entropy", "critic/advantages/mean"}
        assert all(math.isfinite(value) for name, value in step.items() if name.startswith("vimpo/"))
    assert run.steps[1]["vimpo/residual_rms"] == run.steps[1]["vimpo/target_rms"] > 0
    assert run.steps[1]["vimpo/kl"] == 0.0 < run.steps[2]["vimpo/kl"]
    assert run.steps[1]["vimpo/value_loss"] == pytest.approx(0.5 * run.steps[1]["vimpo/target_rms"] ** 2, rel=0.2)


def test_two_data_parallel_ranks_in_one_pass(tmp_path):
    """The default: the statistics that whiten a batch and weigh its actor loss are of both ranks."""
    run = run_tiny(tmp_path, "vimpo", GRPO_STEPS, RANKS="2")
    assert "one pass a step (one update a batch)" in run.log
    once = GRPO_STEPS * SEQUENCES
    assert run.forwards == {("reference", "infer"): once, ("policy", "train"): once}
    require_the_start_of_a_run(run)
    assert run.steps[1]["vimpo/actor_coeff"] == run.steps[2]["vimpo/actor_coeff"] == 0.0
    # What verl logs of the advantages that were trained on is the batch's own, whitened with the batch before.
    before, third = run.steps[2], run.steps[3]
    whitened = (third["vimpo/advantage_mean"] - before["vimpo/advantage_mean"]) / before["vimpo/advantage_std"]
    assert third["critic/advantages/mean"] == pytest.approx(whitened, rel=1e-3)


def test_step_takes_the_forwards_of_grpo_without_a_reference(vimpo_run):
    """Besides generation: one of the reference in the place of GRPO's old log-probs, and one of the policy, in the update."""
    _, run = vimpo_run
    once = VIMPO_STEPS * SEQUENCES
    assert run.forwards == {("reference", "infer"): once, ("policy", "train"): once}


@pytest.fixture(scope="module")
def grpo_without(tmp_path_factory) -> Run:
    """The plugin is not loaded. Saves a checkpoint of its last step, for others to be compared with."""
    folder, save = tmp_path_factory.mktemp("without"), f"trainer.save_freq={GRPO_STEPS}"
    run = run_tiny(folder, "grpo", GRPO_STEPS, *GRPO, save, **REPRODUCIBLE, VERL_USE_EXTERNAL_PLUGINS="vimpo_cpu")
    assert not re.search(r"vimpo_verl( \d|: )", run.log) and sorted(run.steps) == [1, 2, 3]
    assert all(step["actor/grad_norm"] > 0 and len(_results(step)) > 50 for step in run.steps.values())
    return run


def test_grpo_is_untouched_by_the_package(grpo_run, grpo_without):
    assert "loaded, inert" in grpo_run.log
    for step, expected in grpo_without.steps.items():
        assert _results(grpo_run.steps[step]) == _results(expected)


@pytest.fixture
def users_program(tmp_path) -> str:
    """A python that runs tests/plugins/users_run.py where examples/tiny/run_tiny.sh wants verl.trainer.main_ppo."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {ROOT}/.venv/bin/python "${{@/#verl.trainer.main_ppo/users_run}}"\n')
    python.chmod(0o755)
    return str(python)


CALLBACK = "trainer.checkpoint_callback_class=users_run.UsersCallback"


def _weights(folder) -> dict[str, torch.Tensor]:
    """Of a checkpoint of one rank. Not its bytes: pickle numbers strings by their identity, which changes from run to run."""
    (shard,) = (folder / "actor").glob("model_world_size_1_rank_0.pt")
    weights = torch.load(shard, weights_only=False)
    return {name: weight.to_local() if hasattr(weight, "to_local") else weight for name, weight in weights.items()}


@pytest.mark.slow
def test_grpo_of_a_users_own_program_is_untouched_by_the_package(grpo_without, users_program, tmp_path):
    """A runner in __main__, a trainer derived from the registered one, a checkpoint callback: all three in one run."""
    overrides = (*GRPO, CALLBACK, f"trainer.save_freq={GRPO_STEPS}")
    run = run_tiny(tmp_path / "run", "grpo", GRPO_STEPS, *overrides, **REPRODUCIBLE, PYTHON=users_program)
    assert "loaded, inert" in run.log and "UsersTaskRunner" in run.log
    for step, expected in grpo_without.steps.items():
        assert _results(run.steps[step]) == {**_results(expected), "users/steps_seen": step}
    last = f"checkpoints/global_step_{GRPO_STEPS}"
    (called,) = [json.loads(line) for line in (run.folder / "checkpoints/callback.jsonl").read_text().splitlines()]
    assert called["step"] == called["steps_seen"] == GRPO_STEPS
    assert called["files"] == _files(run.folder / last) == _files(grpo_without.folder / last)
    found, expected = _weights(run.folder / last), _weights(grpo_without.folder / last)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.slow
def test_vimpo_in_a_users_own_program(users_program, tmp_path):
    run = run_tiny(tmp_path / "run", "vimpo", 2, CALLBACK, "trainer.save_freq=2", PYTHON=users_program)
    assert run.log.count("VIMPO in force on verl") == 1 and "in VimpoUsersTrainer" in run.log
    assert run.steps[1]["vimpo/kl"] == 0.0 < run.steps[2]["vimpo/kl"]
    assert [run.steps[step]["users/steps_seen"] for step in (1, 2)] == [1, 2]
    assert (run.folder / "checkpoints/callback.jsonl").exists()


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _results(metrics: dict[str, float]) -> dict[str, float]:
    """What training computed; times and memory differ from run to run."""
    return {name: value for name, value in metrics.items() if not name.startswith(("timing", "perf", "actor/perf"))}
