"""Claim: the table of verl's scripts and the README's fraction are what tests/compatibility/recipes.py found, and hold today.

Scripts of every habit (uv, ray job submit, variables they ask for, ulimit, a search for a device) in a small checkout, run as the
tool runs them: module and arguments are found, nothing else is started and nothing outside is written. What a newer verl's script
has that this one does not know is left out by name. The kept settings of every script of verl, put through the checks as they are
now, give what the table says.
"""

import ast
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "compatibility"
sys.path.insert(0, str(FOLDER))

import backing  # noqa: E402
import recipe_scripts  # noqa: E402
import recipes  # noqa: E402
import recipes_page  # noqa: E402

RESULTS = json.loads(recipes_page.RESULTS.read_text())
RECIPES = [recipe for checkout in RESULTS["checkouts"] for recipe in checkout["recipes"]]

SCRIPTS = {
    "uv": """set -xeuo pipefail
DEVICE=${DEVICE:-$(python3 -c 'import torch_npu' 2>/dev/null && echo npu || echo gpu)}
ulimit -n 1048576
ARGUMENTS=(algorithm.adv_estimator=grpo "data.train_files=['$HOME/a b.parquet']" trainer.device=$DEVICE)
LAUNCH=(uv run --frozen --extra vllm python3)
"${LAUNCH[@]}" -m verl.trainer.main_ppo "${ARGUMENTS[@]}" "$@"
""",
    "ray": """ray job submit --no-wait --runtime-env=a.yaml -- python3 -m verl.trainer.main_ppo \\
    --config-name=ppo_megatron_trainer.yaml trainer.nnodes=$NNODES
""",
    "asks": """set -u
MODEL=${MODEL:?where is it}
python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=$MODEL actor_rollout_ref.rollout.name=$INFER_BACKEND
""",
    "other": "torchrun --nproc_per_node=1 -m verl.trainer.sft_trainer data.path=x\n",
    "writes": """python3 -c 'open("made", "w")'; curl -s http://example.org >made; pip install something; touch made
nsys profile python3 -m verl.trainer.main_ppo trainer.n_gpus_per_node=$(nproc --all >/dev/null; echo 8)
""",
    "silent": "echo nothing here >&2; exit 3\n",
    "hangs": "while true; do sleep 1; done\n",
}


@pytest.fixture
def sandbox(tmp_path):
    checkout = tmp_path / "checkout"
    for name, text in SCRIPTS.items():
        script = checkout / "examples" / f"{name}.sh"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
    (tmp_path / "place").mkdir()
    made = recipe_scripts.Sandbox(checkout, tmp_path / "place")
    made.checkout = checkout
    return made


def run(sandbox, name):
    return sandbox.run(Path("examples") / f"{name}.sh")


def test_what_a_script_would_start_is_found(sandbox):
    (command,) = run(sandbox, "uv").commands
    arguments = (
        "algorithm.adv_estimator=grpo",
        f"data.train_files=['{sandbox.home}/a b.parquet']",
        "trainer.device=gpu",
    )
    assert command == recipe_scripts.Command("uv", "verl.trainer.main_ppo", arguments)
    ran = run(sandbox, "ray")
    assert ran.commands[0].arguments == ("--config-name=ppo_megatron_trainer.yaml", "trainer.nnodes=")
    assert run(sandbox, "other").commands[0].module == "verl.trainer.sft_trainer"


def test_variables_that_it_asks_for_are_given_and_named(sandbox):
    ran = run(sandbox, "asks")
    assert ran.given == ("MODEL", "INFER_BACKEND")
    assert ran.commands[0].arguments == ("actor_rollout_ref.model.path=1", "actor_rollout_ref.rollout.name=vllm")


def test_nothing_else_is_started_and_the_checkout_is_left_alone(sandbox):
    before = sorted(path.name for path in sandbox.checkout.rglob("*"))
    (command,) = run(sandbox, "writes").commands
    assert command.launcher == "nsys" and command.arguments == ("trainer.n_gpus_per_node=8",)
    assert sorted(path.name for path in sandbox.checkout.rglob("*")) == before
    assert not {"curl", "pip", "git", "ssh", "wget"} & {path.name for path in sandbox.bin.iterdir()}


def test_a_script_that_starts_nothing_says_why(sandbox, monkeypatch):
    assert run(sandbox, "silent") == recipe_scripts.ScriptRun((), (), "nothing here")
    monkeypatch.setattr(recipe_scripts, "SECONDS", 1)
    assert run(sandbox, "hangs").error == "nothing was started in 1 s"


def test_what_this_verl_does_not_know_is_left_out_by_name():
    location, overrides = recipes.split(
        (
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.actor.of_a_newer_verl=1",
            "+actor_rollout_ref.actor.optim.lr=1e-5",
            "+actor_rollout_ref.actor.policy_loss.of_a_newer_verl=2",
            "actor_rollout_ref.actor.use_dynamic_bsz=True",
        )
    )
    config, changed = recipes.mend(overrides, location)
    assert sorted(changed) == sorted(overrides[1:4])
    actor = config.actor_rollout_ref.actor
    assert (config.algorithm.adv_estimator, actor.optim.lr, actor.use_dynamic_bsz) == ("grpo", 1e-5, True)


def test_an_engine_of_another_package_is_named_and_refused():
    location, overrides = recipes.split(("algorithm.adv_estimator=grpo", "actor@actor_rollout_ref.actor=mlite_actor"))
    command = recipe_scripts.Command("python3", recipes.MAIN, tuple(overrides))
    recipe = recipes.check("a.sh", recipe_scripts.ScriptRun((command,)), command)
    assert (recipe.engine, recipe.plain) == ("mlite", True) and location[1] == "ppo_trainer"
    assert recipe.refused == ["actor_rollout_ref.actor.strategy=mlite"]


def test_a_configuration_that_does_not_compose_counts_as_that():
    command = recipe_scripts.Command("python3", recipes.MAIN, ("--config-name=of_a_recipe", "algorithm.lam=1.0"))
    recipe = recipes.check("a.sh", recipe_scripts.ScriptRun((command,)), command)
    assert recipe.engine == "?" and recipe.verdict.startswith("does not compose: ")
    assert not recipes_page.accepted({"engine": "?", "refused": []})


def test_the_pages_are_what_the_results_make():
    page, readme = recipes_page.PAGE.read_text(), recipes_page.README.read_text()
    assert recipes_page.BEGIN in page and recipes_page.END in page
    assert recipes_page.with_section(page, recipes_page.render(RESULTS)) == page, (
        "run tests/compatibility/recipes_page.py"
    )
    assert len(recipes_page.FRACTION.findall(readme)) == 1
    assert recipes_page.with_fraction(readme, RESULTS) == readme, "run tests/compatibility/recipes_page.py"


def distinct() -> list[dict]:
    """One script of verl for each combination of engine and kept settings."""
    return list({(r["engine"], str(sorted(r["settings"].items()))): r for r in RECIPES if r["engine"] != "?"}.values())


@pytest.mark.parametrize("engine", sorted({recipe["engine"] for recipe in distinct()}))
def test_the_table_holds_with_the_checks_as_they_are_now(engine):
    """After a change of what is refused: tests/compatibility/recipes.py --again."""
    for recipe in distinct():
        if recipe["engine"] == engine:
            now = recipes.again(recipe)
            assert (recipe["script"], now["refused"]) == (recipe["script"], recipe["refused"])


ENGINES = {"FSDP1 or FSDP2", "FSDP-Turbo", "VeOmni", "Megatron"}


def test_every_acceptance_has_a_test_of_its_engine_and_no_setting_that_nobody_has_looked_at():
    taking = [recipe for recipe in RECIPES if recipes_page.accepted(recipe)]
    assert len(taking) > 74
    for recipe in taking:
        engines = [path for path in backing.paths_of(recipe) if path.name in ENGINES]
        assert len(engines) == 1 and engines[0].tests, recipe["script"]
        assert backing.unclassified(recipe) == [], recipe["script"]


@pytest.mark.parametrize("path", backing.PATHS, ids=[path.name for path in backing.PATHS])
def test_what_backs_a_path_exists(path):
    assert (path.level == backing.NOT_RUN) == (path.tests == ())
    for test in path.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((FOLDER.parent / file).read_text())
        assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_what_has_not_run_of_a_script_is_in_its_row():
    recipe = next(r for r in RECIPES if r["script"].endswith("grpo_trainer/run_qwen2_5_vl_7b_megatron.sh"))
    (row,) = [line for line in recipes_page.PAGE.read_text().splitlines() if "/run_qwen2_5_vl_7b_megatron.sh |" in line]
    assert backing.not_run(recipe) == ["images on Megatron (Qwen2.5-VL)"] and backing.not_run(recipe)[0] in row
