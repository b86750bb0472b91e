"""Claim: the picture of what a step costs is drawn from the results files, with the forwards that whole runs were counted to
have."""

import pytest

from benchmarks import cost_picture

FORWARDS = {"grpo": [4], "grpo_kl": [5], "vimpo": [5], "vimpo_one_pass": [4]}


def test_forwards_time_and_memory_are_those_of_the_results(tmp_path):
    forwards, time, memory = cost_picture.panels().values()
    assert forwards == FORWARDS  # tests/test_end_to_end.py counts them
    files = cost_picture.GPU, cost_picture.ENGINE, cost_picture.THROUGH_VERL
    gpu, engine, through_verl = (cost_picture.rows_of(path) for path in files)
    for recipe in FORWARDS:
        of_grpo = through_verl[recipe]["all but generation s"] / through_verl["grpo"]["all but generation s"]
        assert time[recipe] == [gpu[recipe]["to GRPO"], engine[recipe]["to GRPO"], pytest.approx(of_grpo)]
        assert memory[recipe] == [gpu[recipe]["peak ratio"], engine[recipe]["peak ratio"]]
    cost_picture.draw(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
