# SPDX-License-Identifier: Apache-2.0
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, coco_evaluation
from detectron2.structures import Boxes, Instances

from libra_d2.data import register_coco_json
from libra_d2.errors import InputError
from libra_d2.evaluation import PredictionPictures, build_evaluator, fast_coco_evaluator
from libra_d2.evaluation.fast_coco_evaluator import FastCOCOEvaluator


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


@pytest.mark.parametrize("config", ["faster", "mask"])
def test_fast_evaluation(synthetic, tmp_path, config):
    """All numbers, per class and of masks as well, are those of pycocotools."""
    name = f"test_fast_{config}"
    mask_format = "bitmask" if config == "mask" else None
    paths = (str(synthetic / "instances.json"), str(synthetic / "images"), str(tmp_path))
    register_coco_json(name, *paths, mask_format)
    rng = torch.Generator().manual_seed(0)
    evaluators = [
        evaluator(name, ("bbox", "segm") if config == "mask" else ("bbox",), False)
        for evaluator in (COCOEvaluator, FastCOCOEvaluator)
    ]
    for evaluator in evaluators:
        evaluator.reset()
    for record in DatasetCatalog.get(name):
        # The ground truth, moved a little, with wrong classes and additional boxes.
        truth = Instances((96, 96))
        annotations = 3 * record["annotations"]
        boxes = torch.tensor([a["bbox"] for a in annotations]).float().view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes += 3 * torch.randn(boxes.shape, generator=rng)
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.long)
        wrong = torch.rand(len(boxes), generator=rng) < 0.2
        truth.pred_boxes = Boxes(boxes)
        truth.pred_classes = torch.where(wrong, (classes + 1) % 4, classes)
        truth.scores = torch.rand(len(boxes), generator=rng)
        if config == "mask":
            ys, xs = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
            x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
            truth.pred_masks = (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)
        for evaluator in evaluators:
            evaluator.process([{"image_id": record["image_id"]}], [{"instances": truth}])
    expected, results = (evaluator.evaluate() for evaluator in evaluators)
    assert results.keys() == expected.keys()
    assert expected["bbox"]["AP50"] > 5
    for task, numbers in expected.items():
        assert results[task] == pytest.approx(numbers, abs=1e-10, nan_ok=True)


def test_choice_of_the_evaluator(dataset, tmp_path, monkeypatch):
    """Detectron2's own if it was compiled, else the package if it is installed, else a notice."""
    evaluator = build_evaluator(dataset, str(tmp_path))
    compiled = coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
    assert type(evaluator) is (COCOEvaluator if compiled else FastCOCOEvaluator)
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", coco_evaluation.COCOeval)
    assert type(build_evaluator(dataset, str(tmp_path))) is FastCOCOEvaluator
    messages = []
    monkeypatch.setattr(fast_coco_evaluator.logger, "info", messages.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert type(build_evaluator(dataset, str(tmp_path))) is COCOEvaluator
    assert "pip install faster-coco-eval" in messages[0]
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", object)
    assert type(build_evaluator(dataset, str(tmp_path))) is COCOEvaluator
    assert len(messages) == 1


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
