# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from test_matching import by_hand, match_detections, pycocotools_evaluation, random_dataset

from libra_d2.evaluation.detection_errors import ERROR_TYPES
from libra_d2.evaluation.detection_metrics import METRICS, DetectionMetrics

OBJECT, ELSEWHERE = [0, 0, 10, 10], [50, 50, 40, 40]


def test_same_as_pycocotools():
    """AP, that of each IoU and size, and AR, of 100 detections."""
    dataset, results = random_dataset(0, crowd=0.1)
    precision, recall = pycocotools_evaluation(dataset, results)
    values = dict(zip(METRICS, DetectionMetrics(match_detections(dataset, results)).values()))

    def mean(x):
        return pytest.approx(100 * x[x > -1].mean(), abs=1e-11)

    assert values["AP"] == mean(precision[:, :, 0])
    for i in range(10):
        assert values[f"AP{50 + 5 * i}"] == mean(precision[i, :, 0])
    assert values["AR"] == mean(recall[:, :, 0])
    for i, name in enumerate(("small", "medium", "large"), 1):
        assert values[f"AP {name}"] == mean(precision[:, :, i])


def test_weights():
    """Several samples of images at a time, and one."""
    metrics = DetectionMetrics(match_detections(*random_dataset(1)))
    weights = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, 3)
    found = metrics.values(weights)
    assert found.shape == (3, len(METRICS))
    for row, values in zip(weights, found):
        np.testing.assert_array_equal(metrics.values(row), values)
    np.testing.assert_array_equal(metrics.values(), metrics.values(np.ones(12, dtype=int)))
    assert np.isnan(metrics.values(np.zeros(12, dtype=int))).all()


def describe(objects, detections, num_images=3):
    dataset = by_hand(objects, detections, num_images)
    metrics = DetectionMetrics(match_detections(*dataset))
    return metrics, json.loads(json.dumps(metrics.describe(), allow_nan=False))


def test_describe():
    """
    Class a is found in image 0, at an IoU of 0.5 only and after a wrong detection; the two objects
    of class b are not, one in image 0 and one in image 1. In image 2 there is only a crowd region.
    """
    objects = [(0, "a", OBJECT), (0, "b", ELSEWHERE), (1, "b", ELSEWHERE)]
    objects.append((2, "crowd b", ELSEWHERE))
    detections = [(0, "a", [0, 0, 10, 5.2], 0.9), (0, "a", [20, 0, 9, 9], 0.95)]
    detections += [(2, "b", OBJECT, 0.5), (1, "b", [50, 50, 40, 16], 0.7)]
    metrics, found = describe(objects, detections)
    no_errors = dict.fromkeys(ERROR_TYPES, 0)
    assert found["images"] == [
        {"image_id": 0, "AP": pytest.approx(2.5), **no_errors, "background": 1, "missed": 1},
        {"image_id": 1, "AP": 0, **no_errors, "localization": 1},
        {"image_id": 2, "AP": None, **no_errors, "background": 1},
    ]
    assert found["classes"] == {
        "a": {"objects": 1, "AP": pytest.approx(5), "AP50": pytest.approx(50)},
        "b": {"objects": 2, "AP": 0, "AP50": 0},
    }
    assert found["errors"] == {**no_errors, "localization": 1, "background": 2, "missed": 1}
    own = (found["ranges"][name] for name in ("small", "medium", "large"))
    names = ("objects", "missed", "AP", "AR")
    assert [tuple(x[k] for k in names) for x in own] == [
        *((1, 0, pytest.approx(5), pytest.approx(10)), (2, 1, 0, 0), (0, 0, None, None))
    ]
    by_name = {"AP": 2.5, "AP50": 25, "AP55": 0, "AP95": 0, "AR": 5, "AP small": 5, "AP medium": 0}
    assert {k: found["metrics"][k] for k in by_name} == pytest.approx(by_name)
    assert found["metrics"]["AP large"] is None
    # With the box of the object, one of two objects of class b is found: half of its recalls.
    assert found["metrics"]["localization errors"] == pytest.approx(51 / 101 * 50)
    assert found["calibration"]["bins"][0]["detections"] == 1
    images = dict(zip(METRICS, metrics.num_images()))
    assert (images["AP"], images["AP small"], images["AP large"]) == (2, 1, 0)
    assert images["missed objects"] == 2
    alone = describe(objects[:1], detections[:1])[1]["metrics"]
    assert (alone["AP"], alone["AP50"]) == pytest.approx((10, 100))


@pytest.mark.parametrize("num_classes", [3, 1200])
def test_no_detections_and_all_right(num_classes):
    """Without detections all is missed; a perfect result has no errors."""
    dataset, _ = by_hand([("a", OBJECT), ("b", ELSEWHERE), ("a", ELSEWHERE)], [])
    dataset["categories"] += [{"id": i, "name": str(i)} for i in range(3, num_classes)]
    numbers = DetectionMetrics(match_detections(dataset, [])).describe()
    assert numbers["metrics"]["AP"] == numbers["metrics"]["AR"] == 0
    assert numbers["metrics"]["missed objects"] == 100
    assert numbers["errors"]["missed"] == 3
    right = [{**annotation, "score": 0.5} for annotation in dataset["annotations"]]
    numbers = DetectionMetrics(match_detections(dataset, right)).describe()
    assert numbers["metrics"]["AP"] == pytest.approx(100)
    assert list(numbers["metrics"].values())[-8:] == pytest.approx([0] * 8)
    assert sum(numbers["errors"].values()) == 0
