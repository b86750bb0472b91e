"""How wrong each baseline is: mean squared error about the prompt's true success rate, by group size, difficulty and prior.

Rewards are 0 and 1, drawn with a known rate. The batches hold as many prompts of each rate of RATES as of every other,
which is what `shrunk` shrinks to. A prior is the true rate plus an error towards the middle; `posterior_mean` takes it for
PAST past answers. For rewards of -1 and +1, as in V0.5's paper, multiply every error by 4. `soft` is not here: there is no
KL. One thread, seconds.

    python benchmarks/baselines.py --json benchmarks/results/baselines.json
"""

import report
import torch
from torch import Tensor

from vimpo_verl import baselines

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
PRIOR_ERRORS = (0.0, 0.1, 0.25, 0.5)
GROUP_SIZES = (2, 4, 8, 16)
PROMPTS_OF_A_RATE = 10  # in a batch
PAST = 8.0  # a + b of posterior_mean
CAP = 0.7
# Rate and prior of the cases that docs/algorithms.md shows; the first four are -0.8, -0.8, 0 and 0.4 in -1..1.
BUDGET_CASES = ((0.1, 0.1), (0.1, 0.35), (0.5, 0.75), (0.7, 0.2), (0.9, 0.9), (0.9, 0.65), (0.5, 0.5))


def errors_of_a_group_size(size: int, batches: int, generator: torch.Generator) -> list[dict[str, float]]:
    """A row for each rate and prior error."""
    rates = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(PROMPTS_OF_A_RATE)
    true = rates.repeat_interleave(size)
    group = torch.arange(len(rates)).repeat_interleave(size).tolist()
    without_prior: dict[str, list[Tensor]] = {"group_mean": [], "leave_one_out": [], "capped": [], "shrunk": []}
    with_prior: dict[float, dict[str, list[Tensor]]] = {
        error: {"fused": [], "posterior_mean": []} for error in PRIOR_ERRORS
    }
    for _ in range(batches):
        outcome = torch.bernoulli(true, generator=generator)
        for name, found in without_prior.items():
            function, needs, _ = baselines.TABLE[name]
            found.append((function(outcome, group, **({"cap": CAP} if needs else {})) - true).square())
        for error, of_error in with_prior.items():
            prior = prior_of(true, error)
            fused = baselines.fused_baseline(outcome, group, prior)
            posterior = baselines.posterior_mean_baseline(outcome, group, PAST * prior, PAST * (1 - prior))
            of_error["fused"].append((fused - true).square())
            of_error["posterior_mean"].append((posterior - true).square())

    def at(rate: float, squares: list[Tensor]) -> float:
        return torch.stack(squares)[:, true == rate].mean().item()

    return [
        {
            "group size": size,
            "rate": rate,
            "prior": prior_of(torch.tensor(rate, dtype=torch.float64), error).item(),
            **{name: at(rate, squares) for name, squares in without_prior.items()},
            **{name: at(rate, squares) for name, squares in with_prior[error].items()},
            "prior alone": error**2,
        }
        for rate in RATES
        for error in PRIOR_ERRORS
    ]


def prior_of(rate: Tensor, error: float) -> Tensor:
    """Off towards the middle, as a prior that is not sure; upwards from 1/2."""
    return torch.where(rate <= 0.5, rate + error, rate - error)


def budget_case(rate: float, prior: float, prompts: int, generator: torch.Generator) -> dict[str, float]:
    """V0.5's rollouts on demand for many prompts of one rate: how many it takes, and the errors it ends with.

    "of 4" and "of 16": of so many whatever they are; "of these": of those that the rule takes.
    """
    rewards = torch.bernoulli(
        torch.full((prompts, baselines.MAX_ROLLOUTS), rate, dtype=torch.float64), generator=generator
    )
    priors = torch.full((prompts,), prior, dtype=torch.float64)
    taken, wanting = torch.zeros(prompts, dtype=torch.long), torch.ones(prompts, dtype=torch.bool)
    for k in range(1, baselines.MAX_ROLLOUTS + 1):
        taken[wanting] = k
        wanting &= baselines.wants_another_rollout(rewards[:, :k].mean(1), priors, k)

    def mean_error(counts: Tensor) -> float:
        kept = torch.arange(baselines.MAX_ROLLOUTS) < counts.unsqueeze(1)
        return ((rewards * kept).sum(1) / counts - rate).square().mean().item()

    def fused_error(counts: Tensor) -> float:
        kept = torch.arange(baselines.MAX_ROLLOUTS) < counts.unsqueeze(1)
        group = torch.arange(prompts).repeat_interleave(counts).tolist()
        fused = baselines.fused_baseline(rewards[kept], group, priors.repeat_interleave(counts))
        first = counts.cumsum(0) - counts
        return (fused[first] - rate).square().mean().item()

    return {
        "rate": rate,
        "prior": prior,
        "mean of 4": (rewards[:, :4].mean(1) - rate).square().mean().item(),
        "fused of 4": fused_error(torch.full((prompts,), 4)),
        "prior alone": (prior - rate) ** 2,
        "rollouts taken": taken.double().mean().item(),
        "mean of these": mean_error(taken),
        "fused of these": fused_error(taken),
        "mean of 16": (rewards.mean(1) - rate).square().mean().item(),
    }


def main() -> None:
    args = report.arguments(__doc__.splitlines()[0], batches=400, prompts=20_000, seed=0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(args.seed)
    rows = [row for size in GROUP_SIZES for row in errors_of_a_group_size(size, args.batches, generator)]
    budget = [budget_case(rate, prior, args.prompts, generator) for rate, prior in BUDGET_CASES]
    grid = [
        budget_case(rate, prior_of(torch.tensor(rate, dtype=torch.float64), error).item(), args.prompts, generator)
        for rate in RATES
        for error in PRIOR_ERRORS
    ]
    settings = {"batches": args.batches, "prompts": args.prompts, "seed": args.seed, "past": PAST, "cap": CAP}
    report.show(
        "mean squared error, rewards 0 and 1", rows, args.json, settings=settings, budget=budget, budget_grid=grid
    )
    report.show("rollouts on demand, from 4 to 16", budget + grid, json_file=None)


if __name__ == "__main__":
    main()
