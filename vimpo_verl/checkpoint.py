"""From whatever names a model (a run's folder, a checkpoint of verl, a Hugging Face folder) to a Hugging Face folder.

`python -m vimpo_verl.checkpoint PATH` does it on the command line and prints the folder.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LATEST = "checkpoints/latest_checkpointed_iteration.txt"
# What the tools of this package make of a checkpoint, inside its global_step_N: worth nothing once the step is saved again.
DERIVED = ("actor/merged", "actor/merged.part", "evaluation")


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


def remove_derived(step: Path) -> list[Path]:
    """Remove what was made of a checkpoint whose shards are about to be written again.

    Args:
        step: global_step_N, which need not exist.

    Returns:
        What there was and is gone. Of a symbolic link the link alone.
    """
    found = [path for path in (step / name for name in DERIVED) if path.is_symlink() or path.is_dir()]
    for path in found:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    return found


def locate(path: Path) -> Checkpoint | Path:
    """The checkpoint, or the Hugging Face folder, that a path names. Nothing is written.

    Args:
        path: a run's folder (its last checkpoint counts), .../global_step_N, .../global_step_N/actor, or a Hugging Face
            folder.

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
    if path.name == "actor" and list(path.glob("model_world_size_*_rank_*.pt")):
        return Checkpoint(path)
    if (path / "config.json").is_file():
        return path
    raise NotAModel(
        f"{path} is no model: expected a Hugging Face folder (config.json), a checkpoint of verl (global_step_N with "
        f"actor/) or a run's folder ({LATEST})"
    )


def huggingface_folder(found: Checkpoint | Path) -> Path:
    """The Hugging Face folder of what `locate` found; a checkpoint is merged the first time, by verl's own merger.

    Raises:
        NotAModel: the merger failed; its output is above the message.
    """
    if isinstance(found, Path):
        return found
    if not (found.merged / "config.json").is_file():
        part = found.merged.with_name("merged.part")
        shutil.rmtree(part, ignore_errors=True)
        merge = ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
        merge += ["--local_dir", str(found.actor), "--target_dir", str(part)]
        if subprocess.run([sys.executable, *merge], stdout=sys.stderr).returncode:
            raise NotAModel(f"{found.actor}: verl's merger failed (above)")
        if (part / "lora_adapter").is_dir():
            _apply_adapter(part)
        part.rename(found.merged)  # a folder that is there is whole
    return found.merged


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


def main() -> int:
    """Print the Hugging Face folder of the path given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    try:
        print(huggingface_folder(locate(parser.parse_args().path)))
    except NotAModel as error:
        print(f"vimpo_verl.checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
