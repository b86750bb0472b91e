"""Claim: docs/install.md's ways to install work as far as they need no network, Docker or GPU: a wheel built without an index
is whole, `vimpo check` says yes with it, and no page or message names a package index that this package is not on.

In a uv project too, with a lock of its own. Not claimed: that pip finds the rest in an image, or uv in verl's own lock,
which is for GPUs.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vimpo_verl

ROOT = Path(__file__).parent.parent
PACKAGES = ("vimpo_verl", "verl_patches")
# "pip install ... vimpo_verl" by name, or one of its extras; a path that ends in it is none.
FROM_AN_INDEX = re.compile(
    r"vimpo[_-]verl\[|(pip3?|uv) (install|add|download) [^\n`;]*?(?<![\w./-])vimpo[_-]verl(?![\w./-])"
)
NO_INDEX = ("--disable-pip-version-check", "--no-deps", "--no-index")


def pip(*arguments: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as docs/install.md says, from a copy: setuptools writes beside the sources."""
    clone = tmp_path_factory.mktemp("clone")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, clone / name)
    pip("wheel", *NO_INDEX, "--no-build-isolation", "-w", "wheels", ".", cwd=clone)
    (built,) = (clone / "wheels").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel in it, to stand before this environment's packages."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", *NO_INDEX, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def run_installed(installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=installed, capture_output=True, text=True)


def test_a_wheel_built_without_an_index_has_every_file(wheel):
    assert wheel.name == f"vimpo_verl-{vimpo_verl.__version__}-py3-none-any.whl"
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= set(zipfile.ZipFile(wheel).namelist())
    assert any(not name.endswith(".py") for name in sources), "there are files that setup.py has to name"


def test_the_installed_package_works(installed):
    code = "import vimpo_verl, verl_patches; print(vimpo_verl.__version__, vimpo_verl.__file__, verl_patches.__file__)"
    version, *files = run_installed(installed, "-c", code).stdout.split()
    assert version == vimpo_verl.__version__
    assert all(file.startswith(str(installed)) for file in files)
    done = run_installed(installed, "-m", "vimpo_verl", "check")
    assert done.returncode == 0, done.stdout
    assert f"vimpo_verl: {version}" in done.stdout


@pytest.fixture(scope="module")
def uv():
    """uv, and a caller of it without a network."""
    pytest.importorskip("uv", reason="uv is not installed")
    from uv import find_uv_bin

    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"UV_OFFLINE": "1", "UV_PYTHON_DOWNLOADS": "never"}

    def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        return subprocess.run([find_uv_bin(), *arguments], cwd=cwd, env=env, capture_output=True, text=True)

    return call


def test_a_uv_project_with_verl_gets_the_package_by_uv_pip(uv, wheel, tmp_path):
    """docs/install.md, "In a uv project": a project with a lock of its own, started as verl's examples are.

    Its environment sees verl and what that needs in the tests' own environment, but not vimpo_verl.
    """
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "a-project"\nversion = "0"\nrequires-python = ">=3.10"\n'
    )
    for step in (("venv", "--python", sys.executable, ".venv"), ("lock",)):
        done = uv(*step, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    site = next((tmp_path / ".venv").glob("lib/python*/site-packages"))
    (site / "the_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    before = uv("run", "--frozen", "python", "-m", "vimpo_verl", "check", cwd=tmp_path)
    if before.returncode == 0:
        pytest.skip("this environment has vimpo_verl in its site-packages")
    assert "No module named vimpo_verl" in before.stderr
    assert uv("pip", "install", "--no-deps", str(wheel), cwd=tmp_path).returncode == 0
    checked = uv("run", "--frozen", "vimpo", "check", cwd=tmp_path)
    assert checked.returncode == 0 and "Yes: algorithm.adv_estimator=vimpo works" in checked.stdout, checked.stdout
    where = uv("run", "--frozen", "python", "-c", "import vimpo_verl; print(vimpo_verl.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(site))


def test_the_version_is_the_newest_of_the_changelog():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] in ("Unreleased", vimpo_verl.__version__)
    assert [heading for heading in headings if heading != "Unreleased"][0] == vimpo_verl.__version__
    assert "0.1.0" in headings


def test_no_page_or_message_names_an_index_that_we_are_not_on():
    files = [
        path
        for part in (".", "docs", "examples", "benchmarks", *PACKAGES)
        for path in ((ROOT / part).glob("*") if part == "." else (ROOT / part).rglob("*"))
        if path.suffix in (".py", ".md", ".sh", ".sbatch")
    ]
    assert len(files) > 80
    assert {
        str(path.relative_to(ROOT)): found[0] for path in files if (found := FROM_AN_INDEX.search(path.read_text()))
    } == {}


@pytest.mark.parametrize(
    "text, found",
    [
        ("pip install 'vimpo_verl[math]'", True),
        ("pip install vimpo_verl", True),
        ("uv add vimpo-verl", True),
        ("pip install '.[math]'", False),
        ("uv pip install /path/to/vimpo_verl", False),
        ("pip install wheels/vimpo_verl-*.whl", False),
        ("git clone https://github.com/OWNER/vimpo_verl && cd vimpo_verl", False),
    ],
)
def test_what_is_looked_for_is_found(text, found):
    assert bool(FROM_AN_INDEX.search(text)) == found


def test_the_messages_ask_for_what_the_extra_asks_for():
    (wanted,) = re.findall(r'"math": \["(.+?)"\]', (ROOT / "setup.py").read_text())
    assert f"pip install '{wanted}'" in (ROOT / "vimpo_verl/rewards/math.py").read_text()
    assert Requirement(wanted).name == "math-verify"
