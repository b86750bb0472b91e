"""Choosing among n answers to a question by a score of each: best-of-n and weighted majority. Standard library and numpy.

Any score will do, of which more is better. Samples without an answer, "", cannot be chosen and do not vote: that they
have none can be seen without knowing the right one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from vimpo_verl.evaluation import bootstrap, majority


def best_of_n(answers: Sequence[str], right: Sequence[bool], scores: Sequence[float]) -> float:
    """Whether the answer with the highest score is right; where several have it, the share of them that are.

    Args:
        answers: one a sample.
        right: whether each is.
        scores: of each; finite.

    Returns:
        In [0, 1]; 0 where no sample has an answer.

    Raises:
        ValueError: a score is not finite, or the lengths differ.
    """
    candidates = _candidates(answers, right, scores)
    highest = max((score for _, _, score in candidates), default=math.nan)
    leaders = [is_right for _, is_right, score in candidates if score == highest]
    return sum(leaders) / len(leaders) if leaders else 0.0


def weighted_majority(answers: Sequence[str], right: Sequence[bool], scores: Sequence[float]) -> float:
    """Whether the answer with the largest sum of `vote_weights` is right; ties as in `evaluation.majority`.

    Self-consistency with weights (arXiv 2203.11171, section 2, weighs by the exp of the mean log-prob). Arguments,
    result and errors as for `best_of_n`; the weights are those of the samples that vote.
    """
    candidates = _candidates(answers, right, scores)
    if not candidates:
        return 0.0
    voted, verdicts, scores = zip(*candidates, strict=True)
    return majority(voted, verdicts, vote_weights(scores))


def vote_weights(scores: Sequence[float]) -> list[float]:
    """exp of the scores, standardised within the question: exp((s - mean) / std), std over all n; 1 where all are equal.

    Standardised, so that a vote does not depend on the score's unit: S grows with beta and with how far training went,
    a mean log-prob with neither. In return the weights do not know how sure the score is.
    """
    array = np.asarray(scores, dtype=float)
    spread = array.std()
    return np.exp((array - array.mean()) / spread).tolist() if spread > 0 else [1.0] * len(array)


def _candidates(answers, right, scores) -> list[tuple[str, bool, float]]:
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores must be finite, found {list(scores)}")
    return [sample for sample in zip(answers, right, scores, strict=True) if sample[0]]


def summary(
    questions: Sequence[tuple[Sequence[str], Sequence[bool]]],
    scores: Mapping[str, Sequence[Sequence[float]]],
    confidence: float = 0.95,
) -> dict[str, dict[str, float]]:
    """Estimates of one data set, to stand beside those of `evaluation.summary`.

    Args:
        questions: for each the answers and whether each is right; all with the same number n of samples.
        scores: name -> for each question one score a sample.
        confidence: of the intervals.

    Returns:
        "best-of-n by NAME" and "weighted majority@n by NAME" -> value, low, high.

    Raises:
        ValueError: no questions, a score that is not finite, or lengths that differ.
    """
    n = len(questions[0][1]) if questions else 0
    estimates = {}
    for name, rows in scores.items():
        for label, choose in ((f"best-of-{n}", best_of_n), (f"weighted majority@{n}", weighted_majority)):
            values = [choose(*question, row) for question, row in zip(questions, rows, strict=True)]
            estimates[f"{label} by {name}"] = asdict(bootstrap(values, confidence))
    return estimates
