# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from scipy import stats
from test_matching import by_hand, match_detections, random_dataset

from libra_d2.errors import ArgumentError
from libra_d2.evaluation.comparison import compare_images, compare_metrics, compare_objects
from libra_d2.evaluation.detection_metrics import METRICS, DetectionMetrics
from libra_d2.evaluation.significance import holm_correction

OBJECT, ELSEWHERE = [0, 0, 10, 10], [50, 50, 40, 40]
CHANCE = "cannot be told from chance"


def models(objects, *detections, num_images=1):
    datasets = [by_hand(objects, x, num_images) for x in detections]
    return [DetectionMetrics(match_detections(*x)) for x in datasets]


def rows_of(*args, **kwargs):
    """The rows of a comparison, by their metric."""
    return {row["metric"]: row for row in compare_metrics(*args, **kwargs)}


# The first object of image 0 is found by both, and better by b; the second one by a alone, the one
# in image 1 by b alone. In image 2 there is only a crowd region.
OBJECTS = [(0, "a", OBJECT), (0, "b", ELSEWHERE), (1, "a", OBJECT), (2, "crowd a", OBJECT)]
A = [(0, "a", [0, 0, 10, 6], 0.7), (0, "b", ELSEWHERE, 0.9), (2, "a", OBJECT, 0.6)]
B = [(0, "a", [0, 0, 10, 9], 0.8), (1, "a", OBJECT, 0.3)]


def test_objects():
    a, b = models(OBJECTS, A, B, num_images=3)
    rows = compare_objects(a, b)
    assert [tuple(row.values()) for row in rows] == [
        (0, 1, "a", pytest.approx(0.6), 0.7, pytest.approx(0.9), 0.8),
        (0, 2, "b", 1, 0.9, None, None),
        (1, 3, "a", None, None, 1, 0.3),
    ]
    names = ["image_id", "annotation_id", "class", "iou_a", "score_a", "iou_b", "score_b"]
    assert list(rows[0]) == names


def test_images():
    """
    In image 0, class a is found at 3 of 10 IoUs by a, at 9 by b, and class b by a alone. Those that
    b loses most in come first, those without objects last.
    """
    a, b = models(OBJECTS, A, B, num_images=3)
    rows = compare_images((a, b))
    assert [list(row.values()) for row in rows] == [
        [0, pytest.approx(65), pytest.approx(45), pytest.approx(-20), 1, 0],
        [1, 0, pytest.approx(100), pytest.approx(100), 0, 1],
        [2, None, None, None, 0, 0],
    ]
    assert list(rows[0]) == ["image_id", "a", "b", "difference", "only_a", "only_b"]


def test_metrics():
    """The numbers are those of the models; what both find, b locates better by 0.3."""
    a, b = models(OBJECTS, A, B, num_images=3)
    rows = rows_of(a, b, resamples=50)
    for name, own_a, own_b in zip(METRICS, a.values(), b.values()):
        if name not in ("AP large", "AP crowded", "AP close"):  # no objects
            assert (rows[name]["a"], rows[name]["b"]) == (own_a, own_b)
            assert rows[name]["difference"] == own_b - own_a
    assert set(rows["AP large"].values()) == {"AP large", None, 1, CHANCE}
    found, located = rows["objects found"], rows["IoU of objects that both find"]
    assert (found["a"], found["b"]) == (pytest.approx(200 / 3), pytest.approx(200 / 3))
    assert (located["a"], located["b"]) == (pytest.approx(60), pytest.approx(90))
    # One image has an object that both find, whatever is drawn; it says nothing.
    assert (located["difference"], located["low"]) == (pytest.approx(30), None)
    assert (located["p_value"], located["says"]) == (1, CHANCE)


def test_interval():
    """
    Of 4 objects, one in each image, b finds two that a does not. The standard error is
    sqrt(0.5 * 0.5 / 4), times sqrt(4 / 3) for the few images; t is 3.182 with 3 degrees of freedom
    for 95%, and 0.7649 for 50%, of which the samples have the middle from 1 to 3 of 4.
    """
    objects = [(i, "a", OBJECT) for i in range(4)]
    a, b = models(objects, [], [(i, "a", OBJECT, 0.5) for i in range(2)], num_images=4)
    found = rows_of(a, b, resamples=2000)["objects found"]
    half = 3.182 * 25 * (4 / 3) ** 0.5
    assert found["difference"] == 50
    assert (found["low"], found["high"]) == pytest.approx((50 - half, 50 + half), abs=5)
    found = rows_of(a, b, resamples=2000, level=0.5)["objects found"]
    assert (found["low"], found["high"]) == (25, 75)
    p_values = [row["p_value"] for row in rows_of(a, b, resamples=2000).values()]
    assert min(p_values) == 1  # 0.18 of one row, times 28


def test_few_images():
    """b finds 39 of 40 objects, a none: that 8 images agree has a p-value of 1/128, times 28."""
    objects = [(i, "a", [20 * k, 0, 10, 10]) for i in range(8) for k in range(5)]
    a, b = models(objects, [], [(*x, 0.5) for x in objects[:39]], num_images=8)
    found = rows_of(a, b, resamples=200)["objects found"]
    assert (found["difference"], found["p_value"], found["says"]) == (97.5, 28 / 128, CHANCE)
    a, c = models(objects[:20], [], [(*x, 0.5) for x in objects[:20]], num_images=4)
    assert rows_of(a, c, resamples=20)["objects found"]["low"] is None
    assert rows_of(a, c, resamples=20, level=0.5)["objects found"]["low"] == 100


def test_verdicts():
    """
    With another false detection in each of 30 images, of medium size and with a higher score than
    the right one in every other image, b is worse; the other way round it is better. Six images
    cannot say so.
    """
    objects = [(i, "a", OBJECT) for i in range(30)]
    right = [(i, "a", OBJECT, 0.5) for i in range(30)]
    wrong = [(i, "a", ELSEWHERE, 0.4 + 0.3 * (i % 2)) for i in range(30)]
    a, b = models(objects, right, right + wrong, num_images=30)
    rows = rows_of(a, b, resamples=200)
    changed = {name for name, row in rows.items() if row["says"] != CHANCE}
    by_iou = {f"AP{x}" for x in range(50, 100, 5)}
    errors = {"background errors", "false positives"}
    assert changed == by_iou | errors | {"AP", "AP apart"}
    assert {rows[name]["says"] for name in changed} == {"harms"}
    assert rows["background errors"]["difference"] > 0
    rows = rows_of(b, a, resamples=200)
    assert {rows[name]["says"] for name in changed} == {"helps"}
    a, b = models(objects[:6], right[:6], right[:6] + wrong[:6], num_images=6)
    assert {row["says"] for row in rows_of(b, a, resamples=200).values()} == {CHANCE}


def test_seed():
    """
    The same draws with the same seed, and for both models. The p-values are those of the t-tests
    whose intervals are shown, or of sign tests, and corrected.
    """
    dataset, results = random_dataset(1)
    a, b = (DetectionMetrics(match_detections(dataset, x)) for x in (results, results[::2]))
    rows = compare_metrics(a, b, resamples=600)
    some = compare_metrics(a, b, resamples=30)
    assert some == compare_metrics(a, b, resamples=30)
    assert some != compare_metrics(a, b, resamples=30, seed=1)
    draws = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, 600)
    ap = b.values(draws)[:, 0] - a.values(draws)[:, 0]
    low, high = np.quantile(ap, [0.025, 0.975])
    assert a.num_images()[0] == 10  # of 12, have objects
    half = 2.26216 * ap.std(ddof=1) * (10 / 9) ** 0.5
    assert rows[0]["low"] == pytest.approx(min(low, rows[0]["difference"] - half), rel=1e-4)
    assert rows[0]["high"] == pytest.approx(max(high, rows[0]["difference"] + half), rel=1e-4)
    both = {x["image_id"] for x in compare_objects(a, b) if None not in x.values()}
    numbers, p_values = [*a.num_images(), a.num_images()[0], len(both)], []
    for row, num in zip(rows, numbers):
        p_value = 1.0
        if row["difference"]:
            half = min(row["high"] - row["difference"], row["difference"] - row["low"])
            t = abs(row["difference"]) / half * stats.t.ppf(0.975, num - 1)
            p_value = max(2 * stats.t.sf(t, num - 1), 0.5 ** (num - 1))
        p_values.append(p_value)
    assert [row["p_value"] for row in rows] == pytest.approx(holm_correction(p_values))


def test_other_objects():
    a, b = (models(x, [])[0] for x in (OBJECTS[:1], OBJECTS[:2]))
    for compare in (lambda *x: compare_images(x), compare_metrics, compare_objects):
        with pytest.raises(ArgumentError, match="use results on the same images and objects as"):
            compare(a, b)
