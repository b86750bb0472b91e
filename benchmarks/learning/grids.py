"""The study's grids: name -> settings. Tuning seeds and reported seeds never meet.

Every arm is tuned by the same number of trials, each a pair of a learning rate and the arm's tie to the reference (coeff);
an arm without such a tie spends its trials on learning rates. A headline grid takes each arm's best trial from the results
of its tuning grid and repeats it on the reported seeds.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

from benchmarks.learning.analysis import best_trial, load
from benchmarks.learning.settings import Setting

TUNING_SEEDS = range(101, 104)
REPORTED_SEEDS = range(1, 11)

RATES = (3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3)
PAIRS = tuple(product((7e-4, 1e-3, 1.5e-3), (0.25, 0.5)))
KL_LOSS_PAIRS = tuple(product((7e-4, 1e-3, 1.5e-3), (0.03, 0.1)))

# Arm's label -> the settings that are tried for it.
TRIALS: dict[str, list[Setting]] = {
    "GRPO": [Setting("grpo", lr=lr) for lr in RATES],
    "GRPO, KL loss": [Setting("grpo", lr=lr, coeff=coeff) for lr, coeff in KL_LOSS_PAIRS],
    "RLOO": [Setting("rloo", lr=lr) for lr in RATES],
    "KL in the reward": [Setting("kl_in_reward", lr=lr, coeff=coeff) for lr, coeff in PAIRS],
    "VIMPO, value loss": [Setting("vimpo", lr=lr, coeff=coeff) for lr, coeff in PAIRS],
    "VIMPO, actor 0.1": [Setting("vimpo", lr=lr, coeff=coeff, alpha=0.1) for lr, coeff in PAIRS],
    "oracle": [Setting("oracle", lr=lr) for lr in RATES],
}

# Condition -> what it changes of the centre.
CONDITIONS: dict[str, dict] = {
    "noise_20": {"flip_prob": 0.2, "batches": 160},
    "noise_30": {"flip_prob": 0.3, "batches": 160},
    "clean": {"batches": 80},
}


def label_of(setting: Setting) -> str:
    """The label of the arm that a setting belongs to."""
    if setting.arm == "grpo":
        return "GRPO, KL loss" if setting.coeff > 0 else "GRPO"
    if setting.arm == "vimpo":
        return "VIMPO, actor 0.1" if setting.alpha > 0 else "VIMPO, value loss"
    return {"rloo": "RLOO", "kl_in_reward": "KL in the reward", "vimpo_paper": "VIMPO, paper's constants"}.get(
        setting.arm, setting.arm
    )


def each(trials: Iterable[Setting], seeds: Iterable[int], **changes) -> list[Setting]:
    """Every trial with every seed, seed by seed, so that a grid that is cut off has whole seeds."""
    return [replace(trial, seed=seed, **changes) for seed in seeds for trial in trials]


def tuning(condition: str) -> list[Setting]:
    """Every trial of every arm on the tuning seeds."""
    return each([trial for trials in TRIALS.values() for trial in trials], TUNING_SEEDS, **CONDITIONS[condition])


def headline(condition: str) -> list[Setting]:
    """Each arm's best trial on the reported seeds; nothing before the whole tuning grid has been run."""
    results = load(f"tune_{condition}")
    if not results.keys() >= set(tuning(condition)):
        return []
    chosen = [
        best_trial([replace(trial, seed=0, **CONDITIONS[condition]) for trial in trials], results)
        for trials in TRIALS.values()
    ]
    return each(chosen, REPORTED_SEEDS)


# What was tried before the grids were frozen, on tuning seeds; cut off.
PILOTS: dict[str, list[Setting]] = {
    "noise_30": [
        Setting("grpo", lr=7e-4),
        Setting("grpo", lr=1.5e-3),
        Setting("grpo", lr=1.5e-3, coeff=0.1),
        Setting("rloo", lr=1e-3),
        Setting("kl_in_reward", lr=1e-3, coeff=0.5),
        Setting("vimpo", lr=1e-3, coeff=0.5),
        Setting("vimpo", lr=2e-3, coeff=0.5),
        Setting("vimpo", lr=2e-3, coeff=1.0),
    ],
    "reuse": [
        *(Setting("grpo", lr=lr, coeff=coeff) for lr in (3e-4, 1e-3) for coeff in (0.0, 0.1)),
        *(Setting("kl_in_reward", lr=lr, coeff=0.5) for lr in (3e-4, 1e-3)),
        *(Setting("vimpo", lr=lr, coeff=coeff) for lr in (3e-4, 1e-3) for coeff in (0.5, 1.0, 2.0, 4.0, 8.0)),
    ],
}

GRIDS: dict[str, Callable[[], list[Setting]]] = {
    **{f"tune_{condition}": lambda condition=condition: tuning(condition) for condition in CONDITIONS},
    **{condition: lambda condition=condition: headline(condition) for condition in CONDITIONS},
    "pilot_noise_30": lambda: each(PILOTS["noise_30"], TUNING_SEEDS, **CONDITIONS["noise_30"]),
    "pilot_reuse": lambda: each(PILOTS["reuse"], TUNING_SEEDS, batches=20, updates=8),
    # The paper's constants are for answers of 1,000 tokens: here they are shown to fail at every rate, not tuned.
    "paper_constants": lambda: each(
        [Setting("vimpo_paper", lr=lr) for lr in RATES], TUNING_SEEDS, **CONDITIONS["clean"]
    ),
}
