# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image, ImageDraw
from test_coco_json import check_images

from libra_d2.data.coco_json import read_coco_json
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
    for name, seed, number in (("a", 0, 2), ("b", 0, 9), ("c", 1, 9), ("d", 1, 9)):
        make_synthetic_dataset(str(tmp_path / name), num_images=number, size=32, seed=seed)
    a, b, c, d = (content(tmp_path / name) for name in "abcd")
    assert a["000001.jpg"] == b["000001.jpg"]
    assert c == d
    assert len({*b.values(), *c.values()}) == len(b) + len(c)


def test_objects(tmp_path):
    """
    Tight boxes around disjoint visible parts, of all classes and of widely different sizes, each in
    the shape of its class and in a color that stands out.
    """
    arguments = {"num_images": 60, "seed": 5, "classes": CLASSES, "image_format": "png"}
    dataset = make_synthetic_dataset(str(tmp_path / "a"), **arguments)
    sizes = np.sqrt([a["bbox"][2] * a["bbox"][3] for a in dataset["annotations"]])
    small, middle, large = np.quantile(sizes, [0.05, 0.5, 0.95])
    assert small < 20 < 25 < middle < 40 < 60 < large <= sizes.max() < 2 * 0.32 * 160
    shares, contrasts = {name: [] for name in CLASSES}, []
    for image in dataset["images"]:
        with Image.open(tmp_path / "a/images" / image["file_name"]) as file:
            pixels, covered = np.asarray(file).astype(float), np.zeros((160, 160), int)
        for a in [a for a in dataset["annotations"] if a["image_id"] == image["id"]]:
            x, y, w, h = a["bbox"]
            mask = mask_utils.decode(a["segmentation"]).astype(bool)
            covered += mask
            assert a["area"] == mask.sum() == mask[y : y + h, x : x + w].sum() >= 12 * 0.4
            assert all(mask[y : y + h, [x, x + w - 1]].any(axis=0))
            assert all(mask[[y, y + h - 1], x : x + w].any(axis=1))
            shares[CLASSES[a["category_id"] - 1]].append(a["area"] / (w * h))
            around = np.zeros_like(mask)
            around[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4] = True
            difference = np.median(pixels[mask], axis=0)
            difference -= np.median(pixels[around & ~mask], axis=0)
            contrasts.append(np.abs(difference).max())
        assert covered.max() <= 1
    # Of the area of the box, for objects of which little is hidden.
    found = {name: np.quantile(x, 0.75) for name, x in shares.items()}
    assert found == pytest.approx(dict(zip(CLASSES, (0.87, 0.53, 0.8, 0.42, 0.42, 0.53))), abs=0.04)
    assert np.quantile(contrasts, 0.1) > 70


def test_hidden_objects(tmp_path, monkeypatch):
    """Of 4000 pixels, two others hide 1000 and 1200; with a third one, less than 40% were left."""
    sides = [(10, 90), (10, 30), (66, 90), (40, 50), *[(0, 0)] * 5]  # columns of 50 pixels
    boxes = (tuple(4 * x for x in (a, 10, b, 60)) for a, b in sides)
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "polygon", lambda draw, _, fill: draw.rectangle(next(boxes), fill)
    )
    dataset = make_synthetic_dataset(str(tmp_path / "a"), num_images=1, seed=2)
    assert [x["area"] for x in dataset["annotations"]] == [1800, 1000, 1200]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 0}, "num_images must be from 1"),
        (
            {"num_images": 10**21},
            "num_images must be from 1 to 1000000, got 1000000000000000000000",
        ),
        ({"size": 8}, "size must be from 32"),
        ({"classes": ()}, "classes must be different ones of"),
        ({"classes": ("star", "star")}, "got .'star', 'star'"),
        ({"classes": ("star", "disk")}, "got .'star', 'disk'"),
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
    arguments = [str(target), "--num-images", "2", "--size", "48"]
    main([*arguments, "--classes", "star", "square"])
    assert "2 images" in capsys.readouterr().out
    dataset = json.loads((target / "instances.json").read_text())
    assert [c["name"] for c in dataset["categories"]] == ["star", "square"]
    assert {a["category_id"] for a in dataset["annotations"]} == {1, 2}
    assert [p.name for p in target.parent.iterdir()] == ["er"]  # nothing unfinished is left
    # It replaces the other one, through a link as well.
    (tmp_path / "link").symlink_to("deep/er")
    for seed, path in (("1", target), ("2", tmp_path / "link")):
        main([str(path), *arguments[1:], "--seed", seed, "--image-format", "png"])
        assert sorted(p.name for p in (target / "images").iterdir()) == ["000000.png", "000001.png"]
        assert f"seed {seed}" in (target / "instances.json").read_text()
        assert [p.name for p in target.parent.iterdir()] == ["er"]
    (tmp_path / "empty").mkdir()
    main([str(tmp_path / "empty"), *arguments[1:]])
    assert len(content(tmp_path / "empty")) == 3


NOT_A_DATASET = "holds files that this program has not written, which would be deleted"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": ""}, NOT_A_DATASET),
        ({"instances.json": '{"info": {}}', "images/a.jpg": ""}, NOT_A_DATASET),
        ({"instances.json": "{cut short"}, NOT_A_DATASET),
        ({"images/photo.jpg": ""}, NOT_A_DATASET),
        ({"instances.json": "OURS", "notes.txt": ""}, NOT_A_DATASET),
        ({"instances.json": "OURS", "images/1.jpg": "", "images/photo.jpg": ""}, NOT_A_DATASET),
        ({"instances.json": "OURS", "images/1.jpg/photo.jpg": ""}, NOT_A_DATASET),
        (None, NOT_A_DATASET),
    ],
)
def test_nothing_is_lost(files, message, tmp_path, refused):
    """A file, or a directory with anything else in it, is left alone."""
    target = tmp_path / "a"
    if files is None:
        target.write_text("a file")
    for name, text in (files or {}).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        info = {"description": "libra_d2 synthetic shapes, seed 0"}
        ours = {"info": info, "images": [{"file_name": "1.jpg"}]}
        (target / name).write_text(text.replace("OURS", json.dumps(ours)))
    before = content(tmp_path)
    assert message in refused(main, [str(target), "--num-images", "1", "--size", "48"])
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--size", "1"], "error: size must be from 32"),
        (["file/a"], "error: output_dir: "),
        (["file/deep/a"], "error: output_dir: "),
    ],
)
def test_errors(arguments, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (line,) = refused(main, arguments).splitlines()
    assert line.startswith(message)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
