# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import demo_cfg
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    coco_evaluation,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from libra_d2.data import register_coco_json
from libra_d2.engine import Trainer
from libra_d2.errors import InputError
from libra_d2.evaluation import (
    LibraCOCOEvaluator,
    PredictionPictures,
    build_evaluator,
    coco_evaluator,
)
from libra_d2.evaluation.coco_evaluator import choose_coco_eval


@pytest.fixture
def dataset(synthetic, tmp_path):
    name = "test_evaluation"
    register_coco_json(
        name, str(synthetic / "instances.json"), str(synthetic / "images"), str(tmp_path)
    )
    return name


@pytest.mark.parametrize("evaluator_type", ["coco", "lvis"])
def test_coco(dataset, evaluator_type, tmp_path):
    metadata = MetadataCatalog.get(dataset)
    MetadataCatalog.remove(dataset)
    MetadataCatalog.get(dataset).set(**{**metadata.as_dict(), "evaluator_type": evaluator_type})
    assert isinstance(build_evaluator(dataset, str(tmp_path)), COCOEvaluator)


def compiled_evaluator():
    """Detectron2's, where it was compiled."""
    found = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
    return [] if found is COCOeval else [found]


EVALUATORS = [COCOeval, coco_evaluator._faster_coco_eval, *compiled_evaluator()]


def detections_near(record, rng, num=3, masks=False):
    """The ground truth of an image ``num`` times, moved a little, with wrong classes."""
    annotations = num * record["annotations"]
    instances = Instances((record["height"], record["width"]))
    boxes = torch.tensor([a["bbox"] for a in annotations]).float().view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes += 3 * torch.randn(boxes.shape, generator=rng)
    classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.long)
    wrong = torch.rand(len(boxes), generator=rng) < 0.2
    instances.pred_boxes = Boxes(boxes)
    instances.pred_classes = torch.where(wrong, (classes + 1) % 4, classes)
    instances.scores = torch.rand(len(boxes), generator=rng)
    if masks:
        ys, xs = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
        x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
        instances.pred_masks = (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)
    return instances


def evaluate(evaluator, detections):
    """Results for the detections in each image, by its id."""
    evaluator.reset()
    for image_id, instances in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("coco_eval", EVALUATORS)
@pytest.mark.parametrize("config", ["faster", "mask"])
def test_evaluators_agree(synthetic, tmp_path, config, coco_eval):
    """All numbers, per class and of masks as well, are those of Detectron2 with pycocotools."""
    name, masks = f"test_fast_{config}", config == "mask"
    paths = (str(synthetic / "instances.json"), str(synthetic / "images"), str(tmp_path))
    register_coco_json(name, *paths, "bitmask" if masks else None)
    rng = torch.Generator().manual_seed(0)
    records = DatasetCatalog.get(name)
    found = {r["image_id"]: detections_near(r, rng, masks=masks) for r in records}
    arguments = (name, ("bbox", "segm") if masks else ("bbox",), False)
    expected = evaluate(COCOEvaluator(*arguments, use_fast_impl=False), found)
    results = evaluate(LibraCOCOEvaluator(*arguments, coco_eval=coco_eval), found)
    assert results.keys() == expected.keys()
    assert expected["bbox"]["AP50"] > 5
    for task, numbers in expected.items():
        assert results[task] == pytest.approx(numbers, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("coco_eval", EVALUATORS)
def test_more_than_100_detections(dataset, coco_eval):
    """All 300 of an image count, as with pycocotools' limit set to 300."""
    rng = torch.Generator().manual_seed(1)
    records = DatasetCatalog.get(dataset)
    found = {r["image_id"]: detections_near(r, rng, num=60) for r in records}
    assert max(map(len, found.values())) > 200
    at_100, at_300 = (
        evaluate(
            LibraCOCOEvaluator(
                dataset, ("bbox",), False, max_dets_per_image=n, coco_eval=coco_eval
            ),
            found,
        )["bbox"]
        for n in (100, 300)
    )
    coco = COCO(MetadataCatalog.get(dataset).json_file)
    ids = coco.getCatIds()
    results = [x for i, found_i in found.items() for x in instances_to_coco_json(found_i, i)]
    for result in results:
        result["category_id"] = ids[result["category_id"]]
    expected = COCOeval(coco, coco.loadRes(results), "bbox")
    expected.params.maxDets = [1, 10, 300]
    expected.evaluate()
    expected.accumulate()
    precision = expected.eval["precision"][:, :, :, 0, -1]
    assert at_300["AP"] == pytest.approx(100 * precision[precision > -1].mean(), abs=1e-10)
    assert at_300["AP"] > at_100["AP"]


def test_limit_is_the_models(dataset, tmp_path):
    """What the model may return counts, and never less than COCO looks at."""
    for limit, expected in ((20, 100), (100, 100), (300, 300)):
        evaluator = build_evaluator(dataset, str(tmp_path), limit)
        assert evaluator._max_dets_per_image == [1, 10, expected]


@pytest.mark.parametrize("coco_eval", EVALUATORS)
def test_perfect_predictions(dataset, coco_eval):
    """The ground truth is worth 100 AP."""
    found = {}
    for record in DatasetCatalog.get(dataset):
        instances = Instances((96, 96))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).float().view(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        instances.pred_classes = torch.tensor(
            [a["category_id"] for a in record["annotations"]], dtype=torch.long
        )
        instances.scores = torch.ones(len(boxes))
        found[record["image_id"]] = instances
    results = evaluate(LibraCOCOEvaluator(dataset, ("bbox",), False, coco_eval=coco_eval), found)
    assert results["bbox"]["AP"] == pytest.approx(100)


BIG = 2**62
NUMBERINGS = {
    "as it is": {},
    "negative annotations": {"annotation": lambda i: -i},
    "annotations around zero": {"annotation": lambda i: i - 20},
    "large annotations": {"annotation": lambda i: BIG + i},
    "annotations of text": {"annotation": lambda i: f"a{i}"},
    "negative categories": {"category": lambda i: 3 * i - 20},
    "large categories": {"category": lambda i: BIG + i},
    "categories of text": {"category": lambda i: f"c{i:03d}"},
    "images close to each other": {"image": lambda i: 1 + i * 2**-50},
    "large images": {"image": lambda i: 2**53 + i},
    "negative images": {"image": lambda i: -i},
    "images of text": {"image": lambda i: f"img-{i:03d}"},
}


@pytest.mark.parametrize("coco_eval", EVALUATORS)
@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_numbering(synthetic, tmp_path, numbering, coco_eval):
    """The same detections have the same AP, whatever the ids are; files have the dataset's."""

    def renumber(dataset, image=int, annotation=int, category=int):
        for x in dataset["annotations"]:
            x.update(id=annotation(x["id"]), image_id=image(x["image_id"]))
            x["category_id"] = category(x["category_id"])
        for x in dataset["images"]:
            x["id"] = image(x["id"])
        for x in dataset["categories"]:
            x["id"] = category(x["id"])

    results = []
    for kind in ("as it is", numbering):
        dataset = json.loads((synthetic / "instances.json").read_text())
        renumber(dataset, **NUMBERINGS[kind])
        (tmp_path / "ids.json").write_text(json.dumps(dataset))
        name = f"test_ids_{len(results)}"
        out = tmp_path / f"{len(results)}"
        register_coco_json(name, str(tmp_path / "ids.json"), str(synthetic / "images"), str(out))
        rng = torch.Generator().manual_seed(4)
        records = sorted(DatasetCatalog.get(name), key=lambda r: r["file_name"])
        found = {r["image_id"]: detections_near(r, rng) for r in records}
        evaluator = LibraCOCOEvaluator(name, ("bbox",), False, str(out), coco_eval=coco_eval)
        results.append(evaluate(evaluator, found))
        written = json.loads((out / "coco_instances_results.json").read_text())
        assert {x["image_id"] for x in written} <= {x["id"] for x in dataset["images"]}
        assert {x["category_id"] for x in written} <= {x["id"] for x in dataset["categories"]}
    assert results[0]["bbox"]["AP"] > 5
    assert results[1]["bbox"] == pytest.approx(results[0]["bbox"], abs=1e-10, nan_ok=True)


def lvis_dataset(synthetic, tmp_path, name):
    """The synthetic dataset as Detectron2 registers LVIS: without a map of ids."""
    from detectron2.data.datasets.lvis import load_lvis_json

    dataset = json.loads((synthetic / "instances.json").read_text())
    for image in dataset["images"]:
        name_of_file = image.pop("file_name")
        image["coco_url"] = f"http://x/val2017/{name_of_file}"
        image.update(neg_category_ids=[1, 2, 3, 4], not_exhaustive_category_ids=[])
    for annotation in dataset["annotations"]:
        del annotation["iscrowd"]
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for category in dataset["categories"]:
        category.update(frequency="f", image_count=9, instance_count=9, synset="x", synonyms=["x"])
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(dataset))
    DatasetCatalog.register(name, lambda: load_lvis_json(str(path), str(synthetic)))
    names = [c["name"] for c in dataset["categories"]]
    MetadataCatalog.get(name).set(
        json_file=str(path), image_root=str(synthetic), evaluator_type="lvis", thing_classes=names
    )


@pytest.mark.parametrize("installed", [False, True])
def test_perfect_predictions_on_lvis(synthetic, tmp_path, installed, monkeypatch, caplog):
    """With COCO's metrics, and with those of the package lvis where it is installed."""
    name = f"test_lvis_{installed}"
    if installed:
        pytest.importorskip("lvis")
        monkeypatch.setattr(np, "float", float, raising=False)  # the package needs an older NumPy
    lvis_dataset(synthetic, tmp_path, name)
    evaluator = build_evaluator(name, str(tmp_path / "out"))
    assert type(evaluator) is (LVISEvaluator if installed else LibraCOCOEvaluator)
    assert ("evaluated with COCO's metrics" in caplog.text) != installed
    found = {}
    for record in DatasetCatalog.get(name):
        instances = Instances((96, 96))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).float().view(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        instances.scores = torch.ones(len(boxes))
        found[record["image_id"]] = instances
    assert evaluate(evaluator, found)["bbox"]["AP"] == pytest.approx(100)
    DatasetCatalog.remove(name)


def test_nothing_found(dataset):
    """No detections at all: no number, as in Detectron2."""
    empty = Instances((96, 96), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    empty.pred_classes = torch.zeros(0, dtype=torch.long)
    found = {r["image_id"]: empty for r in DatasetCatalog.get(dataset)}
    results = evaluate(LibraCOCOEvaluator(dataset, ("bbox",), False), found)
    assert np.isnan(results["bbox"]["AP"])


def test_choice_of_the_evaluator(monkeypatch):
    """Detectron2's own if it was compiled, else the package if it is installed, else a notice."""
    messages = []
    monkeypatch.setattr(coco_evaluator.logger, "info", messages.append)
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", object)
    assert choose_coco_eval() is object
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)
    assert choose_coco_eval() is coco_evaluator._faster_coco_eval
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not messages
    assert choose_coco_eval() is COCOeval
    assert "pip install faster-coco-eval" in messages[0]


def test_voc(tmp_path):
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    MetadataCatalog.get("test_voc").set(
        evaluator_type="pascal_voc",
        dirname=str(tmp_path),
        split="val",
        year=2012,
        thing_classes=["a"],
    )
    assert isinstance(build_evaluator("test_voc", ""), PascalVOCDetectionEvaluator)


def test_registered_by_a_function(dataset, tmp_path):
    """A dataset with classes and nothing else, as in Detectron2's tutorial."""
    records = DatasetCatalog.get(dataset)
    name = "test_registered_by_a_function"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=MetadataCatalog.get(dataset).thing_classes)
    cfg = demo_cfg(OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=0)
    cfg.MODEL.LIBRA.NUM_PICTURES = 0
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    trainer = Trainer(cfg)
    trainer.train()
    assert "AP" in trainer.results["bbox"]
    assert (tmp_path / f"inference/{name}_coco_format.json").exists()


def test_unknown():
    MetadataCatalog.get("test_unknown").set(evaluator_type="cityscapes")
    with pytest.raises(InputError, match="'test_unknown': no evaluator for its type 'cityscapes'"):
        build_evaluator("test_unknown", "")


def detect(image, score):
    instances = Instances((image["height"], image["width"]))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60]]))
    instances.scores = torch.tensor([score])
    instances.pred_classes = torch.tensor([1])
    return {"instances": instances}


@pytest.mark.parametrize("score", [0.9, 0.1])
def test_pictures(dataset, tmp_path, score):
    """
    Two images, detections left of the ground truth; what is below the threshold is not drawn.
    """
    pictures = PredictionPictures(dataset, str(tmp_path / "p"), num_images=2, min_size=96)
    images = DatasetCatalog.get(dataset)[:3]
    for _ in range(2):  # evaluations
        pictures.reset()
        for image in images:
            pictures.process([image], [detect(image, score)])
        assert pictures.evaluate() is None
    files = sorted((tmp_path / "p").iterdir())
    assert [f.name for f in files] == ["000000.jpg", "000001.jpg"]
    picture = np.asarray(Image.open(files[0])).astype(int)
    original = np.asarray(Image.open(images[0]["file_name"])).astype(int)
    assert picture.shape == (96, 192, 3)
    left, right = (np.abs(half - original).max() > 60 for half in np.split(picture, 2, axis=1))
    assert left == (score > 0.5)
    assert right
