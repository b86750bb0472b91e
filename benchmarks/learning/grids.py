"""The study's grids: name -> settings. Tuning seeds and reported seeds never meet.

Every arm is tuned by the same number of trials, each a pair of a learning rate and the arm's tie to the reference (coeff);
an arm without such a tie spends its trials on learning rates. A headline grid takes each arm's best trial from the results
of its tuning grid and repeats it on the reported seeds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.learning import family
from benchmarks.learning.analysis import best_trial, load
from benchmarks.learning.settings import Setting
from vimpo_verl.config import VimpoConfig

DEFAULT_TIE = VimpoConfig().beta_scale
TUNING_SEEDS = range(101, 104)
REPORTED_SEEDS = range(1, 11)

RATES = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3)
PAIRS = tuple(product((3e-4, 5e-4, 1e-3), (0.5, 1.0)))
KL_LOSS_PAIRS = tuple(product((3e-4, 5e-4, 1e-3), (0.03, 0.1)))
SCHEDULES = ((1, 1e-3), (2, 7e-4), (2, 5e-4), (4, 5e-4), (4, 3e-4), (8, 2e-4))  # updates a batch, learning rate

# Arm's label -> the settings that are tried for it.
TRIALS: dict[str, list[Setting]] = {
    "GRPO": [Setting("grpo", lr=lr) for lr in RATES],
    "GRPO, KL loss": [Setting("grpo", lr=lr, coeff=coeff) for lr, coeff in KL_LOSS_PAIRS],
    "RLOO": [Setting("rloo", lr=lr) for lr in RATES],
    "KL in the reward": [Setting("kl_in_reward", lr=lr, coeff=coeff) for lr, coeff in PAIRS],
    "VIMPO, value loss": [Setting("vimpo", lr=lr, coeff=coeff) for lr, coeff in PAIRS],
    "VIMPO, actor 0.1": [Setting("vimpo", lr=lr, coeff=0.5, alpha=0.1) for lr in RATES],
    "VIMPO, paper's constants": [Setting("vimpo_paper", lr=lr) for lr in RATES],
    "oracle": [Setting("oracle", lr=lr) for lr in RATES],
}


def scheduled(arm: str, **changes) -> list[Setting]:
    """The trials of an arm that may choose its number of updates a batch."""
    return [Setting(arm, lr=lr, updates=updates, **changes) for updates, lr in SCHEDULES]


# The same where every arm chooses its number of updates a batch: what ties it to the reference is that of the centre.
REUSE_TRIALS: dict[str, list[Setting]] = {
    "GRPO": scheduled("grpo"),
    "GRPO, KL loss": scheduled("grpo", coeff=0.1),
    "RLOO": scheduled("rloo"),
    "KL in the reward": scheduled("kl_in_reward", coeff=0.5),
    "VIMPO, value loss": scheduled("vimpo", coeff=0.5),
    "VIMPO, clipped": scheduled("vimpo", coeff=0.5, form="clipped"),
    "VIMPO, clipped, old kappa": scheduled("vimpo", coeff=0.5, form="clipped", kappa="old"),
    "PACS": family.TRIALS["PACS"],
}

# Needles' policy is no transformer and learns at larger rates: at those of TRIALS every arm would want the largest.
NEEDLES_FASTER = 20
NEEDLES_TRIALS = {
    label: [replace(trial, lr=trial.lr * NEEDLES_FASTER) for trial in trials] for label, trials in TRIALS.items()
}
NEEDLES = {"task": "needles", "tokens": 64}

# Condition -> what it changes of the centre, and the trials.
CONDITIONS: dict[str, tuple[dict, dict[str, list[Setting]]]] = {
    "noise_20": ({"flip_prob": 0.2}, TRIALS),
    "noise_30": ({"flip_prob": 0.3}, TRIALS),
    "clean": ({"batches": 40}, TRIALS),
    "reuse": ({"batches": 20}, REUSE_TRIALS),
    "qwen3_noise_20": ({"flip_prob": 0.2, "model": "qwen3"}, TRIALS),
    "qwen3_clean": ({"batches": 40, "model": "qwen3"}, TRIALS),
    "qwen3_reuse": ({"batches": 20, "model": "qwen3"}, REUSE_TRIALS),
    "v05": ({"flip_prob": 0.2}, {"V0.5": family.TRIALS["V0.5"]}),
    "pacs": ({"flip_prob": 0.2}, {"PACS": family.TRIALS["PACS"]}),
    "needles": ({**NEEDLES, "batches": 20}, NEEDLES_TRIALS),
    "needles_noise_20": ({**NEEDLES, "flip_prob": 0.2}, NEEDLES_TRIALS),
}

# The setting of a published table (arXiv 2604.06159): token reversal from nothing, 2,000 updates at one learning rate.
PUBLISHED = {
    "task": "reversal", "lr": 1e-4, "batches": 500, "updates": 4, "prompts": 100, "responses": 8
}  # fmt: skip


def each(trials: Iterable[Setting], seeds: Iterable[int], **changes) -> list[Setting]:
    """Every trial with every seed, seed by seed, so that a grid that is cut off has whole seeds."""
    return [replace(trial, seed=seed, **changes) for seed in seeds for trial in trials]


def tuning(condition: str) -> list[Setting]:
    """Every trial of every arm on the tuning seeds."""
    changes, trials = CONDITIONS[condition]
    return each([trial for of_arm in trials.values() for trial in of_arm], TUNING_SEEDS, **changes)


def chosen(condition: str) -> dict[str, Setting]:
    """Each arm's best trial, as the setting with seed 0; empty before the whole tuning grid has been run."""
    results = load(f"tune_{condition}")
    if not results.keys() >= set(tuning(condition)):
        return {}
    changes, trials = CONDITIONS[condition]
    return {
        label: best_trial([replace(trial, seed=0, **changes) for trial in of_arm], results)
        for label, of_arm in trials.items()
    }


def headline(condition: str) -> list[Setting]:
    """Each arm's best trial on the reported seeds, and VIMPO's best at the beta that `beta=auto` works out."""
    best = chosen(condition)
    return each(dict.fromkeys([*best.values(), *(at_the_defaults(condition) if best else [])]), REPORTED_SEEDS)


def at_the_defaults(condition: str) -> list[Setting]:
    """The best trial of VIMPO's value loss with beta * T as by default, as the setting with seed 0."""
    changes, trials = CONDITIONS[condition]
    tied = [
        replace(trial, seed=0, **changes) for trial in trials.get("VIMPO, value loss", ()) if trial.coeff == DEFAULT_TIE
    ]
    return [best_trial(tied, load(f"tune_{condition}"))] if tied else []


AXIS_CENTRE = "qwen3_noise_20"
AXIS_ARMS = ("GRPO", "GRPO, KL loss", "KL in the reward", "VIMPO, value loss")
AXIS_SEEDS = range(1, 6)


@dataclass(frozen=True)
class Axis:
    """Moves one thing of a grid, with the settings that were best there and fewer arms and seeds.

    Attributes:
        points: what each point changes of the centre.
        centre: a condition.
        arms: labels; of the centre's arms, or "VIMPO, clipped", which is the value loss at its best trial with value_clip.
    """

    points: tuple[dict, ...]
    centre: str = AXIS_CENTRE
    arms: tuple[str, ...] = AXIS_ARMS

    def settings(self) -> list[Setting]:
        """Every point, seed by seed; empty before the centre's whole tuning grid has been run."""
        best = chosen(self.centre)
        if best:
            best["VIMPO, clipped"] = replace(best["VIMPO, value loss"], form="clipped")
        trials = [replace(best[label], **point) for label in self.arms if best for point in self.points]
        return each(trials, AXIS_SEEDS)


DILUTION = tuple({"tokens": tokens} for tokens in (8, 16, 32, 64, 128, 256))  # T / K from 2 to 64
# A centre that is no point of its axis is in its own grid, with more seeds.
AXES: dict[str, Axis] = {
    "noise": Axis(tuple({"flip_prob": prob} for prob in (0.0, 0.1, 0.3))),
    "responses_flipped": Axis(tuple({"flip_kind": "response", "flip_prob": prob} for prob in (0.1, 0.2))),
    "groups": Axis(({"prompts": 64, "responses": 4}, {"prompts": 16, "responses": 16})),
    "staleness": Axis(tuple({"staleness": batches} for batches in (1, 2, 4)), arms=(*AXIS_ARMS, "VIMPO, clipped")),
    "length": Axis(({"tokens": 5}, {"tokens": 20})),
    "dilution": Axis(DILUTION, "needles", (*AXIS_ARMS, "oracle")),
    "dilution_noise_20": Axis(DILUTION, "needles_noise_20", (*AXIS_ARMS, "oracle")),
}


# beta * T of VIMPO's value loss, with noise and without: what beta_scale should be. On the tuning seeds, because it chooses.
TIES = (0.25, 0.5, 1.0, 2.0, 4.0)


def ties() -> list[Setting]:
    """Every beta * T at two learning rates, on the quickstart's model."""
    trials = [Setting("vimpo", lr=lr, coeff=tie, model="qwen3") for lr, tie in product((5e-4, 1e-3), TIES)]
    conditions = ({"flip_prob": 0.2}, {"batches": 40})
    return [setting for changes in conditions for setting in each(trials, TUNING_SEEDS, **changes)]


def weaker_ties(condition: str) -> list[Setting]:
    """VIMPO's value loss on needles below the ties of the tuning grid, at its seeds: is it the tie that costs there?"""
    changes, trials = CONDITIONS[condition]
    rates = (0.02, 0.03) if condition == "needles" else (0.01, 0.014)
    trial = trials["VIMPO, value loss"][0]
    tried = [replace(trial, lr=lr, coeff=tie) for lr, tie in product(rates, (0.05, 0.1, 0.2, 0.5))]
    return each(tried, TUNING_SEEDS, **changes)


def sixteen_updates() -> list[Setting]:
    """Are 16 updates a batch worth a place in SCHEDULES? Arms with a ratio, at the tuning seeds, like tune_qwen3_reuse."""
    changes, trials = CONDITIONS["qwen3_reuse"]
    labels = ("GRPO", "GRPO, KL loss", "KL in the reward", "VIMPO, clipped, old kappa")
    tried = [replace(trials[label][0], updates=16, lr=lr) for label in labels for lr in (1e-4, 2e-4)]
    return each(tried, TUNING_SEEDS, **changes)


GRIDS: dict[str, Callable[[], list[Setting]]] = {
    "tie": ties,
    **{f"tune_{condition}": lambda condition=condition: tuning(condition) for condition in CONDITIONS},
    **{condition: lambda condition=condition: headline(condition) for condition in CONDITIONS},
    "qwen3_reuse_16": sixteen_updates,
    **{f"{name}_tie": lambda name=name: weaker_ties(name) for name in ("needles", "needles_noise_20")},
    "reversal": lambda: each(
        [Setting("grpo"), Setting("grpo", coeff=0.1), Setting("vimpo", coeff=0.5, form="clipped")],
        range(1, 6),
        **{**PUBLISHED, "tokens": 8},
    ),
    # Is there anything to compare? Not here: see docs/study.md.
    "path_star": lambda: each(
        [
            Setting(arm, lr=lr, coeff=coeff)
            for lr in (3e-5, 1e-4, 2e-4)
            for arm, coeff in (("oracle", 0.0), ("grpo", 0.0), ("vimpo", 0.5))
        ],
        range(1, 4),
        task="path_star",
    ),
    **{f"axis_{name}": axis.settings for name, axis in AXES.items()},
}
