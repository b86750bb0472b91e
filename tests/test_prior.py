"""Claim: a prompt's prior is the discounted Beta posterior of its own past, started from the run's mean; the state survives a
checkpoint bit for bit; a column or a function gives it instead; and what is logged of a prior is its error.
"""

import json
import math
import random
import re
import statistics
from dataclasses import fields
from pathlib import Path

import pytest
from tensordict import TensorDict

from vimpo_verl.prior import STATE, PastRewards, Prior, PriorConfig, parse_config, prior_metrics

ROOT = Path(__file__).parent.parent


def posterior(visits, prompt, step, discount):
    """The formula of vimpo_verl/prior.py over the list of all visits (prompt, rewards, step), term by term."""
    faded = [(name, discount ** (step - then), rewards) for name, rewards, then in visits]
    successes = sum(kept * sum(rewards) for _, kept, rewards in faded)
    answers = sum(kept * len(rewards) for _, kept, rewards in faded)
    run_mean = (1 + successes) / (2 + answers)
    own = [(kept, rewards) for name, kept, rewards in faded if name == prompt]
    a = 2 * run_mean + sum(kept * sum(rewards) for kept, rewards in own)
    b = 2 * (1 - run_mean) + sum(kept * (len(rewards) - sum(rewards)) for kept, rewards in own)
    return a / (a + b), a + b


@pytest.mark.parametrize("discount", [1.0, 0.99, 0.5])
def test_the_state_is_the_formula_over_all_visits(discount):
    rng = random.Random(0)
    past, visits = PastRewards(discount), []
    for step in range(1, 30):
        for prompt in rng.sample("abcdefgh", 3):
            mean, weight = past.prior(prompt, step)
            assert (mean, weight) == pytest.approx(posterior(visits, prompt, step, discount), rel=1e-12)
        for prompt in rng.sample("abcdefgh", 3):
            rewards = [rng.choice([0.0, 1.0, 0.25]) for _ in range(rng.randint(1, 6))]
            past.add(prompt, rewards, step)
            visits.append((prompt, rewards, step))


def test_by_hand():
    past = PastRewards(discount=0.5)
    assert past.prior("a", 1) == Prior(0.5, 2.0), "nothing is known"
    past.add("a", [1, 1, 1, 0], 1)
    assert past.prior("b", 1) == Prior(4 / 6, 2.0), "another prompt: the run's mean, (1 + 3) / (2 + 4)"
    # A step later the four answers count for two: m = 2.5 / 4, a = 1.25 + 1.5, b = 0.75 + 0.5.
    assert past.prior("a", 2) == Prior(2.75 / 4, 4.0)
    assert past.has_seen("a") and not past.has_seen("b")


def test_a_checkpoint_keeps_it_bit_for_bit(tmp_path):
    rng = random.Random(1)
    past = PastRewards(0.97)
    for step in range(1, 20):
        past.add(rng.choice("abc/ü"), [rng.random() for _ in range(4)], step)
    past.save(tmp_path / "global_step_19")
    again = PastRewards(0.97)
    assert again.load(tmp_path / "global_step_19")
    assert [again.prior(p, 20) for p in "abc/üx"] == [past.prior(p, 20) for p in "abc/üx"]


def test_a_checkpoint_without_or_with_a_broken_past(tmp_path):
    past = PastRewards(1.0)
    assert not past.load(tmp_path)
    for broken in ("", "[]", '{"of_run": [1, 2, 3]}', '{"of_run": [1], "of_prompt": {}}'):
        (tmp_path / STATE).write_text(broken)
        with pytest.raises(ValueError, match=f"{STATE} cannot be read"):
            past.load(tmp_path)


def test_metrics_are_of_the_prior_and_not_of_the_answers_noise():
    """For priors with a known error the estimate is that error squared, the plain distance is more."""
    rng = random.Random(2)
    rate, error = 0.4, 0.2
    groups = [[float(rng.random() < rate) for _ in range(rng.randint(2, 8))] for _ in range(20_000)]
    found = prior_metrics([Prior(rate + error, 8.0)] * len(groups), groups)
    assert found["prior/mean"] == pytest.approx(0.6) and found["prior/bias"] == pytest.approx(error, abs=0.01)
    assert found["prior/squared_error"] == pytest.approx(error**2, abs=0.003)
    noise = statistics.mean(rate * (1 - rate) / len(group) for group in groups)
    assert found["prior/squared_distance"] == pytest.approx(error**2 + noise, abs=0.003)


def test_metrics_by_hand():
    found = prior_metrics([Prior(0.5, 2.0), Prior(1.0, 2.0), Prior(0.3, 2.0)], [[1, 1, 0, 1], [0], []])
    assert found["prior/mean"] == 0.75 and found["prior/bias"] == pytest.approx((-0.25 + 1) / 2)
    assert found["prior/squared_distance"] == pytest.approx((0.0625 + 1) / 2)
    assert found["prior/squared_error"] == pytest.approx(0.0625 - 0.25 / 4), "of the group with two answers or more"
    assert prior_metrics([], []) == {}


def test_knobs():
    assert parse_config(None) == (PriorConfig(), []) and PriorConfig().source == "own_past"
    assert parse_config({"column": "extra_info.rate"})[0].source == "column"
    assert parse_config({"path": "a.py", "name": "f"})[0].source == "function"
    _, problems = parse_config({"path": "a.py", "column": "c", "discount": 0, "weight": -1, "colum": "c"})
    assert len(problems) == 5
    for named in (
        "name a function together",
        "two priors",
        "discount=0",
        "weight=-1",
        "did you mean algorithm.prior.column",
    ):
        assert any(named in problem for problem in problems), (named, problems)


def test_the_page_has_every_knob_with_its_default():
    table = (ROOT / "docs/configuration.md").read_text().split("| knob under `algorithm.prior`")[1].split("\n\n")[0]
    found = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, flags=re.MULTILINE))
    assert found == {field.name: str(field.default) for field in fields(PriorConfig)}


# ---- where a run's priors come from (verl_patches.prior_state) -------------------------------------------------------


def batch_of(**columns) -> TensorDict:
    import numpy as np
    from verl.utils import tensordict_utils as tu

    def column(values):
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array

    return tu.get_tensordict({name: column(values) for name, values in columns.items()})


@pytest.fixture
def run_prior():
    from verl_patches.prior_state import RunPrior

    return lambda **knobs: RunPrior(PriorConfig(**knobs))


def test_own_past_is_by_data_source_and_index(run_prior):
    priors = run_prior(discount=1.0)
    batch = batch_of(data_source=["s", "s", "t"], extra_info=[{"index": 1}, {"index": 2}, {"index": 1}])
    assert [p.mean for p in priors.of(batch, 1)] == [0.5] * 3
    metrics = priors.learn([("s", {"index": 1})], [[1.0, 1.0]], 1)
    assert metrics == {"prior/share_seen": 0.0}
    seen, other, same_index = priors.of(batch, 2)
    assert seen.mean > other.mean == same_index.mean == 0.75
    assert priors.learn([("s", {"index": 1}), ("t", {"index": 1})], [[1.0], [0.0]], 2) == {"prior/share_seen": 0.5}
    with pytest.raises(ValueError, match="no extra_info.index"):
        priors.of(batch_of(data_source=["s"], extra_info=[{}]), 1)


def test_a_column(run_prior):
    priors = run_prior(column="extra_info.rate", weight=3.0)
    assert priors.of(batch_of(extra_info=[{"rate": 0.25}, {"rate": 1}]), 1) == [Prior(0.25, 3.0), Prior(1.0, 3.0)]
    assert run_prior(column="rate").of(batch_of(rate=[0.5]), 1) == [Prior(0.5, 8.0)]
    for bad in ({"rate": 1.5}, {"rate": None}, {"rate": math.nan}, {}):
        with pytest.raises(
            ValueError, match="column=extra_info.rate: a prompt of step 7, row 0 .*a number from 0 to 1"
        ):
            priors.of(batch_of(extra_info=[bad]), 7)
    assert priors.learn([("s", {"index": 1})], [[1.0]], 1) == {}, "it learns nothing"


def test_a_function(run_prior, tmp_path):
    file = tmp_path / "value.py"
    file.write_text(
        "def value(prompts, step):\n    return [len(p['raw_prompt'][0]['content']) / 10 / step for p in prompts]\n"
        "def short(prompts, step):\n    return []\n"
        "number = 3\n"
    )
    batch = batch_of(raw_prompt=[[{"role": "user", "content": "ab"}], [{"role": "user", "content": "abcd"}]])
    priors = run_prior(path=str(file), name="value")
    assert [p.mean for p in priors.of(batch, 1)] == [0.2, 0.4] and [p.mean for p in priors.of(batch, 2)] == [0.1, 0.2]
    with pytest.raises(ValueError, match="gave 0 numbers for 2 prompts"):
        run_prior(path=str(file), name="short").of(batch, 1)
    for name, message in (("number", "this is no function"), ("missing", "cannot be loaded")):
        with pytest.raises(ValueError, match=message):
            run_prior(path=str(file), name=name)


class Rows(list):
    """As far as a data set's table is looked at."""

    @property
    def column_names(self):
        return list(self[0]) if self else []

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


class DataSet:
    def __init__(self, *rows):
        self.dataframe = Rows(rows)


def test_the_data_set_is_looked_through_before_the_first_step(run_prior):
    def row(source, index, rate=0.5):
        return {"data_source": source, "extra_info": {"index": index}, "rate": rate}

    fine = DataSet(row("s", 1), row("s", 2), row("t", 1))
    run_prior().check(fine)
    run_prior(column="rate").check(fine)
    with pytest.raises(ValueError, match="1 rows .* first 's/1'"):
        run_prior().check(DataSet(row("s", 1), row("s", 2), row("s", 1)))
    with pytest.raises(ValueError, match="no extra_info.index"):
        run_prior().check(DataSet({"data_source": "s", "prompt": 1}))
    with pytest.raises(ValueError, match="row 1 of the data set has 2 for a prior"):
        run_prior(column="rate").check(DataSet(row("s", 1), row("s", 2, rate=2)))
    with pytest.raises(ValueError, match="row 0 of the data set has None"):
        run_prior(column="absent").check(fine)
    run_prior().check(object())  # a user's own data set shows nothing before it is read


def test_a_resumed_run_goes_on_with_its_past(run_prior, tmp_path, capsys):
    first = run_prior()
    first.learn([("s", {"index": 1})], [[1.0, 0.0, 1.0]], 1)
    first.save(tmp_path)
    assert json.loads((tmp_path / STATE).read_text())["of_prompt"] == {"s/1": [2.0, 1.0, 1]}
    resumed = run_prior()
    resumed.restore(tmp_path)
    batch = batch_of(data_source=["s"], extra_info=[{"index": 1}])
    assert resumed.of(batch, 2) == first.of(batch, 2)
    run_prior().restore(tmp_path / "elsewhere")
    assert f"has no {STATE}: algorithm.prior starts without a past" in capsys.readouterr().err
