"""Claim: where a virtual cluster cannot be made, the tests of this folder are skipped with the reason by name."""

import virtual_cluster


def test_packages_and_root_are_named(monkeypatch):
    monkeypatch.setattr(virtual_cluster.shutil, "which", lambda command: None if command == "munged" else f"/{command}")
    monkeypatch.setattr(virtual_cluster.os, "geteuid", lambda: 1000)
    assert virtual_cluster.missing() == ["the package munge", "root"]


def test_a_repository_under_tmp_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(virtual_cluster.shutil, "which", lambda command: f"/{command}")
    monkeypatch.setattr(virtual_cluster.os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        virtual_cluster.subprocess, "run", lambda *_, **__: virtual_cluster.subprocess.CompletedProcess("", 0)
    )
    monkeypatch.setattr(virtual_cluster, "ROOT", virtual_cluster.Path("/tmp/clone"))
    assert "a place outside /tmp, which is each node's own, for /tmp/clone" in virtual_cluster.missing()
