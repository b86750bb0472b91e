"""Claim: `vimpo check` says yes only where the switch would work, and otherwise names what is missing and what to do."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import verl  # noqa: F401  loads the plugin before a test here hides the entry points from it

from verl_patches import seams
from vimpo_verl import check


def run_check(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vimpo_verl", "check"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def failures(findings) -> list[str]:
    return [f"{finding.subject}: {finding.text}" for finding in findings if finding.verdict == check.FAIL]


def test_says_yes_here():
    done = run_check()
    assert done.returncode == 0, done.stdout
    assert "0.9.1, tested" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "in force by" in line]
    assert len(lines) == len(seams.SEAMS)
    for seam, line in zip(seams.SEAMS, lines, strict=True):
        assert f"'{seam.name}'" in line and seam.until and seam.until in line and seam.upstream in line
    assert "'vimpo' is vimpo_verl.registrations.vimpo_advantage" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Yes:")


def test_plugins_switched_off():
    done = run_check(VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "VERL_USE_EXTERNAL_PLUGINS=none; unset it or name vimpo in it" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("No:")


def test_verl_absent(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(check.metadata, "version", version)
    (failure,) = failures(check.run_checks())
    assert "verl: not installed here" in failure and "pip install verl==" in failure


def test_entry_point_missing(monkeypatch):
    monkeypatch.setattr(check.metadata, "entry_points", lambda group: [])
    (failure,) = failures(check.run_checks())
    assert "no 'vimpo' in group verl.plugins" in failure and "pip install" in failure


def test_broken_plugin(monkeypatch):
    """verl swallowed the error of the import; the check reproduces and names it."""
    monkeypatch.delitem(sys.modules, "vimpo_verl.plugin", raising=False)
    real = check.importlib.import_module

    def import_module(name):
        if name == "vimpo_verl.plugin":
            raise ImportError("no such thing as half a wrapt")
        return real(name)

    monkeypatch.setattr(check.importlib, "import_module", import_module)
    (failure,) = failures(check.run_checks())
    assert "it cannot be imported: ImportError: no such thing as half a wrapt" in failure


def test_broken_plugin_is_printed_when_verl_loads_it(monkeypatch, capsys):
    monkeypatch.setattr(seams, "hook_all", lambda: 1 / 0)
    monkeypatch.delitem(sys.modules, "vimpo_verl.plugin", raising=False)
    with pytest.raises(ZeroDivisionError):
        __import__("vimpo_verl.plugin")
    assert "vimpo_verl could not be loaded" in capsys.readouterr().err


def test_untested_verl_is_a_note(monkeypatch):
    monkeypatch.setattr(seams, "TESTED_VERL", ("0.0.1",))
    findings = check.run_checks()
    assert not failures(findings)
    assert any(f.verdict == check.NOTE and "not a tested version (0.0.1)" in f.text for f in findings)


def test_seam_that_failed_is_named(monkeypatch):
    seam = seams.SEAMS[0]
    monkeypatch.setattr(seams, "_in_force", {other.name for other in seams.SEAMS[1:]})
    monkeypatch.setattr(seams, "_failures", {seam.name: "AttributeError: gone in this verl"})
    (failure,) = failures(check.run_checks())
    assert seam.name in failure and "gone in this verl" in failure
