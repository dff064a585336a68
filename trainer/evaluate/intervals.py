"""Means with 95 % confidence intervals.

over_seeds([71.2, 70.9, 71.6])        # by Student's t, for a few seeds
bootstrap(error_per_image)            # by resampling, for many images
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook
# of Statistical Methods, section 1.3.6.7.2, column 0.975.
_T_95 = (
    (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    + (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
    + (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
)
_Z_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: Of the values.
        std: Their standard deviation, with n - 1 in the denominator; 0 for a single value.
        low, high: Ends of the interval; both are the mean for a single value, of which nothing is
            known but itself.
        count: How many values.
    """

    mean: float
    std: float
    low: float
    high: float
    count: int


def over_seeds(values: Sequence[float]) -> Interval:
    """The interval of a mean of a few independent values, by Student's t.

    Raises:
        ValueError: there are no values.
    """
    mean, std, count = _moments(values)
    half = student_t(count - 1) * std / count**0.5 if count > 1 else 0.0
    return Interval(mean, std, mean - half, mean + half, count)


def bootstrap(values: Sequence[float], *, num_draws: int = 1000, seed: int = 0) -> Interval:
    """The percentile bootstrap's interval of a mean of many values, as of one per image.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Raises:
        ValueError: there are no values.
    """
    mean, std, count = _moments(values)
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    draws = [
        array[generator.integers(0, count, count)].mean()
        for _ in range(num_draws if count > 1 else 1)
    ]
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(mean, std, float(low), float(high), count)


def student_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom; an interval needs two values")
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    # Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    z = _Z_95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _moments(values: Sequence[float]) -> tuple[float, float, int]:
    count = len(values)
    if not count:
        raise ValueError("no values: a mean needs one")
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if count > 1 else 0.0, count
