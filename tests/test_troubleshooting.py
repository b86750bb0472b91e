"""docs/troubleshooting.md is keyed by messages: each must be one that this repository or the installed verl really has."""

import re
from pathlib import Path

import pytest
import verl

ROOT = Path(__file__).parent.parent
OF_OTHERS = {  # Hydra, OmegaConf, Python, torch and Ray
    "Unsupported interpolation type vimpo_verl_is_missing_in_the_environment_of_this_process",
    "No module named 'verl_patches'",
    "Could not override 'algorithm.vimpo.beta'",
    "CUDA out of memory",
    "The current node timed out during startup",
}


def messages() -> list[str]:
    """The text in bold code that opens an entry; an entry may have several."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    opening = [line for line in text.splitlines() if line.startswith("**`")]
    return [message for line in opening for message in re.findall(r"\*\*`(.+?)`\*\*", line)]


@pytest.fixture(scope="module")
def sources() -> str:
    """Our code, and verl's that checks or trains, with string literals that run over several lines joined."""
    ours = [
        path
        for folder in ("vimpo_verl", "verl_patches", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch")
    ]
    verl_root = Path(verl.__file__).parent
    theirs = [
        path
        for folder in ("trainer/ppo", "utils", "workers/config", "single_controller")
        for path in (verl_root / folder).rglob("*.py")
    ]
    text = "\n".join(path.read_text(errors="replace") for path in [*ours, *theirs])
    return re.sub(r'"\s*\n\s*f?"', "", text)


def fragments(message: str) -> list[str]:
    """The parts of a message that are the same every time, without the values in it."""
    message = (
        message.replace("'vimpo'", "...")
        .replace(": vimpo", ": ...")
        .replace("GPUs 0", "GPUs ...")
        .replace("GPUs 8", "GPUs ...")
    )
    message = re.sub(r"/guru_math\.parquet|algorithm\.reward_noise: ", "...", message).replace("actor.ppo", "...ppo")
    return [part.strip(" ():'\"`=") for part in message.split("...") if len(part.strip(" ():'\"`=")) > 3]


def test_there_are_messages():
    assert len(messages()) > 20


@pytest.mark.parametrize("message", messages())
def test_message_exists(message, sources):
    if message in OF_OTHERS:
        return
    parts = fragments(message)
    assert parts, "nothing left to look for"
    missing = [part for part in parts if part not in sources]
    assert not missing, f"nobody says {missing}"
