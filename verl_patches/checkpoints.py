"""Seam: which checkpoints are complete.

Touches PPOTrainer._save_checkpoint and _load_checkpoint, by subclassing: the family's trainers derive from
CheckpointedTrainer; and the attribute checkpoint_callback (new in 0.9.1), for the length of a save. Checked against
verl 0.9.1; no upstream issue.

verl writes a checkpoint's files, then `latest_checkpointed_iteration.txt`, the tracker, and loads whatever folder the
tracker names. So a run that is killed while it writes is no problem, but a file that a power cut, a full disk or a broken
copy left short is found out by torch.load, deep in a worker, and a tracker that is empty by int(''). Here a folder carries
a mark while it is being written and, once its files are on the disk, a record of those that resuming needs, with their
sizes. What else is in the folder (actor/huggingface, merged models, evaluations) may change or go.

verl calls trainer.checkpoint_callback_class when its own files are written; here that call waits for the record, so
that the callback may copy or move a complete checkpoint.

The record covers what the driver can see: on several nodes, checkpoints belong on a file system that they share.
"""

import contextlib
import errno
import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vimpo_verl.beta import STATE
from vimpo_verl.checkpoint import remove_derived
from vimpo_verl.prior import STATE as PRIOR_STATE

RECORD = "vimpo_checkpoint.json"  # {"files": {relative path: bytes}}
MARK = "vimpo_checkpoint.unfinished"
TRACKER = "latest_checkpointed_iteration.txt"
# What PPOTrainer._load_checkpoint and the checkpoint managers of FSDP (LoRA included) and Megatron read, and this package's own
# files. Megatron's model may be in actor/huggingface, which changes when a model is merged.
NEEDED = re.compile(
    r"actor/(model|optim|extra_state|reference)_world_size_\d+_rank_\d+\.pt|actor/dist_ckpt/.+|data\.pt|transfer_queue/.+|"
    rf"{re.escape(STATE)}|{re.escape(PRIOR_STATE)}"
)
# How file systems say that they do not synchronise folders; any other error, such as EIO, is one.
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def begin(folder: Path) -> None:
    """Mark a checkpoint's folder as one that is being written, whatever an earlier attempt left there.

    What the tools of this package made of that attempt is removed: it belongs to other weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / MARK, "")
    removed = [str(path.relative_to(folder)) for path in remove_derived(folder)]
    if removed:
        _say(f"the checkpoint {folder} is written again: removed {', '.join(removed)}, made of what was there before")


def finish(folder: Path) -> None:
    """Force a checkpoint's files to the disk and record those that resuming needs. Only then is it complete.

    Args:
        folder: `global_step_<n>`, with everything that belongs to it.
    """
    files = _files(folder)
    for path in files:
        _force_to_disk(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    _write(folder / RECORD, json.dumps({"files": _needed(sizes)}, indent=1))
    (folder / MARK).unlink()
    _force_folder_to_disk(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, naming the file; None if nothing is known against it.

    A folder with neither record nor mark was written without VIMPO's trainer, and is taken as it is.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / MARK).exists():
        return "the run ended while it was being written"
    if not (folder / RECORD).exists():
        return None
    try:
        sizes = _needed(json.loads((folder / RECORD).read_text())["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} cannot be read ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _needed(sizes: dict[str, int]) -> dict[str, int]:
    """Of {relative path: bytes} what resuming needs; records of earlier versions name every file of the folder."""
    return {name: size for name, size in sizes.items() if NEEDED.fullmatch(name)}


def has_record(folder: Path) -> bool:
    """Whether the checkpoint was written by VIMPO's trainer."""
    return (folder / RECORD).exists()


def latest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from.

    Args:
        root: verl's trainer.default_local_dir.

    Returns:
        The newest complete checkpoint that is no newer than the tracker says, or the newest complete one if the tracker
        cannot be read; None if there is none. And a sentence for each newer one that is passed over, naming it.
    """
    refused = []
    folders = _folders(root)
    newest = _tracked_step(root, refused)
    if newest not in (None, math.inf) and newest not in folders:
        refused.append(f"the checkpoint {root / f'global_step_{newest}'}, which {TRACKER} names, is not there")
    for step, folder in sorted(folders.items(), reverse=True):
        problem = fault(folder)
        if problem is None and newest is not None and step <= newest:
            return folder, refused
        if problem is not None:
            refused.append(f"the checkpoint {folder} is torn: {problem}")
    return None, refused


def _tracked_step(root: Path, refused: list[str]) -> float | None:
    """The step that the tracker names; infinity if it names none, None if there is no tracker, as before a first save."""
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    try:
        return int(tracker.read_text())
    except ValueError:
        refused.append(f"{tracker} is torn: it has {tracker.read_text()!r} instead of a step")
        return math.inf


def _folders(root: Path) -> dict[int, Path]:
    matches = [(re.fullmatch(r"global_step_(\d+)", path.name), path) for path in root.glob("global_step_*")]
    return {int(match[1]): path for match, path in matches if match}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, MARK))


def _write(path: Path, text: str) -> None:
    """All or nothing: the file is there with `text`, on the disk, or it is not there."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    _force_to_disk(new)
    new.rename(path)
    _force_folder_to_disk(path.parent)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _force_folder_to_disk(folder: Path) -> None:
    """Names in a folder; file systems that cannot be told to (some network ones) keep them in an order of their own."""
    try:
        _force_to_disk(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def install(v1: ModuleType) -> None:
    """Check that verl's trainer has what CheckpointedTrainer extends. `v1` is the module verl.trainer.ppo.v1."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.utils.checkpoint.checkpoint_manager import get_checkpoint_tracker_filename

    for method in ("_save_checkpoint", "_load_checkpoint"):
        parameters = list(inspect.signature(getattr(PPOTrainer, method)).parameters)
        if parameters != ["self"]:
            raise RuntimeError(f"PPOTrainer.{method} takes {parameters}, not self alone")
    if get_checkpoint_tracker_filename("") != TRACKER:
        raise RuntimeError(f"verl's tracker is {get_checkpoint_tracker_filename('')}, not {TRACKER}")


class CheckpointedTrainer:
    """In front of a v1 trainer: complete checkpoints have a record, torn ones are refused by name."""

    def _save_checkpoint(self) -> None:
        """As verl's; trainer.checkpoint_callback_class hears of it when the checkpoint is complete.

        Raises:
            RuntimeError: the checkpoint could not be written; it stays marked, and the one before it valid.
            Exception: whatever the callback raises.
        """
        root = Path(self.config.trainer.default_local_dir)
        folder = root / f"global_step_{self.global_steps}"
        try:
            begin(folder)
            with _callback_held_back(self) as held:
                super()._save_checkpoint()
            finish(folder)
        except Exception as error:
            raise RuntimeError(_not_written(self.global_steps, folder, error)) from error
        self._run_checkpoint_callback(held)

    def _run_checkpoint_callback(self, held: "_HeldBack") -> None:
        for arguments in held.calls:
            self.checkpoint_callback.on_save(**arguments)

    def _load_checkpoint(self) -> None:
        """As verl's, from a checkpoint that is complete.

        Raises:
            ValueError: trainer.resume_mode=resume_path names one that is torn; or, with resume_mode=auto, there have
                been checkpoints and none is complete.
        """
        trainer = self.config.trainer
        if trainer.resume_mode == "auto":
            root = Path(trainer.default_local_dir).absolute()
            chosen, refused = latest_complete(root)
            if refused:
                _say_or_stop(root, chosen, refused)
                with _resuming_from(trainer, chosen):
                    super()._load_checkpoint()
                return
        elif trainer.resume_mode == "resume_path" and trainer.resume_from_path:
            chosen = Path(trainer.resume_from_path).absolute()
            problem = fault(chosen)
            if problem:
                raise ValueError(
                    f"trainer.resume_from_path={chosen} is torn: {problem}. Name another one, or let "
                    "trainer.resume_mode=auto find the newest that is complete"
                )
        else:
            chosen = None
        if chosen and not has_record(chosen):
            _say(f"{chosen} was written without VIMPO's trainer and has no record of its files: taken as it is")
        super()._load_checkpoint()


class _HeldBack:
    """Takes the calls that verl makes of its checkpoint callback, for later; for anything else it is the callback."""

    def __init__(self, callback: Any):
        self.callback, self.calls = callback, []

    def on_save(self, **arguments) -> None:
        self.calls.append(arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)


@contextlib.contextmanager
def _callback_held_back(trainer: Any) -> Iterator[_HeldBack]:
    """verl calls nobody while it saves; verl 0.9.0 has no callback."""
    callback = getattr(trainer, "checkpoint_callback", None)
    trainer.checkpoint_callback = held = _HeldBack(callback)
    try:
        yield held
    finally:
        trainer.checkpoint_callback = callback


def _say_or_stop(root: Path, chosen: Path | None, refused: list[str]) -> None:
    """Name the checkpoints that are passed over. Without a tracker no save has ended yet: the start is right then.

    Raises:
        ValueError: there is a tracker, so training has come further than the start, and no complete checkpoint.
    """
    if chosen is None and (root / TRACKER).exists():
        raise ValueError(
            f"trainer.resume_mode=auto: {root / TRACKER} says that there are checkpoints, but none is complete:\n"
            + "".join(f"  - {sentence}\n" for sentence in refused)
            + "Put a complete one back, or name one that is elsewhere: trainer.resume_mode=resume_path "
            "trainer.resume_from_path=.../global_step_N. To start from step 0 on purpose, write "
            f"trainer.resume_mode=disable or, for a job that starts itself again, remove {root / TRACKER}"
        )
    for sentence in refused:
        _say(sentence)
    _say(f"going on from {chosen}" if chosen else "no checkpoint has been completed yet: training from the start")


def _not_written(step: int, folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(folder.parent if folder.parent.is_dir() else "/").free
    before, _ = latest_complete(folder.parent)
    reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return (
        f"step {step}: the checkpoint {folder} could not be written ({reason[0]}; {free / 2**20:.1f} MiB are free there). It is "
        f"marked as unfinished and will not be resumed from; the one before it is {before or 'the start'}"
    )


@contextlib.contextmanager
def _resuming_from(trainer: Any, chosen: Path | None) -> Iterator[None]:
    """verl's own settings for one given checkpoint, or for none, while it loads."""
    asked = trainer.resume_mode, trainer.resume_from_path
    trainer.resume_mode, trainer.resume_from_path = ("resume_path", str(chosen)) if chosen else ("disable", None)
    try:
        yield
    finally:
        trainer.resume_mode, trainer.resume_from_path = asked


def _say(sentence: str) -> None:
    print(f"vimpo_verl: {sentence}", file=sys.stderr, flush=True)


def loaded_folder(trainer: Any) -> Path | None:
    """The checkpoint, global_step_N, that verl's _load_checkpoint has just loaded; None where it has loaded none.

    Args:
        trainer: of verl's v1, after its _load_checkpoint.
    """
    if not trainer.global_steps:
        return None
    keys = trainer.config.trainer
    by_path = keys.resume_mode == "resume_path"
    return Path(keys.resume_from_path if by_path else f"{keys.default_local_dir}/global_step_{trainer.global_steps}")
