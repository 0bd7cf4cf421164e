# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
from test_matching import match_detections, random_dataset, ranking_of

from libra_d2.evaluation.ranking import Ranking


def ranking(is_true, num_objects, removed=0):
    """Of one row and class, in the order of the scores."""
    size = len(is_true)
    return Ranking(
        *(np.zeros(size, dtype=int), -np.arange(size), np.zeros(size, dtype=int)),
        *(np.array([is_true], dtype=bool), np.ones((1, size), dtype=bool)),
        *np.zeros((2, num_objects), dtype=int),
        np.ones(num_objects, dtype=bool),
        np.arange(num_objects) < removed,
    )


@pytest.mark.parametrize(
    ("is_true", "num_objects", "expected"),
    [
        ([1, 1], 2, 1),
        ([], 2, 0),
        ([0, 0], 2, 0),
        ([1, 0, 1], 2, (51 + 50 * 2 / 3) / 101),  # recalls up to 0.50, and above
        ([0, 1], 1, 0.5),
        ([0, 1, 1], 4, 51 * 2 / 3 / 101),  # 2 of 3 is better than 1 of 2 and holds for it, too
        ([1, 0, 0, 0], 3, 34 / 101),
    ],
)
def test_average_precision(is_true, num_objects, expected):
    ap, recall = ranking(is_true, num_objects).average_precision()
    assert ap.tolist() == [[pytest.approx(expected, abs=1e-15)]]
    assert recall.tolist() == [[sum(is_true) / num_objects]]


@pytest.mark.parametrize(
    ("is_true", "removed", "expected"),
    [([1, 0], 0, 34 / 101), ([1, 0], 2, 1), ([0], 3, 0), ([], 3, np.nan), ([], 2, 0)],
)
def test_removed(is_true, removed, expected):
    """Of three objects; a class without objects is wrong if it has detections, else none."""
    ap = ranking(is_true, 3, removed).average_precision()[0]
    np.testing.assert_allclose(ap, [[expected]])


def test_rows_and_groups():
    """
    In the first row, the first of two classes is found by the second and third of its detections,
    the other one by both; in the other row two detections are ignored. Classes without objects,
    before and after them, have no AP.
    """
    group, is_true = np.array([3, 1, 1, 3, 1, 0, 2, 7]), np.ones((2, 8), dtype=bool)
    counts = is_true.copy()
    is_true[:, 1] = is_true[1, 2:4] = counts[1, 2:4] = False
    objects, needed = np.array([3, 1, 3, 1, 5]), np.arange(5) < 4
    images = np.zeros(8, dtype=int), np.zeros(5, dtype=int)
    r = Ranking(group, -np.arange(8), images[0], is_true, counts, objects, images[1], needed)
    ap, recall = r.average_precision()
    assert ap == pytest.approx(np.array([[2 / 3, 1], [51 / 101 / 2, 51 / 101]]))
    assert recall.tolist() == [[1, 1], [0.5, 0.5]]
    assert (r.groups.tolist(), r.num_images) == ([1, 3], 1)
    assert ranking([1], 0).average_precision()[0].shape == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_weights(seed):
    """An image of weight 2 is the same as two images, and one of weight 0 as none, one by one."""
    dataset, results = random_dataset(seed, num_images=6)
    weights = np.array([[2, 0, 1, 1, 3, 0], [0, 1, 1, 2, 1, 1], [0, 0, 0, 0, 0, 1]])
    found = ranking_of(match_detections(dataset, results)).average_precision(weights)
    assert found[0].shape == (3, 10, 3)
    for i, row in enumerate(weights):
        copies = {"images": [], "annotations": [], "categories": dataset["categories"]}
        own = []
        sources = ((dataset["annotations"], copies["annotations"]), (results, own))
        for image, weight in zip(dataset["images"], row):
            for _ in range(weight):
                new = {**image, "id": len(copies["images"])}
                copies["images"].append(new)
                for source, target in sources:
                    chosen = [x for x in source if x["image_id"] == image["id"]]
                    target += [{**copy.copy(x), "image_id": new["id"]} for x in chosen]
        ranking = ranking_of(match_detections(copies, own))
        for x, y in zip(found, ranking.average_precision()):
            np.testing.assert_allclose(x[i][:, ranking.groups], y, rtol=0, atol=1e-14)
            assert np.isnan(np.delete(x[i], ranking.groups, axis=1)).all()
