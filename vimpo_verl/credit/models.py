"""The two models: loading them, and what must hold for their distributions to be compared."""

from dataclasses import dataclass
from pathlib import Path

from vimpo_verl.checkpoint import Checkpoint, NotAModel, huggingface_folder, locate


@dataclass(frozen=True)
class Described:
    """A model before its weights are read."""

    found: Checkpoint | Path
    config: object
    tokenizer: object


def describe(path: Path, which: str) -> tuple[Described | None, list[str]]:
    """Configuration and tokenizer of a model, or what is wrong with it.

    Args:
        path: what `vimpo_verl.checkpoint.locate` takes, or the name of a model in Hugging Face's cache, where training
            has put it. Nothing is downloaded.
        which: how messages call it.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        found = locate(path if path.exists() else _cached(path))
    except NotAModel as error:
        return None, [f"{which}: {error}"]
    folder = found.tokenizer if isinstance(found, Checkpoint) else found
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        return None, [f"{which}: {folder}: no configuration that transformers can read: {error}"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        return None, [f"{which}: {folder}: no tokenizer that transformers can read: {error}"]
    return Described(found, config, tokenizer), []


def _cached(name: Path) -> Path:
    """Where Hugging Face's cache has the model of that name; the name itself if it does not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return name


def differences(policy: Described, reference: Described) -> list[str]:
    """Why the two models' distributions cannot be compared token by token; nothing where they can."""
    problems = []
    sizes = tuple(model.config.get_text_config().vocab_size for model in (policy, reference))
    if sizes[0] != sizes[1]:
        problems.append(
            f"the models have {sizes[0]} (policy) and {sizes[1]} (reference) vocabulary entries, not as many"
        )
    ours, theirs = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if ours != theirs:
        entry = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        problems.append(
            f"the models' tokenizers differ, for example in {entry!r}: {ours.get(entry, 'missing')} (policy), "
            f"{theirs.get(entry, 'missing')} (reference). The reference must be the model that training started from"
        )
    return problems


def load_pair(policy: Described, reference: Described, device: str | None, dtype: str) -> list:
    """Both causal language models, ready to score; a checkpoint is merged first.

    Args:
        policy, reference: what to load.
        device: None: cuda if there is one, else cpu.
        dtype: of the weights, by its name in torch.

    Raises:
        ValueError: a checkpoint cannot be merged.
    """
    import torch

    try:
        folders = [huggingface_folder(model.found) for model in (policy, reference)]
    except NotAModel as error:
        raise ValueError(str(error)) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return [_load(folder, device, dtype) for folder in folders]


def _load(folder: Path, device: str, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
