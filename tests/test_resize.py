# SPDX-License-Identifier: Apache-2.0
"""From the image file to the network's input, beside mmdetection's own pipeline: bit by bit."""

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, load_cfg, reference_config
from PIL import Image

from detectron2.data import transforms as T
from detectron2.modeling import build_model

from libra_d2.config import check_values, make_recipe
from libra_d2.data import LibraDatasetMapper, build_augmentation
from libra_d2.data.resize import (
    OpenCVResizeShortestEdge,
    OpenCVResizeTransform,
    with_interpolation,
)
from libra_d2.engine import LibraPredictor
from libra_d2.errors import InputError

CONFIG = ROOT / "configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml"
SIZES = [  # height, width
    *((480, 640), (427, 640), (640, 427), (800, 1333), (799, 1333), (800, 1332), (801, 1334)),
    *((1333, 800), (1334, 799), (900, 1200), (1800, 2400), (2400, 1351), (100, 1000)),
    *((1000, 61), (3, 5)),
]


def photograph(size, seed=0):
    """(H, W, 3) uint8 with edges and noise, which no interpolation treats alike."""
    rng = np.random.default_rng(seed)
    height, width = size
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    image[height // 3 :, width // 2 :] = 255 - image[height // 3 :, width // 2 :]
    return (image + rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def both(mmdet):
    """The published model, which normalizes and pads, and the config of the reference."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    reference = reference_config(mmdet, "libra-faster-rcnn_r50")
    cfg = load_cfg(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    return cfg, build_model(cfg), reference, MODELS.build(reference.model.data_preprocessor)


def their_sample(pipeline, path, **known):
    from mmdet.registry import TRANSFORMS

    data = {"img_path": str(path), "img_id": 1, **known}
    for transform in pipeline:
        data = TRANSFORMS.build(transform)(data)
    return data


def assert_same_input(both, path):
    """Of the networks, for the image in ``path``."""
    cfg, model, reference, preprocessor = both
    with Image.open(path) as image:
        width, height = image.size[:: -1 if image.getexif().get(0x0112, 1) >= 5 else 1]
    record = {"file_name": str(path), "image_id": 1, "height": height, "width": width}
    mapped = LibraDatasetMapper(cfg, is_train=False)(record)
    ours = model.preprocess_image([mapped])
    pipeline = [t for t in reference.test_pipeline if t.type != "LoadAnnotations"]
    data = their_sample(pipeline, path)
    theirs = preprocessor({k: [v] for k, v in data.items()})
    assert ours.tensor.dtype == theirs["inputs"].dtype == torch.float32
    assert ours.image_sizes == [theirs["data_samples"][0].img_shape]
    assert torch.equal(ours.tensor, theirs["inputs"])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_sizes(both, tmp_path, size):
    Image.fromarray(photograph(size)).save(tmp_path / "a.jpg", quality=90)
    assert_same_input(both, tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["gray.jpg", "gray.png", "palette.png", "bitmap.bmp"])
def test_kinds(both, tmp_path, kind):
    image = Image.fromarray(photograph((180, 247)))
    modes = {"gray": "L", "palette": "P"}
    image.convert(modes.get(kind.split(".")[0], "RGB")).save(tmp_path / kind)
    assert_same_input(both, tmp_path / kind)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(both, tmp_path, orientation):
    """Written by a camera: turned and mirrored alike."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photograph((180, 247))).save(tmp_path / "a.jpg", exif=exif)
    assert_same_input(both, tmp_path / "a.jpg")


def test_training(both, tmp_path):
    """Image and boxes, resized and flipped; the boxes to the last digit of a float32."""
    from mmdet.structures.bbox import HorizontalBoxes

    cfg, _, reference, _ = both
    height, width = 451, 633
    Image.fromarray(photograph((height, width))).save(tmp_path / "a.jpg")
    boxes = np.array([[10.5, 20.25, 100, 200], [0, 0, 633, 451], [300.1, 7.7, 301.9, 440]])
    (resize,) = build_augmentation(cfg, is_train=True)[:1]
    assert type(resize) is OpenCVResizeShortestEdge
    mapper = LibraDatasetMapper(
        is_train=True, augmentations=[resize, T.RandomFlip(prob=1.0)], image_format="RGB"
    )
    annotations = [{"bbox": b, "bbox_mode": 0, "category_id": 0, "iscrowd": 0} for b in boxes]
    record = {"file_name": str(tmp_path / "a.jpg"), "height": height, "width": width}
    ours = mapper({**record, "annotations": annotations})
    pipeline = [t for t in reference.train_pipeline if t.type != "LoadAnnotations"]
    (flip,) = [t for t in pipeline if t.type == "RandomFlip"]
    pipeline[pipeline.index(flip)] = {**flip, "prob": 1.0}
    load, *rest = pipeline
    data = their_sample([load], tmp_path / "a.jpg")
    data["gt_bboxes"] = HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32))
    data["gt_bboxes_labels"] = np.zeros(3, dtype=np.int64)
    data = their_sample(rest, **{"path": tmp_path / "a.jpg", **data})
    assert torch.equal(ours["image"], data["inputs"].flip(0))
    theirs = data["data_samples"].gt_instances.bboxes.tensor
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours["instances"].gt_boxes.tensor, theirs, rtol=4 * eps, atol=4e-4)


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_values(channels, dtype):
    """Between the centers of four pixels, however many a new one covers."""

    def resize(image, height, width):
        image = np.array(image, dtype)
        if channels is not None:
            image = np.repeat(image[:, :, None], channels, axis=2)
        resized = OpenCVResizeTransform(*image.shape[:2], height, width).apply_image(image)
        assert resized.shape == (height, width, *image.shape[2:])
        assert resized.dtype == dtype
        return (resized if channels is None else resized[:, :, -1]).tolist()

    larger = [[0, 25, 75, 100], [40, 65, 115, 140]]
    assert resize([[0, 100], [40, 140]], 2, 4) == larger
    assert resize([[0, 40], [100, 140]], 4, 2) == np.transpose(larger).tolist()
    # In the middle between the rows; of three columns the one in the middle.
    assert resize([[0, 10, 90, 90, 40, 0], [6, 70, 0, 5, 100, 5]], 1, 2) == [[40, 70]]


@pytest.mark.parametrize(
    ("size", "arguments", "expected"),
    [
        *(((50, 40), (96, 100), (100, 80)), ((50, 42), (100, 119), (119, 100))),
        *(((40, 50), ((60, 60), 10**9), (60, 75)), ((40, 50), (20,), (20, 25))),
    ],
)
def test_shortest_edge(size, arguments, expected):
    """The shorter side is as long as wanted, unless the longer one were too long."""
    transform = OpenCVResizeShortestEdge(*arguments).get_transform(np.zeros((*size, 3), np.uint8))
    assert (transform.h, transform.w, transform.new_h, transform.new_w) == (*size, *expected)
    assert type(transform) is OpenCVResizeTransform


def test_segmentation_takes_the_nearest_pixel():
    labels = np.random.default_rng(0).choice(np.array([0, 90, 200], np.uint8), (40, 40))
    resized = OpenCVResizeTransform(40, 40, 13, 17).apply_segmentation(labels)
    assert set(np.unique(resized)) <= {0, 90, 200}
    expected = T.ResizeTransform(40, 40, 13, 17).apply_segmentation(labels)
    assert np.array_equal(resized, expected)


@pytest.mark.parametrize("interpolation", ["pillow", "opencv"])
def test_key(interpolation, tmp_path):
    """In evaluation, training and the predictor alike; Pillow's is Detectron2's own class."""
    cfg = demo_cfg(MODEL__LIBRA__INPUT__INTERPOLATION=interpolation)
    expected = {"pillow": T.ResizeShortestEdge, "opencv": OpenCVResizeShortestEdge}[interpolation]
    train, test = (build_augmentation(cfg, is_train)[0] for is_train in (True, False))
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    assert [type(x) for x in (train, test, LibraPredictor(cfg).aug)] == [expected] * 3
    assert train.short_edge_length == cfg.INPUT.MIN_SIZE_TRAIN
    assert test.short_edge_length == (cfg.INPUT.MIN_SIZE_TEST,) * 2


@pytest.mark.parametrize(("sampling", "drawn"), [("choice", ()), ("range", [(121, 97)])])
def test_crops_and_several_sizes(sampling, drawn):
    """What Detectron2 does besides is left as it is; lengths are drawn as the config says."""
    cfg = demo_cfg(
        MODEL__LIBRA__INPUT__INTERPOLATION="opencv",
        INPUT__CROP__ENABLED=True,
        **{"INPUT__MIN_SIZE_TRAIN": (96, 99), "INPUT__MAX_SIZE_TRAIN": 123},
        INPUT__MIN_SIZE_TRAIN_SAMPLING=sampling,
    )
    crop, resize, flip = LibraDatasetMapper(cfg, is_train=True).augmentations.augs
    assert (type(crop), type(flip)) == (T.RandomCrop, T.RandomFlip)
    np.random.seed(0)
    image = np.zeros((50, 40, 3), np.uint8)
    sizes = {(t.new_h, t.new_w) for t in (resize.get_transform(image) for _ in range(60))}
    assert sizes == {(120, 96), (123, 98), *drawn}  # 99 x 123.75 would be too large
    assert isinstance(OpenCVResizeShortestEdge(0).get_transform(image), T.NoOpTransform)


def test_own_augmentation():
    """One of the user's is left as it is."""
    own = [type("Own", (T.ResizeShortestEdge,), {})(96), T.Resize((3, 4))]
    assert with_interpolation(own, "opencv") == own


def test_unusable_interpolation(monkeypatch):
    with pytest.raises(ValueError, match="interpolation is 'area': use one of"):
        with_interpolation([], "area")
    recipe = make_recipe(demo_cfg(MODEL__LIBRA__INPUT__INTERPOLATION="area"))
    with pytest.raises(InputError, match="MODEL.LIBRA.INPUT.INTERPOLATION is 'area': use one of"):
        check_values(recipe)
    recipe.interpolation = "opencv"
    check_values(recipe)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="is 'opencv', .* `pip install opencv-python"):
        check_values(recipe)
    recipe.interpolation, recipe.num_pictures = "pillow", 0
    check_values(recipe)
