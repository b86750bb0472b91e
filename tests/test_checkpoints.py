"""Claim: a torn checkpoint is refused by name and the newest complete one is used; what has no record is taken as it is.

The trainer's part with a stand-in for verl's methods, which do what verl 0.9.1 does; whole runs are in test_resume.py.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from verl_patches import checkpoints
from verl_patches.checkpoints import MARK, RECORD, TRACKER, CheckpointedTrainer, fault, latest_complete


class VerlsTrainer:
    """verl's _save_checkpoint and _load_checkpoint without Ray: shards, data.pt, tracker; the tracker says what is loaded."""

    def __init__(self, root: Path, resume_mode: str = "auto", resume_from_path=None):
        trainer = {"default_local_dir": str(root), "resume_mode": resume_mode, "resume_from_path": resume_from_path}
        self.config = SimpleNamespace(trainer=SimpleNamespace(**trainer))
        self.root, self.global_steps, self.disk_full_at = root, 0, None

    def _save_checkpoint(self):
        folder = self.root / f"global_step_{self.global_steps}"
        for name in ("actor/model_world_size_1_rank_0.pt", "actor/huggingface/config.json", "data.pt"):
            if name == self.disk_full_at:
                raise OSError(28, "No space left on device")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * 100)
        (self.root / TRACKER).write_text(str(self.global_steps))

    def _load_checkpoint(self):
        self.global_steps, trainer = 0, self.config.trainer
        if trainer.resume_mode == "auto" and (self.root / TRACKER).exists():
            self.global_steps = int((self.root / TRACKER).read_text())
        elif trainer.resume_mode == "resume_path":
            self.global_steps = int(trainer.resume_from_path.split("global_step_")[-1])


class Trainer(CheckpointedTrainer, VerlsTrainer):
    pass


@pytest.fixture
def root(tmp_path):
    """Steps 1, 2 and 3 are saved."""
    trainer = Trainer(tmp_path)
    for trainer.global_steps in (1, 2, 3):
        trainer._save_checkpoint()
    return tmp_path


def resumed_at(root, **settings) -> int:
    trainer = Trainer(root, **settings)
    before = vars(trainer.config.trainer).copy()
    trainer._load_checkpoint()
    assert vars(trainer.config.trainer) == before, "verl's settings are the user's again"
    return trainer.global_steps


def test_a_complete_checkpoint_is_resumed_from_in_silence(root, capsys):
    assert [fault(root / f"global_step_{step}") for step in (1, 2, 3)] == [None] * 3
    assert resumed_at(root) == 3 and capsys.readouterr().err == ""
    record = json.loads((root / "global_step_3" / RECORD).read_text())
    assert record["files"] == {
        "actor/huggingface/config.json": 100, "actor/model_world_size_1_rank_0.pt": 100, "data.pt": 100,
    }  # fmt: skip


def truncate(folder):
    (folder / "actor/model_world_size_1_rank_0.pt").write_bytes(b"x" * 50)


def remove(folder):
    (folder / "data.pt").unlink()


def unfinished(folder):
    (folder / MARK).touch()


def bad_record(folder):
    (folder / RECORD).write_text("{")


TORN = {
    truncate: "global_step_3 is torn: actor/model_world_size_1_rank_0.pt has 50 bytes instead of 100",
    remove: "global_step_3 is torn: data.pt is missing",
    unfinished: "global_step_3 is torn: the run ended while it was being written",
    bad_record: f"global_step_3 is torn: {RECORD} cannot be read",
    shutil.rmtree: f"global_step_3, which {TRACKER} names, is not there",
}


@pytest.mark.parametrize("damage", TORN)
def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(root, damage, capsys):
    damage(root / "global_step_3")
    assert resumed_at(root) == 2
    said = capsys.readouterr().err
    assert TORN[damage] in said and f"going on from {root / 'global_step_2'}" in said


@pytest.mark.parametrize("damage", TORN)
def test_one_that_is_asked_for_by_path_is_refused(root, damage):
    damage(root / "global_step_3")
    with pytest.raises(ValueError, match="resume_from_path=.*global_step_3 is torn"):
        resumed_at(root, resume_mode="resume_path", resume_from_path=str(root / "global_step_3"))
    assert resumed_at(root, resume_mode="resume_path", resume_from_path=str(root / "global_step_2")) == 2


def test_two_torn_ones_are_both_named(root, capsys):
    truncate(root / "global_step_3")
    remove(root / "global_step_2")
    assert resumed_at(root) == 1
    said = capsys.readouterr().err
    assert "global_step_3 is torn" in said and "global_step_2 is torn" in said


def test_never_one_that_is_newer_than_the_tracker_says(root):
    """Somebody went back to step 2 on purpose."""
    (root / TRACKER).write_text("2")
    assert resumed_at(root) == 2
    truncate(root / "global_step_2")
    assert resumed_at(root) == 1


def test_an_empty_tracker(root, capsys):
    (root / TRACKER).write_text("")
    assert resumed_at(root) == 3
    assert "latest_checkpointed_iteration.txt is torn: it has ''" in capsys.readouterr().err


def test_without_a_complete_one_training_starts_from_the_start(root, capsys):
    for step in (1, 2, 3):
        truncate(root / f"global_step_{step}")
    assert resumed_at(root) == 0
    assert "no complete checkpoint: training from the start" in capsys.readouterr().err


def test_a_run_that_ends_while_it_writes_leaves_the_one_before(root, capsys):
    """The tracker is verl's last file, so it still names step 3."""
    checkpoints.begin(root / "global_step_4")
    (root / "global_step_4/data.pt").write_bytes(b"x")
    assert resumed_at(root) == 3
    assert "global_step_4 is torn: the run ended while it was being written" in capsys.readouterr().err


def test_a_checkpoint_without_a_record_is_taken_as_it_is(tmp_path, capsys):
    """Of GRPO, or of an earlier version."""
    stock = VerlsTrainer(tmp_path)
    stock.global_steps = 5
    stock._save_checkpoint()
    assert resumed_at(tmp_path) == 5
    assert "global_step_5 was written without VIMPO's trainer" in capsys.readouterr().err
    path = str(tmp_path / "global_step_5")
    assert resumed_at(tmp_path, resume_mode="resume_path", resume_from_path=path) == 5


def test_nothing_there_and_nothing_asked_for(tmp_path, root, capsys):
    assert resumed_at(tmp_path / "empty") == 0
    assert resumed_at(root, resume_mode="disable") == 0
    assert capsys.readouterr().err == ""


def test_a_full_disk_names_the_checkpoint_and_leaves_the_one_before(root, capsys):
    trainer = Trainer(root)
    trainer.global_steps, trainer.disk_full_at = 4, "data.pt"
    with pytest.raises(
        RuntimeError, match=r"step 4: the checkpoint .*global_step_4 could not be written \(.*No space left"
    ):
        trainer._save_checkpoint()
    assert latest_complete(root)[0] == root / "global_step_3"


def test_a_second_attempt_at_a_step_is_complete_only_when_it_is(root):
    """A record of the first attempt does not vouch for the second."""
    trainer = Trainer(root)
    trainer.global_steps, trainer.disk_full_at = 3, "data.pt"
    with pytest.raises(RuntimeError):
        trainer._save_checkpoint()
    assert "being written" in fault(root / "global_step_3")
    trainer.disk_full_at = None
    trainer._save_checkpoint()
    assert fault(root / "global_step_3") is None


@pytest.fixture
def worker(models, monkeypatch):
    from in_process import make_config, make_trainer

    trainer, _ = make_trainer(make_config(models / "policy"), monkeypatch)
    return trainer.actor_rollout_wg.worker


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_never_written(worker, tmp_path, value):
    name, weight = next((n, p) for n, p in worker.actor.engine.module.named_parameters() if "norm" in n)
    with torch.no_grad():
        weight.fill_(value)
    with pytest.raises(
        FloatingPointError, match=f"step 7: the weights .* not finite .1 tensors on rank 0, such as {name}"
    ):
        worker.save_checkpoint(str(tmp_path / "actor"), None, 7)
    assert not (tmp_path / "actor").exists()


def test_the_checkpoint_before_is_kept_until_the_new_one_is_complete(worker, tmp_path):
    """verl with max_ckpt_to_keep=1 deletes it as soon as the shards are there, before its own tracker is."""
    for step in (1, 2, 3):
        worker.save_checkpoint(str(tmp_path / f"global_step_{step}/actor"), None, step, max_ckpt_to_keep=1)
        assert (tmp_path / f"global_step_{max(1, step - 1)}/actor").exists()
    assert not (tmp_path / "global_step_1/actor").exists()
