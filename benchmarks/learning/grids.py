"""The study's grids: name -> settings. Tuning seeds and reported seeds never meet.

Every arm is tuned by the same number of trials, each a pair of a learning rate and the arm's tie to the reference (coeff);
an arm without such a tie spends its trials on learning rates.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

from benchmarks.learning.settings import Setting

TUNING_SEEDS = range(101, 104)
REPORTED_SEEDS = range(1, 11)

RATES = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3)
PAIRS = tuple(product((5e-4, 1e-3), (0.25, 0.5, 1.0)))
KL_LOSS_PAIRS = tuple(product((5e-4, 1e-3), (0.03, 0.1, 0.3)))

# Arm's label -> the settings that are tried for it.
TRIALS: dict[str, list[Setting]] = {
    "GRPO": [Setting("grpo", lr=lr) for lr in RATES],
    "GRPO, KL loss": [Setting("grpo", lr=lr, coeff=coeff) for lr, coeff in KL_LOSS_PAIRS],
    "RLOO": [Setting("rloo", lr=lr) for lr in RATES],
    "KL in the reward": [Setting("kl_in_reward", lr=lr, coeff=coeff) for lr, coeff in PAIRS],
    "VIMPO, paper's constants": [Setting("vimpo_paper", lr=lr) for lr in RATES],
    "VIMPO, value loss": [Setting("vimpo", lr=lr, coeff=coeff) for lr, coeff in PAIRS],
    "VIMPO, actor 0.1": [Setting("vimpo", lr=lr, coeff=coeff, alpha=0.1) for lr, coeff in PAIRS],
    "oracle": [Setting("oracle", lr=lr) for lr in RATES],
}


def each(trials: Iterable[Setting], seeds: Iterable[int], **changes) -> list[Setting]:
    """Every trial with every seed, seed by seed, so that a grid that is cut off has whole seeds."""
    return [replace(trial, seed=seed, **changes) for seed in seeds for trial in trials]


def _tuning(**changes) -> list[Setting]:
    return each([trial for trials in TRIALS.values() for trial in trials], TUNING_SEEDS, **changes)


GRIDS: dict[str, Callable[[], list[Setting]]] = {
    "tune_noise": lambda: _tuning(flip_prob=0.2),
    "tune_clean": lambda: _tuning(batches=60),
}
