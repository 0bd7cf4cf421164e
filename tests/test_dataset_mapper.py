# SPDX-License-Identifier: Apache-2.0
"""The input of a model for an image of 3 x 2 pixels."""

import copy

import numpy as np
import pytest
import torch
from conftest import demo_cfg
from omegaconf import OmegaConf
from PIL import Image

from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.structures import BoxMode

from libra_d2.config import make_recipe
from libra_d2.data import LibraDatasetMapper, pixels
from libra_d2.errors import InputError

RED = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)


@pytest.fixture
def record(tmp_path):
    """An image with two objects and a crowd, three proposals and a segmentation map."""
    Image.fromarray(np.stack([RED, RED + 10, RED + 20], axis=2)).save(tmp_path / "a.png")
    Image.fromarray(RED.astype(np.uint16)).save(tmp_path / "map.png")
    boxes = [[0, 0, 1, 1], [1, 0.5, 1.5, 1], [0, 0, 3, 2]]
    polygons = [[[x, 0, x + 1, 0, x + 1, 2]] for x, *_ in boxes]
    objects = [
        {"bbox": b, "bbox_mode": 1, "category_id": i, "iscrowd": i // 2, "segmentation": p}
        for i, (b, p) in enumerate(zip(boxes, polygons))
    ]
    return {
        **{"file_name": str(tmp_path / "a.png"), "image_id": 7, "height": 2, "width": 3},
        **{"sem_seg_file_name": str(tmp_path / "map.png"), "annotations": objects},
        "proposal_boxes": np.array([[0, 0, 2, 1], [1, 1, 3, 2], [0, 0, 1, 1.0]]),
        "proposal_objectness_logits": np.array([3.0, 2, 1]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }


def mapper(*augmentations, **kwargs):
    arguments = {"is_train": True, "augmentations": augmentations, "image_format": "BGR"}
    return LibraDatasetMapper(**{**arguments, **kwargs})


def test_training(record):
    """Everything is flipped; crowds and masks are left out; the record is not modified."""
    before, red = copy.deepcopy(record), RED[:, ::-1]
    mapped = mapper(T.HFlipTransform(3), precomputed_proposal_topk=2)(record)
    np.testing.assert_equal(record, before)
    assert mapped["image"].tolist() == [(red + 20).tolist(), (red + 10).tolist(), red.tolist()]
    assert (mapped["image"].dtype, mapped["image"].is_contiguous()) == (torch.uint8, True)
    assert mapped["sem_seg"].tolist() == red.tolist()
    assert mapped["sem_seg"].dtype == torch.int64
    proposals, instances = mapped["proposals"], mapped["instances"]
    assert proposals.proposal_boxes.tensor.tolist() == [[1, 0, 3, 1], [0, 1, 2, 2]]
    assert proposals.objectness_logits.tolist() == [3, 2]
    assert instances.gt_boxes.tensor.tolist() == [[2, 0, 3, 1], [0.5, 0.5, 2, 1.5]]
    assert instances.gt_classes.tolist() == [0, 1]
    assert instances.image_size == proposals.image_size == (2, 3)
    assert not instances.has("gt_masks")
    keys = {"file_name", "image_id", "height", "width", "image", "sem_seg", "proposals"}
    assert mapped.keys() == {*keys, "instances"}


def test_resized(record):
    """Boxes, masks and keypoints are scaled; sizes are (height, width) of the new image."""
    mapped = mapper(T.ResizeTransform(2, 3, 3, 9), use_instance_mask=True)(record)
    assert mapped["image"].shape == (3, 3, 9)
    assert mapped["instances"].image_size == (3, 9)
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[0, 0, 3, 1.5], [3, 0.75, 7.5, 2.25]]
    assert mapped["instances"].gt_masks.polygons[1][0].tolist() == [3, 0, 6, 0, 6, 3]
    assert (mapped["height"], mapped["width"], "proposals" in mapped) == (2, 3, False)
    for annotation in record["annotations"]:
        annotation["keypoints"] = [1, 0.5, 2]
    instances = mapper(T.ResizeTransform(2, 3, 3, 9), use_keypoint=True)(record)["instances"]
    assert instances.gt_keypoints.tensor.tolist() == 2 * [[[3, 0.75, 2]]]


@pytest.mark.parametrize("mode", [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS])
@pytest.mark.parametrize("kind", [int, float])
def test_boxes(record, kind, mode):
    """Boxes of integers are not rounded; boxes alone are Detectron2's, to the bit."""
    boxes = [[0, 0, 1, 2], [2, 1, 3, 2], [1, 0, 3, 1.7], [3, 0, 8, 2]]  # the last one is outside
    boxes = BoxMode.convert(torch.tensor(boxes), BoxMode.XYXY_ABS, mode).tolist()
    objects = [
        {"bbox": [kind(x) for x in box], "bbox_mode": mode, "category_id": i}
        for i, box in enumerate(boxes)
    ]
    record["annotations"] = [*objects, {**objects[0], "iscrowd": 1}]
    resize = (T.ResizeTransform(2, 3, 3, 5), T.HFlipTransform(5))
    found = mapper(*resize)(record)["instances"]
    arguments = {"is_train": True, "augmentations": resize, "image_format": "BGR"}
    for annotation in record["annotations"]:
        annotation["bbox"] = list(map(float, annotation["bbox"]))
    expected = DatasetMapper(**arguments)(record)["instances"]
    assert found.gt_boxes.tensor[0].tolist() == [pytest.approx(10 / 3), 0, 5, 3]
    assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
    assert found.gt_boxes.tensor.dtype == torch.float32
    assert found.gt_classes.tolist() == expected.gt_classes.tolist() == [0, 1, 2]
    assert found.image_size == expected.image_size
    assert found.get_fields().keys() == expected.get_fields().keys()
    record["annotations"] = record["annotations"][-1:]
    assert len(mapper(*resize)(record)["instances"]) == 0


@pytest.mark.parametrize("has_opencv", [True, False])
def test_pixels(has_opencv, monkeypatch):
    """Planes of images and of mirrored views; other numbers of channels and types."""
    if not has_opencv:
        monkeypatch.setattr(pixels, "_opencv", lambda: None)
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    more = (image[..., :2], image.reshape(2, 3, 4), image / 2)
    for view in (image, image[:, ::-1], image[::-1], image[:, 1:3], *more):
        planes = pixels.to_planes(view)
        assert planes.flags.c_contiguous
        assert np.array_equal(planes, np.stack([view[..., i] for i in range(view.shape[2])]))
    assert np.array_equal(pixels.swap_channels(image), image[:, :, ::-1])


def test_evaluation(record):
    """No ground truth except the segmentation map."""
    mapped = mapper(is_train=False, precomputed_proposal_topk=3)(record)
    assert not mapped.keys() & {"annotations", "instances"}
    assert len(mapped["proposals"]) == 3
    broken = {**record, "sem_seg_file_name": __file__}
    with pytest.raises(InputError, match=f"^{__file__}: the image cannot be used: it has no known"):
        mapper()(broken)
    del record["annotations"], record["sem_seg_file_name"]
    assert not mapper()(record).keys() & {"annotations", "instances", "sem_seg"}
    message = r"a.png: the image cannot be used: Mismatched .* got \(3, 2\), expect \(2, 2\)"
    with pytest.raises(InputError, match=message):
        mapper()({**record, "width": 2})


def lazy_recipe(**mappers):
    """Recipe of a LazyConfig with mappers for "train" and "test"."""
    loaders = {split: {"mapper": node} for split, node in mappers.items()}
    return make_recipe(OmegaConf.create({"model": L(ShapeSpec)(), "dataloader": loaders}))


def test_lazy_config(record):
    """Each split has its mapper; Detectron2's class is replaced, others are kept."""

    class Other(DatasetMapper):
        pass

    flip = L(T.HFlipTransform)(width=3)
    recipe = lazy_recipe(
        train=L(DatasetMapper)(is_train=True, augmentations=[flip], image_format="BGR"),
        test=L(Other)(is_train=False, augmentations=[], image_format="RGB"),
    )
    train, test = recipe.build_mapper(True), recipe.build_mapper(False)
    assert (type(train), type(test)) == (LibraDatasetMapper, Other)
    assert train(record)["image"][2].tolist() == RED[:, ::-1].tolist()
    assert test(record)["image"][0].tolist() == RED.tolist()
    assert "instances" in train(record)
    replaced = recipe.build_mapper(True, augmentations=[])
    assert replaced(record)["image"][2].tolist() == RED.tolist()
    recipe.image_format = "BGR"
    assert recipe.build_mapper(False)(record)["image"][2].tolist() == RED.tolist()
    assert LibraDatasetMapper(demo_cfg()).is_train
    assert [type(a) for a in recipe.build_augmentations(True)] == [T.HFlipTransform]
    assert recipe.build_augmentations(False) == []
    lacking = lazy_recipe(train=recipe.config.dataloader.train.mapper)
    augmented = make_recipe(demo_cfg(INPUT__FORMAT="RGB")).build_mapper(True, augmentations=[])
    assert augmented(record)["image"][0].tolist() == RED.tolist()
    for split, without in (("test", lacking), ("train", lazy_recipe())):
        for place, name in (("mapper", "mapper"), ("mapper.augmentations", "augmentations")):
            with pytest.raises(InputError, match=f"^dataloader.{split}.{place}: missing in"):
                getattr(without, f"build_{name}")(split == "train")
