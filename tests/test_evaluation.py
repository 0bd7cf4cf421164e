# SPDX-License-Identifier: Apache-2.0
"""Choice of the evaluator, and COCO's numbers."""

import importlib.util
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import evaluate, masks_of
from pycocotools.cocoeval import COCOeval

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import load_lvis_json
from detectron2.evaluation import (
    COCOEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    coco_evaluation,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from libra_d2.data import register_coco_json
from libra_d2.errors import InputError
from libra_d2.evaluation import (
    LibraCOCOEvaluator,
    LibraLVISEvaluator,
    build,
    build_evaluator,
    coco_evaluator,
    reported_metrics,
)
from libra_d2.evaluation.coco_evaluator import choose_coco_eval

pytestmark = pytest.mark.rounding

# Detectron2's as well, if it is compiled.
COMPILED = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
EVALUATORS = list(dict.fromkeys([COCOeval, coco_evaluator.faster_coco_eval, COMPILED]))


@pytest.fixture
def registered(synthetic, tmp_path):
    """Registers the synthetic dataset, with changes to its JSON."""

    def register(name, change=lambda dataset: None, mask_format=None):
        dataset = json.loads((synthetic / "instances.json").read_text())
        change(dataset)
        path, out = tmp_path / f"{name}.json", tmp_path / name
        path.write_text(json.dumps(dataset))
        register_coco_json(name, str(path), str(synthetic / "images"), str(out), mask_format)
        return name

    return register


def detections(record, rng=None, num=1, masks=False):
    """The ground truth of an image; with ``rng``, with jittered boxes and some wrong classes."""
    annotations = num * record["annotations"]
    instances = Instances((record["height"], record["width"]))
    boxes = torch.tensor([a["bbox"] for a in annotations]).float().view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.long)
    instances.scores = torch.ones(len(boxes))
    if rng is not None:
        boxes += 3 * torch.randn(boxes.shape, generator=rng)
        wrong = torch.rand(len(boxes), generator=rng) < 0.2
        classes = torch.where(wrong, (classes + 1) % 4, classes)
        instances.scores = torch.rand(len(boxes), generator=rng)
    instances.pred_boxes, instances.pred_classes = Boxes(boxes), classes
    if masks:
        instances.pred_masks = masks_of(boxes, (96, 96))
    return instances


def assert_equal_results(results, expected):
    assert results.keys() == expected.keys()
    for task, numbers in expected.items():
        assert results[task] == pytest.approx(numbers, abs=1e-10, nan_ok=True)


def with_crowds(dataset):
    for annotation in dataset["annotations"][::3]:
        annotation["iscrowd"] = 1


@pytest.mark.parametrize("coco_eval", EVALUATORS)
@pytest.mark.parametrize(("masks", "limit"), [(True, 100), (False, 300)])
def test_evaluators_agree(registered, masks, limit, coco_eval, monkeypatch, capsys):
    """
    All numbers, including those of classes and masks, are those of Detectron2 with pycocotools:
    with crowds, for some images or tasks, with more than 100 detections in an image, and if just a
    class or two are evaluated at once.
    """
    name = registered("test_agree", with_crowds, "bitmask" if masks else None)
    rng, num = torch.Generator().manual_seed(0), 40 if limit > 100 else 3
    records = [r for r in DatasetCatalog.get(name) if r["annotations"]]
    found = {r["image_id"]: detections(r, rng, num, masks) for r in records}
    for instances in found.values():
        instances.scores = instances.scores.round(decimals=1)  # some are equal
    assert (max(map(len, found.values())) > 100) == (limit > 100)
    options = {"distributed": False, "max_dets_per_image": limit}
    tasks = ("bbox", "segm")[: 1 + masks]
    theirs = COCOEvaluator(name, tasks, use_fast_impl=False, **options)
    monkeypatch.setattr(coco_evaluator, "_GROUP", sum(map(len, found.values())) // 3)
    counts = []

    def implementation(truth, found, task):
        counts.append(len(found.anns))
        return coco_eval(truth, found, task)

    for img_ids, chosen in ((None, None), (list(found)[2:5], ("bbox",))):
        ours = LibraCOCOEvaluator(name, chosen, coco_eval=implementation, **options)
        expected = evaluate(theirs, found, img_ids)
        printed = capsys.readouterr().out
        assert expected["bbox"]["AP50"] > 2
        expected = {task: expected[task] for task in chosen or tasks}
        assert_equal_results(evaluate(ours, found, img_ids), expected)
        # The summary of boxes has recall, too, which is not in the results.
        lines = [re.findall(" Average .*", x)[:12] for x in (capsys.readouterr().out, printed)]
        assert lines[0] == lines[1]
        assert "Recall" in lines[0][11]
    assert max(counts) < 0.7 * sum(map(len, found.values()))


@pytest.mark.parametrize(
    ("rank", "limit", "expected"),
    [
        *((100, 20, 100 / 100), (101, 20, 0), (101, None, 0)),
        *((101, 101, 100 / 101), (300, 300, 100 / 300), (301, 300, 0)),
    ],
)
def test_limit(registered, tmp_path, rank, limit, expected):
    """AP of a single object is the precision at its rank, up to the limit of the model or 100."""
    name = registered("test_limit", lambda x: x.update(annotations=x["annotations"][:1]))
    (record,) = (r for r in DatasetCatalog.get(name) if r["annotations"])
    found = detections(record, num=rank)
    found.pred_boxes.tensor[:-1] = torch.tensor([0.0, 0, 1, 1])
    found.scores = 1 - torch.arange(rank) / 1000
    evaluator = build_evaluator(name, str(tmp_path), *([limit] if limit else []))
    results = evaluate(evaluator, {record["image_id"]: found})["bbox"]
    assert results["AP"] == pytest.approx(expected, rel=1e-9)
    files = {x.name for x in tmp_path.iterdir() if x.name.startswith(("coco_", "instances_"))}
    assert files == {"coco_instances_results.json", "instances_predictions.pth"}


NUMBERINGS = [
    {},
    {"image": lambda i: -i, "annotation": lambda i: i - 20, "category": lambda i: 3 * i - 20},
    {"annotation": lambda i: 2**62 + i, "category": lambda i: 2**62 + i},
    {"image": lambda i: 1 + i * 2**-50, "annotation": "a{}".format, "category": "c{:03d}".format},
    *({"image": lambda i: 2**53 + i}, {"image": "img-{:03d}".format}),
]


def renumber(dataset, image=int, annotation=int, category=int):
    for x in dataset["annotations"]:
        ids = {"id": annotation(x["id"]), "image_id": image(x["image_id"])}
        x.update(ids, category_id=category(x["category_id"]))
    for kind, number in (("images", image), ("categories", category)):
        for x in dataset[kind]:
            x["id"] = number(x["id"])


@pytest.mark.parametrize("coco_eval", EVALUATORS)
def test_numbering(registered, tmp_path, coco_eval):
    """AP does not depend on the ids; files have those of the dataset."""
    expected = None
    for i, numbers in enumerate(NUMBERINGS):
        name = registered(f"test_numbering_{i}", partial(renumber, **numbers))
        rng, out = torch.Generator().manual_seed(4), tmp_path / name
        records = sorted(DatasetCatalog.get(name), key=lambda r: r["file_name"])
        found = {r["image_id"]: detections(r, rng, 3) for r in records}
        evaluator = LibraCOCOEvaluator(name, None, False, str(out), coco_eval=coco_eval)
        results = evaluate(evaluator, found)
        expected = expected or results
        assert results["bbox"]["AP"] > 5
        assert_equal_results(results, expected)
        dataset = json.loads((tmp_path / f"{name}.json").read_text())
        ids = sorted(x["id"] for x in dataset["categories"])
        written = [x for i, y in found.items() for x in instances_to_coco_json(y, i)]
        written = [{**x, "category_id": ids[x["category_id"]]} for x in written]
        assert json.loads((out / "coco_instances_results.json").read_text()) == written


def test_order_of_classes(registered, tmp_path):
    """
    That which the dataset was registered with, as in Detectron2, which names the AP of classes in
    the order of their ids, though.
    """
    name, other, ids = registered("test_order"), "test_other_order", [2, 4, 1, 3]
    metadata = MetadataCatalog.get(name)
    names = dict(zip(sorted(metadata.thing_dataset_id_to_contiguous_id), metadata.thing_classes))
    assert sorted(names) == sorted(ids)
    MetadataCatalog.get(other).set(
        json_file=metadata.json_file,
        thing_classes=[names[id] for id in ids],
        thing_dataset_id_to_contiguous_id={id: i for i, id in enumerate(ids)},
    )
    found = {r["image_id"]: detections(r) for r in DatasetCatalog.get(name)}
    of_ids = torch.tensor([0, 0, 3, 1])  # those of 1 are taken for those of 2
    for instances in found.values():
        instances.pred_classes = of_ids[instances.pred_classes]
    options = {"tasks": None, "distributed": False}
    theirs = evaluate(COCOEvaluator(other, use_fast_impl=False, **options), found)["bbox"]
    ours = evaluate(LibraCOCOEvaluator(other, **options), found)["bbox"]
    keys = [f"AP-{names[id]}" for id in ids]
    by_id = [theirs.pop(key) for key in keys]
    assert [ours.pop(f"AP-{names[id]}") for id in sorted(ids)] == pytest.approx(by_id)
    assert len({*by_id}) == 3  # 0, 100, and that of the class which has false positives
    assert ours == pytest.approx(theirs, nan_ok=True)


def test_reported_metrics(registered, tmp_path):
    """They are just those of the evaluators: of boxes, masks and proposals, of classes."""
    name = registered("test_reported", mask_format="bitmask")
    evaluator = build_evaluator(name, str(tmp_path))
    records = [r for r in DatasetCatalog.get(name) if r["annotations"]]
    found = {r["image_id"]: detections(r, masks=True) for r in records}
    results = flatten_results_dict(evaluate(evaluator, found))
    assert {"segm/AP50", "bbox/AP-circle"} <= set(results)
    assert set(results) == set(reported_metrics(name, ("bbox", "segm")))
    boxes, logits = Boxes(torch.rand(3, 4)), torch.rand(3)
    proposals = Instances((96, 96), proposal_boxes=boxes, objectness_logits=logits)
    results = flatten_results_dict(evaluate(evaluator, dict.fromkeys(found, proposals)))
    assert set(results) == set(reported_metrics(name, ("box_proposals",)))
    names = [f"keypoints/{x}" for x in ("AP", "AP50", "AP75", "APm", "APl")]
    for classes, more in (("a", []), ("ab", ["keypoints/AP-a", "keypoints/AP-b"])):
        MetadataCatalog.get(f"test_{classes}").set(thing_classes=[*classes], evaluator_type="coco")
        assert reported_metrics(f"test_{classes}", ("keypoints",)) == names + more


@pytest.mark.parametrize("expected", [LibraLVISEvaluator, LVISEvaluator, LibraCOCOEvaluator])
def test_lvis(synthetic, tmp_path, expected, monkeypatch, caplog):
    """
    The ground truth of a dataset like LVIS has 100 AP, with faster-coco-eval, with the package lvis
    and with neither; also as proposals.
    """
    if expected is not LibraLVISEvaluator:
        monkeypatch.setattr(build, "has_lvis_metrics", lambda: False)
    if expected is LVISEvaluator:
        pytest.importorskip("lvis")
        monkeypatch.setattr(np, "float", float, raising=False)  # the package needs an older NumPy
    dataset = json.loads((synthetic / "instances.json").read_text())
    for image in dataset["images"]:
        image["coco_url"] = f"http://x/val2017/{image.pop('file_name')}"
        image.update(neg_category_ids=[1, 2, 3, 4], not_exhaustive_category_ids=[])
    for annotation in dataset["annotations"]:
        del annotation["iscrowd"]
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for category in dataset["categories"]:
        category.update(frequency="f", image_count=9, instance_count=9, synset="x", synonyms=["x"])
    name, path = f"test_lvis_{expected.__name__}", tmp_path / "lvis.json"
    path.write_text(json.dumps(dataset))
    DatasetCatalog.register(name, lambda: load_lvis_json(str(path), str(synthetic)))
    MetadataCatalog.get(name).set(
        **{"json_file": str(path), "image_root": str(synthetic), "evaluator_type": "lvis"},
        thing_classes=[c["name"] for c in dataset["categories"]],
    )
    evaluator = build_evaluator(name, str(tmp_path / "out"))
    assert type(evaluator) is expected
    has_warned = "evaluated with COCO's metrics" in caplog.text
    assert has_warned == (expected is LibraCOCOEvaluator)
    found = {r["image_id"]: detections(r) for r in DatasetCatalog.get(name)}
    results = evaluate(evaluator, found)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert set(flatten_results_dict(results)) == set(reported_metrics(name, ("bbox",)))
    assert list((tmp_path / "out").glob("*_instances_results.json"))
    found = {
        i: Instances((96, 96), proposal_boxes=x.pred_boxes, objectness_logits=x.scores)
        for i, x in found.items()
    }
    results = evaluate(evaluator, found)
    assert results["box_proposals"]["AR@100"] == pytest.approx(100)
    assert set(flatten_results_dict(results)) == set(reported_metrics(name, ("box_proposals",)))


def test_choice_of_the_evaluator(monkeypatch):
    """Detectron2's if it is compiled, else the package if it is installed, else pycocotools."""
    messages = []
    monkeypatch.setattr(coco_evaluator.logger, "info", messages.append)
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", object)
    assert choose_coco_eval() is object
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)
    assert choose_coco_eval() is coco_evaluator.faster_coco_eval
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not messages
    assert choose_coco_eval() is COCOeval
    assert "pip install faster-coco-eval" in messages[0]


def test_types(registered, tmp_path, monkeypatch):
    """A dataset without a type is evaluated as COCO's, as in Detectron2's tutorial."""
    records = DatasetCatalog.get(registered("test_complete"))
    DatasetCatalog.register("test_untyped", lambda: records)
    classes = MetadataCatalog.get("test_complete").thing_classes
    MetadataCatalog.get("test_untyped").set(thing_classes=classes)
    found = {r["image_id"]: detections(r) for r in records}
    results = evaluate(build_evaluator("test_untyped", str(tmp_path)), found)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert MetadataCatalog.get("test_untyped").get("json_file") is None
    with monkeypatch.context() as m:  # one of several processes does not wait for the others
        m.setattr(comm, "synchronize", lambda: pytest.fail("waits"))
        LibraCOCOEvaluator("test_untyped", None, False, str(tmp_path))
    # Other data under this name is not taken for the one that was evaluated before.
    del records[0]["annotations"][0]
    results = evaluate(build_evaluator("test_untyped", str(tmp_path)), found)
    assert results["bbox"]["AP"] < 100
    nothing = {records[0]["image_id"]: detections({**records[0], "annotations": []})}
    evaluator = build_evaluator("test_untyped", str(tmp_path))
    assert np.isnan(evaluate(evaluator, nothing)["bbox"]["AP"])
    voc = {"evaluator_type": "pascal_voc", "dirname": str(tmp_path), "split": "val", "year": 2012}
    MetadataCatalog.get("test_voc").set(**voc, thing_classes=["a"])
    assert isinstance(build_evaluator("test_voc", ""), PascalVOCDetectionEvaluator)
    assert reported_metrics("test_voc") == ["bbox/AP", "bbox/AP50", "bbox/AP75"]
    MetadataCatalog.get("test_unknown").set(evaluator_type="cityscapes")
    with pytest.raises(InputError, match="'test_unknown': no evaluator for its type 'cityscapes'"):
        build_evaluator("test_unknown", "")


def test_no_predictions(registered, caplog, monkeypatch):
    """Processes wait for each other, unless each of them evaluates what it has."""
    name, calls = registered("test_no_predictions"), []
    monkeypatch.setattr(comm, "synchronize", lambda: calls.append(1))
    for options in ({"distributed": False}, {}):
        assert evaluate(LibraCOCOEvaluator(name, **options), {}) == {}
        assert len(calls) == (not options)
    assert caplog.text.count("did not receive any predictions") == 2
