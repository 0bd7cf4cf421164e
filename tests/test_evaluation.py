# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from libra_d2.data import register_coco_json
from libra_d2.errors import InputError
from libra_d2.evaluation import PredictionPictures, build_evaluator


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
