"""Claim: `algorithm.vimpo` is read completely or refused completely, every problem named at once with what to write.

Values come as YAML or Hydra hands them over, 5e-4 perhaps as text. Defaults exist in one place, the dataclass.
"""

import math
from dataclasses import asdict, fields

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vimpo_verl.config import PAPER_RECIPE, VimpoConfig, parse_config
from vimpo_verl.reward_noise import parse_config as parse_noise


def parsed(**section):
    config, problems = parse_config(section)
    assert problems == []
    return config


def problems_of(**section):
    return parse_config(section)[1]


def test_nothing_given_gives_the_defaults():
    for section in (None, {}):
        assert parse_config(section) == (VimpoConfig(), [])


def test_the_defaults_are_those_of_the_design():
    """The paper's, but for beta, actor_coeff, actor_trust and value_clip."""
    assert asdict(VimpoConfig()) == {
        "beta": "auto", "beta_scale": 0.5, "actor_coeff": "auto", "actor_alpha": 0.1, "actor_trust": True,
        "kl_estimator": "exact", "whiten": True, "use_actor": True, "value_loss_type": "squared_error", "huber_delta": 0.5,
        "value_clip": 0.2,
        "baseline": "group_mean", "baseline_cap": None, "kappa_policy": "old", "passes": "auto", "preset": None,
        "ref_refresh_every": None, "kl_top_k": None, "kappa_detach": True, "value_type": "raw", "value_coeff": 1.0,
        "value_normalised": False, "actor_advantage": "implied",
        "stage_timeout": "auto", "validation_timeout": "auto", "startup_timeout": "auto",
    }  # fmt: skip
    assert parsed(**PAPER_RECIPE) == VimpoConfig(beta=5e-4, actor_coeff=5e-3, actor_trust=False, value_clip=None)


@pytest.mark.parametrize("value", [5e-4, "5e-4", "0.0005", "5E-4"])
def test_numbers_may_come_as_text(value):
    assert parsed(beta=value).beta == 5e-4
    assert parsed(actor_coeff=value, baseline_cap=value) == VimpoConfig(actor_coeff=5e-4, baseline_cap=5e-4)


def test_an_integer_becomes_a_float():
    assert isinstance(parsed(beta=1).beta, float) and parsed(actor_coeff=0).actor_coeff == 0.0


def test_everything_at_once():
    section = dict(
        beta=0.01, beta_scale=0.7, actor_coeff="auto", actor_alpha=0.3, actor_trust=False, kl_estimator="topk", whiten=True,
        use_actor=True, value_loss_type="huber", huber_delta=0.25, value_clip=0.1, baseline="leave_one_out", baseline_cap=0.9,
        kappa_policy="current", passes="one", preset="paper", ref_refresh_every=20, kl_top_k=64,
        kappa_detach=False, value_type="raw", value_coeff=2.0, value_normalised=True, actor_advantage="grpo",
        stage_timeout=60.0, validation_timeout=None, startup_timeout=600.0,
    )  # fmt: skip
    assert asdict(parsed(**section)) == section
    assert set(section) == {field.name for field in fields(VimpoConfig)}


BAD_VALUES = {
    "beta": [0, -1, "x", "automatic", None, True, math.nan, math.inf, "nan", [1]],
    "beta_scale": [0, -0.5, "auto", None, True, math.inf],
    "actor_coeff": [-1, "automatic", None, True, math.inf],
    "actor_alpha": [-0.1, "x", None, False],
    "actor_trust": [1, 0, "true", None],
    "kl_estimator": ["k4", None, 3],
    "whiten": ["no", 1],
    "use_actor": ["", 0.0],
    "value_loss_type": ["mse", None],
    "huber_delta": [0, -1, "x"],
    "value_clip": [0, -0.2, "x", True, math.inf],
    "baseline": ["mean", None],
    "baseline_cap": ["x", True, math.nan],
    "stage_timeout": [0, -1, "never", True, math.inf],
    "validation_timeout": [0, "none", False, math.nan],
    "startup_timeout": [-1, "", [60]],
    "kappa_policy": ["new", None],
    "passes": ["three", 1, None],
    "preset": ["authors", True, ""],
    "ref_refresh_every": [0, -1, 2.5, "5", True],
    "kl_top_k": [0, -1, 1.5, "64"],
    "kappa_detach": [0, "no", None],
    "value_type": ["hard", None],
    "value_coeff": [0, -1, "x", None],
    "value_normalised": ["yes", 1, None],
    "actor_advantage": ["gae", None],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_a_bad_value_is_named_with_what_to_write(name, value):
    (problem,) = problems_of(**{name: value})
    assert problem.startswith(f"algorithm.vimpo.{name}={value!r}: ")
    assert "write" in problem


def test_every_key_has_bad_values_to_test():
    assert set(BAD_VALUES) == {field.name for field in fields(VimpoConfig)}


@pytest.mark.parametrize("name", ["stage_timeout", "validation_timeout", "startup_timeout"])
def test_a_timeout_is_seconds_auto_or_nothing(name):
    for value, taken in (("auto", "auto"), (None, None), ("90", 90.0), (7200, 7200.0)):
        assert getattr(parsed(**{name: value}), name) == taken
    (problem,) = problems_of(**{name: "null"})
    assert problem.endswith("write auto, a number of seconds greater than 0, or null to be warned only")


def test_k1_is_refused_with_the_reason():
    (problem,) = problems_of(kl_estimator="k1")
    assert "log-ratio" in problem and "zero" in problem and "exact, topk, k2 or k3" in problem


@pytest.mark.parametrize(
    "wrong, nearest", [("betta", "beta"), ("actor_coef", "actor_coeff"), ("kl_estimater", "kl_estimator")]
)
def test_an_unknown_key_suggests_the_nearest(wrong, nearest):
    (problem,) = problems_of(**{wrong: 1})
    assert f"algorithm.vimpo.{wrong} does not exist: did you mean algorithm.vimpo.{nearest}?" == problem


def test_an_unknown_key_without_a_near_one_lists_all():
    (problem,) = problems_of(zzz=1)
    assert all(field.name in problem for field in fields(VimpoConfig))


def test_every_problem_is_listed_at_once():
    problems = problems_of(beta=-1, betta=1, kl_estimator="k1", whiten="no", huber_delta=2)
    assert len(problems) == 4
    assert [problem.split("algorithm.vimpo.")[1].split("=")[0].split(" ")[0] for problem in problems] == [
        "beta", "betta", "kl_estimator", "whiten",
    ]  # fmt: skip


def test_auto_needs_whitened_advantages():
    (problem,) = problems_of(whiten=False)
    assert "actor_coeff" in problem and "whiten" in problem and "5e-3" in problem
    assert parsed(whiten=False, actor_coeff=5e-3) and parsed(whiten=False, use_actor=False)


@pytest.mark.parametrize("section", ["beta=1", 3, [("beta", 1)], True])
def test_something_that_is_no_section(section):
    (problem,) = parse_config(section)[1]
    assert "+algorithm.vimpo.<name>=<value>" in problem


STRANGE = [10**400, "1e999", "nan", "-inf", "5e-4", "0x10", "1_000", "٣", 1j, b"1", math.nan, {}, "auto ", " 1"]
ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
    | st.sampled_from(STRANGE)
)  # fmt: skip
NAMES = st.sampled_from([field.name for field in fields(VimpoConfig)]) | st.text(max_size=8)


@given(st.dictionaries(NAMES, ANYTHING, max_size=6))
def test_property_a_section_is_usable_or_explained(section):
    """Never an exception; no problem means that every value is the one given."""
    config, problems = parse_config(section)
    if problems:
        assert all("algorithm.vimpo" in problem for problem in problems)
        return
    for name, value in section.items():
        taken = getattr(config, name)
        assert taken == value or taken == float(value)
        assert not isinstance(taken, float) or math.isfinite(taken)


@given(st.dictionaries(st.sampled_from(["flip_prob", "seed"]) | st.text(max_size=8), ANYTHING, max_size=4))
def test_property_the_section_of_the_noise_is_usable_or_explained(section):
    config, problems = parse_noise(section)
    if problems:
        assert all("algorithm.reward_noise" in problem for problem in problems)
        return
    assert 0.0 <= config.flip_prob <= 1.0 and isinstance(config.seed, int)
    assert config.flip_prob == float(section["flip_prob"]) and config.seed == section.get("seed", 0)


@given(st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.booleans())
def test_property_what_is_no_section_is_explained(section):
    for parse, name in ((parse_config, "+algorithm.vimpo."), (parse_noise, "+algorithm.reward_noise.")):
        problems = parse(section)[1]
        assert problems == [] if section is None else name in problems[0]
