"""Claim: without a knob every method of the family has the setting that is vetted for it, and one word gives the paper's."""

from dataclasses import asdict

import pytest

from verl_patches.family import FAMILY
from vimpo_verl.config import PRESETS, VimpoConfig, parse_config
from vimpo_verl.rollout_budget import RolloutBudgetConfig
from vimpo_verl.timeouts import KNOBS

# Of each method, its constants; where they are from is said beside them.
VETTED = {
    # The paper's, but for beta, the actor's weight and its trust: docs/method.md, "Scale" and "Trust".
    "vimpo": {
        "beta": "auto", "beta_scale": 0.5, "actor_coeff": "auto", "actor_alpha": 0.1, "actor_trust": True,
        "kl_estimator": "exact", "kappa_policy": "old", "whiten": True, "use_actor": True, "value_loss_type": "squared_error",
        "baseline": "group_mean", "baseline_cap": None, "preset": None,
    },
    # arXiv 2509.02522 and its authors' script.
    "pacs": {"beta": 1.0, "score": "rloo", "class_weight": "question", "reward_method": "log_ratio"},
    # arXiv 2603.10848: the fused baseline has no constant of its own; 4 to 16 answers, c = 1/16^2 for rewards of -1 and 1.
    "v05": {},
}  # fmt: skip


@pytest.mark.parametrize("estimator", FAMILY)
def test_the_defaults_are_the_vetted_ones(estimator):
    config, problems = FAMILY[estimator].parse_config(None)
    found = asdict(config)
    assert problems == [] and {name: found[name] for name in VETTED[estimator]} == VETTED[estimator]
    assert {found[name] for name in KNOBS} == {"auto"}
    if estimator != "vimpo":  # nothing is left out
        assert found.keys() == {*VETTED[estimator], *KNOBS}


def test_the_defaults_of_rollouts_on_demand_are_the_papers():
    found = RolloutBudgetConfig()
    assert (found.min_rollouts, found.max_rollouts, found.cost, found.round_size) == (4, 16, "auto", 1)


# arXiv 2606.20008, section 5.
PAPER = {
    "beta": 5e-4, "actor_coeff": 5e-3, "actor_trust": False, "kl_estimator": "exact", "whiten": True, "use_actor": True,
    "value_loss_type": "squared_error", "baseline": "group_mean", "baseline_cap": None,
}  # fmt: skip


def test_the_papers_constants_by_one_word():
    config, problems = parse_config({"preset": "paper"})
    found = asdict(config)
    assert problems == [] and {name: found[name] for name in PAPER} == PAPER
    assert set(PRESETS) == {"paper"} and found["preset"] == "paper"


def test_what_is_given_wins_over_the_preset():
    config, problems = parse_config({"preset": "paper", "beta": "1e-3", "actor_trust": True})
    assert problems == [] and (config.beta, config.actor_coeff, config.actor_trust) == (1e-3, 5e-3, True)
    assert parse_config({"preset": None})[0] == VimpoConfig()
