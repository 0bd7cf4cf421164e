# SPDX-License-Identifier: Apache-2.0
import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from libra_d2.errors import ArgumentError, InputError
from libra_d2.evaluation.matching import RANGES, match_detections, read_results
from libra_d2.evaluation.ranking import Ranking


def random_dataset(seed, num_images=12, num_classes=3, crowd=0.0, ties=False, name="class 0"):
    """
    Annotations and results in COCO's format, in any order, with boxes and masks, which are boxes
    without a corner; some objects overlap another one of their class, and detections have errors of
    all types. The first class has a ``name``, the last one no objects.
    """
    random = np.random.default_rng(seed)
    images = [
        {"id": 3 * i + 1, "file_name": f"{i}.jpg", "width": 320 + i, "height": 300 + i}
        for i in range(num_images)
    ]
    categories = [{"id": 5 * (k + 1), "name": f"class {k}"} for k in range(num_classes + 1)]
    categories[0]["name"] = name
    annotations, results = [], []

    def entry(image, label, box):
        x, y, w, h = np.round(np.clip(box, 0, 299)).tolist()
        x1, y1, x_mid, y_mid = x + w + 1, y + h + 1, x + (w + 2) // 2, y + (h + 1) // 2
        place = {"image_id": image["id"], "category_id": 5 * int(label + 1)}
        polygon = [x, y, x_mid, y, x_mid, y_mid, x1, y_mid, x1, y1, x, y1]
        return {**place, "bbox": [x, y, w + 1, h + 1], "segmentation": [polygon]}

    def random_box():
        return random.uniform([0, 0, 5, 5], [150, 150, 140, 140])

    for image in images:
        for _ in range(random.integers(0, 8)):
            box, label = random_box(), random.integers(num_classes)
            for _ in range(1 + (random.random() < 0.3)):
                a = entry(image, label, box)
                area = a["bbox"][2] * a["bbox"][3] * 0.9
                is_crowd = int(random.random() < crowd)
                a.update(id=len(annotations) + 1, area=area, iscrowd=is_crowd)
                annotations.append(a)
                for _ in range(random.integers(0, 4)):
                    shift = random.normal(size=4) * random.uniform(0, 0.25) * np.tile(box[2:], 2)
                    other = random.integers(num_classes) if random.random() < 0.3 else label
                    results.append({**entry(image, other, box + shift), "score": random.random()})
                box = box * random.uniform(0.9, 1.1, 4)
        for _ in range(random.integers(0, 3)):
            box = random_box()
            label = random.integers(num_classes)
            results.append({**entry(image, label, box), "score": 0.6 * random.random()})
    for result in results:
        result["score"] = round(result["score"], 1) if ties else float(result["score"])
        size = (images[result["image_id"] // 3][k] for k in ("height", "width"))
        rle = masks.merge(masks.frPyObjects(result["segmentation"], *size))
        result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    random.shuffle(annotations)  # COCO's are in no order, either
    random.shuffle(categories)
    results.reverse()
    return {"images": images, "annotations": annotations, "categories": categories}, results


def by_hand(objects, detections, num_images=1):
    """
    Annotations and results of (class, box) and (class, box, score), or with the number of the image
    in front; a class "crowd a" is a crowd region of class "a". Images and classes descend.
    """
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100}
        for i in reversed(range(num_images))
    ]
    names, annotations, results = ["a", "b", "c"], [], []
    for *image, label, box in objects:
        is_crowd, area = int(label.startswith("crowd")), box[2] * box[3]
        place = {"image_id": image[0] if image else 0, "category_id": names.index(label[-1])}
        own = {"id": len(annotations) + 1, "bbox": box, "area": area, "iscrowd": is_crowd}
        annotations.append({**place, **own})
    for *image, label, box, score in detections:
        place = {"image_id": image[0] if image else 0, "category_id": names.index(label)}
        results.append({**place, "bbox": box, "score": score})
    categories = [{"id": i, "name": names[i]} for i in (2, 1, 0)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def pycocotools_evaluation(dataset, results, iou_type="bbox"):
    """Precision (IoU, class, area) and recall, -1 for classes without objects."""
    key = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    kept = ("image_id", "category_id", "score", key)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(dataset)
        coco.createIndex()
        detections = coco.loadRes([{k: copy.deepcopy(x[k]) for k in kept} for x in results])
        coco_eval = COCOeval(coco, detections, iou_type)
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval.eval["precision"][..., 2].mean(1), coco_eval.eval["recall"][..., 2]


def ranking_of(m, part="all"):
    i = list(RANGES).index(part)
    return Ranking(
        *(m.detected_class, m.score, m.image, m.status[i] == 1, m.status[i] >= 0),
        *(m.object_class, m.object_image, m.object_counts[i]),
    )


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_same_as_pycocotools(seed, ties, iou_type):
    """AP and recall of each class, IoU and size, with crowds, ties, and an "ignore" in between."""
    dataset, results = random_dataset(seed, crowd=0.15, ties=ties)
    for annotation in dataset["annotations"][::7]:
        annotation["ignore"] = 1
    precision, recall = pycocotools_evaluation(dataset, results, iou_type)
    m = match_detections(dataset, results, iou_type)
    for area, name in enumerate(("all", "small", "medium", "large")):
        ranking = ranking_of(m, name)
        ap, own_recall = ranking.average_precision()
        absent = np.setdiff1d(range(4), ranking.groups)
        assert (precision[:, absent, area] == -1).all()
        np.testing.assert_allclose(ap, precision[:, ranking.groups, area], rtol=0, atol=1e-14)
        np.testing.assert_array_equal(own_recall, recall[:, ranking.groups, area])
    by_id = {x["id"]: x for x in dataset["annotations"]}
    assert sorted(m.object_ids) == sorted(by_id)
    for id, image, label in zip(m.object_ids, m.object_image, m.object_class):
        place = (m.image_ids[image], m.class_ids[label])
        assert place == (by_id[id]["image_id"], by_id[id]["category_id"])


def test_many_detections():
    """Of an image and a class the 100 best count, in the order of their scores, as pycocotools."""
    objects = [("a", [0, 0, 10, 10]), ("b", [50, 50, 10, 10])]
    detections = [("a", [20, 20, 5, 5], 0.5 + i / 1000) for i in range(100)]
    detections += [("a", [0, 0, 10, 10], 0.4), ("b", [50, 50, 10, 10], 0.1)]
    m = match_detections(*by_hand(objects, detections))
    assert m.position.tolist() == [*range(99, -1, -1), 101]
    assert m.score.tolist() == sorted(m.score, reverse=True)
    assert ranking_of(m).average_precision()[0][0].tolist() == pytest.approx([0, 1])
    fewer = match_detections(*by_hand(objects, detections), max_detections=2)
    assert fewer.position.tolist() == [99, 98, 101]


def test_nearest_and_found():
    """
    Of overlapping objects of its class a detection finds the best one that is free; what is nearest
    does not depend on that. What small objects alone would decide does not matter here.
    """
    objects = [(0, "a", [0, 0, 10, 10]), (1, "a", [0, 0, 40, 40]), (1, "a", [0, 0, 40, 25])]
    objects += [(1, "b", [0, 0, 40, 16]), (1, "crowd b", [0, 0, 99, 99])]
    detections = [(1, "a", [0, 0, 40, 40], 0.9), (1, "a", [0, 0, 40, 36], 0.8)]
    detections += [(1, "c", [80, 80, 5, 5], 0.7), (1, "b", [0, 0, 40, 32], 0.6)]
    m = match_detections(*by_hand(objects, [*detections, (0, "a", [0, 0, 10, 10], 0.1)], 2))
    # 36 of 40 rows are the first object of image 1; 25 of 36 the second one, 16 of 32 the third one
    found = [[0] * 10, [1] * 10, [2] * 4 + [-1] * 6, [-1] * 10, [3] + [-1] * 9]
    assert m.found.T.tolist() == found
    assert m.finders().tolist() == [0, 1, 2, 4, -1]
    assert m.found_iou.tolist() == pytest.approx([1, 1, 25 / 36, 0, 0.5])
    assert m.nearest.tolist() == [[0, 1, 1, -1, 3], [-1, 3, 3, -1, 1]]
    ious = np.array([[1, 1, 0.9, 0, 0.5], [0, 0.4, 4 / 9, 0, 0.8]])
    assert m.nearest_iou == pytest.approx(ious)
    assert m.object_counts[0].tolist() == [True] * 4 + [False]


def test_ties():
    """Of objects with the same IoU the last one is found, as in pycocotools."""
    m = match_detections(*by_hand([("a", [0, 0, 9, 9])] * 3, [("a", [0, 0, 9, 9], 0.5)]))
    assert m.found[:, 0].tolist() == [2] * 10


def test_crowdedness():
    """
    Objects of one class with an IoU of 0.25 or 0.11 are close, with 0.33 crowded. A duplicate of a
    close one is close; other classes and crowd regions do not crowd.
    """
    boxes = [[0, 0, 10, 10], [0, 6, 10, 10], [50, 50, 10, 10]]
    objects = [("a", boxes[0]), ("a", boxes[1]), ("a", boxes[2]), ("crowd a", boxes[2])]
    objects += [(x, [50, y, 10, 10]) for x, y in (("b", 50), ("b", 55), ("c", 50), ("c", 58))]
    detections = [("a", boxes[0], 0.9), ("a", [0, 0, 10, 9], 0.8), ("a", [80, 0, 9, 9], 0.7)]
    m = match_detections(*by_hand(objects, detections))
    found = dict(zip(RANGES, map(np.flatnonzero, m.object_counts)))
    parts = {name: found[name].tolist() for name in ("apart", "close", "crowded")}
    assert parts == {"apart": [2], "close": [0, 1, 6, 7], "crowded": [4, 5]}
    parts = dict(zip(RANGES, m.status[:, 0].tolist()))
    assert parts["all"] == [1, 0, 0]
    assert parts["close"] == [1, 0, -1]
    assert parts["apart"] == [-1, -1, 0]


BOX = {"image_id": 0, "category_id": 0, "score": 0.5, "bbox": [0, 0, 5, 5]}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": 1}, "res.json: not in COCO's result format, which is a list of detections"),
        (["x"], "res.json: detection number 0: 'x' is no detection with image_id"),
        ([BOX, {**BOX, "image_id": 7}], "number 1: the image_id 7 is not in the annotations"),
        ([{**BOX, "image_id": None}], "the image_id None is not"),
        ([{**BOX, "category_id": 9}], "the category_id 9 is not in the annotations"),
        ([{**BOX, "category_id": [0]}], "the category_id [0] is not"),
        ([{**BOX, "score": math.nan}], "the score nan is no finite number"),
        ([{**BOX, "score": "1"}], "the score '1' is no finite number"),
        ([{**BOX, "bbox": [0, 0, math.inf, 5]}], "the bbox [0, 0, inf, 5] is not [x, y, width, "),
        ([{**BOX, "bbox": [0, 0, -1, 5]}], "the bbox [0, 0, -1, 5] is not"),
        ([{**BOX, "bbox": [0, 0, 5]}], "the bbox [0, 0, 5] is not"),
        ([{**BOX, "bbox": None}], "there is no 'bbox'; choose the IoU type that was evaluated"),
        ([{**BOX, "segmentation": [[0, 0, 5, 0, 5, 5]]}], "it must have a run-length mask"),
        ([{**BOX, "segmentation": {"size": [100, 99], "counts": "`0"}}], "must have 'counts'"),
    ],
)
def test_broken_results(results, message):
    iou_type = "segm" if "segmentation" in str(results) else "bbox"
    dataset = by_hand([("a", [0, 0, 5, 5])], [])[0]
    with pytest.raises(InputError) as e:
        match_detections(dataset, results, iou_type, name="res.json")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(ArgumentError, match="iou_type"):
        match_detections(dataset, [], "keypoints")


@pytest.mark.parametrize(
    "content", [None, "", "[1, ", "\xff", pytest.param("[" * 10**5, id="deep")]
)
def test_unreadable_file(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=f"{path}: no readable JSON file of detections: "):
        read_results(str(path))
    path.write_text(json.dumps([BOX]), encoding="utf-8-sig")
    assert read_results(str(path)) == [BOX]


def test_empty():
    """An empty box is no broken one, nor is one across the border; there may be nothing at all."""
    dataset, _ = by_hand([("a", [0, 0, 5, 5])], [])
    del dataset["annotations"][0]["iscrowd"]
    m = match_detections(dataset, [{**BOX, "bbox": [0, -1, 0, 5]}])
    assert m.nearest_iou.tolist() == [[0], [0]]
    assert m.object_counts[0].tolist() == [True]
    m = match_detections(*by_hand([], []))
    arrays = (m.object_image, m.image, m.detected_class, m.score, m.object_counts, m.status)
    assert [x.dtype for x in arrays] == [int, int, int, float, bool, np.int8]


@pytest.mark.parametrize(
    ("area", "expected"),
    [
        *((0, ["all", "small"]), (32**2 - 1, ["all", "small"]), (32**2 + 1, ["all", "medium"])),
        *((32**2, ["all", "small", "medium"]), (96**2, ["all", "medium", "large"])),
        *((96**2 - 1, ["all", "medium"]), (96**2 + 1, ["all", "large"])),
        *((1e10, ["all", "large"]), (1e10 + 1, [])),
    ],
)
def test_ends_of_ranges(area, expected):
    """Both belong to it; equal objects are crowded."""
    dataset, results = by_hand([("a", [0, 0, 9, 9])] * 2, [("a", [0, 0, 2**32, 2**32], 0.5)])
    dataset["annotations"][0]["area"] = area
    found = match_detections(dataset, results)
    counts = zip(RANGES, found.object_counts[:, 0])
    assert [name for name, x in counts if x] == [*expected, "crowded"]
    assert found.status[:4].max() == -1  # 2**64 pixels are too many for any size
