"""`vimpo compare` on logs written here in verl's three formats, with known values.

Claimed: the three readers agree; what cannot be read is said; different runs are never read as one, in verl's own
layouts; paths may have "=" and "," in them; runs are aligned by step, tokens and hours as stated;
intervals are Student's and Welch's; a difference is called outside the seeds' noise when it is and not when it is
not; the plots are drawn. Not claimed: that a plot is easy to read.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from vimpo_verl.__main__ import main
from vimpo_verl.compare.command import add_arguments, label_of, read_sides
from vimpo_verl.compare.command import main as compare_main
from vimpo_verl.compare.comparison import INSIDE, OTHER_KEY, OUTSIDE, TOO_FEW, Side, compare
from vimpo_verl.compare.metrics import AXES
from vimpo_verl.compare.runs import RunLog, UnreadableRun, read_run
from vimpo_verl.compare.statistics import difference_interval, mean_interval, student_t_quantile

STEP, TOKENS, HOURS = AXES


def records(
    steps: int = 20, reward: float = 0.5, tokens: float = 1e6, seconds: float = 360.0, **extra: float
) -> list[dict]:
    """What a run logs: validation before training and at its end, rewards that rise to `reward`."""
    found = [{"step": 0, "data": {"val-core/math500/acc/mean@4": 0.1}}]
    for step in range(1, steps + 1):
        data = {
            "critic/score/mean": reward * step / steps,
            "actor/entropy": 1.0 / step,
            "response_length/mean": 100.0,
            "perf/total_num_tokens": tokens,
            "timing_s/step": seconds,
            **extra,
        }
        found.append({"step": step, "data": data})
    found[-1]["data"]["val-core/math500/acc/mean@4"] = reward
    return found


def write_file(folder: Path, found: list[dict], name: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in found))
    return folder


def write_console(folder: Path, found: list[dict]) -> Path:
    """As verl's console logger and Ray write it."""
    folder.mkdir(parents=True)
    lines = ["ray init kwargs: step:7 is not a record", "(WorkerDict pid=1) global_step:3 - loading"]
    for record in found:
        pairs = [
            f"{key}:np.float64({value!r})" if "val" in key else f"{key}:{value!r}"
            for key, value in record["data"].items()
        ]
        lines.append(f"\x1b[36m(TaskRunnerV1 pid=9505)\x1b[0m step:{record['step']} - " + " - ".join(pairs))
    (folder / "log.txt").write_text("\n".join(lines))
    return folder


def write_tensorboard(folder: Path, found: list[dict]) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    for record in found:
        for key, value in record["data"].items():
            writer.add_scalar(key, value, record["step"])
    writer.close()
    return folder


WRITERS = {"file": write_file, "console": write_console, "tensorboard": write_tensorboard}


# ---- reading ----------------------------------------


@pytest.mark.parametrize("source", WRITERS)
def test_every_source_is_read_whole(tmp_path, source):
    found = records()
    run = read_run(WRITERS[source](tmp_path / "run", found))
    assert run.source.startswith(source) and run.problems == []
    assert run.steps.keys() == {record["step"] for record in found}
    for record in found:
        # TensorBoard stores single precision.
        assert run.steps[record["step"]] == pytest.approx(
            record["data"], rel=1e-6 if source == "tensorboard" else 1e-15
        )


def test_file_wins_over_tensorboard_and_console(tmp_path):
    write_console(tmp_path / "run", records(3))
    write_tensorboard(tmp_path / "run", records(4))
    assert len(read_run(tmp_path / "run").steps) == 5
    write_file(tmp_path / "run", records(5))
    assert len(read_run(tmp_path / "run").steps) == 6


def test_resumed_run_is_one_run_and_its_later_values_count(tmp_path):
    """Stopped after step 6, resumed from the checkpoint of step 4."""
    write_file(tmp_path, records(6, reward=0.1), "metrics.1.jsonl")
    write_file(tmp_path, [record for record in records(12, reward=0.9) if record["step"] > 4])
    run = read_run(tmp_path)
    assert sorted(run.steps) == list(range(13))
    assert run.steps[4]["critic/score/mean"] == pytest.approx(0.1 * 4 / 6)
    assert run.steps[5]["critic/score/mean"] == pytest.approx(0.9 * 5 / 12)
    assert TOKENS.positions(run)[12] == pytest.approx(12.0), "no step counts twice"


def test_attempts_are_in_the_order_of_their_numbers(tmp_path):
    for attempt in (1, 2, 10):
        write_file(tmp_path, records(2, reward=attempt), f"metrics.{attempt}.jsonl")
    write_file(tmp_path, records(1, reward=99))
    assert read_run(tmp_path).steps[2]["critic/score/mean"] == 10


def test_what_cannot_be_read_is_said(tmp_path):
    write_file(tmp_path, records(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "data": {"critic/score/mean": null, "actor/entropy": 0.5}}\n')
        file.write('{"step": 5, "data": {"critic/score/mean": null}}\n')
        file.write('{"step": 6, "da')
    run = read_run(tmp_path)
    assert run.steps[4] == {"actor/entropy": 0.5} and 6 not in run.steps
    nulls, truncated = sorted(run.problems)
    assert nulls == "critic/score/mean: no finite number at some steps, first at step 4: None (2 times)"
    assert "metrics.jsonl, line 7" in truncated


def test_console_line_that_another_process_wrote_into_is_said(tmp_path):
    (tmp_path / "run.log").write_text(
        "step:1 - critic/score/mean:0.5 - actor/entropy:0.(Worker) hello - actor/lr:1e-06\n"
    )
    run = read_run(tmp_path)
    assert run.steps == {1: {"critic/score/mean": 0.5, "actor/lr": 1e-6}}
    assert len(run.problems) == 1 and "run.log, line 1" in run.problems[0] and "hello" in run.problems[0]


@pytest.mark.parametrize("damage", ("overwritten", "cut off"))
def test_damaged_tensorboard_file_is_read_to_the_damage(tmp_path, damage):
    write_tensorboard(tmp_path, records(10))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    rest = b"\x55" * 8 + content[middle + 8 :] if damage == "overwritten" else b""
    file.write_bytes(content[:middle] + rest)
    run = read_run(tmp_path)
    assert 0 < max(run.steps) < 10
    assert any("damaged or cut off" in problem for problem in run.problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({}, "no metrics*.jsonl"),
        ({"log.txt": "Traceback"}, "no step of a run in it"),
        ({"metrics.jsonl": ""}, "no step"),
    ],
)
def test_run_with_nothing_to_compare(tmp_path, content, message):
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        for name, text in content.items():
            (run / name).write_text(text)
    with pytest.raises(UnreadableRun) as error:
        read_run(run)
    assert str(run) in str(error.value) and message in str(error.value)


# ---- verl's own layouts ----------------------------------------


def write_as_verl(kind: str, root: Path, project: str, experiment: str, found: list[dict], monkeypatch) -> None:
    """By verl's own logger, in the folders that it chooses itself."""
    from verl.utils.tracking import FileLogger, _TensorboardAdapter

    for name in ("VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT", "TENSORBOARD_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    logger = {"file": FileLogger, "tensorboard": _TensorboardAdapter}[kind](project, experiment)
    for record in found:
        logger.log(record["data"], record["step"])
    logger.finish()


@pytest.mark.parametrize("kind", ["file", "tensorboard"])
def test_different_runs_in_verls_folders_are_different_runs(tmp_path, monkeypatch, kind):
    rewards = {"grpo-seed1": 0.50, "grpo-seed2": 0.52, "vimpo-seed1": 0.70}
    for experiment, reward in rewards.items():
        write_as_verl(kind, tmp_path, "gsm8k", experiment, records(4, reward=reward), monkeypatch)
    write_as_verl(kind, tmp_path, "math", "grpo-seed1", records(4, reward=0.1), monkeypatch)
    root = tmp_path if kind == "file" else tmp_path / "tensorboard_log"
    sides, unreadable = read_sides([str(root / "gsm8k")])
    assert not unreadable
    found = {side.label: [run.steps[4]["critic/score/mean"] for run in side.runs] for side in sides}
    assert found.keys() == {"gsm8k/grpo", "gsm8k/vimpo"}
    assert found["gsm8k/grpo"] == pytest.approx([0.50, 0.52]) and found["gsm8k/vimpo"] == pytest.approx([0.70])
    sides, _ = read_sides([str(root)])
    assert {side.label: len(side.runs) for side in sides} == {
        f"{root.name}/gsm8k/grpo": 2, f"{root.name}/gsm8k/vimpo": 1, f"{root.name}/math/grpo": 1,
    }  # fmt: skip
    (side,) = read_sides([f"a={root}/gsm8k"])[0]
    assert len(side.runs) == 3, "a label of one's own makes them seeds"
    with pytest.raises(UnreadableRun, match="has several runs: .*grpo-seed1.*vimpo-seed1"):
        read_run(root / "gsm8k")


def test_only_the_starts_of_one_run_are_one_run(tmp_path):
    write_file(tmp_path, records(2, reward=0.1), "metrics.1.jsonl")
    write_file(tmp_path, records(3, reward=0.2))
    write_file(tmp_path, records(9, reward=0.9), "metrics_grpo.jsonl")
    write_file(tmp_path, [{"input": "a", "step": 3}], "rollout.jsonl")
    run = read_run(tmp_path)
    assert max(run.steps) == 3 and run.source == "file: metrics.1.jsonl, metrics.jsonl"
    left_out, other = run.problems
    assert "metrics_grpo.jsonl: not read, as it is no part of this run" in left_out
    assert other == "rollout.jsonl: no step of a run in it (file)"


def test_console_logs_of_one_folder_are_different_runs(tmp_path):
    for name, reward in (("grpo", 0.5), ("vimpo", 0.7)):
        write_console(tmp_path / name, records(2, reward=reward))
        (tmp_path / name / "log.txt").rename(tmp_path / f"{name}.log")
    sides, _ = read_sides([str(tmp_path / "*.log")])
    assert [side.label for side in sides] == ["grpo", "vimpo"]
    assert [side.label for side in read_sides([str(tmp_path)])[0]] == [
        f"{tmp_path.name}/{n}" for n in ("grpo", "vimpo")
    ]


def test_tensorboard_of_a_resumed_run_is_one_run_and_of_two_runs_is_refused(tmp_path):
    def write(name, found):
        """A file a start; TensorBoard names it by the second, in which several may start here."""
        write_tensorboard(tmp_path / name / "new", found)
        (file,) = (tmp_path / name / "new/tensorboard").iterdir()
        (tmp_path / name / "tensorboard").mkdir(exist_ok=True)
        start = len(list((tmp_path / name / "tensorboard").iterdir()))
        file.rename(tmp_path / name / f"tensorboard/events.out.tfevents.{start:010}")

    write("resumed", records(6, reward=0.1))
    for _ in range(2):  # twice from the same checkpoint
        write("resumed", [record for record in records(12, reward=0.9) if record["step"] > 4])
    run = read_run(tmp_path / "resumed")
    assert sorted(run.steps) == list(range(13)) and run.steps[5]["critic/score/mean"] == pytest.approx(0.9 * 5 / 12)
    write("two", records(6))
    write("two", records(3))
    with pytest.raises(UnreadableRun, match="starts over at step 0, so the 2 files there are not one run"):
        read_run(tmp_path / "two")


def test_folders_of_several_runs_by_the_launch_scripts(tmp_path):
    """outputs/ instead of outputs/*: each run has TensorBoard beside its metrics.jsonl, or nothing else."""
    for seed in (1, 2):
        write_tensorboard(write_file(tmp_path / f"vimpo-seed{seed}", records(2)), records(2))
        write_tensorboard(tmp_path / f"grpo-seed{seed}", records(2))
    (tmp_path / "latest").symlink_to(tmp_path / "vimpo-seed2")
    sides, unreadable = read_sides([str(tmp_path)])
    assert {side.label: len(side.runs) for side in sides} == {f"{tmp_path.name}/{n}": 2 for n in ("grpo", "vimpo")}
    assert not unreadable and [run.source.split(":")[0] for run in sides[1].runs] == ["file", "file"]
    assert label_of(tmp_path / "grpo-seed1/tensorboard") == "grpo"


# ---- seeds and sides ----------------------------------------


@pytest.mark.parametrize("prefix", ["", "mine="])
def test_paths_of_hydras_multirun(tmp_path, monkeypatch, prefix):
    """Its folders are named by the overrides: key=value,key=value."""
    names = ["adv=grpo,data.seed=1", "adv=grpo,data.seed=2", "adv=vimpo,data.seed=1"]
    for name in names:
        write_file(tmp_path / name, records(2))
    monkeypatch.chdir(tmp_path)
    for folder in ("", f"{tmp_path}/"):
        sides, unreadable = read_sides([f"{prefix}{folder}{name}" for name in names])
        expected = {"mine": 3} if prefix else {"adv=grpo": 2, "adv=vimpo": 1}
        assert ({side.label: len(side.runs) for side in sides}, unreadable) == (expected, [])
    sides, unreadable = read_sides([f"{prefix}{names[0]},{names[1]}", f"other={tmp_path}/adv=v*"])
    assert not unreadable and [len(side.runs) for side in sides] == [2, 1]


def test_paths_that_are_not_there_are_named_as_they_were_meant(tmp_path):
    write_file(tmp_path / "a", records(2))
    long = "x" * 200
    given = [f"{long},{long}", f"{tmp_path}/lr=1,seed=2", f"x={tmp_path}/a,{tmp_path}/b", "y=none,no", "zero"]
    missing = [long, long, f"{tmp_path}/lr=1,seed=2", f"{tmp_path}/b", "none", "no", "zero"]
    sides, unreadable = read_sides(given)
    assert [side.label for side in sides] == ["x"] and unreadable == [f"{path} does not exist" for path in missing]


def test_runs_of_one_name_are_seeds_of_one_side(tmp_path):
    for name in ("grpo-seed1", "grpo-seed2", "vimpo_seed_1", "other"):
        write_file(tmp_path / name, records(2))
    sides, unreadable = read_sides([str(tmp_path / "*"), f"missing={tmp_path}/none"])
    assert {side.label: len(side.runs) for side in sides} == {"grpo": 2, "other": 1, "vimpo": 1}
    assert unreadable == [f"{tmp_path}/none does not exist"]
    assert label_of(tmp_path / "grpo-seed2" / "metrics.jsonl") == "grpo"


def test_labels_wildcards_and_lists(tmp_path):
    for name in ("a1", "a2", "b", "c"):
        write_file(tmp_path / name, records(2))
    sides, _ = read_sides([f"x={tmp_path}/a*", f"y={tmp_path}/b,{tmp_path}/c"])
    assert {side.label: len(side.runs) for side in sides} == {"x": 2, "y": 2}


def test_one_run_is_not_two_seeds(tmp_path):
    write_file(tmp_path / "a", records(2))
    sides, unreadable = read_sides([f"x={tmp_path}/a", f"x={tmp_path}/a"])
    assert len(sides[0].runs) == 1 and "named twice" in unreadable[0]


# ---- alignment ----------------------------------------


def run_of(found: list[dict], name: str = "run") -> RunLog:
    return RunLog(name=name, source="file", steps={record["step"]: record["data"] for record in found})


def row(comparison, axis, name):
    (table,) = [table for table in comparison.tables if table.axis is axis]
    (found,) = [row for row in table.rows if row.quantity.name == name]
    return table, found


def test_axes_compare_at_what_all_have_reached():
    """b makes half the tokens a step in a third of the time: 20 steps of a are 40 by tokens and 60 by time."""
    a = Side("a", [run_of(records(20, tokens=2e6, seconds=540))])
    b = Side("b", [run_of(records(100, reward=1.0, tokens=1e6, seconds=180))])
    comparison = compare([a, b], last=0.1)
    expected = {STEP: (20, 20), TOKENS: (40, 40), HOURS: (3.0, 60)}
    for axis, (end, last_step_of_b) in expected.items():
        table, reward = row(comparison, axis, "reward")
        assert table.end == pytest.approx(end)
        inside = [step for step in range(1, 101) if 0.9 * last_step_of_b < step <= last_step_of_b]
        assert reward.values["b"][0] == pytest.approx(sum(inside) / len(inside) / 100), axis.name
        assert reward.values["a"][0] == pytest.approx(0.5 * 19.5 / 20)


def test_shortest_seed_sets_the_end():
    a, b = Side("a", [run_of(records(10)), run_of(records(30))]), Side("b", [run_of(records(20))])
    assert row(compare([a, b]), STEP, "reward")[0].end == 10


def test_validation_before_training_is_not_taken_for_the_end():
    comparison = compare([Side("a", [run_of(records(10))]), Side("b", [run_of(records(30))])], [STEP])
    _, validation = row(comparison, STEP, "validation math500")
    assert validation.values == {"a": [0.5], "b": []} and validation.differences["b"] is None
    assert any(
        "b has no value in the second half" in note and "validation math500" in note for note in comparison.notes
    )


def test_mean_over_several_validation_sets():
    run = run_of(
        records(
            4, **{"val-core/aime/acc/mean@32": 0.2, "val-core/aime/acc/mean@8": 0.9, "val-core/math500/acc/mean@4": 0.6}
        )
    )
    run.steps[4]["val-core/math500/acc/mean@4"] = 0.6
    comparison = compare([Side("a", [run])], [STEP])
    assert row(comparison, STEP, "validation aime")[1].values["a"] == [0.2], "of the most samples"
    assert row(comparison, STEP, "validation accuracy")[1].values["a"] == [pytest.approx(0.4)]


def test_axis_that_a_run_does_not_log_is_left_out_and_said():
    found = records(5)
    del found[3]["data"]["perf/total_num_tokens"]
    comparison = compare([Side("a", [run_of(found, "the-run")])])
    assert [table.axis for table in comparison.tables] == [STEP, HOURS]
    assert "not aligned by tokens: no perf/total_num_tokens at some steps of the-run" in comparison.notes


def test_run_whose_start_is_missing_is_said():
    found = [record for record in records(20) if record["step"] > 8]
    assert any("starts at step 9" in note for note in compare([Side("a", [run_of(found)])]).notes)


# ---- statistics ----------------------------------------


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),  # tables of Student's t
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.95, 10, 1.81246),
        (0.995, 30, 2.75000),
        (0.975, 1e6, 1.95997),
        (0.5, 3, 0.0),
    ],
)
def test_student_t(probability, freedom, expected):
    assert student_t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_intervals_cover_as_often_as_they_say():
    generator = random.Random(1)
    covered = {"mean": 0, "difference": 0}
    for _ in range(700):
        a = [generator.gauss(1.0, 1.0) for _ in range(3)]
        b = [generator.gauss(1.0, 3.0) for _ in range(5)]
        mean = mean_interval(a, 0.9)
        covered["mean"] += abs(mean.value - 1.0) <= mean.half_width
        covered["difference"] += not difference_interval(a, b, 0.9).excludes_zero
    assert all(abs(count / 700 - 0.9) < 0.04 for count in covered.values()), covered


def test_one_seed_has_no_interval():
    assert mean_interval([0.5], 0.95).half_width is None
    assert difference_interval([0.5], [0.6, 0.7], 0.95).excludes_zero is None


# ---- verdicts ----------------------------------------


def verdict(a_rewards, b_rewards, **keys):
    sides = [
        Side(label, [run_of(records(reward=reward)) for reward in rewards])
        for label, rewards in (("a", a_rewards), ("b", b_rewards))
    ]
    return row(compare(sides, [STEP]), STEP, "reward")[1].differences["b"].verdict


def test_verdicts():
    assert verdict([0.50, 0.51, 0.52], [0.70, 0.71, 0.72]) == OUTSIDE
    assert verdict([0.50, 0.60, 0.70], [0.55, 0.66, 0.72]) == INSIDE
    assert verdict([0.50], [0.9, 0.91]) == TOO_FEW
    assert verdict([0.5, 0.5], [0.5, 0.5]) == INSIDE, "the very same is no difference"


def test_other_metric_of_the_same_name_gets_no_verdict():
    a = Side("grpo", [run_of(records(**{"actor/kl_loss": kl})) for kl in (0.1, 0.11)])
    b = Side("vimpo", [run_of(records(**{"vimpo/kl": kl})) for kl in (0.5, 0.51)])
    comparison = compare([a, b], [STEP])
    assert row(comparison, STEP, "kl")[1].differences["vimpo"].verdict == OTHER_KEY
    assert any("kl is not the same metric everywhere" in note for note in comparison.notes)


def test_noisy_runs_are_compared_by_their_clean_reward_with_each_other_and_with_clean_ones():
    noisy = Side("noisy", [run_of(records(**{"reward_noise/clean_mean": clean})) for clean in (0.80, 0.81)])
    clean = Side("clean", [run_of(records(reward=reward)) for reward in (0.50, 0.51)])
    reward = row(compare([clean, noisy], [STEP]), STEP, "reward")[1]
    assert reward.values["noisy"] == pytest.approx([0.80, 0.81])
    assert reward.differences["noisy"].verdict == OUTSIDE


def test_mean_over_sets_of_different_sample_numbers_gets_no_verdict():
    def side(label, key):
        extra = {"val-core/aime/acc/mean@32": 0.2, key: 0.5}
        runs = [run_of([*records(4)[:-1], {"step": 4, "data": {**extra, "critic/score/mean": 0.5}}]) for _ in range(2)]
        for run in runs:
            del run.steps[0]["val-core/math500/acc/mean@4"]
        return Side(label, runs)

    comparison = compare([side("a", "val-core/math500/acc/mean@4"), side("b", "val-core/math500/acc/mean@8")], [STEP])
    verdicts = {r.quantity.name: r.differences["b"].verdict for r in comparison.tables[0].rows if r.differences["b"]}
    assert verdicts["validation accuracy"] == verdicts["validation math500"] == OTHER_KEY
    assert verdicts["validation aime"] == INSIDE


# ---- the command ----------------------------------------


def make_runs(folder: Path) -> list[str]:
    for seed in (1, 2, 3):
        write_file(folder / f"grpo-seed{seed}", records(20, reward=0.50 + 0.01 * seed))
        extra = {"vimpo/kl": 0.01 * seed, "vimpo/outcome_auc": 0.7, "vimpo/value_explained_variance": 0.2}
        write_console(folder / f"vimpo-seed{seed}", records(20, reward=0.70 + 0.01 * seed, seconds=400, **extra))
    return [str(folder / "grpo-*"), str(folder / "vimpo-*")]


def test_command_prints_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *make_runs(tmp_path / "runs"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in printed
    for text in (
        "grpo: 3 runs",
        "At equal step",
        "At equal tokens",
        "At equal hours",
        "outside the seeds' noise",
        "nothing: all was read",
    ):
        assert text in printed
    assert "outcome AUC: grpo has none" in printed
    table = json.loads((out / "comparison.json").read_text())["tables"][0]
    reward = table["rows"]["reward"]["differences"]["vimpo"]
    assert reward["verdict"] == OUTSIDE and reward["value"] == pytest.approx(0.2 * 19.5 / 20)
    assert math.isclose(table["end"], 20)
    names = {path.stem for path in out.glob("*.png")}
    assert names == {
        "overview", "reward", "validation_math500", "kl", "response_length", "entropy",
        "value_explained_variance", "outcome_auc", "seconds_a_step",
    }  # fmt: skip


def test_plots_show_every_seed_and_the_mean(tmp_path, monkeypatch):
    """Read from matplotlib's own objects just before a figure is saved."""
    from vimpo_verl.compare import plots

    lines = {}

    def keep(figure, path):
        lines[path.stem] = [[line.get_xydata() for line in panel.lines] for panel in figure.axes]
        return path

    monkeypatch.setattr(plots, "_save", keep)
    sides, _ = read_sides(make_runs(tmp_path))
    plots.draw(compare(sides), tmp_path / "out", 0.95)
    by_step, by_tokens, by_hours = lines["reward"]
    assert [len(panel) for panel in lines["reward"]] == [8, 8, 8], "three seeds and their mean, two sides"
    assert by_step[0][-1].tolist() == pytest.approx([20, 0.51])
    assert by_step[3][-1].tolist() == pytest.approx([20, 0.52]), "the mean of grpo's seeds"
    assert by_tokens[0][-1][0] == pytest.approx(20.0) and by_hours[0][-1][0] == pytest.approx(2.0)


def test_unreadable_run_is_said_and_the_rest_compared(tmp_path, capsys):
    (run,) = [write_file(tmp_path / "good", records(3))]
    status = main(
        ["compare", str(run), str(tmp_path / "bad"), "--out", str(tmp_path / "out"), "--no-plots", "--by", "step"]
    )
    printed = capsys.readouterr().out
    assert status == 1 and f"{tmp_path}/bad does not exist" in printed and "good: 1 run" in printed
    assert "At equal tokens" not in printed and not list((tmp_path / "out").glob("*.png"))


def test_nothing_readable(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "bad"), "--out", str(tmp_path / "out")]) == 1
    assert "does not exist" in capsys.readouterr().out and not (tmp_path / "out").exists()


def command(*arguments, **options):
    line = [sys.executable, "-m", "vimpo_verl", "compare", *map(str, arguments)]
    return subprocess.run(line, text=True, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, **options)


def test_a_pipe_that_is_closed_gets_one_message_and_the_files_are_there(tmp_path):
    """As in `vimpo compare ... | head -1`, when head has ended."""
    run, out = write_file(tmp_path / "run", records(3)), tmp_path / "out"
    reading, writing = os.pipe()
    os.close(reading)
    done = command(run, "--out", out, "--no-plots", stdout=writing)
    os.close(writing)
    assert done.stderr == "vimpo: standard output was closed before all was printed; files are whole\n"
    assert done.returncode == 141 and "run: 1 run" in (out / "comparison.md").read_text()


def test_files_are_written_before_anything_is_printed(tmp_path, monkeypatch):
    from vimpo_verl.compare import plots

    run, out = write_file(tmp_path / "run", records(3)), tmp_path / "out"
    monkeypatch.setattr(plots, "draw", lambda comparison, folder, confidence: [(folder / "overview.png").touch()])
    there = []
    arguments = argparse.ArgumentParser()
    add_arguments(arguments)
    given = arguments.parse_args([str(run), "--out", str(out)])
    compare_main(given, lambda text: there.append({path.name for path in out.glob("*")}))
    assert there[0] == there[-1] >= {"comparison.md", "comparison.json", "overview.png"}


def test_an_out_that_cannot_be_written_gets_one_message(tmp_path, capsys):
    run = write_file(tmp_path / "run", records(3))
    (tmp_path / "file").touch()
    assert main(["compare", str(run), "--out", str(tmp_path / "file/out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"vimpo compare: --out {tmp_path}/file/out cannot be written: ")
    assert printed.err.count("\n") == 1 and "run: 1 run" in printed.out and "Written" not in printed.out
