"""Accuracy from several samples a question: avg@k, pass@k, majority@k, with intervals by bootstrap. Standard library
and numpy."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its percentile-bootstrap interval; all in [0, 1]."""

    value: float
    low: float
    high: float


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that of k samples at least one is right, without bias: 1 - C(samples - right, k) / C(samples, k).

    Raises:
        ValueError: unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"right={right} must be in [0, samples={samples}] and k={k} in [1, samples]")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str], right: Sequence[bool], weights: Sequence[float] | None = None) -> float:
    """Whether the most frequent answer is right; where several are, the share of them that are.

    Args:
        answers: one a sample; samples without an answer, "", do not vote.
        right: whether each is.
        weights: of the votes; None: one each.

    Returns:
        In [0, 1]; 0 where nobody votes.
    """
    ballots: dict[str, list[float]] = {}
    verdict: dict[str, bool] = {}
    weights = [1.0] * len(answers) if weights is None else weights
    for answer, is_right, weight in zip(answers, right, weights, strict=True):
        if answer:
            ballots.setdefault(answer, []).append(weight)
            verdict[answer] = is_right
    if not ballots:
        return 0.0
    votes = {answer: math.fsum(cast) for answer, cast in ballots.items()}  # exact: ties do not hang on the order
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    return sum(verdict[answer] for answer in leaders) / len(leaders)


def bootstrap(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of one value a question, with the percentile interval over questions drawn again with replacement.

    It holds the noise of which questions there are and of their samples, not that of the training run.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no questions to average over")
    array = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            array[generator.integers(0, len(array), (rows, len(array)))].mean(axis=1)
            for rows in _in_parts(resamples, len(array))
        ]
    )
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(float(array.mean()), float(low), float(high))


def _in_parts(resamples: int, questions: int) -> list[int]:
    """Resamples in parts of at most some ten million numbers."""
    part = max(1, 10_000_000 // questions)
    return [min(part, resamples - start) for start in range(0, resamples, part)]


def summary(
    questions: Sequence[tuple[Sequence[str], Sequence[bool]]], confidence: float = 0.95
) -> dict[str, dict[str, float]]:
    """Estimates of one data set.

    Args:
        questions: for each the answers and whether each is right; all with the same number n of samples.
        confidence: of the intervals.

    Returns:
        "avg@n", "pass@k" for k = 1, 2, 4, ... and n, "majority@n" -> value, low, high.

    Raises:
        ValueError: no questions, or different numbers of samples.
    """
    sizes = {len(right) for _, right in questions}
    if len(sizes) != 1:
        raise ValueError(f"every question needs the same number of samples, found {sorted(sizes)}")
    (n,) = sizes
    per_question = {f"avg@{n}": [sum(right) / n for _, right in questions]}
    for k in sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n}):
        per_question[f"pass@{k}"] = [pass_at_k(sum(right), n, k) for _, right in questions]
    per_question[f"majority@{n}"] = [majority(answers, right) for answers, right in questions]
    return {name: asdict(bootstrap(values, confidence)) for name, values in per_question.items()}
