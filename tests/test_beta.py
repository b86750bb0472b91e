"""Claim: `beta: auto` is one number for the whole run: of the first batch, by the formula, in every update and every checkpoint.

The formula in its plainest form, degenerate batches included; 0/1 rewards give the same number however rare successes are.
With verl's trainer and worker in one process: every update uses the number, in each setting that meets it; a resumed run
goes on with the checkpoint's, bit for bit. A whole run, killed and resumed, is in test_resume.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace

import engine_formula
import hypothesis.strategies as st
import pytest
import torch
from engine_samples import make_samples
from hypothesis import given
from in_process import make_config, make_trainer, run_trainer_step

from verl_patches import checkpoints
from verl_patches.checkpoints import RECORD, fault
from verl_patches.run_beta import RunBeta
from vimpo_verl import beta as betas
from vimpo_verl.batch import compute_batch
from vimpo_verl.beta import STATE, Beta, auto_beta, beta_fit
from vimpo_verl.config import VimpoConfig

# ---- the formula ----


def test_the_formula():
    """0.5 * range / mean length; the range is the largest inside a group, and the groups' offsets do not matter."""
    lengths, outcomes, groups = [10, 20, 0, 30], [5.0, 5.5, -7.0, -4.0], ["a", "a", "b", "b"]
    found = auto_beta(lengths, outcomes, groups, beta_scale=0.5)
    assert found == Beta(value=0.5 * 3.0 / 15.0, beta_scale=0.5, mean_length=15.0, reward_range=3.0)
    assert auto_beta(lengths, outcomes, groups, 0.8).value == pytest.approx(found.value * 1.6)


def test_the_papers_number_at_the_papers_length():
    assert auto_beta([1000] * 8, [0.0, 1.0] * 4, [0] * 8, VimpoConfig().beta_scale).value == 5e-4


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_with_rewards_of_0_and_1_only_the_length_counts(rows):
    """Mixed groups or not, one success or none: 1 stands for the range in any case."""
    lengths, outcomes, groups = zip(*rows, strict=True)
    found = auto_beta(lengths, [float(outcome) for outcome in outcomes], groups, 0.5)
    assert found.value == 0.5 / (sum(lengths) / len(lengths)) and found.reward_range == 1.0
    assert found.range_is_known == (len(set(outcomes)) == 2)


def test_one_success_beside_small_penalties_gives_the_range():
    """A standard deviation, or a mean over groups, would be ten times smaller and grow with the success rate."""
    outcomes = [0.0, -0.05] * 31 + [1.0, -0.05]
    found = auto_beta([4] * 64, outcomes, [i // 8 for i in range(64)], 0.5)
    assert found.reward_range == 1.05


def test_rewards_that_differ_between_groups_only():
    """Groups all right or all wrong, worth 10 each: the range of the batch is what is known."""
    assert auto_beta([4] * 4, [0.0, 0.0, 10.0, 10.0], "aabb", 0.5).reward_range == 10.0


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0, 0.1])
def test_equal_rewards_are_taken_for_0_and_1(constant):
    assert auto_beta([8, 8], [constant, constant], "ab", 0.5) == Beta(0.0625, 0.5, 8.0, 1.0, range_is_known=False)
    rounded = [constant, constant * (1 + 1e-7)]  # sums of token rewards in float32
    assert not auto_beta([8, 8], rounded, "aa", 0.5).range_is_known


@given(st.floats(1e-3, 1e3), st.floats(-5, 5), st.randoms(use_true_random=False))
def test_beta_goes_with_the_rewards_and_neither_with_their_origin_nor_with_the_order(scale, shift, random_order):
    rows = [(n + 1, float(n % 3), n // 4) for n in range(12)]
    expected = auto_beta(*zip(*rows, strict=True), 0.5).value
    moved = [(length, scale * (outcome + shift), group) for length, outcome, group in rows]
    found = auto_beta(*zip(*moved, strict=True), 0.5).value
    assert found == pytest.approx(scale * expected, rel=1e-9)
    random_order.shuffle(moved)
    assert auto_beta(*zip(*moved, strict=True), 0.5).value == found


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no response of the batch has a valid token.*Write"):
        auto_beta([0, 0], [0.0, 1.0], "aa", 0.5)
    with pytest.raises(ValueError, match="not finite"):
        auto_beta([1, 1], [0.0, math.nan], "aa", 0.5)
    with pytest.raises(ValueError, match="2 lengths, 1 outcomes"):
        auto_beta([1, 1], [0.0], "aa", 0.5)


def test_a_batch_measures_real_sequences_and_valid_tokens():
    """Lengths 3, 1 and 2 with a tool's token; a placeholder of another length and reward counts nowhere."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    inputs = dict(
        old_log_prob=zeros, ref_log_prob=zeros - 0.1, token_kl=zeros, response_mask=mask, lam=1.0,
        outcome=torch.tensor([0.0, 4.0, 1.0, -90.0]), group=["a", "a", "b", "a"],
        is_padding=torch.tensor([False, False, False, True]),
    )  # fmt: skip
    batch = compute_batch(**inputs, config=VimpoConfig())
    assert batch.beta == Beta(0.5 * 4.0 / 2.0, 0.5, 2.0, 4.0)
    with_the_number = compute_batch(**inputs, config=VimpoConfig(beta=1.0))
    assert torch.equal(batch.values, with_the_number.values) and batch.metrics == with_the_number.metrics
    assert batch.actor_coeff == with_the_number.actor_coeff
    assert with_the_number.beta == Beta(1.0)


# ---- the fit ----


def test_the_fit_is_the_minimum_of_the_squared_residuals():
    generator = torch.Generator().manual_seed(0)
    nats, targets = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    found = beta_fit((0.1 * nats).tolist(), targets.tolist(), 0.1)
    losses = [(b * nats - targets).square().sum() for b in (found - 1e-4, found, found + 1e-4)]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    assert found == pytest.approx((nats @ targets / (nats @ nats)).item(), rel=1e-12)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0, -1.0])
def test_the_side_that_the_fit_is_on(factor):
    """S = factor * target: above beta the judgement is too small and the loss makes it larger; below, it is pulled back."""
    targets = [0.5, -0.5, 0.25, -0.25]
    fit = beta_fit([factor * y for y in targets], targets, 0.1)
    assert fit == pytest.approx(0.1 / factor)
    residuals = torch.tensor([factor * y - y for y in targets])
    growth = -(residuals * factor * torch.tensor(targets)).sum()  # of |S| by a gradient step, d L_V / d S = residual
    assert (growth > 1e-6) == (fit > 0.1 + 1e-6)


def test_without_a_judgement_there_is_no_fit():
    assert beta_fit([0.0, 0.0], [0.5, -0.5], 0.1) is None and beta_fit([], [], 0.1) is None


# ---- in a run ----


def auto(path, *overrides):
    return make_config(path, "++algorithm.vimpo.beta=auto", *overrides)


SETTINGS = {
    "plain": [],
    "kappa of the current policy": ["+algorithm.vimpo.kappa_policy=current"],
    "k3": ["+algorithm.vimpo.kl_estimator=k3"],
    "LoRA": ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.target_modules=all-linear"],
    "mini-batches": ["actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.ppo_epochs=2"],
    "colocate_async": ["trainer.v1.trainer_mode=colocate_async"],
}


def results(metrics) -> dict[str, float]:
    """What was computed; no times."""
    names = [name for name in metrics if name.startswith("vimpo/")] + ["actor/grad_norm"]
    return {name: float(metrics[name]) for name in names}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_update_uses_the_number_of_the_first_batch(models, monkeypatch, setting, capsys):
    """A run with auto is the run with its number, bit for bit; the second batch's own lengths and rewards change nothing."""
    first = make_samples(tool_tokens=False)
    second = [replace(s, outcome=1.4 * s.outcome) for s in make_samples(seed=3, tool_tokens=False)]
    tokens = sum(len(s.response) for s in first)
    number = 0.5 / (tokens / len(first))
    assert sum(len(s.response) for s in second) != tokens
    runs = []
    for beta in ("auto", number):
        torch.manual_seed(0)
        config = make_config(models / "policy", f"++algorithm.vimpo.beta={beta}", *SETTINGS[setting])
        trainer, queue = make_trainer(config, monkeypatch)
        runs.append([run_trainer_step(trainer, queue, samples) for samples in (first, second)])
        if beta == "auto":
            said = capsys.readouterr()
    assert [results(metrics) for metrics in runs[0]] == [results(metrics) for metrics in runs[1]]
    assert [metrics["vimpo/beta"] for metrics in runs[0]] == [number, number]
    assert "vimpo/beta_fit" not in runs[0][0] and "vimpo/beta_fit" in runs[0][1]
    (line,) = [line for line in said.out.splitlines() if "beta=auto is" in line]
    assert f"step 1: algorithm.vimpo.beta=auto is beta={number:.6g}" in line
    assert f"a mean length of {tokens / len(first):.6g} tokens and rewards that differ by up to 1 " in line
    assert "are equal" not in said.err and "nats" not in said.err


def test_the_update_is_the_formulas_with_that_number(models, monkeypatch):
    samples = make_samples(tool_tokens=False)
    trainer, queue = make_trainer(auto(models / "policy"), monkeypatch)
    found = run_trainer_step(trainer, queue, samples)
    beta = 0.5 * len(samples) / sum(len(s.response) for s in samples)
    expected = engine_formula.step(models, samples, beta=beta, lr=0.1, equal=True)
    assert found["vimpo/value_loss"] == pytest.approx(expected["updates"][0]["value_loss"], rel=1e-5)
    from engine_harness import parameters_of

    parameters = parameters_of(trainer.actor_rollout_wg.worker.actor.engine)
    for name, wanted in expected["parameters"].items():
        torch.testing.assert_close(parameters[name].double(), wanted, rtol=1e-4, atol=1e-6)


def test_rewards_of_another_scale_train_alike(models, monkeypatch, capsys):
    """Ten times the rewards: ten times beta, a hundred times the loss, and nobody is warned of nats."""
    samples, losses = make_samples(tool_tokens=False), []
    for scale in (1.0, 10.0):
        trainer, queue = make_trainer(auto(models / "policy"), monkeypatch)
        scaled = [replace(s, outcome=scale * s.outcome) for s in samples]
        losses.append(run_trainer_step(trainer, queue, scaled)["vimpo/value_loss"] / scale**2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "nats" not in capsys.readouterr().err


def test_a_first_batch_of_equal_rewards_is_said_and_other_rewards_later_are_named(models, monkeypatch, capsys):
    trainer, queue = make_trainer(auto(models / "policy"), monkeypatch)
    samples = make_samples(tool_tokens=False, prompts=2, group_size=4)
    equal = [replace(s, outcome=0.0) for s in samples]
    found = run_trainer_step(trainer, queue, equal)["vimpo/beta"]
    said = capsys.readouterr().err
    assert "step 1: all rewards of the batch that algorithm.vimpo.beta=auto is measured over are equal" in said
    larger = [replace(s, outcome=20.0 * (i % 4 == 0)) for i, s in enumerate(samples)]
    assert run_trainer_step(trainer, queue, larger)["vimpo/beta"] == found
    said = capsys.readouterr().err
    assert (
        "rewards are up to 15 from their group's mean" in said
        and f"write +algorithm.vimpo.beta={15 * found:.2g}" in said
    )


# ---- checkpoints ----


class VerlsTrainer:
    """verl's part of saving and loading, without Ray."""

    checkpoint_callback = Namespace(on_save=lambda **_: None)

    def _save_checkpoint(self):
        root = Path(self.config.trainer.default_local_dir)
        (root / f"global_step_{self.global_steps}/data.pt").write_bytes(b"x")
        (root / checkpoints.TRACKER).write_text(str(self.global_steps))

    def _load_checkpoint(self):
        self.global_steps, trainer = 0, self.config.trainer
        if trainer.resume_mode == "auto" and (Path(trainer.default_local_dir) / checkpoints.TRACKER).exists():
            self.global_steps = int((Path(trainer.default_local_dir) / checkpoints.TRACKER).read_text())
        elif trainer.resume_mode == "resume_path":
            self.global_steps = int(trainer.resume_from_path.split("global_step_")[-1])


def trainer_in(root, knobs=None, resume_mode="auto", resume_from_path=None):
    from verl_patches.trainer import VimpoTrainer

    class Trainer(checkpoints.CheckpointedTrainer, VimpoTrainer, VerlsTrainer):
        def __init__(self):
            places = {"default_local_dir": str(root), "resume_mode": resume_mode, "resume_from_path": resume_from_path}
            self.config, self.global_steps = Namespace(trainer=Namespace(**places)), 0
            self.run_beta = RunBeta(knobs or VimpoConfig())

    return Trainer()


MEASURED = Beta(0.1 + 0.2 / 3.0, 0.5, 3.3, 1.1)


@pytest.fixture
def saved(tmp_path, capsys):
    """Steps 1 and 2 of a run with a number that no short decimal is."""
    trainer = trainer_in(tmp_path)
    trainer.run_beta.fix(MEASURED, 1)
    for trainer.global_steps in (1, 2):
        trainer._save_checkpoint()
    capsys.readouterr()
    return tmp_path


def test_a_resumed_run_has_the_same_number_bit_for_bit(saved, capsys):
    by_path = {"resume_mode": "resume_path", "resume_from_path": str(saved / "global_step_1")}
    for places in ({}, by_path):
        trainer = trainer_in(saved, **places)
        trainer._load_checkpoint()
        assert trainer.run_beta.found == MEASURED and trainer.run_beta.config.beta == MEASURED.value
        trainer.run_beta.fix(Beta(9.0), 3)
        assert trainer.run_beta.found == MEASURED, "a later batch changes nothing"
        said = capsys.readouterr()
        assert f"beta={MEASURED.value:.6g}, as in the checkpoint {saved}/global_step_" in said.out and said.err == ""
    (saved / "global_step_2/data.pt").unlink()  # torn
    trainer = trainer_in(saved)
    trainer._load_checkpoint()
    assert trainer.global_steps == 1 and trainer.run_beta.found == MEASURED
    assert f"as in the checkpoint {saved}/global_step_1" in capsys.readouterr().out


def test_the_file_is_part_of_a_complete_checkpoint(saved):
    folder = saved / "global_step_2"
    assert STATE in json.loads((folder / RECORD).read_text())["files"] and fault(folder) is None
    (folder / STATE).unlink()
    assert fault(folder) == f"{STATE} is missing"


def test_a_start_from_nothing_measures(tmp_path, saved, capsys):
    for places in ({"root": tmp_path / "empty"}, {"root": saved, "resume_mode": "disable"}):
        trainer = trainer_in(**places)
        trainer._load_checkpoint()
        assert trainer.run_beta.found is None and trainer.run_beta.config.beta == "auto"
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_without_the_file_is_said_and_beta_is_measured_anew(saved, capsys):
    """Of an earlier version, which had a record but no such file, and of GRPO, which has neither."""
    folder = saved / "global_step_2"
    (folder / STATE).unlink()
    (folder / RECORD).write_text(json.dumps({"files": {"data.pt": 1}}))
    for _ in range(2):
        trainer = trainer_in(saved)
        trainer._load_checkpoint()
        assert trainer.global_steps == 2 and trainer.run_beta.config.beta == "auto"
        said = capsys.readouterr().err
        assert f"{folder} has no {STATE}: algorithm.vimpo.beta=auto is measured anew" in said
        (folder / RECORD).unlink(missing_ok=True)


def test_a_number_that_is_given_wins_and_is_said(saved, capsys):
    trainer = trainer_in(saved, VimpoConfig(beta=5e-4))
    trainer._load_checkpoint()
    assert trainer.run_beta.config.beta == 5e-4
    said = capsys.readouterr().err
    assert "beta=0.0005 is used as given" in said and f"it was {MEASURED.value:.6g}" in said
    same = trainer_in(saved, VimpoConfig(beta=MEASURED.value))
    same._load_checkpoint()
    assert capsys.readouterr().err == ""
    trainer.global_steps = 3
    trainer._save_checkpoint()
    back = trainer_in(saved)
    back._load_checkpoint()
    assert back.run_beta.found == Beta(5e-4), "a number that was given is kept, too"


def test_a_scale_that_comes_too_late_is_said(saved, capsys):
    trainer = trainer_in(saved, VimpoConfig(beta_scale=0.8))
    trainer._load_checkpoint()
    assert trainer.run_beta.config.beta == MEASURED.value
    assert "beta_scale=0.8 changes nothing in a run that is resumed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"value": -1.0}', '{"value": "x"}'])
def test_a_file_that_cannot_be_read_stops_the_run_by_name(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    with pytest.raises(ValueError, match=f"{STATE}: the run's beta cannot be read"):
        betas.load(tmp_path)


def test_a_file_of_a_later_version_is_read(tmp_path):
    (tmp_path / STATE).write_text(json.dumps({"value": 0.25, "trust": [1, 2]}))
    assert betas.load(tmp_path) == Beta(0.25)


@given(st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False))
def test_property_the_file_keeps_every_bit(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("state")
    betas.save(Beta(value), folder)
    assert betas.load(folder).value == value
