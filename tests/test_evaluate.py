"""vimpo_verl.evaluation and examples/math/evaluate.*, without vLLM.

Claimed: pass@k is unbiased, majority and bootstrap are what they are called; evaluate.sh finds the checkpoint and
merges it once, and again when its shards have changed; responses of another model, other prompts or settings are not
taken for those asked for, and results are of the data and reward asked for. Not claimed here: generation by vLLM.
"""

import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vimpo_verl.evaluation import bootstrap, majority, pass_at_k, summary

ROOT = Path(__file__).parent.parent

_spec = importlib.util.spec_from_file_location("evaluate", ROOT / "examples/math/evaluate.py")
evaluate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(evaluate)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        for right in range(n + 1) if k <= n else ():
            subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("right", "samples", "k"), [(3, 2, 1), (-1, 2, 1), (1, 2, 3), (1, 2, 0)])
def test_pass_at_k_refuses(right, samples, k):
    with pytest.raises(ValueError, match="must be in"):
        pass_at_k(right, samples, k)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["4", "5"], [True, False], 0.5),
        (["4", "", "", ""], [True, False, False, False], 1.0),
        (["", ""], [False, False], 0.0),
    ],
)
def test_majority(answers, right, expected):
    assert majority(answers, right) == expected


def test_bootstrap_covers_as_often_as_it_says():
    generator = random.Random(0)
    covered = 0
    for trial in range(300):
        values = [float(generator.random() < 0.3) for _ in range(100)]
        estimate = bootstrap(values, confidence=0.9, resamples=500, seed=trial)
        assert estimate.low <= estimate.value <= estimate.high
        covered += estimate.low <= 0.3 <= estimate.high
    assert abs(covered / 300 - 0.9) < 0.06


def test_bootstrap_is_the_same_every_time_and_refuses_nothing():
    assert bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="no questions"):
        bootstrap([])


def test_summary():
    questions = [
        (["a", "a", "b", "c"], [True, True, False, False]),
        (["x", "y", "y", "y"], [True, False, False, False]),
    ]
    result = summary(questions)
    assert list(result) == ["avg@4", "pass@1", "pass@2", "pass@4", "majority@4"]
    assert result["avg@4"]["value"] == result["pass@1"]["value"] == pytest.approx(3 / 8)
    assert result["pass@2"]["value"] == pytest.approx((1 - 1 / 6 + 0.5) / 2)
    assert result["majority@4"]["value"] == 0.5
    with pytest.raises(ValueError, match="same number of samples"):
        summary([(["a"], [True]), (["a", "b"], [True, False])])


def test_scores_of_both_kinds_of_reward_function():
    question = {"data_source": "s", "ground_truth": "4", "index": 0, "responses": ["4", "5"]}
    for function in (
        lambda s, r, g, e: float(r == g),
        lambda s, r, g, e: {"score": 9, "acc": float(r == g), "pred": r},
    ):
        (row,) = evaluate.scored([question], function)
        assert row["accs"] == [1.0, 0.0] and row["preds"] == ["4", "5"]


def test_table_and_missing_data(tmp_path, capsys):
    text = evaluate.table({"aime": summary([(["a", "b"], [True, False])])})
    assert "| aime | 50.0 (50.0 to 50.0) | 50.0" in text and "majority@2" in text
    assert evaluate.main(["--model", "m", "--data", str(tmp_path / "aime.parquet"), "--out", str(tmp_path)]) == 2
    assert "prepare_data.py" in capsys.readouterr().err


def test_script_merges_the_last_checkpoint_once_and_again_when_it_changes(tmp_path):
    """Stand-ins: verl's merger writes its arguments down and leaves a configuration; evaluate.py only the former."""
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl/__init__.py").touch()
    (tmp_path / "verl/model_merger.py").write_text(
        "import os, pathlib, sys\n"
        "open(os.environ['CALLS'], 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "target = pathlib.Path(sys.argv[sys.argv.index('--target_dir') + 1])\n"
        "target.mkdir()\n"
        "(target / 'config.json').touch()\n"
    )
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/bash\n[[ $1 != -m ]] || PYTHONPATH={tmp_path}:{ROOT} exec {sys.executable} "$@"\n'
        'echo "$@" >>"$CALLS"\n'
    )
    stub.chmod(0o755)
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "global_step_40/actor").mkdir(parents=True)
    (checkpoints / "global_step_20/actor").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("40")
    shard = checkpoints / "global_step_40/actor/model_world_size_1_rank_0.pt"
    shard.write_bytes(b"weights")
    env = {**os.environ, "PYTHON": str(stub), "CALLS": str(tmp_path / "calls"), "SETS": "aime2024", "DATA": "/data"}
    command = ["bash", str(ROOT / "examples/math/evaluate.sh")]
    for _ in range(2):
        subprocess.run([*command, str(tmp_path / "run"), "--seed", "3"], env=env, check=True)
    actor = checkpoints / "global_step_40/actor"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3, "one merge, two evaluations"
    assert calls[0] == f"merge --backend fsdp --local_dir {actor} --target_dir {actor}/merged.part"
    assert f"--model {actor}/merged --data /data/aime2024.parquet --out {actor.parent}/evaluation" in calls[1]
    assert calls[1].endswith("--n 32 --tensor-parallel 1 --seed 3")
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(b"WEIGHTS")
    os.utime(shard, ns=times)
    done = subprocess.run([*command, f"{actor}/merged"], env=env, check=True, capture_output=True, text=True)
    assert "stale (other than it was merged from: model_world_size_1_rank_0.pt): merging again" in done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.startswith("merge ") for call in calls] == [True, False, False, True, False]
    assert f"--model {actor}/merged" in calls[-1] and f"--out {actor.parent}/evaluation" in calls[-1]
    shard.unlink()
    done = subprocess.run([*command, str(tmp_path / "run")], env=env, check=True, capture_output=True, text=True)
    assert "is taken as it is: the shards that it was merged from are gone" in done.stderr
    done = subprocess.run([*command, str(checkpoints / "global_step_20")], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "so there is nothing to merge" in done.stderr
    done = subprocess.run([*command, str(checkpoints / "global_step_60")], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "global_step_60: there is no such folder" in done.stderr
    done = subprocess.run([*command, str(checkpoints)], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "is no model: expected a Hugging Face folder" in done.stderr
    subprocess.run([*command, "Qwen/Qwen3-4B-Base"], env=env, check=True)
    assert "--model Qwen/Qwen3-4B-Base" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_a_tiny_run_is_evaluated_with_its_own_reward_and_lengths(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$VLLM_CPU_KVCACHE_SPACE" "$@" >"$CALLS"\n')
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub), "CALLS": str(tmp_path / "calls")}
    script = ROOT / "examples/tiny/evaluate_tiny.sh"
    subprocess.run(["bash", str(script), "some/model", "--limit", "3"], env=env, check=True)
    kv_cache, _, *arguments = (tmp_path / "calls").read_text().splitlines()
    assert kv_cache == "1"
    given = evaluate._parser().parse_args(arguments)
    assert (given.model, given.limit, given.n) == ("some/model", 3, 8)
    assert given.data == [ROOT / "outputs/tiny/data/test.parquet"]
    assert evaluate.load_function(given.reward)("", "1", "1") == 1.0
    assert given.engine["enforce_eager"] is True


def test_the_whole_chain_of_the_recipes_is_shell_and_its_data_are_prepared(tmp_path):
    """The block in docs/recipes.md that a reader pastes: bash can read it, and its first part does what it says."""
    section = (ROOT / "docs/recipes.md").read_text().split("## The whole chain")[1]
    block = section.split("```bash\n")[1].split("```")[0]
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    data = block.split("# Data")[1].split("DRY_RUN")[0].split("\n", 1)[1].replace("outputs/chain", str(tmp_path))
    data = data.replace("python examples", f"{sys.executable} {ROOT}/examples")
    subprocess.run(["bash", "-euo", "pipefail", "-c", data], check=True)
    import pyarrow.parquet

    (row,) = pyarrow.parquet.read_table(tmp_path / "data/math500.parquet").to_pylist()
    assert row["reward_model"]["ground_truth"] == "\\frac{5}{6}" and row["prompt"][0]["content"].startswith("Compute")
    for script in re.findall(r"(examples/[\w/]+\.sh)", block):
        assert os.access(ROOT / script, os.X_OK), script


# ---- what is used again ----

LINE_ENDS = "one\u2028two\u2029three\x85four\x0bfive"  # that str.splitlines() ends a line at, and JSON does not


class StandIn:
    """In place of vLLM: every response is `text`."""

    text, generated = "4", 0

    def __init__(self, args, model):
        self.n = args.n

    def generate(self, questions):
        StandIn.generated += 1
        return [{**q, "responses": [self.text] * self.n, "finished": [True] * self.n} for q in questions]

    def close(self):
        pass


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """Evaluates a model's folder on aime.parquet and returns avg@2 and how often it generated."""
    monkeypatch.setattr(evaluate, "Engine", StandIn)
    monkeypatch.setattr(StandIn, "text", "4")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    write_data(tmp_path / "aime.parquet")
    (tmp_path / "reward.py").write_text(
        "def compute_score(s, response, truth, e=None): return float(response == truth)"
    )

    def once(*more):
        before = StandIn.generated
        options = {"model": tmp_path / "model", "data": tmp_path / "aime.parquet", "out": tmp_path, "n": 2}
        arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        assert evaluate.main([*arguments, "--reward", str(tmp_path / "reward.py"), *more]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        return results["results"]["aime"]["avg@2"]["value"], StandIn.generated - before

    return once


def write_data(path, question="2+2=", truth="4"):
    import pyarrow
    import pyarrow.parquet

    prompt = [{"role": "user", "content": question}]
    row = {"data_source": "s", "prompt": prompt, "reward_model": {"ground_truth": truth}, "extra_info": {"index": 0}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)


def test_what_is_there_is_used_again(evaluation, tmp_path, capsys):
    assert evaluation() == (1.0, 1)
    assert evaluation() == (1.0, 0)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert evaluation("--model", str(tmp_path / "moved")) == (1.0, 0), "the same contents elsewhere"
    assert "| aime |" in (tmp_path / "results.md").read_text() and "| aime |" in capsys.readouterr().out


def test_a_changed_reward_or_ground_truth_gives_new_numbers_of_the_same_responses(evaluation, tmp_path):
    assert evaluation() == (1.0, 1)
    (tmp_path / "reward.py").write_text("def compute_score(*a): return 0.0")
    assert evaluation() == (0.0, 0)
    (tmp_path / "other.py").write_text("def compute_score(*a): return 1.0")
    assert evaluation("--reward", str(tmp_path / "other.py")) == (1.0, 0)
    (tmp_path / "reward.py").write_text(
        "def compute_score(s, response, truth, e=None): return float(response == truth)"
    )
    write_data(tmp_path / "aime.parquet", truth="5")
    assert evaluation() == (0.0, 0)
    (row,) = [json.loads(line) for line in (tmp_path / "responses/aime.jsonl").read_text().split("\n")[1:-1]]
    assert (row["ground_truth"], row["accs"]) == ("5", [0.0, 0.0]), "vimpo credit reads the new scores, too"


@pytest.mark.parametrize("what", ["model_contents", "prompts", "temperature", "engine"])
def test_responses_of_something_else_are_not_used(evaluation, tmp_path, monkeypatch, capsys, what):
    assert evaluation() == (1.0, 1)
    monkeypatch.setattr(StandIn, "text", "5")
    more = {"temperature": ["--temperature", "0.5"], "engine": ["--engine", '{"quantization": "fp8"}']}.get(what, [])
    if what == "model_contents":
        (tmp_path / "model/model.safetensors").write_bytes(b"WEIGHTS")
    if what == "prompts":
        write_data(tmp_path / "aime.parquet", question="1+3=")
    capsys.readouterr()
    assert evaluation(*more) == (0.0, 1)
    assert f"of other settings ({what})" in capsys.readouterr().out


def test_a_reward_that_fails_does_not_cost_the_responses(evaluation, tmp_path):
    good = (tmp_path / "reward.py").read_text()
    (tmp_path / "reward.py").write_text("def compute_score(*a): raise ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        evaluation()
    (tmp_path / "reward.py").write_text(good)
    assert evaluation() == (1.0, 0)


def test_responses_with_other_line_ends_are_read_again(evaluation, monkeypatch, tmp_path):
    monkeypatch.setattr(StandIn, "text", LINE_ENDS)
    write_data(tmp_path / "aime.parquet", truth=LINE_ENDS)
    assert evaluation() == (1.0, 1)
    assert evaluation() == (1.0, 0)


def test_a_model_on_the_hub_is_its_commit_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert evaluate.model_contents("org/base") is None
    (tmp_path / "models--org--base/snapshots/abc").mkdir(parents=True)
    (tmp_path / "models--org--base/refs").mkdir()
    (tmp_path / "models--org--base/refs/main").write_text("abc")
    assert evaluate.model_contents("org/base") == "abc"
