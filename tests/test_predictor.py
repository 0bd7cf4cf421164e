# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from conftest import build_model, demo_cfg
from oracle import double_precision
from PIL import Image

from detectron2.data import MetadataCatalog

from libra_d2.config import make_recipe
from libra_d2.engine import LibraPredictor
from libra_d2.errors import ArgumentError

LEARNED = "training data 'a' classes"


@pytest.fixture
def cfg(tmp_path):
    cfg = demo_cfg(INPUT__MIN_SIZE_TEST=64, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.01)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    return cfg


def save(cfg, **content):
    torch.save({"model": build_model(cfg).state_dict(), **content}, cfg.MODEL.WEIGHTS)


def test_batch(cfg):
    """A batch of images, of several sizes, has the detections of each image."""
    save(cfg)
    predictor = LibraPredictor(cfg)
    predictor.model.double()
    rng = np.random.default_rng(0)
    sizes = ((50, 50), (50, 50), (90, 60))
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    with double_precision():
        assert [x["instances"].image_size for x in predictor(images)] == [*sizes]
        same_size = images[:2]  # no padding, which the features of an image depend on
        outputs, alone = predictor(same_size), [predictor(x) for x in same_size]
    for ours, theirs in zip(outputs, alone):
        ours, theirs = ours["instances"], theirs["instances"]
        assert not ours.scores.requires_grad
        assert len(ours) == len(theirs) > 10
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-9)
        boxes = ours.pred_boxes.tensor, theirs.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-7)
    assert not torch.equal(*(x["instances"].scores[:10] for x in outputs))


@pytest.mark.parametrize("format", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_formats(cfg, format, tmp_path):
    """The model gets what an evaluation reads from the file."""
    cfg.INPUT.FORMAT = format
    if format == "L":
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0], [1.0]
    save(cfg)
    path, image = str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 256, (48, 64, 3))
    Image.fromarray(image.astype(np.uint8)).save(path)
    predictor, seen = LibraPredictor(cfg), []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    predictor(image[:, :, ::-1].astype(np.uint8))
    mapped = make_recipe(cfg).build_mapper(False)({"file_name": path, "image_id": 1})
    torch.testing.assert_close(seen[0]["image"], mapped["image"].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        *((np.zeros(x, np.uint8), f"uint8 {x}") for x in ((9, 9), (9, 9, 1), (9, 9, 4), (0, 0, 3))),
        (np.zeros((2, 9, 9, 3)), "float64 (2, 9, 9, 3)"),
        (np.zeros((9, 9, 3), bool), "bool (9, 9, 3)"),
        (Image.new("RGB", (9, 9)), "Image"),
        ("a.jpg", "str"),
    ],
)
def test_bad_images(cfg, image, found):
    """The error names shape and type; an empty batch is not an error."""
    save(cfg)
    predictor = LibraPredictor(cfg)
    for images in (image, [np.zeros((9, 9, 3)), image]):
        with pytest.raises(ArgumentError) as error:
            predictor(images)
        rule = "use an array of shape (height, width, 3), BGR, usually of type uint8, or a list"
        assert str(error.value).startswith(f"image is {found!r}: {rule} of them; ")
    assert predictor([]) == []


@pytest.mark.parametrize(
    ("format", "num_model", "num_image", "expected", "refused"),
    [
        ("BGR", 4, 4, [10, 20, 30, 0], bool),
        ("RGB", 4, 4, [30, 20, 10, 0], bool),
        ("RGB", 3, 3, [30, 20, 10], bool),
        ("L", 1, 3, [22], np.float32),
    ],
)
def test_other_channels(cfg, format, num_model, num_image, expected, refused):
    """Depth as a fourth one; grayscale, to which BGR is converted."""
    cfg.INPUT.FORMAT = format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * num_model, [1.0] * num_model
    save(cfg)
    predictor, seen = LibraPredictor(cfg), []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    image = np.full((9, 9, num_image), [10, 20, 30, 0][:num_image], np.uint8)
    assert predictor(image)["instances"].image_size == (9, 9)
    assert seen[0]["image"][:, 0, 0].tolist() == expected
    if format != "L":
        predictor(image.astype(np.uint16))
        assert seen[1]["image"][:, 0, 0].tolist() == expected
    shape = rf"9, 9, {num_image}\)'.* \(height, width, {num_image}\)"
    with pytest.raises(ArgumentError, match=rf"{np.dtype(refused)} \({shape}"):
        predictor(image.astype(refused))


@pytest.mark.parametrize("amp", [True, False])
def test_precision(cfg, amp):
    """Mixed if the config says so."""
    cfg.SOLVER.AMP.ENABLED = amp
    save(cfg)
    predictor, seen = LibraPredictor(cfg), []
    cfg.SOLVER.AMP.ENABLED = not amp  # later changes have no effect
    note = lambda *args: seen.append(torch.is_autocast_enabled("cpu"))  # noqa: E731
    predictor.model.register_forward_pre_hook(note)
    predictor(np.zeros((48, 64, 3), np.uint8))
    assert seen == [amp]


@pytest.mark.parametrize(
    ("run", "names"),
    [({LEARNED: ["a", "b"]}, ["a", "b"]), ({LEARNED: ["x", "y"]}, ["x", "y"]), (None, ["x", "y"])],
)
def test_class_names(cfg, run, names):
    """Those that the checkpoint has, else those of the dataset."""
    cfg.DATASETS.TEST = ("test_predictor", "another")
    metadata = MetadataCatalog.get("test_predictor")
    metadata.thing_classes = ["x", "y"]
    save(cfg, **({} if run is None else {"run": run}))
    predictor = LibraPredictor(cfg)
    assert predictor.metadata.thing_classes == names
    assert (predictor.metadata is metadata) == (names == ["x", "y"])
    assert metadata.thing_classes == ["x", "y"]
