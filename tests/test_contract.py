"""Claim: every verl function, signature, registry, configuration key and stored field that we rely on is there.

One test a thing, whose failure names the seam, the place in verl and what changed: a new verl breaks a line here and
not a training run. Names that our modules import from verl are collected from their source; the rest is the table in
contract.py. Not claimed: that verl does the same behind the same names; the engine and end-to-end tests are for that.
"""

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl
from contract import ANY, CONFIG_KEYS, CONTRACT
from contract_checks import Called, Derives, Holds, Mentions, Parameters, find
from omegaconf import OmegaConf
from test_validation import compose

from verl_patches import seams

ROOT = Path(__file__).parent.parent


def imported_from_verl() -> list[tuple[str, str]]:
    """(file of ours, "module:name" of verl's) for every import in the source, also inside functions."""
    found = set()
    for folder in ("verl_patches", "vimpo_verl"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("verl", "transfer_queue"):
                    found |= {(str(path.relative_to(ROOT)), f"{node.module}:{alias.name}") for alias in node.names}
                elif isinstance(node, ast.Import):
                    names = [
                        alias.name for alias in node.names if alias.name.split(".")[0] in ("verl", "transfer_queue")
                    ]
                    found |= {(str(path.relative_to(ROOT)), name) for name in names}
    return sorted(found)


INSTALLED_FOR_FEW = ("megatron",)  # what some of verl's modules import and most environments lack


def defined_in_source(module: str) -> set[str]:
    """Functions and classes of a module that can't be imported here."""
    source = Path(importlib.util.find_spec(module).origin).read_text()
    return {node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


RELIED_ON = [(seam, place, wanted) for seam, lines in CONTRACT.items() for place, wanted in lines]


@pytest.mark.parametrize("seam, place, wanted", RELIED_ON, ids=[f"{s}-{p}-{type(w).__name__}" for s, p, w in RELIED_ON])
def test_seam(seam, place, wanted):
    try:
        problem = wanted.problem(find(place))
    except (ImportError, AttributeError) as error:
        problem = f"it is gone ({error})"
    assert problem is None, f"seam '{seam}', verl {verl.__version__}: {place}: {problem}"


@pytest.mark.parametrize("file, place", imported_from_verl(), ids=str)
def test_import(file, place):
    module, _, name = place.partition(":")
    try:
        found = importlib.import_module(module)
        assert not name or hasattr(found, name) or importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in INSTALLED_FOR_FEW:
            pytest.fail(f"{file} imports {place}, which verl {verl.__version__} no longer has: {error}")
        assert name in defined_in_source(module), f"{file} imports {place}, which verl {verl.__version__} no longer has"
    except ImportError as error:
        pytest.fail(f"{file} imports {place}, which verl {verl.__version__} no longer has: {error}")


@pytest.fixture(scope="module")
def verls_configuration():
    return compose()


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_configuration_key(verls_configuration, key):
    parent, _, name = key.rpartition(".")
    section = OmegaConf.select(verls_configuration, parent)
    where = f"seam 'validation in the driver', verl {verl.__version__}: {key}"
    assert section is not None and name in section, f"{where}: verl's configuration no longer has it"
    if CONFIG_KEYS[key] is not ANY:
        assert section[name] == CONFIG_KEYS[key], (
            f"{where}: the default was {CONFIG_KEYS[key]!r}, now {section[name]!r}"
        )


def test_verl_loads_plugins_by_entry_point():
    code = "import sys, verl; sys.exit('vimpo_verl.plugin' not in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "auto"})
    assert done.returncode == 0, (
        f"entry point, verl {verl.__version__}: `import verl` no longer loads the group verl.plugins"
    )


def test_every_seam_has_its_contract():
    assert {seam.name for seam in seams.SEAMS} == {name for name in CONTRACT if not name.startswith("cpu: ")}


def test_a_change_is_named():
    """The three kinds of check say what changed."""

    def step(self, batch, new):
        return batch["other_field"]

    assert "now ('self', 'batch', 'new')" in Parameters(("self", "batch", "metrics")).problem(step)
    assert "missing a required argument: 'new'" in Called(2).problem(step)
    assert Mentions(("other_field", "rm_scores")).problem(step) == "its code no longer has rm_scores"
    assert Holds(("sync", "gone")).problem({"sync": 1}) == "it no longer has gone"
    assert "does not derive" in Derives("verl_patches.cpu.platform:PlatformCPU").problem(int)
