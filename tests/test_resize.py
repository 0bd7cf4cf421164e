# SPDX-License-Identifier: Apache-2.0
"""From the image file to the network's input: bit for bit as in mmdetection's pipeline."""

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, load_cfg, reference_config
from PIL import Image

from detectron2.data import transforms as T
from detectron2.modeling import build_model

from libra_d2.data import LibraDatasetMapper, build_augmentation
from libra_d2.data.resize import OpenCVResizeShortestEdge, OpenCVResizeTransform, with_interpolation
from libra_d2.engine import LibraPredictor

pytestmark = pytest.mark.rounding

CONFIG = ROOT / "configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml"
SIZES = [  # height, width
    *((427, 640), (640, 427), (800, 1333), (799, 1333), (801, 1334), (1334, 799), (1800, 2400)),
    *((2400, 1351), (1000, 61), (3, 5)),
]


def photograph(size, seed=0):
    """(H, W, 3) uint8 with edges and noise, on which interpolations differ."""
    rng = np.random.default_rng(seed)
    height, width = size
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    image[height // 3 :, width // 2 :] = 255 - image[height // 3 :, width // 2 :]
    return (image + rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def both(mmdet):
    """Config and model of this project, and the reference's config and preprocessor."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    reference = reference_config(mmdet, "libra-faster-rcnn_r50")
    cfg = load_cfg(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    return cfg, build_model(cfg), reference, MODELS.build(reference.model.data_preprocessor)


@pytest.mark.parametrize(
    ("size", "orientation"), [*((x, 1) for x in SIZES), *(((180, 247), i) for i in range(2, 9))]
)
def test_network_input(both, tmp_path, size, orientation):
    from mmdet.registry import TRANSFORMS

    cfg, model, reference, preprocessor = both
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photograph(size)).save(tmp_path / "a.jpg", quality=90, exif=exif)
    height, width = size[::-1] if orientation >= 5 else size
    record = {"file_name": str(tmp_path / "a.jpg"), "height": height, "width": width}
    ours = model.preprocess_image([LibraDatasetMapper(cfg, is_train=False)(record)])
    data = {"img_path": str(tmp_path / "a.jpg"), "img_id": 1}
    for transform in reference.test_pipeline:
        if transform.type != "LoadAnnotations":
            data = TRANSFORMS.build(transform)(data)
    theirs = preprocessor({name: [value] for name, value in data.items()})
    assert ours.tensor.dtype == theirs["inputs"].dtype == torch.float32
    assert ours.image_sizes == [theirs["data_samples"][0].img_shape]
    assert torch.equal(ours.tensor, theirs["inputs"])


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_values(channels, dtype):
    """Bilinear between the centers of four pixels, also when the image shrinks."""

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


def test_segmentation_takes_the_nearest_pixel():
    labels = np.random.default_rng(0).choice(np.array([0, 90, 200], np.uint8), (40, 40))
    resized = OpenCVResizeTransform(40, 40, 13, 17).apply_segmentation(labels)
    expected = T.ResizeTransform(40, 40, 13, 17).apply_segmentation(labels)
    assert np.array_equal(resized, expected)


@pytest.mark.parametrize("interpolation", ["pillow", "opencv"])
def test_key(interpolation, tmp_path):
    """MODEL.LIBRA.INPUT.INTERPOLATION applies to training, evaluation and the predictor."""
    cfg = demo_cfg(MODEL__LIBRA__INPUT__INTERPOLATION=interpolation, INPUT__CROP__ENABLED=True)
    expected = {"pillow": T.ResizeShortestEdge, "opencv": OpenCVResizeShortestEdge}[interpolation]
    crop, train, flip = LibraDatasetMapper(cfg, is_train=True).augmentations.augs
    (test,) = build_augmentation(cfg, is_train=False)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    assert [type(x) for x in (train, test, LibraPredictor(cfg).aug)] == [expected] * 3
    assert (type(crop), type(flip)) == (T.RandomCrop, T.RandomFlip)
    assert train.short_edge_length == cfg.INPUT.MIN_SIZE_TRAIN
    assert test.short_edge_length == (cfg.INPUT.MIN_SIZE_TEST,) * 2


@pytest.mark.parametrize(
    ("sampling", "limit", "expected"),
    [
        ("choice", 123, {(120, 96), (123, 98)}),  # 99 x 123.75 would be too large
        ("range", 200, {(120, 96), (121, 97), (123, 98), (124, 99)}),
    ],
)
def test_sampling(sampling, limit, expected):
    """Lengths are drawn as in the config; a length of 0 keeps the size."""
    detectron2s = T.ResizeShortestEdge((96, 99), limit, sampling)
    (resize,) = with_interpolation([detectron2s], "opencv")
    np.random.seed(0)
    image = np.zeros((50, 40, 3), np.uint8)
    sizes = {(t.new_h, t.new_w) for t in (resize.get_transform(image) for _ in range(60))}
    assert sizes == expected
    assert isinstance(OpenCVResizeShortestEdge(0).get_transform(image), T.NoOpTransform)


def test_with_interpolation():
    """Subclasses of Detectron2's augmentations are kept; other interpolations are refused."""
    own = [type("Own", (T.ResizeShortestEdge,), {})(96), T.Resize((3, 4))]
    assert with_interpolation(own, "opencv") == own
    with pytest.raises(ValueError, match="interpolation is 'area': use one of"):
        with_interpolation([], "area")
