# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
from test_matching import match_detections, random_dataset, ranking_of

from libra_d2.evaluation.ranking import Ranking


def ranking(is_true, num_objects, *, removed=0, group=None, num_images=1):
    """Of one row, in the order of the scores; of one class unless there are ``group``s."""
    size = len(is_true)
    return Ranking(
        np.zeros(size, dtype=int) if group is None else np.array(group),
        *(-np.arange(size), np.zeros(size, dtype=int)),
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
    ap = ranking(is_true, 3, removed=removed).average_precision()[0]
    np.testing.assert_allclose(ap, [[expected]])


def test_classes_without_objects():
    """They have no AP; those before and after do not influence each other."""
    r = ranking([1, 0, 1], 2, group=[1, 0, 2])
    assert r.groups.tolist() == [0]
    assert r.average_precision()[0].tolist() == [[0]]
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
        for image, weight in zip(dataset["images"], row):
            for _ in range(weight):
                new = {**image, "id": len(copies["images"])}
                copies["images"].append(new)
                for source, target in (
                    (dataset["annotations"], copies["annotations"]),
                    (results, own),
                ):
                    chosen = [x for x in source if x["image_id"] == image["id"]]
                    target += [{**copy.copy(x), "image_id": new["id"]} for x in chosen]
        ranking = ranking_of(match_detections(copies, own))
        for x, y in zip(found, ranking.average_precision()):
            np.testing.assert_allclose(x[i][:, ranking.groups], y, rtol=0, atol=1e-14)
            assert np.isnan(np.delete(x[i], ranking.groups, axis=1)).all()
