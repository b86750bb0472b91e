"""Claim: the documentation says what the code does: defaults, knobs and metrics are those of the code; the README's whole
command is one that verl accepts; the workflow runs the README's commands; what a page names is there.
"""

import importlib.util
import inspect
import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from test_validation import compose, validate

from verl_patches.family import FAMILY
from vimpo_verl.batch import compute_batch
from vimpo_verl.config import PAPER_RECIPE, VimpoConfig, parse_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()


def knob_table(estimator: str) -> dict[str, str]:
    """Name -> default, as the table under the heading says."""
    section = CONFIGURATION.split(f"| knob under `algorithm.{estimator}`")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE))


@pytest.mark.parametrize("estimator", FAMILY)
def test_configuration_table_has_every_knob_with_its_default(estimator):
    defaults, problems = FAMILY[estimator].parse_config(None)
    assert not problems
    assert knob_table(estimator) == {field.name: str(field.default) for field in fields(defaults)}


def test_papers_recipe_is_written_as_the_code_has_it():
    options = re.findall(
        r"\+algorithm\.vimpo\.(\w+)=([\w.-]+)", CONFIGURATION.split("## The paper's recipe")[1].split("##")[0]
    )
    given = {"true": True, "false": False, "null": None}
    *word, one, two, three, four = options
    assert word == [("preset", "paper")]
    config, problems = parse_config({name: given.get(value, value) for name, value in (one, two, three, four)})
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
    of_the_trainer = {
        "vimpo/reference_refreshed",
        "vimpo/value_loss",
        "vimpo/actor_loss",
        "vimpo/missing_responses",
        "vimpo/update_skipped",
    }
    assert documented_metrics("vimpo") == {*batch.metrics, *of_the_trainer}


def documented_metrics(estimator: str) -> set[str]:
    page = (ROOT / "docs/metrics.md").read_text()
    return set(re.findall(rf"^\| `({estimator}/\w+)`", page, flags=re.MULTILINE))


def test_every_metric_of_pacs_is_explained():
    """tests/test_pacs_run.py sees them in a run."""
    worker = (ROOT / "verl_patches/pacs_worker.py").read_text()
    of_the_worker = set(re.findall(r'"(pacs/\w+)"', worker))
    assert len(of_the_worker) == 3
    assert documented_metrics("pacs") == {*of_the_worker, "pacs/missing_responses"}


def blocks(text: str) -> list[str]:
    """The shell commands of a page."""
    return re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), f"links to {target}"
    folders = "docs|examples|tests|benchmarks|vimpo_verl|verl_patches"
    named = re.findall(rf"`((?:{folders})/[\w/.]+)`", text)
    named += [path for block in blocks(text) for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.]+)", block)]
    missing = [path for path in named if not (ROOT / path).exists() and not path.startswith("benchmarks/results")]
    assert missing == []


def test_clone_addresses_are_placeholders():
    """Nobody knows who publishes this copy; an address that is wrong is somebody else's."""
    addresses = [
        address for page in PAGES for address in re.findall(r"(?:https?|git|ssh)[:@]\S+/vimpo_verl", page.read_text())
    ]
    assert set(addresses) == {"https://github.com/OWNER/vimpo_verl"}


@pytest.fixture(params=["vimpo", "grpo"])
def arguments_of_the_readme(request, tmp_path) -> list[str]:
    """What bash hands to verl in the README's whole command; `python` is a stub that writes its arguments down."""
    (block,) = [block for block in blocks(README) if "verl.trainer.main_ppo" in block]
    assert block.count("ESTIMATOR=vimpo\n") == 1
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n[ "$1" != -m ] || printf "%s\\n" "$@" >{tmp_path}/arguments\n')
    stub.chmod(0o755)
    block = block.replace("ESTIMATOR=vimpo", f"ESTIMATOR={request.param}")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", block], env=env, cwd=tmp_path, check=True)
    _, module, *overrides = (tmp_path / "arguments").read_text().splitlines()
    assert module == "verl.trainer.main_ppo" and f"algorithm.adv_estimator={request.param}" in overrides
    return overrides


def test_the_whole_command_is_accepted_by_verl(arguments_of_the_readme):
    config = compose(*arguments_of_the_readme, base=[])
    validate(config)
    name = config.algorithm.adv_estimator
    assert config.trainer.experiment_name == name, "or one run would resume from the other's checkpoints"
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == ("vimpo" if name == "vimpo" else "vanilla")


def test_the_whole_command_reads_what_its_first_line_writes(arguments_of_the_readme):
    config = compose(*arguments_of_the_readme, base=[])
    sets = re.search(r"prepare_data.py --sets ([\w ]+?) *#", README).group(1).split()
    files = [Path(config.data.train_files), Path(config.data.val_files)]
    assert [file.stem for file in files] == sets
    assert all(file.parts[-3:-1] == ("outputs", "data") and file.is_absolute() for file in files)
    spec = importlib.util.spec_from_file_location("math_sources", ROOT / "examples/math/math_sources.py")
    math_sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(math_sources)
    assert set(sets) <= set(math_sources.SOURCES)


def test_the_line_that_shows_that_it_is_on_is_one_that_the_code_prints():
    (line,) = re.findall(r"It is on when the log says `(.+?) \.\.\.`", README)
    sources = "".join(path.read_text() for path in (ROOT / "verl_patches").glob("*.py"))
    assert re.search(rf'print\([^)]*f".*{line.replace("VIMPO", "{self.member.title}", 1)} ', sources)


def test_the_workflow_runs_the_readmes_two_commands():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step and "if" not in step]
    clone, *wanted = blocks(README)[0].splitlines()
    assert clone.startswith("git clone") and len(wanted) == 2
    assert commands == [line.split("  #")[0].strip() for line in wanted]


def test_gpus_are_claimed_where_they_were_used():
    unused = "not yet run on a GPU" in (ROOT / "docs/compatibility.md").read_text()
    for page in ("README.md", "docs/install.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert ("no whole run has been on a GPU yet" in text) == unused, page


def test_what_the_reference_takes_is_what_verl_gives_it():
    """docs/install.md: float32 by default, in host memory whatever param_offload says."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    text = " ".join((ROOT / "docs/install.md").read_text().split("## What the reference takes")[1].split())
    config = compose("actor_rollout_ref.rollout.name=vllm", base=[]).actor_rollout_ref.ref.fsdp_config
    assert (config.model_dtype, config.param_offload, config.forward_only) == ("fp32", False, True)
    assert "parameters x 4 bytes" in text and "fsdp_config.param_offload`, false by default, changes nothing" in text
    source = " ".join(inspect.getsource(inspect.unwrap(FSDPEngine._build_fsdp_module)).split())
    assert "if self.engine_config.forward_only: cpu_offload = CPUOffload(offload_params=True)" in source
    fsdp2 = source.split("if self.engine_config.offload_policy or self.engine_config.forward_only:")[1]
    assert fsdp2.split("=")[:2] == [" self._is_offload_param ", " False self._is_offload_optimizer "]
    assert "offload_policy = CPUOffloadPolicy(pin_memory=True)" in fsdp2.split("fsdp_kwargs")[0]
