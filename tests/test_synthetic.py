# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from PIL import Image

from libra_d2.data.coco_json import check_images, read_coco_json
from libra_d2.data.synthetic import CLASSES, main, make_synthetic_dataset


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_is_valid_coco(synthetic):
    dataset, changes = read_coco_json(str(synthetic / "instances.json"))
    assert not changes
    check_images(dataset, str(synthetic / "images"), "instances.json")
    assert [c["name"] for c in dataset["categories"]] == list(CLASSES[:4])
    assert len(dataset["images"]) == 12


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_synthetic_dataset(str(tmp_path / name), num_images=3, size=64, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_image_depends_on_seed_and_index_only(tmp_path):
    make_synthetic_dataset(str(tmp_path / "a"), num_images=2, size=64)
    make_synthetic_dataset(str(tmp_path / "b"), num_images=4, size=64)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert a["000001.jpg"] == b["000001.jpg"]


def test_is_not_trivial(tmp_path):
    """Widely different scales, overlap, and every class."""
    dataset = make_synthetic_dataset(str(tmp_path / "a"), num_images=60, size=160, num_classes=6)
    areas = np.array([a["bbox"][2] * a["bbox"][3] for a in dataset["annotations"]])
    assert np.quantile(areas, 0.95) / np.quantile(areas, 0.05) > 12
    assert {a["category_id"] for a in dataset["annotations"]} == set(range(1, 7))
    overlapping = 0
    for i in range(1, 61):
        boxes = np.array([a["bbox"] for a in dataset["annotations"] if a["image_id"] == i])
        low, high = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
        size = np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1))
        overlapping += ((size > 0).all(axis=2).sum(axis=1) > 1).sum()
    assert overlapping > 0.2 * len(areas)


def test_boxes_are_possible(tmp_path):
    """Within the image, and large enough for the visible part of their object."""
    dataset = make_synthetic_dataset(str(tmp_path / "a"), num_images=40, seed=5, image_format="png")
    for a in dataset["annotations"]:
        x, y, w, h = a["bbox"]
        assert 0 < a["area"] <= w * h
        assert (x >= 0, y >= 0, x + w <= 160, y + h <= 160) == (True,) * 4
    assert Image.open(tmp_path / "a/images/000000.png").size == (160, 160)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 0}, "num_images must be from 1"),
        ({"size": 8}, "size must be from 32"),
        ({"num_classes": 7}, "num_classes must be from 1 to 6, got 7"),
        ({"seed": -1}, "seed must be from 0"),
        ({"image_format": "gif"}, "image_format must be"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic_dataset(str(tmp_path / "a"), **{"num_images": 1, **kwargs})
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, capsys):
    target = tmp_path / "deep/er"
    arguments = [str(target), "--num-images", "2", "--size", "48", "--num-classes", "2"]
    assert main(arguments) == 0
    assert "2 images" in capsys.readouterr().out
    assert len(json.loads((target / "instances.json").read_text())["categories"]) == 2
    assert [p.name for p in target.parent.iterdir()] == ["er"]  # nothing unfinished is left
    assert main([str(target), "--size", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: size must be")
