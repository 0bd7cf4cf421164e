# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from scipy import stats

from libra_d2.evaluation.significance import (
    PairedTest,
    detectable_difference,
    deviation_limit,
    holm_correction,
    paired_t_test,
    pairs_needed,
    power,
    sign_test,
    verdict,
)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.03, 0.01, 0.04], [0.06, 0.03, 0.06]),  # 2 x 0.03, 3 x 0.01, no less than the one before
        ([0.01, 0.01, 0.01], [0.03] * 3),
        ([0.6, 0.7], [1, 1]),
        ([math.nan, 0.02], [1, 0.04]),
    ],
)
def test_holm_correction(p_values, expected):
    assert holm_correction(p_values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("interval", "p_value", "level", "expected"),
    [
        ((0.1, 2.0), 0.04, 0.95, "helps"),
        ((-2.0, -0.1), 0.04, 0.95, "harms"),
        ((-0.1, 2.0), 0.04, 0.95, "cannot be told from chance"),
        ((0.1, 2.0), 0.06, 0.95, "cannot be told from chance"),
        ((0.1, 2.0), 0.06, 0.9, "helps"),
        ((0.0, 2.0), 0.04, 0.95, "cannot be told from chance"),
        ((-2.0, 0.0), 0.04, 0.95, "cannot be told from chance"),
        ((0.1, 2.0), 0.5, 0.5, "helps"),
        ((math.nan, math.nan), 1.0, 0.95, "cannot be told from chance"),
    ],
)
def test_verdict(interval, p_value, level, expected):
    assert verdict(*interval, p_value, *([] if level == 0.95 else [level])) == expected


def test_paired_t_test():
    """
    Differences of 1.0, 1.1 and 0.9 have a standard error of 0.1 / sqrt(3), and Student's t is 4.303
    with 2 degrees of freedom; the p-values are those of SciPy's own test.
    """
    nan = math.nan
    columns = np.array([[1.0, -3, 2, 0, nan], [1.1, 3, 2, 0, 1], [0.9, 0.3, 2, 0, 2]])
    test = paired_t_test(columns)
    half = 4.303 * 0.1 / 3**0.5
    assert [x[0] for x in test[:4]] == pytest.approx(
        [1, 0.1 / 3**0.5, 1 - half, 1 + half], rel=1e-4
    )
    assert test.p_value[:2] == pytest.approx(stats.ttest_1samp(columns[:, :2], 0).pvalue)
    assert test.p_value[2:].tolist() == [0.25, 1, pytest.approx(nan, nan_ok=True)]
    narrow = paired_t_test(columns[:, 0], level=0.9)
    assert narrow.high == pytest.approx(1 + 2.920 * 0.1 / 3**0.5, rel=1e-4)
    assert paired_t_test(np.array([2.0] * 3), level=0.75).low == 2


def test_no_spread():
    """Pairs that all differ by the same, or one pair, say no more than that they agree."""
    rows = [  # mean, standard error, pairs, low end, p-value
        (2.0, 0.0, 3, math.nan, 0.25),  # half of the half that the second and third agree
        (2.0, 0.005, 2, math.nan, 0.5),  # 0.25% of the mean
        *((2.0, 0.007, 2, 1.993, 0.01), (-2.0, 0.0, 6, -2, 0.03125), (0.0, 0.0, 2, 0, 1)),
        (2.0, math.inf, 1, math.nan, 1),
    ]
    mean, error, num, low, p_value = np.array(rows).T
    test = PairedTest(mean, error, mean - error, mean + error, np.full(6, 0.01))
    test = sign_test(test, num)
    np.testing.assert_allclose(test.low, low)
    np.testing.assert_allclose(test.high, 2 * mean - low)
    np.testing.assert_allclose(test.p_value, p_value)
    assert paired_t_test(np.array([0.1, 0.1 + 1e-15])).p_value == 0.5


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_few_objects_by_simulation(pairs):
    """Where nothing differs in 28 rows about 4 objects, few tables say otherwise."""
    draws = np.random.default_rng(0).binomial(4, 0.5, (2, pairs, 300, 28))
    p_values = paired_t_test((draws[0] - draws[1]) / 4).p_value
    assert np.mean([min(holm_correction(row)) <= 0.05 for row in p_values.tolist()]) < 0.05


def test_deviation_limit():
    """In 80% of draws, what is estimated with 3 degrees of freedom is not below the true 1.1."""
    draws = np.random.default_rng(0).normal(0, 1.1, (4, 20000)).std(axis=0, ddof=1)
    assert np.mean(draws * deviation_limit(1, 3) > 1.1) == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize(("difference", "pairs", "tests"), [(0.9, 14, 1), (2.0, 5, 6), (0, 3, 1)])
def test_power_by_simulation(difference, pairs, tests):
    """The share of drawn samples in which the test finds the difference."""
    draws = np.random.default_rng(0).normal(difference, 1.1, (pairs, 20000))
    found = np.mean(paired_t_test(draws).p_value <= 0.05 / tests)
    table = [] if tests == 1 else [tests]
    # Four standard errors of the simulation
    assert power(difference, 1.1, pairs, *table) == pytest.approx(found, abs=0.014)


def test_pairs():
    """The smallest number that is enough, and the smallest difference that can be found."""
    assert pairs_needed(0.9, 1.1) == 14
    assert [pairs_needed(0.9, 1.1, largest=n) for n in (13, 14)] == [None, 14]
    assert pairs_needed(0.0, 1.1) is None
    for num_tests in (1, 5):
        num = pairs_needed(0.7, 1.1, num_tests)
        assert power(0.7, 1.1, num - 1, num_tests) < 0.8 <= power(0.7, 1.1, num, num_tests)
    assert (pairs_needed(100, 1.1), pairs_needed(0.02, 1.1)) == (2, None)
    smallest = detectable_difference(1.1, 5, 3)
    assert power(smallest, 1.1, 5, 3) == pytest.approx(0.8)
    assert detectable_difference(0.11, 5, 3) == pytest.approx(smallest / 10)
    assert power(detectable_difference(1.1, 5), 1.1, 5) == pytest.approx(0.8)
    # Scipy's own noncentral distribution is NaN at shifts as large as these.
    assert power(1000, 1, 3) == 1
    assert detectable_difference(1, 2) > 10
