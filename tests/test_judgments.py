# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

from libra_d2.analysis.judgments import judge

PRO, CONTRA, LITTLE = "speaks for it", "speaks against it", "says little"
# Neighbors of four levels have a mean similarity of 0.5, the others one of 0.2.
SIMILARITY = [[1, 0.6, 0.2, 0.1], [0.6, 1, 0.4, 0.3], [0.2, 0.4, 1, 0.5], [0.1, 0.3, 0.5, 1]]
NUMBERS = {
    "samples": {
        "random": {"negatives": [0.7, 0.3], "instances": 0.6},
        "balanced, paper's bins": {"negatives": [0.4, 0.6], "instances": 0.7},
    },
    "features": {"before": {"similarity": SIMILARITY}, "repeated": [False] * 4},
    "objective": {
        "smooth_l1_beta": 0.0,
        "L1": {"inlier_gradient": 0.5},
        "smooth L1 (beta 1)": {"inlier_gradient": 0.3},
        "balanced L1": {"inlier_gradient": 0.58},
    },
}


def says(**changes):
    """What is said after setting values at places such as ``samples__random__instances``."""
    numbers = copy.deepcopy(NUMBERS)
    for place, value in changes.items():
        *path, last = place.split("__")
        inner = numbers
        for name in path:
            inner = inner[name.replace("balanced", "balanced, paper's bins")]
        inner[last.replace("_L1", " L1")] = value
    return [row.says for row in judge(numbers)]


def test_rows():
    """The numbers of each rule in words."""
    rows = judge(NUMBERS)
    assert [row.measured for row in rows] == [
        "70% of the negatives sampled at random are easy ones, 40% of those of balanced sampling",
        "70% of the objects have a positive with balanced sampling, 60% at random",
        "neighboring levels have a similarity of 0.50 before it, others one of 0.20",
        "inliers contribute 58% of the gradient of balanced L1 loss, 50% of that of the plain "
        "detector's",
    ]
    assert [row.figure for row in rows] == ["samples", "samples", "levels", "gradient_shares"]
    assert [row.says for row in rows] == [PRO] * 4


@pytest.mark.parametrize(
    ("place", "values", "row"),
    [
        ("samples__random__negatives", ([0.65], [0.64], [0.51], [0.49]), 0),  # 0.65 is the limit
        ("samples__random__instances", (0.64, 0.66, 0.68, 0.695), 1),
        ("features__before__similarity", (0.39, 0.41, 0.45, 0.5), 2),
        ("objective__L1__inlier_gradient", (0.52, 0.54, 0.54, 0.59), 3),
    ],
)
def test_limits(place, values, row):
    for value, expected in zip(values, (PRO, LITTLE, LITTLE, CONTRA)):
        if place.startswith("features"):  # a fourth level repeats the third
            value = [[1, 0.6, value, 0], [0.6, 1, 0.4, 0], [value, 0.4, 1, 1], [0, 0, 1, 1]]
        changes = {place: value, "features__repeated": [False, False, False, True]}
        assert says(**changes)[row] == expected


def test_parts():
    """A RetinaNet has no samples; before a training there are no errors."""
    (row,) = judge({"features": NUMBERS["features"]})
    assert row.idea == "balanced feature pyramid"
    assert judge({}) == []
    two = {"before": {"similarity": [row[1:] for row in SIMILARITY[1:]]}}
    assert judge({"features": {**two, "repeated": [False, False, True]}}) == []
