"""From whatever names a model (a run's folder, a checkpoint of verl, a Hugging Face folder) to a Hugging Face folder.

`python -m vimpo_verl.checkpoint PATH` does it on the command line and prints the folder.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LATEST = "checkpoints/latest_checkpointed_iteration.txt"
# What the tools of this package make of a checkpoint, inside its global_step_N: void once the step is saved again.
DERIVED = ("actor/merged", "actor/merged.part", "evaluation")
SHARDS = "model_world_size_*_rank_*.pt"
MADE_FROM = "made_from.json"  # in actor/merged: the sha256 of every file that it was merged from
_BLOCK = 2**22  # bytes read at once


class NotAModel(Exception):
    """There is no model at a path; the message says where and what was looked for."""


@dataclass(frozen=True)
class Checkpoint:
    """FSDP shards that verl wrote: global_step_N/actor."""

    actor: Path

    @property
    def step(self) -> Path:
        """global_step_N."""
        return self.actor.parent

    @property
    def tokenizer(self) -> Path:
        """Folder with the model's configuration and tokenizer, which verl writes beside the shards."""
        return self.actor / "huggingface"

    @property
    def merged(self) -> Path:
        """Where the merged model is or will be."""
        return self.actor / "merged"

    @property
    def has_shards(self) -> bool:
        """Whether there is anything to merge."""
        return any(self.actor.glob(SHARDS))

    @property
    def sources(self) -> list[Path]:
        """Every file that the merged model is made from: no states of the optimizer."""
        configuration = [path for path in self.tokenizer.glob("*") if path.is_file()]
        return sorted([*self.actor.glob(SHARDS), *self.actor.glob("*.json"), *configuration])


def contents(files: Iterable[Path], root: Path) -> dict[str, str]:
    """What is in files: path relative to `root` -> sha256, in hexadecimal.

    Sizes and times would not do: a shard keeps its size when it is saved again, and a copy can keep its time. It costs
    about what reading the files costs, which whoever asks is about to do anyway.
    """
    files = list(files)
    with ThreadPoolExecutor() as threads:  # hashlib lets others run
        return dict(zip((str(path.relative_to(root)) for path in files), threads.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def remove_derived(step: Path) -> list[Path]:
    """Remove what was made of a checkpoint whose shards are about to be written again.

    Args:
        step: global_step_N, which need not exist.

    Returns:
        What there was and is gone. Of a symbolic link the link alone.
    """
    found = [path for path in (step / name for name in DERIVED) if path.is_symlink() or path.is_dir()]
    for path in found:
        _remove(path)
    return found


def _remove(folder: Path) -> None:
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def locate(path: Path) -> Checkpoint | Path:
    """The checkpoint, or the Hugging Face folder, that a path names. Nothing is written.

    Args:
        path: a run's folder (its last checkpoint counts), .../global_step_N, .../global_step_N/actor, actor/merged in
            it, or a Hugging Face folder.

    Raises:
        NotAModel: it is none of these.
    """
    if not path.is_dir():
        raise NotAModel(f"{path}: there is no such folder")
    if (path / LATEST).is_file():
        path = path / "checkpoints" / f"global_step_{(path / LATEST).read_text().strip()}"
        if not path.is_dir():
            raise NotAModel(f"{path}: {LATEST} names it, but it is not there")
    if (path / "actor").is_dir():
        return Checkpoint(path / "actor")
    if path.name == "actor" and Checkpoint(path).has_shards:
        return Checkpoint(path)
    if path.name == "merged" and path.parent.name == "actor" and Checkpoint(path.parent).has_shards:
        return Checkpoint(path.parent)
    if (path / "config.json").is_file():
        return path
    raise NotAModel(
        f"{path} is no model: expected a Hugging Face folder (config.json), a checkpoint of verl (global_step_N with "
        f"actor/) or a run's folder ({LATEST})"
    )


def huggingface_folder(found: Checkpoint | Path) -> Path:
    """The Hugging Face folder of what `locate` found; a checkpoint is merged, by verl's own merger.

    It is merged again where the files that it was merged from are no longer what they were, by their contents. Where
    only the merged model is left, that is taken, and said.

    Raises:
        NotAModel: there are no shards and no merged model, or the merger failed; its output is above the message.
    """
    if isinstance(found, Path):
        return found
    is_merged = (found.merged / "config.json").is_file()
    if not found.has_shards:
        if not is_merged:
            raise NotAModel(f"{found.actor}: no {SHARDS} in it, so there is nothing to merge")
        _say(f"{found.merged} is taken as it is: the shards that it was merged from are gone")
        return found.merged
    sources = contents(found.sources, found.actor)
    stale = _stale(found.merged, sources) if is_merged else None
    if stale:
        _say(f"{found.merged} is stale ({stale}): merging again")
    if stale or not is_merged:
        _merge(found, sources)
    return found.merged


def _stale(merged: Path, sources: dict[str, str]) -> str | None:
    """Why a merged model is not of the files that there are now; None if it is."""
    try:
        before = json.loads((merged / MADE_FROM).read_text())
    except (OSError, ValueError) as error:
        return f"{MADE_FROM} cannot be read: {type(error).__name__}"
    names = [name for name in sorted(before.keys() | sources.keys()) if before.get(name) != sources.get(name)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"other than it was merged from: {', '.join(names[:3])}{more}" if names else None


def _merge(found: Checkpoint, sources: dict[str, str]) -> None:
    part = found.merged.with_name("merged.part")
    shutil.rmtree(part, ignore_errors=True)
    merge = ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    merge += ["--local_dir", str(found.actor), "--target_dir", str(part)]
    if subprocess.run([sys.executable, *merge], stdout=sys.stderr).returncode:
        raise NotAModel(f"{found.actor}: verl's merger failed (above)")
    if (part / "lora_adapter").is_dir():
        _apply_adapter(part)
    (part / MADE_FROM).write_text(json.dumps(sources, indent=1))
    if found.merged.is_symlink() or found.merged.exists():
        _remove(found.merged)
    part.rename(found.merged)  # a folder that is there is whole


def _apply_adapter(folder: Path) -> None:
    """verl's merger leaves LoRA beside the base model's weights, which alone are the model before training.

    Raises:
        NotAModel: verl did not know the adapter's scale and wrote 0, with which the adapter does nothing.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "lora_adapter"
    if not json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]:
        raise NotAModel(f"{folder.parent}: LoRA without lora_train_meta.json, so its scale (lora_alpha) is not known")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)


def _say(sentence: str) -> None:
    print(f"vimpo_verl.checkpoint: {sentence}", file=sys.stderr, flush=True)


def main() -> int:
    """Print the Hugging Face folder of the path given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    try:
        print(huggingface_folder(locate(parser.parse_args().path)))
    except NotAModel as error:
        _say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
