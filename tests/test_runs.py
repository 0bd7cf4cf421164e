# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from test_matching import match_detections, random_dataset

from libra_d2.evaluation.comparison import compare_images, compare_metrics, compare_runs
from libra_d2.evaluation.detection_metrics import METRICS, DetectionMetrics
from libra_d2.evaluation.runs import compare_models, describe_runs

DATASET, RESULTS = random_dataset(2)
RUNS = [DetectionMetrics(match_detections(DATASET, RESULTS[i::4])) for i in range(4)]


def test_one_run():
    """Its own numbers, without deviations."""
    found = describe_runs(RUNS[:1])
    own = {k: found.pop(k) for k in ("runs", "deviations", "class_deviations")}
    assert own["runs"] == 1
    assert set(own["deviations"]) == set(METRICS)
    assert {*own["deviations"].values(), *own["class_deviations"].values()} == {None}
    assert found == RUNS[0].describe()


def test_several_runs():
    """Means, sample deviations, and the calibration of all detections together."""
    found, each = describe_runs(RUNS), [x.describe() for x in RUNS]
    assert found["runs"] == 4
    seen = {k: [x["metrics"][k] for x in each] for k in METRICS}
    for name, values in seen.items():
        assert found["metrics"][name] == pytest.approx(np.mean(values))
        assert found["deviations"][name] == pytest.approx(np.std(values, ddof=1))
    for name, own in found["classes"].items():
        aps = [x["classes"][name]["AP"] for x in each]
        assert own["AP"] == pytest.approx(np.mean(aps))
        assert found["class_deviations"][name] == pytest.approx(np.std(aps, ddof=1))
    counts = [x["errors"]["background"] for x in each]
    assert found["errors"]["background"] == np.mean(counts)
    for i, row in enumerate(found["images"]):
        aps = [x["images"][i]["AP"] for x in each]
        assert row["image_id"] == each[0]["images"][i]["image_id"]
        assert row["AP"] == (None if None in aps else pytest.approx(np.mean(aps)))
    assert None in [row["AP"] for row in found["images"]]
    bins = [{b["score"]: b for b in x["calibration"]["bins"]} for x in each]
    total = sum(b["detections"] for own in bins for b in own.values())
    assert sum(b["detections"] for b in found["calibration"]["bins"]) == total


def test_pairs():
    """Runs with the same seed, in whatever order; one that has no partner is in the means only."""
    a, b = {1: RUNS[0], 2: RUNS[1]}, {2: RUNS[2], 3: RUNS[3], 1: RUNS[1]}
    found = compare_models([a, {2: RUNS[3]}, b])
    one, two = found["comparisons"]
    assert (two["pairs"], one["pairs"]) == (2, 1)
    assert [x["runs"] for x in found["models"]] == [2, 1, 3]
    ap = [x.values()[0] for x in RUNS]
    assert found["models"][0]["deviations"]["AP"] == pytest.approx(np.std(ap[:2], ddof=1))
    row, differences = two["metrics"][0], (ap[2] - ap[1], ap[1] - ap[0])
    assert row["metric"] == "AP"
    assert row["difference"] == pytest.approx(np.mean(differences))
    half = 12.706 * abs(differences[0] - differences[1]) / 2  # Student's t of two pairs
    assert row["high"] - row["difference"] == pytest.approx(half, rel=1e-4)
    pairs = [(RUNS[1], RUNS[2]), (RUNS[0], RUNS[1])]
    (narrow,) = compare_runs([pairs], level=0.5)  # whose t is 1
    assert narrow[0]["high"] - row["difference"] == pytest.approx(half / 12.706, rel=1e-4)
    assert (row["a"], row["b"]) == pytest.approx(((ap[0] + ap[1]) / 2, (ap[1] + ap[2]) / 2))
    # Of one pair, the images are drawn.
    alone = compare_metrics(RUNS[1], RUNS[3])
    for x, y in zip(one["metrics"], alone):
        assert (x["low"], x["high"]) == (y["low"], y["high"])
        assert x["p_value"] >= y["p_value"]  # corrected for both tables
    options = {"level": 0.5, "seed": 1}
    (alone,) = compare_runs([[(RUNS[1], RUNS[3])]], **options)
    assert alone == compare_metrics(RUNS[1], RUNS[3], **options)
    rows = {x["image_id"]: x for x in two["images"]}
    for each in zip(*(sorted(compare_images(x), key=lambda r: r["image_id"]) for x in pairs)):
        row = rows[each[0]["image_id"]]
        for name in ("a", "b", "difference", "only_a", "only_b"):
            values = [x[name] for x in each]
            assert row[name] == (None if None in values else pytest.approx(np.mean(values)))


def test_correction():
    """For the rows of all tables."""
    a, b = dict(enumerate(RUNS[:2])), dict(enumerate(RUNS[2:]))
    smallest = [
        min(
            row["p_value"]
            for own in compare_models([a, *models])["comparisons"]
            for row in own["metrics"]
        )
        for models in ([b], [b, a])
    ]
    assert smallest[1] == pytest.approx(2 * smallest[0])
    assert smallest[1] < 1
