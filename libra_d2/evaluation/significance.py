# SPDX-License-Identifier: Apache-2.0
"""What differences between pairs of runs say, and how many pairs it takes to say it."""

import math
from typing import List, NamedTuple, Optional, Sequence

import numpy as np
from scipy import optimize, stats

__all__ = ["PairedTest", "detectable_difference", "deviation_limit", "holm_correction"]
__all__ += ["paired_t_test", "pairs_needed", "power", "sign_test", "verdict"]

_POWER = 0.8  # the probability of finding a difference that comparisons are planned for


class PairedTest(NamedTuple):
    """Results of :func:`paired_t_test`, arrays of the same shape."""

    mean: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray


def paired_t_test(differences: np.ndarray, level: float = 0.95) -> PairedTest:
    """
    Student's t-test of whether the mean of differences between pairs is 0.

    Args:
        differences: (pairs, ...), of two pairs or more.
        level: of the confidence intervals, from ``low`` to ``high``.

    Returns:
        arrays (...), NaN where a difference is. Where all pairs differ by the same, there is no
        spread for a t-test: the p-value is that of :func:`sign_test`, and the interval is NaN
        unless there are enough pairs for it.
    """
    differences = np.asarray(differences, dtype=float)
    num_pairs = len(differences)
    mean = differences.mean(axis=0)
    error = differences.std(axis=0, ddof=1) / np.sqrt(num_pairs)
    half = error * stats.t.ppf((1 + level) / 2, num_pairs - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = 2 * stats.t.sf(np.abs(mean) / error, num_pairs - 1)
    return sign_test(PairedTest(mean, error, mean - half, mean + half, p_value), num_pairs, level)


def sign_test(test: PairedTest, num: np.ndarray, level: float = 0.95) -> PairedTest:
    """
    Correct a test where all that was tested differs by the same (the standard error is at most 0.3%
    of the mean), as few objects in few images often do by chance: ``num`` differences have the same
    sign with a probability of 0.5 ** (num - 1).

    Args:
        test: to be corrected.
        num: how many differences it is about, one number or one for each.
        level: the interval is NaN where the p-value does not reach it.
    """
    agree = 0.5 ** (np.asarray(num, dtype=float) - 1)
    error, mean = test.standard_error, np.abs(test.mean)
    is_same = ~((error > 0.003 * mean) & (error < np.inf)) & ~np.isnan(mean)
    p_value = np.where(is_same, agree, test.p_value)
    p_value = np.where(test.mean == 0, 1.0, p_value)
    is_unknown = is_same & (agree > 1 - level) & (test.mean != 0)
    low, high = (np.where(is_unknown, np.nan, x) for x in (test.low, test.high))
    return test._replace(low=low, high=high, p_value=p_value)


def deviation_limit(deviation: float, freedom: int) -> float:
    """
    What a standard deviation is at most, with a probability of 80%, if it was estimated with so
    many degrees of freedom.
    """
    return float(deviation * math.sqrt(freedom / stats.chi2.ppf(0.2, freedom)))


def holm_correction(p_values: Sequence[float]) -> List[float]:
    """
    Correct the p-values of several tests for their number, with Holm's method: if nothing differs,
    any of those returned is 0.05 or less with a probability of 0.05 at most, however the tests
    depend on each other.

    Args:
        p_values: in 0 to 1; NaN, where nothing could be tested, becomes 1.
    """
    values = np.nan_to_num(p_values, nan=1.0)
    order = values.argsort(kind="stable")
    scaled = np.minimum(values[order] * np.arange(len(order), 0, -1), 1)
    return np.maximum.accumulate(scaled)[order.argsort()].tolist()


def verdict(low: float, high: float, p_value: float, level: float = 0.95) -> str:
    """
    What a comparison says: "helps", "harms" or "cannot be told from chance".

    Args:
        low, high: confidence interval of the difference, of which more is better.
        p_value: see :func:`holm_correction`, if there are several comparisons in the table.
        level: that the interval and the p-value have to reach.
    """
    if p_value <= 1 - level:
        if low > 0:
            return "helps"
        if high < 0:
            return "harms"
    return "cannot be told from chance"


def power(difference: float, deviation: float, num_pairs: int, num_tests: int = 1) -> float:
    """
    The probability that a paired t-test finds a true difference, with a p-value of 0.05 at most.

    Args:
        difference: of the means.
        deviation: standard deviation of the differences of pairs, above 0, in the same unit.
        num_pairs: 2 or more.
        num_tests: of the table. Each is held to the p-value that Holm's method asks of the smallest
            one; where several differences are found, it asks less of the others.
    """
    freedom = num_pairs - 1
    limit = stats.t.isf(0.05 / num_tests / 2, freedom)
    shift = abs(difference) / deviation * math.sqrt(num_pairs)
    # Student's noncentral distribution: given the estimated deviation, the mean is normal.
    # scipy.stats.nct returns NaN for some of these values.
    quantiles = (np.arange(2000) + 0.5) / 2000
    estimated = limit * np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)
    return float(np.mean(stats.norm.sf(estimated - shift) + stats.norm.cdf(-estimated - shift)))


def pairs_needed(
    difference: float, deviation: float, num_tests: int = 1, *, largest: int = 1000
) -> Optional[int]:
    """How many pairs :func:`power` needs to be 80%; None if more than ``largest``."""
    low, high = 1, 2  # enough is more than low, and high at most
    while power(difference, deviation, high, num_tests) < _POWER:
        low, high = high, 2 * high
        if low > largest:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = power(difference, deviation, middle, num_tests) >= _POWER
        low, high = (low, middle) if is_enough else (middle, high)
    return high if high <= largest else None


def detectable_difference(deviation: float, num_pairs: int, num_tests: int = 1) -> float:
    """The smallest difference for which :func:`power` is 80%."""

    def excess(difference: float) -> float:
        return power(difference, deviation, num_pairs, num_tests) - _POWER

    end = deviation
    while excess(end) < 0:
        end *= 2
    return float(optimize.brentq(excess, 0, end))
