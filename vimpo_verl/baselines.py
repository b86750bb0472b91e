"""Baselines: estimates of a prompt's mean reward, by name. Torch only.

Each takes the rewards R_i of B sequences and the group (prompt) of each, and returns one baseline a sequence, [B], in the
dtype that sums are taken in, detached. K is the number of sequences of a group, rbar their mean reward.

    group_mean       rbar                                                  VIMPO, arXiv 2606.20008
    leave_one_out    ( K rbar - R_i ) / ( K - 1 )                          RLOO, arXiv 2402.14740
    capped           min( rbar, cap )                                      VIMPO's authors' code, cap_v0
    soft             mean of R_j - beta sum_t KL_jt over the group         VIMPO's authors' code, the soft value
    shrunk           (1 - l) leave_one_out + l (mean of the other prompts) arXiv 2511.03710
    fused            w rbar + (1 - w) prior                                V0.5, arXiv 2603.10848
    posterior_mean   ( a + sum R ) / ( a + b + K )                         ours; Beta(a, b) from the prompt's own past

`group_mean` and `leave_one_out` are written in `functional`, with the rest of VIMPO. What `algorithm.vimpo.baseline` takes
is OF_A_BATCH, what needs nothing but the rewards, and WITH_PRIOR, for which the trainer keeps a prior; both are sound beside
VIMPO's value loss (docs/algorithms.md).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimpo_verl import functional as F
from vimpo_verl.config import BASELINES_WITH_PRIOR

SHRINKAGE_EPS = 1e-6  # beside the variances in `shrunk_baseline`, as the authors have it
MIN_ROLLOUTS, MAX_ROLLOUTS = 4, 16  # V0.5's budget a prompt


# ---- from the group alone --------------------------------------------------------------------------------------------


def capped_baseline(outcome: Tensor, group: Sequence[Hashable], cap: float) -> Tensor:
    """min( rbar, cap ): the group mean, at most `cap` (cap_v0 of VIMPO's authors' code).

    A prompt that is nearly always solved keeps a target of at least 1 - cap for a right answer. `cap` at or above the
    largest reward gives the group mean.

    Args:
        outcome: [B], the reward of each sequence, any real dtype.
        group: B hashables; sequences of one prompt share one.
        cap: upper bound, in units of reward.

    Raises:
        ValueError: as for `functional.group_baseline`, or cap is None.
    """
    if cap is None:
        raise ValueError("cap must be a number; without a cap this is group_baseline")
    return F.group_baseline(outcome, group, cap=cap)


def soft_baseline(
    outcome: Tensor, group: Sequence[Hashable], sequence_kl: Tensor, beta: float, *, cap: float | None = None
) -> Tensor:
    """Mean over the group of R_j - beta * sum_t KL_jt: the value of the KL-regularised problem (VIMPO's authors' code).

    It belongs to the loss without kappa, 1/2 ( sum_t rho_t - (R - V0) )^2. Beside kappa it counts the KL twice: sum_t td
    has mean 0 under the policy, and the target R - V0 would have mean beta * KL. With the policy at the reference it is
    the group mean.

    Args:
        outcome, group: as for `capped_baseline`.
        sequence_kl: [B], the sum of KL( policy || reference ) over the valid tokens of each sequence, in nats.
        beta: weight of the reference, > 0.
        cap: upper bound of the baseline, or None.

    Raises:
        ValueError: as for `functional.group_baseline`; sequence_kl does not fit outcome, or beta is out of range.
    """
    F.require_positive(beta=beta)
    rewards, _ = F.grouped(outcome, group)
    _require_each(rewards, sequence_kl=sequence_kl)
    return F.group_baseline(rewards - beta * F.accumulating(sequence_kl.detach()), group, cap=cap)


# ---- from the batch --------------------------------------------------------------------------------------------------


def shrunk_baseline(outcome: Tensor, group: Sequence[Hashable], *, cap: float | None = None) -> Tensor:
    """(1 - l) * leave-one-out + l * (mean of the other prompts' means), at most `cap` (arXiv 2511.03710).

        l = v / ( v + s + 1e-6 ),  v = mean over the other prompts p of var_p / K_p      noise of a prompt's mean, unbiased
                                   s = mean over the other prompts of ( rbar_p - their mean )^2   spread of the prompts

    As in the authors' code (adv_estimator jspo), which asks for groups of equal size; here v and s are means over prompts
    of any. Neither l nor the mean reads the sequence's own prompt, so the policy gradient stays unbiased. s holds the
    noise v as well as the prompts' own spread, so l is about 1/2 where all prompts are equally hard, and less elsewhere.

    Degenerate cases: prompts with one sequence have no variance and enter v not at all; their own baseline is the other
    prompts' mean. With two prompts s = 0, and l is 1 wherever the other prompt's rewards vary, as published. A single
    prompt has nothing to shrink to: leave-one-out.

    Args:
        outcome, group: as for `capped_baseline`; the whole batch, without placeholders.
        cap: upper bound of the baseline, or None.

    Raises:
        ValueError: as for `functional.group_baseline`.
    """
    rewards, index = F.grouped(outcome, group, cap)
    leave_one_out = F.leave_one_out_baseline(rewards, group).double()
    size, mean, variance = _per_group(rewards.double(), index)
    others = len(size) - 1
    if others < 1:
        return F.leave_one_out_baseline(rewards, group, cap=cap)
    mean_of_others = (mean.sum() - mean) / others
    deviation = mean - mean.mean()
    # Sum of squares without one member, about the mean without it. Rounding alone could take it below 0.
    spread = ((deviation.square().sum() - deviation.square() * len(size) / others) / others).clamp(min=0)
    repeated = (size > 1).double()
    noise = variance / size
    noise_of_others = (noise.sum() - noise) / (repeated.sum() - repeated).clamp(min=1)
    shrinkage = noise_of_others / (noise_of_others + spread + SHRINKAGE_EPS)
    shrinkage = torch.where(size > 1, shrinkage, 1.0)[index]
    baseline = (1 - shrinkage) * leave_one_out + shrinkage * mean_of_others[index]
    return (baseline if cap is None else baseline.clamp(max=cap)).to(rewards.dtype)


# ---- with a prior: rewards from 0 to 1 -------------------------------------------------------------------------------


def fused_baseline(outcome: Tensor, group: Sequence[Hashable], prior: Tensor) -> Tensor:
    """w * rbar + (1 - w) * prior, w = D / ( D + 1/(4K) ), D = max( 0, (rbar - prior)^2 - 1/(4K) )  (arXiv 2603.10848).

    V0.5's rule as published, brought from rewards of -1 and +1 to 0 and 1: 1/(4K) is the largest variance that a mean of K
    rewards can have, D the squared error of the prior beyond it. Where they differ by no more than such noise would
    explain, the baseline is the prior itself. Where the prior is moderately wrong this is worse than the mean of the same
    rewards (docs/algorithms.md).

    A group of one follows its prior unless the two are further apart than 1/2.

    Args:
        outcome: [B], from 0 to 1.
        group: B hashables; sequences of one prompt share one.
        prior: [B], from 0 to 1: what the prompt's mean reward is taken to be without these sequences.

    Raises:
        ValueError: as for `functional.group_baseline`; outcome or prior leave 0..1, or prior does not fit.
    """
    rewards, index = F.grouped(outcome, group)
    _require_each(rewards, prior=prior)
    _require_rates(outcome=rewards, prior=prior)
    prior = prior.detach().to(rewards.dtype)
    size = F.group_sums(torch.ones_like(rewards), index)
    mean = F.group_sums(rewards, index) / size
    weight = _fused_weight(mean, prior, size)
    return weight * mean + (1 - weight) * prior


def wants_another_rollout(
    mean: Tensor,
    prior: Tensor,
    rollouts: Tensor | int,
    *,
    cost: float | None = None,
    minimum: int = MIN_ROLLOUTS,
    maximum: int = MAX_ROLLOUTS,
) -> Tensor:
    """V0.5's budget rule (arXiv 2603.10848): whether one rollout more gains more than it costs, from 4 up to 16.

    With D as in `fused_baseline` and the error e(k) = D / ( 1 + 4 k D ) of the fused baseline of k rollouts: e(k) - e(k + 1)
    > cost. Where the test accepts the prior, D = 0 and sampling stops.

    Args:
        mean: mean reward so far of each prompt, from 0 to 1.
        prior: of the same shape, from 0 to 1.
        rollouts: k so far, a number or of the same shape, at least 1.
        cost: c in squared units of reward; None is the paper's, 1/maximum^2 for rewards of -1 and +1, here a quarter of it.
        minimum, maximum: the least and the most rollouts of a prompt.

    Returns:
        Bools of the shape of mean. Always true below `minimum` rollouts, never from `maximum` on.

    Raises:
        ValueError: mean or prior leave 0..1, shapes differ, or a count is below 1.
    """
    _require_each(mean, prior=prior)
    _require_rates(mean=mean, prior=prior)
    k = torch.as_tensor(rollouts, device=mean.device).expand(mean.shape)
    if (k < 1).any():
        raise ValueError(f"rollouts must be 1 or more, got {k.min().item()}")
    cost = 1 / (4 * maximum**2) if cost is None else cost
    wrong = _prior_error(mean, prior, k)
    gain = wrong / (1 + 4 * k * wrong) - wrong / (1 + 4 * (k + 1) * wrong)
    return (k < minimum) | ((k < maximum) & (gain > cost))


def posterior_mean_baseline(outcome: Tensor, group: Sequence[Hashable], a: Tensor, b: Tensor) -> Tensor:
    """( a + sum R ) / ( a + b + K ): mean of the Beta posterior of the prompt's success rate. Ours.

    For rewards of 0 and 1 and a prior Beta(a, b), a + b counts as so many past sequences; `discounted_past` makes them of
    the prompt's own. No test decides whether the prior is right: a + b says how far it is trusted, discounting lets it go.
    a = b = 0 is the group mean. A group of one moves its prior's mean by at most 1 / ( a + b + 1 ).

    Args:
        outcome, group: as for `fused_baseline`.
        a, b: [B], not negative: successes and failures that the prior stands for.

    Raises:
        ValueError: as for `functional.group_baseline`; outcome leaves 0..1, or a or b is negative, not finite or does not fit.
    """
    rewards, index = F.grouped(outcome, group)
    _require_each(rewards, a=a, b=b)
    _require_rates(outcome=rewards)
    _require_counts(a=a, b=b)
    a, b = a.detach().to(rewards.dtype), b.detach().to(rewards.dtype)
    return (a + F.group_sums(rewards, index)) / (a + b + F.group_sums(torch.ones_like(rewards), index))


def discounted_past(
    successes: Tensor, failures: Tensor, age: Tensor, *, discount: float, start: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """a = start + sum over past visits of discount^age * successes, b the same of failures: the policy changes, the past fades.

    No visit leaves the start: (1, 1) is the uniform distribution, with mean 1/2.

    Args:
        successes, failures: [..., P], of each of P past visits to a prompt, not negative; 0 where there was none.
        age: [..., P], steps since, not negative.
        discount: what a step leaves of the past, in (0, 1]; 1 forgets nothing.
        start: a and b before the first visit, not negative.

    Returns:
        a and b, [...]; float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes differ, an entry is negative or not finite, or discount is out of range.
    """
    if not successes.shape == failures.shape == age.shape:
        raise ValueError(
            f"successes, failures and age must have one shape, got {list(successes.shape)}, {list(failures.shape)} and "
            f"{list(age.shape)}"
        )
    _require_counts(successes=successes, failures=failures, age=age)
    _require_counts(start=torch.tensor(start))
    F.require_positive(discount=discount)
    if discount > 1:
        raise ValueError(f"discount must be in (0, 1], got {discount!r}")
    kept = discount ** F.accumulating(age)
    a, b = (start[i] + (kept * F.accumulating(counts)).sum(-1) for i, counts in enumerate((successes, failures)))
    return a, b


# ---- the table -------------------------------------------------------------------------------------------------------


class Baseline(NamedTuple):
    """A row of the table."""

    function: Callable[..., Tensor]
    needs: tuple[str, ...]  # its arguments beside outcome and group
    source: str


TABLE = {
    "group_mean": Baseline(F.group_baseline, (), "arXiv 2606.20008"),
    "leave_one_out": Baseline(F.leave_one_out_baseline, (), "arXiv 2402.14740"),
    "capped": Baseline(capped_baseline, ("cap",), "VIMPO's authors' code"),
    "soft": Baseline(soft_baseline, ("sequence_kl", "beta"), "VIMPO's authors' code"),
    "shrunk": Baseline(shrunk_baseline, (), "arXiv 2511.03710"),
    "fused": Baseline(fused_baseline, ("prior",), "arXiv 2603.10848"),
    "posterior_mean": Baseline(posterior_mean_baseline, ("a", "b"), "this package"),
}

# Name -> function of (outcome, group, *, cap=None): the choices of algorithm.vimpo.baseline that need only the batch.
OF_A_BATCH = {name: row.function for name, row in TABLE.items() if not row.needs}
WITH_PRIOR = BASELINES_WITH_PRIOR  # the others


def baseline_of(
    name: str,
    outcome: Tensor,
    group: Sequence[Hashable],
    *,
    cap: float | None = None,
    prior: Tensor | None = None,
    prior_weight: Tensor | None = None,
) -> Tensor:
    """V0 by one of the names that `algorithm.vimpo.baseline` takes, at most `cap`.

    Args:
        name: of OF_A_BATCH or WITH_PRIOR.
        outcome, group: as for `capped_baseline`.
        cap: upper bound of the baseline, or None.
        prior: [B], from 0 to 1, for a name of WITH_PRIOR.
        prior_weight: [B], past answers that each prior counts for, not negative: a + b of `posterior_mean`.

    Raises:
        ValueError: as for the function of that name, or it needs a prior and there is none.
    """
    if name in OF_A_BATCH:
        return OF_A_BATCH[name](outcome, group, cap=cap)
    if prior is None or prior_weight is None:
        raise ValueError(f"the baseline {name} needs a prior for each sequence, with its weight")
    if name == "fused":
        found = fused_baseline(outcome, group, prior)
    else:
        found = posterior_mean_baseline(outcome, group, prior_weight * prior, prior_weight * (1 - prior))
    return found if cap is None else found.clamp(max=cap)


# ---- small helpers ---------------------------------------------------------------------------------------------------


def _prior_error(mean: Tensor, prior: Tensor, rollouts: Tensor) -> Tensor:
    """D: squared distance of mean and prior beyond the largest variance of a mean of so many rewards in 0..1."""
    return ((mean - prior).square() - 1 / (4 * rollouts)).clamp(min=0)


def _fused_weight(mean: Tensor, prior: Tensor, rollouts: Tensor) -> Tensor:
    wrong = _prior_error(mean, prior, rollouts)
    return wrong / (wrong + 1 / (4 * rollouts))


def _per_group(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[G] each: size, mean and unbiased variance (0 of a single value) of the groups."""
    groups = int(index.max()) + 1 if index.numel() else 0

    def sums(of: Tensor) -> Tensor:
        return of.new_zeros(groups).index_add_(0, index, of)

    size = sums(torch.ones_like(values))
    mean = sums(values) / size
    variance = sums((values - mean[index]).square()) / (size - 1).clamp(min=1)
    return size, mean, variance


def _require_each(outcome: Tensor, **tensors: Tensor) -> None:
    """One number a sequence, on the same device."""
    for name, tensor in tensors.items():
        if tensor.shape != outcome.shape or tensor.device != outcome.device:
            raise ValueError(
                f"{name} must be {list(outcome.shape)} on {outcome.device}, one number each, got {list(tensor.shape)} on "
                f"{tensor.device}"
            )


def _require_rates(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        outside = tensor[~((tensor >= 0) & (tensor <= 1))]
        if outside.numel():
            raise ValueError(f"{name} must be from 0 to 1, got {outside[0].item()}")


def _require_counts(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        strange = tensor[~((tensor >= 0) & torch.isfinite(tensor))]
        if strange.numel():
            raise ValueError(f"{name} must hold finite numbers, 0 or greater, got {strange[0].item()}")
