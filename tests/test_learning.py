"""The learning study: its loop is that of examples/one_file.py, its exact advantages are exact, its grids fair."""

import copy
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import one_file
import pytest
import torch

from benchmarks.learning import analysis, grids, plots
from benchmarks.learning.arms import ARMS
from benchmarks.learning.run import run, sample_from_past, start_policy
from benchmarks.learning.settings import Setting
from benchmarks.learning.tasks import Needles, PathStar, Reversal, RunningSums

ROOT = Path(__file__).parents[1]


def rollout_of(task, policy, sequences):
    """A rollout whose responses are given, one a prompt."""
    prompts, responses = sequences[:, : task.prompt_tokens], sequences[:, task.prompt_tokens :]
    outcome, mask = task.judge(prompts, responses)
    log_prob, logits = policy.score(sequences, task.response_tokens)
    return one_file.Rollout(
        sequences,
        mask,
        outcome,
        outcome,
        list(range(len(outcome))),
        log_prob.detach(),
        log_prob.detach(),
        logits.detach(),
    )


def every_response(task, vocabulary: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=task.response_tokens)))


@pytest.mark.parametrize("task", [RunningSums(2), Needles(tokens=4, decisions=2), Reversal(4)], ids=type)
def test_exact_advantages_are_those_of_the_enumerated_tree(task):
    """V(s) by enumerating every response: A_t = V(s_{t+1}) - V(s_t), with V(s_{T+1}) = R."""
    torch.manual_seed(0)
    policy = task.make_policy().double()
    prompt = task.prompts(1, torch.Generator().manual_seed(1))
    responses = every_response(task, task.vocabulary)
    sequences = torch.cat([prompt.expand(len(responses), -1), responses], 1)
    rollout = rollout_of(task, policy, sequences)
    log_prob = rollout.old_log_prob
    values = []  # V(s_t) of every response's prefix, t = 1..T+1
    for t in range(task.response_tokens + 1):
        same_prefix = (responses[:, None, :t] == responses[None, :, :t]).all(-1).double()
        rest = log_prob[:, t:].sum(1).exp() * rollout.truth
        values.append(same_prefix @ rest)
    expected = torch.stack([after - before for before, after in zip(values, values[1:], strict=False)], 1)
    torch.testing.assert_close(task.advantages(policy, rollout).double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("task", [RunningSums(3), Needles(tokens=6, decisions=3), PathStar(2), Reversal(3)], ids=type)
def test_accuracy_is_the_expected_reward(task):
    torch.manual_seed(0)
    policy = task.make_policy()
    prompts = task.prompts(1, torch.Generator().manual_seed(1)).expand(40_000, -1)
    sequences, _ = policy.sample(prompts, task.response_tokens)
    sampled = task.judge(prompts, sequences[:, task.prompt_tokens :])[0]
    exact = task.accuracy(policy, prompts[:1])
    assert abs(sampled.mean().item() - exact) < 5 * (exact * (1 - exact) / len(prompts)) ** 0.5


@pytest.mark.parametrize("task", [RunningSums(4), Needles(tokens=6, decisions=3), PathStar(5)], ids=type)
def test_sampling_and_scoring_agree(task):
    torch.manual_seed(0)
    policy = task.make_policy()
    sequences, log_prob = policy.sample(task.prompts(5, torch.Generator().manual_seed(1)), task.response_tokens)
    torch.testing.assert_close(log_prob, policy.score(sequences, task.response_tokens)[0], rtol=1e-5, atol=1e-6)


def test_path_star_is_one_choice_and_then_a_forced_walk():
    task = PathStar(tokens=6, arms=4)
    prompts = task.prompts(50, torch.Generator().manual_seed(1))
    answers = task.answers(prompts)
    assert torch.equal(answers[:, -1], prompts[:, 1])  # the goal
    assert (answers.sort(1).values < task.arms).all() and task.follows(prompts, answers).all()
    walks = task.teacher().answers(prompts)  # of any arm: one in four is right, all follow behind the first node
    assert 0.05 < (walks == answers).all(1).float().mean() < 0.5
    assert task.follows(prompts, walks)[:, 1:].all()
    assert torch.equal(task.follows(prompts, walks)[:, 0], (walks == answers).all(1))
    slipped = answers.clone()
    slipped[:, 3] = (slipped[:, 3] + 1) % task.arms
    assert (~task.follows(prompts, slipped)).sum(
        1
    ).float().mean() == 2  # the slip, and the step back that it was no reason for


def test_a_start_is_taught_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.learning.run.STARTS", tmp_path)
    setting = Setting("grpo", task="needles", tokens=6, decisions=3)
    first = start_policy(setting).state_dict()
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("benchmarks.learning.run.taught", lambda setting: pytest.fail("taught again"))
    again = start_policy(replace(setting, arm="vimpo", lr=2e-3)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_on_policy_value_loss_is_reinforce_with_the_kl_in_the_reward():
    """Gradient of L_V: -beta * mean_i (R - V0 - S_i) sum_t grad log pi. The rival's, without kappa and clipping idle."""
    torch.manual_seed(0)
    task = RunningSums(3)
    policy = task.make_policy()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        policy.head.weight.mul_(1.5)
    rollout = one_file.collect(policy, reference, task, torch.Generator().manual_seed(1), prompts=4, responses=4)
    rollout.ref_logits = policy.score(rollout.sequences, 3)[1].detach()  # kappa = 0
    beta = 0.2
    log_prob, logits = policy.score(rollout.sequences, 3)
    one_file.vimpo_loss(rollout, log_prob, logits, beta=beta).backward()
    gradient = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    log_prob, logits = policy.score(rollout.sequences, 3)
    shaped = rollout.outcome - beta * (rollout.old_log_prob - rollout.ref_log_prob).sum(1)
    baseline = torch.tensor(rollout.outcome.view(4, 4).mean(1).repeat_interleave(4))
    (-beta * ((shaped - baseline) * log_prob.sum(1)).mean()).backward()
    for parameter, expected in zip(policy.parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_first_update_of_a_batch_is_the_same_clipped_or_not():
    plain = run(Setting("vimpo", coeff=0.5, tokens=3, batches=3, prompts=4, responses=4))
    clipped = run(Setting("vimpo", coeff=0.5, tokens=3, batches=3, prompts=4, responses=4, form="clipped"))
    assert plain["accuracy"] == pytest.approx(clipped["accuracy"], abs=2e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_repeats_itself(arm):
    setting = Setting(arm, coeff=0.5, tokens=3, batches=2, updates=2, prompts=4, responses=4, flip_prob=0.5)
    first, again = run(setting), run(setting)
    assert first["rewards"] == again["rewards"] and first["accuracy"] == again["accuracy"]
    assert 0 < first["accuracy"] < 1 and len(first["rewards"]) == 2


def test_flips_of_groups_and_of_responses():
    """The same seed flips the same for every arm, and the curve stays that of the true rewards."""
    seen = {}
    for kind in ("group", "response"):
        for arm in ("grpo", "vimpo"):
            flips = []
            ARMS["spy"] = lambda rollout, *args, flips=flips, arm=arm, **more: (
                flips.append((rollout.outcome != rollout.truth).view(-1, 4)), ARMS[arm](rollout, *args, **more)
            )[1]  # fmt: skip
            try:
                run(
                    Setting(
                        "spy", coeff=0.5, tokens=3, batches=3, prompts=64, responses=4, flip_prob=0.3, flip_kind=kind
                    )
                )
            finally:
                del ARMS["spy"]
            seen[kind, arm] = torch.stack(flips)
    for kind in ("group", "response"):
        assert torch.equal(seen[kind, "grpo"], seen[kind, "vimpo"])
        assert abs(seen[kind, "grpo"].float().mean() - 0.3) < 0.12
    whole = seen["group", "grpo"].float().mean(-1)
    assert ((whole == 0) | (whole == 1)).all()
    mixed = seen["response", "grpo"].float().mean(-1)
    assert ((mixed > 0) & (mixed < 1)).any()


def test_stale_answers_come_from_old_weights():
    torch.manual_seed(0)
    policy = RunningSums(3).make_policy()
    prompts = RunningSums(3).prompts(4, torch.Generator().manual_seed(1))
    sample_from_past(policy, 2)
    expected = []
    for step in range(5):
        with torch.no_grad():
            policy.head.weight.fill_(0.01 * step)
            expected.append(policy.state_dict()["head.weight"].clone())
            sequences, log_prob = policy.sample(prompts, 3)
        old = copy.deepcopy(policy)
        old.head.weight.data = expected[max(0, step - 2)]
        torch.testing.assert_close(log_prob, old.score(sequences, 3)[0], rtol=1e-5, atol=1e-6)


def test_every_arm_has_as_many_trials_and_seeds_are_kept_apart():
    assert len({len(trials) for trials in grids.TRIALS.values()}) == 1
    assert not set(grids.TUNING_SEEDS) & set(grids.REPORTED_SEEDS)


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_names_are_those_of_their_settings(grid):
    settings = grids.GRIDS[grid]()
    assert len({setting.name for setting in settings}) == len(set(settings))


@pytest.mark.parametrize("path", sorted(analysis.RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_results_name_their_settings(path):
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert Setting(**row["setting"]).name == row["name"]
        assert len(row["rewards"]) == row["setting"]["batches"]


def test_one_file_is_short_and_runs():
    path = ROOT / "examples" / "one_file.py"
    assert len(path.read_text().splitlines()) < 200
    code = (
        "from one_file import *; policy = Transformer(vocabulary=11, positions=7)\n"
        "print(train(policy, RunningSums(3), vimpo_loss, batches=2, lr=1e-3, seed=1))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)) == 2


def test_a_headline_grid_waits_for_the_whole_tuning_grid(monkeypatch):
    tuned = {setting: {"accuracy": setting.lr, "rewards": [0.5]} for setting in grids.tuning("clean")}
    monkeypatch.setattr(grids, "load", lambda grid: tuned)
    chosen = grids.headline("clean")
    assert len(chosen) == len(grids.TRIALS) * len(grids.REPORTED_SEEDS)
    assert {setting.lr for setting in chosen if setting.label == "GRPO"} == {max(grids.RATES)}
    tuned.popitem()
    assert grids.headline("clean") == []


def test_paired_difference_and_the_best_trial():
    grid = {
        Setting("grpo", lr=lr, seed=seed): {"accuracy": lr * 1000 + 0.01 * seed, "rewards": [0.5]}
        for lr in (1e-4, 2e-4)
        for seed in (101, 102)
    }
    trials = [Setting("grpo", lr=lr, seed=0) for lr in (1e-4, 2e-4)]
    assert analysis.best_trial(trials, grid).lr == 2e-4
    found = analysis.by_trial(grid)
    assert analysis.paired_difference(found[trials[0]], found[trials[1]]) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="have not been run: rloo"):
        analysis.best_trial([Setting("rloo", seed=0)], grid)


# grid -> the arm that docs/study.md compares with the others
COMPARED = {
    "noise_20": "VIMPO, value loss",
    "qwen3_noise_20": "VIMPO, value loss, 0.001, tie 1",
    "qwen3_clean": "VIMPO, value loss, 0.001, tie 1",
    "needles": "VIMPO, value loss",
    "reversal": "VIMPO, clipped",
    "needles_noise_20": "VIMPO, value loss, 0.02, tie 1",
    "reuse": "VIMPO, clipped",
    "qwen3_reuse": "VIMPO, clipped, old kappa",
}
BESIDE = {"noise_20": ["v05", "pacs"]}  # arms of the same condition that have a grid of their own


@pytest.mark.parametrize("grid", COMPARED)
def test_the_page_has_the_table_of_a_headline_grid(grid):
    assert analysis.table(grid, COMPARED[grid], BESIDE.get(grid, ())) in (ROOT / "docs/study.md").read_text()


@pytest.mark.parametrize(
    "grid",
    [
        "tune_qwen3_noise_20",
        "tune_qwen3_clean",
        "tune_qwen3_reuse",
        "qwen3_reuse_16",
        "tune_needles",
        "tune_needles_noise_20",
        "needles_tie",
        "needles_noise_20_tie",
    ],
)
def test_the_page_has_the_whole_tuning_grid(grid):
    assert analysis.tuning_table(grid) in (ROOT / "docs/study.md").read_text()


@pytest.mark.parametrize(
    "axes",
    [
        ["axis_responses_flipped"],
        ["axis_noise", "axis_groups", "axis_length"],
        ["axis_staleness"],
        ["axis_dilution"],
        ["axis_dilution_noise_20"],
    ],
    ids=lambda axes: axes[0],
)
def test_the_page_has_the_table_of_axes(axes):
    compared = "VIMPO, clipped" if axes == ["axis_staleness"] else "VIMPO, value loss"
    assert analysis.axis_table(axes, compared) in (ROOT / "docs/study.md").read_text()


def test_the_page_has_what_reuse_saves():
    assert analysis.share_of_rollouts("qwen3_reuse", "qwen3_clean", 20) in (ROOT / "docs/study.md").read_text()


def results_of(curves: dict[Setting, list[float]]) -> dict[Setting, dict]:
    return {setting: {"accuracy": curve[-1], "rewards": curve} for setting, curve in curves.items()}


def test_the_table_takes_differences_by_seed(monkeypatch):
    results = results_of({
        Setting("grpo", seed=1): [0.1, 0.2], Setting("grpo", seed=2): [0.5, 0.6],
        Setting("vimpo", coeff=0.5, seed=1): [0.2, 0.3], Setting("vimpo", coeff=0.5, seed=2): [0.6, 0.7],
        Setting("vimpo", coeff=1.0, seed=1): [0.0, 0.0], Setting("vimpo", coeff=1.0, seed=2): [0.0, 0.0],
    })  # fmt: skip
    monkeypatch.setattr(analysis, "load", lambda grid: results)
    lines = analysis.table("any", "VIMPO, value loss, 0.001, tie 0.5").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| VIMPO, value loss", "| GRPO", "| VIMPO, value loss"]
    assert "| 2 | 0.400 (0.200 to 0.600) | 0.350 (0.150 to 0.550) | +0.100 (+0.100 to +0.100) | +0.100" in lines[3]
    with pytest.raises(ValueError, match="has 2 trials of 'VIMPO, value loss'"):
        analysis.table("any", "VIMPO, value loss")


def test_the_table_of_axes_has_a_row_a_point_and_pairs_by_seed(monkeypatch):
    def point(staleness: int, ahead: float) -> dict[Setting, list[float]]:
        at = {seed: {"seed": seed, "staleness": staleness, "flip_prob": 0.2} for seed in (1, 2)}
        return {Setting("grpo", **at[seed]): [0.1 * seed] for seed in at} | {
            Setting("vimpo", coeff=1.0, **at[seed]): [0.1 * seed + ahead] for seed in at
        }

    results = {"axis_a": results_of(point(1, 0.2)), "axis_b": results_of(point(4, -0.1))}
    monkeypatch.setattr(analysis, "load", lambda grid: results[grid])
    lines = analysis.axis_table(results, "VIMPO, value loss").splitlines()
    assert lines[2] == "| staleness 1, flip_prob 0.2 | 2 | 0.35 | 0.15 | +0.200 (+0.200 to +0.200) |"
    assert lines[3] == "| staleness 4, flip_prob 0.2 | 2 | 0.05 | 0.15 | -0.100 (-0.100 to -0.100) |"
    with pytest.raises(ValueError, match="no arm 'PACS'"):
        analysis.axis_table(results, "PACS")


def test_an_axis_moves_the_best_trials_of_its_centre(monkeypatch):
    tuned = {s: {"accuracy": s.lr - s.coeff / 100, "rewards": [0.5]} for s in grids.tuning("needles")}
    monkeypatch.setattr(grids, "load", lambda grid: tuned if grid == "tune_needles" else {})
    axis = grids.Axis(({"tokens": 8}, {"tokens": 16}), "needles", ("GRPO", "VIMPO, value loss", "VIMPO, clipped"))
    settings = axis.settings()
    assert {setting.seed for setting in settings} == set(grids.AXIS_SEEDS) and len(settings) == 3 * 2 * 5
    assert {setting.tokens for setting in settings} == {8, 16} and {s.task for s in settings} == {"needles"}
    best = {setting.label: setting.trial for setting in settings}
    assert best["GRPO"] == f"{20 * max(grids.RATES):g}"
    assert best["VIMPO, clipped"] == best["VIMPO, value loss"] == "0.02, tie 0.5"
    tuned.popitem()
    assert axis.settings() == []


def test_the_picture_of_an_axis_has_its_centre_on_the_same_seeds(monkeypatch, tmp_path):
    """Trials of the centre that the axis does not have, and seeds beyond the axis's, stay out."""
    at = {"flip_prob": 0.2}
    centre = {Setting("grpo", seed=s, **at): [0.5] for s in (1, 2, 9)} | {Setting("grpo", lr=2e-3, **at): [0.9]}
    axis = {Setting("grpo", seed=s, staleness=2, **at): [0.1 * s] for s in (1, 2)}
    found = {"qwen3_noise_20": results_of(centre), "axis_staleness": results_of(axis)}
    monkeypatch.setattr(plots, "load", lambda grid: found[grid])
    points = {trial.staleness: values.tolist() for trial, values in plots.points("axis_staleness").items()}
    assert points == {0: [0.5, 0.5], 2: [0.1, 0.2]}
    drawn = []
    monkeypatch.setattr(plots.plt.Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    plots.along_axes(["axis_staleness"], tmp_path / "any.png")
    (line,) = drawn[0].axes[0].lines
    assert line.get_xdata().tolist() == [0, 2] and line.get_ydata().tolist() == pytest.approx([0.5, 0.15])


def test_the_share_of_rollouts(monkeypatch):
    """The rival is at 0.4 after the 4th batch; the oracle, which is better, is none. With 4 updates: there at the 2nd."""
    one_update = results_of({
        Setting("grpo", batches=5): [0.1, 0.2, 0.3, 0.4, 0.5], Setting("rloo", batches=5): [0.1, 0.1, 0.1, 0.1, 0.1],
        Setting("oracle", batches=5): [0.9] * 5, Setting("vimpo", coeff=0.5, batches=5): [0.8] * 5,
    })  # fmt: skip
    several = results_of({
        Setting("vimpo", coeff=0.5, form="clipped", updates=4, batches=3): [0.3, 0.45, 0.6],
        Setting("pacs", coeff=1.0, updates=2, batches=3): [0.1, 0.2, 0.3],
    })  # fmt: skip
    monkeypatch.setattr(analysis, "load", lambda grid: {"one": one_update, "several": several}[grid])
    table = analysis.share_of_rollouts("several", "one", batches=4, window=1)
    assert "to 0.40, where GRPO (0.001) is after 4" in table
    assert "| VIMPO, clipped, 0.001, tie 0.5, 4 updates | 2 | 50% |" in table
    assert "| PACS, 0.001, tie 1, 2 updates | more |  |" in table


def test_a_clipped_loss_has_no_actor_loss_beside_it():
    with pytest.raises(ValueError, match="alpha must be 0"):
        Setting("vimpo", form="clipped", alpha=0.1)


def test_the_quickstarts_model_learns_the_same_tasks():
    setting = Setting("vimpo", coeff=0.5, model="qwen3", tokens=3, batches=2, prompts=4, responses=4)
    first = run(setting)
    assert first["rewards"] == run(setting)["rewards"]
    assert 0 < first["accuracy"] < 1 and start_policy(setting).model.config.model_type == "qwen3"


def test_a_headline_grid_has_vimpo_at_the_default_beta_too(monkeypatch):
    """Where the larger tie wins, the best trial at the default is repeated beside it."""
    tuned = {s: {"accuracy": s.coeff + s.lr, "rewards": [0.5]} for s in grids.tuning("clean")}
    monkeypatch.setattr(grids, "load", lambda grid: tuned)
    vimpo = {setting.coeff for setting in grids.headline("clean") if setting.label == "VIMPO, value loss"}
    assert vimpo == {0.5, 1.0}
