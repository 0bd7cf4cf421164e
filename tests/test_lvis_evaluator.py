# SPDX-License-Identifier: Apache-2.0
"""LVIS' metrics: cases worked out by hand, and numbers of the package lvis."""

import json
from itertools import count

import numpy as np
import pytest
import torch
from conftest import evaluate, masks_of

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from libra_d2.errors import InputError
from libra_d2.evaluation import coco_evaluator
from libra_d2.evaluation.lvis_evaluator import LibraLVISEvaluator, has_lvis_metrics

NAMES, NUMBERS = [f"test_lvis_evaluator_{i}" for i in range(100)], count()
A, B, C = CATEGORIES = 7, 11, 20
SIZE = 160
NEG, PARTLY = "neg_category_ids", "not_exhaustive_category_ids"


def register(folder, images, objects, frequencies, change=lambda dataset: None):
    """
    Registers a dataset of images by id, with fields of LVIS; of objects, as image, category, box
    and polygon; and of the frequencies of categories.
    """
    annotations = []
    for i, (image_id, category, box, polygon) in enumerate(objects, 1):
        own = {"id": i, "image_id": image_id, "category_id": category, "segmentation": [polygon]}
        annotations.append({**own, "bbox": box, "area": box[2] * box[3]})
    dataset = {
        "images": [{"id": i, "height": SIZE, "width": SIZE, **x} for i, x in images.items()],
        "categories": [{"id": i, "frequency": x} for i, x in frequencies.items()],
        "annotations": annotations,
    }
    change(dataset)
    path = folder / "lvis.json"
    path.write_text(json.dumps(dataset))
    name = NAMES[next(NUMBERS)]
    names = [str(i) for i in sorted(frequencies)]
    MetadataCatalog.get(name).set(json_file=str(path), evaluator_type="lvis", thing_classes=names)
    return name


def detections(found, masks=False):
    """Of contiguous class, box and score; with masks, those of the boxes."""
    boxes = torch.tensor([x[1] for x in found]).float().view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances((SIZE, SIZE), pred_boxes=Boxes(boxes))
    instances.pred_classes = torch.tensor([x[0] for x in found])
    instances.scores = torch.tensor([x[2] for x in found]).float()
    if masks:
        instances.pred_masks = masks_of(boxes, (SIZE, SIZE))
    return instances


BOX, ELSEWHERE, THIN = [10, 10, 30, 30], [100, 100, 30, 30], [10, 10, 0, 30]


@pytest.mark.parametrize(
    ("more", "fields", "expected"),
    [
        ([], {}, (100, 100)),
        # A false detection, with a higher score than that of the object: precision 1/2.
        ([(0, ELSEWHERE, 0.9)], {}, (50, 100)),
        ([(0, ELSEWHERE, 0.9)], {PARTLY: [A]}, (100, 100)),
        ([(0, THIN, 0.9)], {}, (100, 100)),
        ([(0, [99, 99, 1, 1], 0.9)], {}, (50, 100)),
        # Of a class with an object in another image only.
        ([(1, BOX, 0.9)], {}, (100, 100)),
        ([(1, BOX, 0.9)], {NEG: [C]}, (100, 100)),
        ([(1, BOX, 0.9)], {NEG: [C, B]}, (100, 50)),
        ([(1, BOX, 0.9)], {NEG: [B], PARTLY: [B]}, (100, 100)),
        # At most 300 in an image, also if they do not count.
        (299 * [(1, BOX, 0.9)], {}, (100, 100)),
        (300 * [(1, BOX, 0.9)], {}, (0, 100)),
    ],
)
def test_metrics(tmp_path, more, fields, expected, monkeypatch):
    """
    One object of each of two classes in an image each, and one detection of each. One of the second
    class without an area does not say that the class is in the image.
    """
    monkeypatch.setattr(coco_evaluator, "_GROUP", 1)  # a class at a time, also that without any
    empty = {NEG: [], PARTLY: []}
    images = {5: {**empty, **fields}, 3: empty}
    polygon = [10, 10, 40, 10, 40, 40, 10, 40]
    objects = [(5, A, BOX, polygon), (3, B, BOX, polygon), (5, B, THIN, polygon)]
    name = register(tmp_path, images, objects, {B: "f", A: "r", C: "c"})
    found = {3: detections([(1, BOX, 0.8)]), 5: detections([*more, (0, BOX, 0.5)])}
    evaluator = LibraLVISEvaluator(name, distributed=False)
    results = evaluate(evaluator, found)["bbox"]
    assert list(results) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
    assert (results["APr"], results["APf"]) == pytest.approx(expected)
    assert results["AP"] == pytest.approx(sum(expected) / 2)
    assert np.isnan([results["APc"], results["APl"]]).all()
    nothing = evaluate(evaluator, {3: detections([])})["bbox"]
    assert list(nothing) == list(results)
    assert np.isnan(list(nothing.values())).all()


# Of detectron2.evaluation.LVISEvaluator with lvis 0.5.3 and `numpy.float = float`.
OF_LVIS = {
    "bbox": (
        *(10.54199652, 21.876696, 9.27332886, 10.0, 10.47851466, 49.42016344),
        *(5.81460474, 16.60960987, 9.20177496),
    ),
    "segm": (
        *(10.35660516, 22.45454204, 8.58884207, 2.5, 10.7518877, 50.11241749),
        *(4.39196295, 16.29350656, 10.38434597),
    ),
}


def random_case(folder, seed=0):
    """A dataset and detections: many in an image, equal scores, empty masks, all sizes."""
    rng = np.random.RandomState(seed)  # whose numbers never change
    frequencies = {2 * i + 5: "rcf"[i % 3] for i in range(6)}
    images, objects, found = {}, [], {}
    for image_id in (8, 3, 5, 6):
        mine, boxes = rng.choice(list(frequencies), 5), rng.uniform(8, 130, (5, 4))
        boxes[:, :2] = rng.uniform(0, 1, (5, 2)) * (SIZE - boxes[:, 2:])
        others = sorted({*frequencies} - {*mine.tolist()})
        images[image_id] = {NEG: others[::2], PARTLY: sorted({*mine[:2].tolist()})}
        found[image_id] = []
        for category, (x, y, w, h) in zip(mine.tolist(), boxes.tolist()):
            polygon = [x, y, x + w, y, x + w, y + h, x, y + 0.8 * h]
            objects.append((image_id, category, [x, y, w, h], polygon))
        for i in range(320):
            box = boxes[i % 5] + rng.normal(0, 4 if i < 40 else 40, 4)
            box[2:] = np.abs(box[2:])
            category = mine[i % 5] if rng.uniform() < 0.6 else rng.choice(list(frequencies))
            score = round(rng.uniform(), 2)
            found[image_id].append(((int(category) - 5) // 2, box.tolist(), score))
    name = register(folder, images, objects, frequencies)
    return name, {i: detections(x, masks=True) for i, x in found.items()}


@pytest.mark.parametrize("at_once", [1, 50_000])
def test_package(tmp_path, at_once, monkeypatch):
    """All numbers are those of the package lvis, of boxes and of masks, in groups of classes."""
    monkeypatch.setattr(coco_evaluator, "_GROUP", at_once)
    name, found = random_case(tmp_path)
    gathered, evaluator = [], LibraLVISEvaluator(name)
    gather = lambda x: gathered.append(1) or x  # noqa: E731
    monkeypatch.setattr(coco_evaluator, "gather_predictions", gather)
    results = evaluate(evaluator, found)
    assert (results.keys(), gathered) == ({"bbox", "segm"}, [1])
    assert has_lvis_metrics()
    for task, numbers in OF_LVIS.items():
        assert list(results[task].values()) == pytest.approx(numbers, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "entry", "key"),
    [("images", 3, NEG), ("images", 3, PARTLY), ("categories", A, "frequency")],
)
def test_errors(tmp_path, kind, entry, key):
    """What LVIS adds to COCO's format must be there."""
    images = {3: {NEG: [], PARTLY: []}}
    name = register(tmp_path, images, [], {A: "r"}, lambda dataset: dataset[kind][0].pop(key))
    with pytest.raises(InputError, match=rf"lvis\.json: {kind}: id {entry} has no {key}, which"):
        LibraLVISEvaluator(name)
