"""Intervals over seeds: Student's t for a mean, Welch's for a difference. Standard library only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Interval:
    """A value and the half-width of its confidence interval; None where one seed gives no width."""

    value: float
    half_width: float | None

    @property
    def excludes_zero(self) -> bool | None:
        """Whether 0 lies outside; None where there is no width."""
        return None if self.half_width is None else abs(self.value) > self.half_width


def mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Mean of one value a seed, with Student's interval.

    Args:
        values: one a seed, at least one.
        confidence: such as 0.95.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, None)
    error = math.sqrt(_variance(values) / n)
    return Interval(mean, student_t_quantile(0.5 + confidence / 2, n - 1) * error)


def difference_interval(a: Sequence[float], b: Sequence[float], confidence: float) -> Interval:
    """mean(b) - mean(a) with Welch's interval, which does not take the two variances for equal.

    Arguments as for mean_interval.
    """
    difference = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    if len(a) < 2 or len(b) < 2:
        return Interval(difference, None)
    error_a, error_b = _variance(a) / len(a), _variance(b) / len(b)
    if error_a + error_b == 0:
        return Interval(difference, 0.0)
    freedom = (error_a + error_b) ** 2 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))
    return Interval(difference, student_t_quantile(0.5 + confidence / 2, freedom) * math.sqrt(error_a + error_b))


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


@cache
def student_t_quantile(probability: float, freedom: float) -> float:
    """The t with P(T <= t) = probability, for `freedom` > 0 degrees of freedom, also fractional.

    Raises:
        ValueError: probability outside [0.5, 1) or freedom <= 0.
    """
    if not 0.5 <= probability < 1 or freedom <= 0:
        raise ValueError(f"probability={probability} must be in [0.5, 1) and freedom={freedom} above 0")
    low, high = 0.0, 1.0
    while _student_t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(60):  # halvings: to the last bit of a float
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(t: float, freedom: float) -> float:
    """For t >= 0."""
    return 1.0 - 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised, for 0 <= x <= 1, on the side of the symmetry where the continued fraction converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    return front * _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 1 / (1 + d1 / (1 + d2 / (1 + ...))), from its tail."""
    terms = 200  # far more than it takes to converge on that side of the symmetry
    value = 1.0
    for j in range(terms, 0, -1):
        m = j // 2
        if j % 2 == 0:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1.0 + d / value
    return 1.0 / value
