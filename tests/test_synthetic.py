# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image

from libra_d2.data.coco_json import check_images, read_coco_json
from libra_d2.tools.make_synthetic_dataset import CLASSES, main, make_synthetic_dataset


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_is_valid_coco(synthetic):
    dataset, changes = read_coco_json(str(synthetic / "instances.json"), "bitmask")
    assert not changes
    check_images(dataset, str(synthetic / "images"), "instances.json")
    names = ["square", "triangle", "circle", "star"]
    assert dataset["categories"] == [{"id": i, "name": n} for i, n in enumerate(names, 1)]
    assert dataset["images"] == [
        {"id": i + 1, "file_name": f"{i:06d}.jpg", "width": 96, "height": 96} for i in range(12)
    ]
    assert [a["id"] for a in dataset["annotations"]] == [*range(1, len(dataset["annotations"]) + 1)]
    assert dataset["info"]["description"].endswith("seed 3")


def test_image_depends_on_seed_and_index_only(tmp_path):
    """The same bytes again; none of one seed is among those of the next. Objects can be seen."""
    for name, seed, number in (("a", 0, 2), ("b", 0, 60), ("c", 1, 60), ("d", 1, 60)):
        arguments = {"num_images": number, "size": 32, "seed": seed}
        dataset = make_synthetic_dataset(str(tmp_path / name), **arguments)
    assert 5 < min(a["area"] for a in dataset["annotations"]) < 20
    a, b, c, d = (content(tmp_path / name) for name in "abcd")
    assert a["000001.jpg"] == b["000001.jpg"]
    assert c == d
    assert len({*b.values(), *c.values()}) == len(b) + len(c)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A dataset of all classes, and the folder of its images."""
    folder = tmp_path_factory.mktemp("shapes") / "a"
    arguments = {"num_images": 60, "seed": 5, "num_classes": 6, "image_format": "png"}
    return make_synthetic_dataset(str(folder), **arguments), folder / "images"


def test_is_not_trivial(shapes):
    """Widely different scales, overlap, and every class."""
    dataset, _ = shapes
    sizes = np.sqrt([a["bbox"][2] * a["bbox"][3] for a in dataset["annotations"]])
    small, middle, large = np.quantile(sizes, [0.05, 0.5, 0.95])
    assert small < 20 < 25 < middle < 40 < 60 < large
    assert sizes.max() < 2 * 0.32 * 160
    assert {a["category_id"] for a in dataset["annotations"]} == set(range(1, 7))
    overlapping, numbers = 0, set()
    for i in range(1, 61):
        boxes = np.array([a["bbox"] for a in dataset["annotations"] if a["image_id"] == i])
        numbers.add(len(boxes))
        boxes = boxes.reshape(-1, 4)
        low, high = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
        size = np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1))
        overlapping += ((size > 0).all(axis=2).sum(axis=1) > 1).sum()
    assert overlapping > 0.2 * len(sizes)
    assert {1, 2, 3, 4, 5, 6, 7} < numbers <= set(range(10))


def test_objects(shapes):
    """
    Tight boxes around what is visible of each, which no other has, in a color that stands out and
    is often that of the class, and in its shape.
    """
    dataset, folder = shapes
    # Of the area of the box, where little of the object is hidden.
    share = dict(zip(CLASSES, (0.87, 0.53, 0.8, 0.42, 0.42, 0.53)))
    shares, hues, half, contrasts = *({n: [] for n in CLASSES} for _ in range(3)), []
    for image in dataset["images"]:
        with Image.open(folder / image["file_name"]) as file:
            assert file.size == (160, 160)
            hue = np.asarray(file.convert("HSV"))[:, :, 0] / 256
            pixels, covered = np.asarray(file).astype(float), np.zeros((160, 160), int)
        for a in [a for a in dataset["annotations"] if a["image_id"] == image["id"]]:
            name, (x, y, w, h) = CLASSES[a["category_id"] - 1], a["bbox"]
            mask = mask_utils.decode(a["segmentation"]).astype(bool)
            covered += mask
            assert a["area"] == mask.sum() == mask[y : y + h, x : x + w].sum() >= 12 * 0.4
            assert all(mask[y : y + h, [x, x + w - 1]].any(axis=0))
            assert all(mask[[y, y + h - 1], x : x + w].any(axis=1))
            shares[name].append(a["area"] / (w * h))
            hues[name].append(np.median(hue[mask]))
            part = mask[:, x + w // 2 :] if name == "arrow" else mask[y + h // 2 :]
            half[name].append(w / h if name == "circle" else part.sum() / a["area"])
            around = ~mask
            around[: max(y - 4, 0)] = around[y + h + 4 :] = False
            around[:, : max(x - 4, 0)] = around[:, x + w + 4 :] = False
            difference = np.median(pixels[mask], axis=0) - np.median(pixels[around], axis=0)
            contrasts.append(np.abs(difference).max())
        assert covered.max() <= 1
    for i, name in enumerate(CLASSES):
        assert np.quantile(shares[name], 0.75) == pytest.approx(share[name], abs=0.04), name
        typical = np.abs((np.array(hues[name]) - i / 6 + 0.5) % 1 - 0.5) < 0.06
        assert 0.5 < typical.mean() < 0.9, name
    # The tip of a triangle is above, that of an arrow on the right; circles are wide.
    tips, arrows, circles = (np.median(half[n]) for n in ("triangle", "arrow", "circle"))
    assert (tips > 0.6, arrows > 0.5, 1.05 < circles < 1.3) == (True,) * 3, half
    assert np.quantile(contrasts, 0.1) > 70
    assert np.median(contrasts) < 140


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
    (record, _) = json.loads((target / "instances.json").read_text())["images"]
    assert record == {"id": 1, "file_name": "000000.jpg", "width": 48, "height": 48}
    assert main([*arguments[:3], *("--size", "48", "--seed", "1", "--image-format", "png")]) == 0
    assert len(json.loads((target / "instances.json").read_text())["categories"]) == 4
    assert sorted(p.name for p in (target / "images").iterdir()) == ["000000.png", "000001.png"]
    capsys.readouterr()
    assert main([str(target), "--size", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: size must be")
