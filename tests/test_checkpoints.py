"""Claim: a torn checkpoint is refused by name and the newest complete one is used; what has no record is taken as it is.

What may change in a complete one is what resuming does not read; verl's checkpoint callback sees complete ones only.

The trainer's part with a stand-in for verl's methods, which do what verl 0.9.1 does; whole runs are in test_resume.py.
"""

import errno
import inspect
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from verl_patches import checkpoints
from verl_patches.checkpoints import MARK, NEEDED, RECORD, TRACKER, CheckpointedTrainer, fault, latest_complete
from vimpo_verl.checkpoint import DERIVED

SHARDS = tuple(f"actor/{kind}_world_size_1_rank_0.pt" for kind in ("model", "optim", "extra_state"))
FOR_THE_MERGER = ("actor/huggingface/config.json", "actor/fsdp_config.json", "actor/lora_train_meta.json")


class NoCallback:
    def on_save(self, **_):
        pass


class VerlsTrainer:
    """verl's _save_checkpoint and _load_checkpoint without Ray: shards, data.pt, tracker; the tracker says what is loaded."""

    checkpoint_callback = NoCallback()

    def __init__(self, root: Path, resume_mode: str = "auto", resume_from_path=None):
        trainer = {"default_local_dir": str(root), "resume_mode": resume_mode, "resume_from_path": resume_from_path}
        self.config = SimpleNamespace(trainer=SimpleNamespace(**trainer))
        self.root, self.global_steps, self.disk_full_at = root, 0, None

    def _save_checkpoint(self):
        folder = self.root / f"global_step_{self.global_steps}"
        for name in (*SHARDS, *FOR_THE_MERGER, "data.pt", "transfer_queue/metadata.json"):
            if name == self.disk_full_at:
                raise OSError(28, "No space left on device")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * 100)
        (self.root / TRACKER).write_text(str(self.global_steps))
        arguments = {"global_step": self.global_steps, "checkpoint_dir": str(folder), "async_save": False}
        self.checkpoint_callback.on_save(trainer=self, **arguments)

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
    assert record["files"] == dict.fromkeys([*SHARDS, "data.pt", "transfer_queue/metadata.json"], 100)


def merged(folder):
    """verl's merger writes the model's configuration anew and, asked for it, the weights beside it."""
    (folder / "actor/huggingface/config.json").write_bytes(b"x" * 101)
    (folder / "actor/huggingface/model.safetensors").touch()
    for name in DERIVED:
        (folder / name).mkdir()


def cleared(folder):
    for name in FOR_THE_MERGER:
        (folder / name).unlink()


@pytest.mark.parametrize("change", [merged, cleared])
@pytest.mark.parametrize("older", [False, True], ids=["record", "record of every file"])
def test_what_resuming_does_not_read_may_change(root, change, older, capsys):
    folder = root / "global_step_3"
    if older:  # as the first versions wrote it
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]
        record = {str(path.relative_to(folder)): 100 for path in files}
        assert set(record) > set(FOR_THE_MERGER)
        (folder / RECORD).write_text(json.dumps({"files": record}))
    change(folder)
    assert fault(folder) is None and resumed_at(root) == 3 and capsys.readouterr().err == ""
    truncate(folder)
    assert "actor/model_world_size_1_rank_0.pt has 50 bytes" in fault(folder), "the shards still count"


def test_verl_reads_what_the_record_names():
    """The names in verl's own code, of all that it loads."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    source = "".join(map(inspect.getsource, (PPOTrainer._load_checkpoint, FSDPCheckpointManager.load_checkpoint)))
    joined = {name for name in re.findall(r'join\(\s*\w+, f?"([^"]+)"', source)} - {"actor"}
    assert len(joined) == 5
    for name in joined:
        name = re.sub(r"{.+?}", "3", name)
        name = {"transfer_queue": "transfer_queue/metadata.json"}.get(name, name)
        assert NEEDED.fullmatch(name) or NEEDED.fullmatch(f"actor/{name}"), name


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


def test_a_first_save_that_was_cut_off_is_no_reason_to_stop(tmp_path, capsys):
    """verl's tracker is written last: without one, no work is lost by starting anew."""
    checkpoints.begin(tmp_path / "global_step_1")
    assert resumed_at(tmp_path) == 0
    said = capsys.readouterr().err
    assert "global_step_1 is torn: the run ended while it was being written" in said
    assert "no checkpoint has been completed yet: training from the start" in said


@pytest.mark.parametrize("tracker", ["3", ""])
def test_where_there_have_been_checkpoints_and_none_is_complete_the_run_stops(root, tracker):
    for step in (1, 2, 3):
        truncate(root / f"global_step_{step}")
    (root / TRACKER).write_text(tracker)
    with pytest.raises(ValueError, match="none is complete") as stopped:
        resumed_at(root)
    for part in ("global_step_1 is torn", "global_step_3 is torn", "resume_mode=disable", f"remove {root / TRACKER}"):
        assert part in str(stopped.value)
    assert resumed_at(root, resume_mode="disable") == 0
    (root / TRACKER).unlink()
    assert resumed_at(root) == 0, "as the message says"


def test_checkpoints_that_have_been_moved_away_stop_the_run_by_name(root):
    for step in (1, 2, 3):
        shutil.rmtree(root / f"global_step_{step}")
    with pytest.raises(ValueError, match=f"global_step_3, which {TRACKER} names, is not there"):
        resumed_at(root)


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


def test_what_was_made_of_a_checkpoint_goes_when_its_step_is_saved_again(root, tmp_path_factory, capsys):
    """And nothing else: neither what others keep in the folder, nor what a link points to."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "results.json"
    elsewhere.touch()
    for step in (2, 3):
        for name in ("actor/merged/config.json", "actor/merged.part/x", "notes/evaluation/mine.txt"):
            (root / f"global_step_{step}" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"global_step_{step}" / name).touch()
        (root / f"global_step_{step}/evaluation").symlink_to(elsewhere.parent)
    trainer = Trainer(root)
    trainer.global_steps = 3
    trainer._save_checkpoint()
    assert not [name for name in DERIVED if os.path.lexists(root / "global_step_3" / name)]
    assert all((root / "global_step_2" / name).exists() for name in DERIVED)
    assert (root / "global_step_3/notes/evaluation/mine.txt").exists() and elsewhere.exists()
    said = capsys.readouterr().err
    assert f"{root / 'global_step_3'} is written again: removed actor/merged, actor/merged.part, evaluation" in said


class Callback:
    """verl's trainer.checkpoint_callback_class: what it sees, and what it does with it."""

    def __init__(self, act=lambda folder: None):
        self.seen, self.act = [], act

    def on_save(self, trainer, global_step, checkpoint_dir, async_save=False, **_):
        assert trainer.checkpoint_callback is self and not async_save
        self.seen.append((global_step, fault(Path(checkpoint_dir)), (Path(checkpoint_dir) / RECORD).exists()))
        self.act(Path(checkpoint_dir))


def test_the_callback_sees_a_complete_checkpoint(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.checkpoint_callback = callback = Callback()
    for trainer.global_steps in (1, 2):
        trainer._save_checkpoint()
    assert callback.seen == [(1, None, True), (2, None, True)] and trainer.checkpoint_callback is callback


def test_the_callback_may_move_the_checkpoint(root, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    trainer = Trainer(root)
    trainer.checkpoint_callback = Callback(lambda folder: shutil.move(folder, store))
    trainer.global_steps = 4
    trainer._save_checkpoint()
    assert fault(store / "global_step_4") is None and not (root / "global_step_4").exists()
    assert resumed_at(root, resume_mode="resume_path", resume_from_path=str(store / "global_step_4")) == 4


def test_an_error_of_the_callback_is_the_callbacks(root):
    """verl lets it end training; the checkpoint is none the worse for it."""

    def fails(folder):
        raise ConnectionError("no such bucket")

    trainer = Trainer(root)
    trainer.checkpoint_callback, trainer.global_steps = Callback(fails), 4
    with pytest.raises(ConnectionError, match="no such bucket"):
        trainer._save_checkpoint()
    assert resumed_at(root) == 4


def test_the_callback_hears_nothing_of_a_save_that_failed(root):
    trainer = Trainer(root)
    trainer.checkpoint_callback = callback = Callback()
    trainer.global_steps, trainer.disk_full_at = 4, "data.pt"
    with pytest.raises(RuntimeError, match="could not be written"):
        trainer._save_checkpoint()
    assert callback.seen == [] and trainer.checkpoint_callback is callback


def test_verls_trainer_without_a_callback(tmp_path, monkeypatch):
    """0.9.0."""
    monkeypatch.setattr(VerlsTrainer, "_save_checkpoint", lambda self: (tmp_path / TRACKER).write_text("1"))
    monkeypatch.delattr(VerlsTrainer, "checkpoint_callback")
    trainer = Trainer(tmp_path)
    trainer.global_steps = 1
    trainer._save_checkpoint()
    assert fault(tmp_path / "global_step_1") is None


def test_verls_own_save_and_load(tmp_path):
    """The methods of the installed verl, with the worker group and the data loader replaced."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    if "checkpoint_callback" not in inspect.getsource(PPOTrainerSync._save_checkpoint):
        pytest.skip("this verl has no checkpoint callback")

    class Workers:
        def save_checkpoint(self, actor, *_, **__):
            for path in (tmp_path / actor / Path(name).name for name in SHARDS):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x")

        def load_checkpoint(self, local_path, **_):
            self.loaded = local_path

    class Loader(dict):
        state_dict, load_state_dict = dict.copy, dict.update

    class WithVerls(CheckpointedTrainer, PPOTrainerSync):
        def __init__(self):
            paths = {"default_local_dir": str(tmp_path), "default_hdfs_dir": None, "resume_from_path": None}
            trainer = {**paths, "resume_mode": "auto", "del_local_ckpt_after_load": False}
            self.config = OmegaConf.create({"trainer": trainer, "actor_rollout_ref": {"actor": {}}})
            self.trainer_mode, self.use_critic, self.global_steps = "sync", False, 7
            self.actor_rollout_wg, self.train_dataloader, self.checkpoint_callback = Workers(), Loader(), Callback()

    first, second = WithVerls(), WithVerls()
    first._save_checkpoint()
    assert first.checkpoint_callback.seen == [(7, None, True)]
    second.global_steps = None
    second._load_checkpoint()
    assert second.global_steps == 7 and second.actor_rollout_wg.loaded == str(tmp_path / "global_step_7/actor")


@pytest.mark.parametrize(
    "code, of, is_refused",
    [
        *((code, "folder", True) for code in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)),
        (errno.EIO, "folder", False),
        (errno.ENOSPC, "folder", False),
        (errno.EINVAL, "file", False),
    ],
)
def test_a_file_system_that_does_not_synchronise_folders(tmp_path, monkeypatch, code, of, is_refused):
    """Which ends nothing; an error of the disk, and a file that does not get there, still do."""
    fsync = os.fsync

    def refuses(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (of == "folder"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    trainer = Trainer(tmp_path)
    trainer.global_steps = 1
    if is_refused:
        trainer._save_checkpoint()
        assert fault(tmp_path / "global_step_1") is None
    else:
        with pytest.raises(RuntimeError, match=f"could not be written.*{os.strerror(code)}"):
            trainer._save_checkpoint()


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
