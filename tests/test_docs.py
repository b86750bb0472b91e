"""Claim: the documentation says what the code does: defaults, knobs, metrics and seams are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

import torch

from vimpo_verl.batch import compute_batch
from vimpo_verl.config import PAPER_RECIPE, VimpoConfig, parse_config

ROOT = Path(__file__).parent.parent
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()


def knob_table() -> dict[str, str]:
    """Name -> default, as the table under the heading says."""
    section = CONFIGURATION.split("| knob under `algorithm.vimpo`")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE))


def test_configuration_table_has_every_knob_with_its_default():
    assert knob_table() == {field.name: str(field.default) for field in fields(VimpoConfig)}


def test_papers_recipe_is_written_as_the_code_has_it():
    options = re.findall(
        r"\+algorithm\.vimpo\.(\w+)=(\S+)", CONFIGURATION.split("## The paper's recipe")[1].split("##")[0]
    )
    given = {"true": True, "false": False}
    config, problems = parse_config({name: given.get(value, value) for name, value in options})
    assert not problems
    assert config == VimpoConfig(**PAPER_RECIPE)


def test_every_metric_is_explained():
    batch = compute_batch(
        old_log_prob=torch.zeros(4, 3),
        ref_log_prob=torch.full((4, 3), -0.1),
        token_kl=torch.zeros(4, 3),
        response_mask=torch.ones(4, 3),
        outcome=torch.tensor([0.0, 1.0, 1.0, 0.0]),
        group=["a", "a", "b", "b"],
        config=VimpoConfig(),
        lam=1.0,
    )
    of_the_trainer = {"vimpo/value_loss", "vimpo/actor_loss", "vimpo/missing_responses", "vimpo/update_skipped"}
    documented = set(re.findall(r"^\| `(vimpo/\w+)`", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    assert documented == {*batch.metrics, *of_the_trainer}


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for path in re.findall(
            r"`((?:docs|examples|tests|benchmarks|vimpo_verl|verl_patches)/[\w/.]+)`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
