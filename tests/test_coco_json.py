# SPDX-License-Identifier: Apache-2.0
import copy
import json
import logging
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog

from libra_d2.data import image_checks, register_coco_json
from libra_d2.data.coco_json import COCOEntries, read_categories, read_coco_json
from libra_d2.errors import InputError

DATASET = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 100, "height": 80},
        {"id": 9, "file_name": "b.png", "width": 60, "height": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 20, "bbox": [10, 20, 30, 40]},
        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0, 0, 60, 60]},
    ],
    "categories": [{"id": 20, "name": "cat"}, {"id": 3, "name": "dog"}],
}
for crowd, entry in enumerate(DATASET["annotations"]):
    entry.update(iscrowd=crowd, area=9)


def check_files(*args, **kwargs):
    """All of ImageChecks."""
    with closing(image_checks.ImageChecks(*args, **kwargs)) as checks:
        checks.finish()


def check_images(dataset, root, json_file):
    """The checks of the images of a dataset."""
    names = [image["file_name"] for image in dataset["images"]]
    sizes = np.array([[image["width"], image["height"]] for image in dataset["images"]])
    check_files(names, sizes, root, json_file)


@pytest.fixture
def folder(tmp_path):
    for image in DATASET["images"]:
        size = (image["width"], image["height"])
        Image.new("RGB", size, "red").save(tmp_path / image["file_name"])
    return tmp_path


def write(folder, dataset):
    path = folder / "instances.json"
    path.write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
    return str(path)


def changed(*changes):
    """DATASET with each (key, index, field, value) applied."""
    dataset = copy.deepcopy(DATASET)
    for key, index, field, value in changes:
        dataset[key][index][field] = value
    return dataset


def with_box(box, **fields):
    """DATASET with one more annotation in its first image."""
    dataset = copy.deepcopy(DATASET)
    dataset["annotations"].append({**DATASET["annotations"][0], "id": 3, "bbox": box, **fields})
    return dataset


def test_read_twice(folder):
    """What was changed is counted anew. Images precede annotations, whatever their order."""
    content = dict(reversed(with_box([5, 5, 0, 9]).items()))
    entries = COCOEntries(write(folder, content))
    order = ("categories", "images", "annotations")
    expected = [(key, entry) for key in order for entry in DATASET[key]]
    for _ in range(2):
        assert list(entries) == expected
        assert +entries.changes == {"dropped": 1}


def with_image(name, size):
    """DATASET whose first image has that name and that size."""
    fields = {"file_name": name, "width": size[0], "height": size[1]}
    return changed(*(("images", 0, *field) for field in fields.items()))


def test_register(folder):
    """Good data is used unchanged, and replaces other data under the same name."""
    cache = str(folder / "cache")
    other = changed(("annotations", 0, "bbox", [1, 2, 3, 4]), ("categories", 0, "name", "cow"))
    register_coco_json("test_good", write(folder, other), str(folder), cache)
    path = write(folder, DATASET)
    assert register_coco_json("test_good", path, str(folder), cache) == ["dog", "cat"]  # by id
    metadata = MetadataCatalog.get("test_good").as_dict()
    assert metadata.pop("thing_dataset_id_to_contiguous_id") == {3: 0, 20: 1}
    assert metadata.pop("fingerprint").keys() == {"annotations", "images"}
    assert metadata == {
        **{"name": "test_good", "json_file": path, "image_root": str(folder), "num_images": 2},
        **{"evaluator_type": "coco", "thing_classes": ["dog", "cat"]},
        "thing_colors": [(0, 113, 188), (216, 82, 24)],
    }


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        *(([-0.5, 20, 30.5, 40], [0, 20, 30, 40]), ([10, -0.5, 30, 40.5], [10, 0, 30, 40])),
        *(([70, 20, 30.5, 40], [70, 20, 30, 40]), ([10, 40, 30, 40.5], [10, 40, 30, 40])),
        *(([-9, -8, 999, 999], [0, 0, 100, 80]), ([-0.011, 20, 30, 40], [0, 20, 29.989, 40])),
        *(([10, 20, 90.011, 60], [10, 20, 90, 60]), ([-0.009, 20, 90, 60.009], None)),
        *(([5, 5, 0, 9], []), ([5, 5, 9, 0], []), ([5, 5, 9, -2], []), ([5, 5, -2, 9], [])),
        *(([100, 0, 9, 9], []), ([0, 80, 9, 9], []), ([-9, 5, 9, 9], []), ([5, -9, 9, 9], [])),
        ([99.999, 5, 9, 9], [99.999, 5, pytest.approx(1e-3), 9]),
    ],
)
def test_clipping(folder, box, expected):
    """To an image of 100 x 80, except for rounding errors."""
    dataset, changes = read_coco_json(write(folder, with_box(box)))
    boxes = [annotation["bbox"] for annotation in dataset["annotations"]]
    assert boxes[:2] == [annotation["bbox"] for annotation in DATASET["annotations"]]
    assert boxes[2:] == ([box] if expected is None else [expected] if expected else [])
    assert changes == ({} if expected is None else {"clipped" if expected else "dropped": 1})


@pytest.mark.parametrize(
    ("box", "clipped", "message"),
    [
        ([-10, 70, 30, 40], [[0, 70, 20, 10]], "clipped 1 box that extended beyond the image"),
        ([5, 5, 0, 9], [], "dropped 1 box without an area in the image"),
    ],
)
def test_changed_data(folder, caplog, box, clipped, message):
    """A warning says what was changed. Evaluation reads the changed annotations, too."""
    dataset = with_box(box, iscrowd=None)
    dataset["images"][0]["width"] = 100.0
    path, caplog.handler.level = write(folder, dataset), logging.WARNING
    for _ in range(2):  # it is read only once
        register_coco_json("test_changed", path, str(folder), str(folder / "cache"))
    assert [record.getMessage() for record in caplog.records] == 2 * [
        f"{path}: {message}",
        f"{path}: repaired or filled in: image width of 1, annotation iscrowd of 1",
    ]
    coco = COCO(MetadataCatalog.get("test_changed").json_file)
    kept = [DATASET["annotations"][0]["bbox"], *clipped]
    assert [a["bbox"] for a in coco.loadAnns(coco.getAnnIds(imgIds=7))] == kept
    assert [a["bbox"] for a in DatasetCatalog.get("test_changed")[0]["annotations"]] == kept


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        *(([5, 2**31 - 1], None), ([1, 0], [1, 2]), ([7, 2**31], [1, 2]), ([-1, 7], [1, 2])),
        *((["a", "b"], [1, 2]), ([5, 1.5], [1, 2])),
    ],
)
def test_annotation_ids(folder, ids, expected):
    """All are renumbered if pycocotools cannot use one; ids of dropped boxes do not matter."""
    dataset = with_box([0, 0, 0, 0], id="z" if "a" in ids else 0.5)
    for annotation, id in zip(dataset["annotations"], ids):
        annotation["id"] = id
    dataset, changes = read_coco_json(write(folder, dataset))
    assert [a["id"] for a in dataset["annotations"]] == (expected or ids)
    assert [a["image_id"] for a in dataset["annotations"]] == [7, 9]
    assert changes == {"dropped": 1, **({"annotation id": 2} if expected else {})}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        *((text, "not valid JSON, is") for text in (json.dumps(DATASET)[:200], "", "[" * 10**5)),
        ([], "there is no list 'images'"),
        *(({**DATASET, key: {}}, f"there is no list '{key}'") for key in DATASET),
        *(({**DATASET, key: []}, f"there are no {key}") for key in ("images", "categories")),
        (changed(("images", 1, "file_name", "a.png")), "image ids 7 and 9 have the same file_name"),
        (changed(("categories", 1, "name", "cat")), "category ids 20 and 3 have the same name"),
        (changed(("categories", 1, "id", 20)), "category id 20 occurs more than once"),
        (changed(("annotations", 1, "id", 1)), "annotation id 1 occurs more than once"),
        (
            changed(("annotations", 0, "image_id", 8)),
            "id 1 names image id 8, which 'images' lacks$",
        ),
        (
            changed(("annotations", 0, "image_id", "7")),
            "names image id '7', which 'images' lacks; it has 7: use numbers in both, or text$",
        ),
        (changed(("annotations", 0, "category_id", 1)), "annotation id 1 names category id 1"),
        (changed(("annotations", 0, "iscrowd", 1)), "there are no objects in it"),
        ({**DATASET, "annotations": []}, "there are no objects in it"),
    ],
)
def test_broken_annotations(folder, dataset, message):
    path = write(folder, dataset)
    with pytest.raises(InputError, match=message) as error:
        read_coco_json(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def cut_short(path):
    Image.effect_noise((60, 60), 50).save(path)
    path.write_bytes(path.read_bytes()[:700])


def test_missing_files(folder, monkeypatch):
    """Errors of five kinds; a file with any size and time was not checked before."""
    with pytest.raises(InputError, match="elsewhere: no such image directory"):
        check_images(DATASET, str(folder / "elsewhere"), "x.json")
    wrong, text = Image.new("RGB", (60, 61)), PngInfo()
    text.add_text("a", "x" * 2**21, zip=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**4)
    for message, change in (
        ("the image is 60 x 61 pixels, but x.json says 60 x 60$", wrong.save),
        *(
            ("not a readable", lambda p, n=n: (p.write_bytes(b"x" * n), os.utime(p, ns=(n, n))))
            for n in (0, 1)  # bytes and nanoseconds
        ),
        ("not a readable image .not a TIFF", lambda path: wrong.save(path, exif=b"no Exif")),
        ("not a readable image .Decompress", lambda path: wrong.save(path, pnginfo=text)),
        ("not a readable image .*exceeds limit", Image.new("1", (150, 150)).save),
        ("the image cannot be used: .*truncated", cut_short),
        ("no such image; x.json names it", Path.unlink),
        ("no such image; x.json names it", Path.mkdir),
    ):
        change(folder / "b.png")
        with pytest.raises(InputError, match=f"b.png: {message}"):
            check_images(DATASET, str(folder), "x.json")


POLYGON = [[10, 20, 40, 20, 40, 60], [1, 2, 3, 4, 5, 6, 7, 8]]
RUN_LENGTHS = {"size": [80, 100], "counts": [10, 20, 7970]}
SMALL = {"size": [60, 60], "counts": [10, 20, 3570]}


@pytest.mark.parametrize(
    ("segmentation", "mask_format", "message"),
    [
        *((POLYGON, "polygon", None), (POLYGON, "bitmask", None), (RUN_LENGTHS, "bitmask", None)),
        ([], "polygon", "has no 'segmentation'"),
        ("x", "polygon", "polygon must be a list of 6 or more numbers in pairs, .*; found 'x'"),
        ([[10, 20, 40, 20]], "polygon", "a polygon must be a list of 6 or more numbers in"),
        ([[1, 2, 3, 4, 5, 6, 7]], "bitmask", "a polygon must be"),
        ([[1, 2, 3, 4, 5, "6"]], "bitmask", "a polygon must be"),
        (RUN_LENGTHS, "polygon", "run-length mask; set INPUT.MASK_FORMAT to 'bitmask'"),
        (SMALL, "bitmask", "must have 'counts' and the size \\[80, 100"),
    ],
)
def test_masks(folder, segmentation, mask_format, message):
    """Required of each object, but not of crowds, if the model has masks."""
    path = write(folder, changed(("annotations", 0, "segmentation", segmentation)))
    if message is None:
        assert not read_coco_json(path, mask_format)[1]
        return
    with pytest.raises(InputError, match=f"instances.json: annotation id 1.*{message}"):
        read_coco_json(path, mask_format)


@pytest.mark.parametrize("mask_format", [None, "bitmask"])
@pytest.mark.parametrize(
    ("segmentation", "is_loadable"),
    [
        *((x, True) for x in (None, [], [[]], [[1, 2, 3]], POLYGON, RUN_LENGTHS)),
        *((x, False) for x in (0, "", "x", 3, {}, [3], [[1], 3], SMALL)),
    ],
)
def test_unused_masks(folder, segmentation, is_loadable, mask_format):
    """Masks of crowds, or for a model without masks, are removed if Detectron2 cannot load them."""
    dataset = changed(("annotations", 0, "segmentation", POLYGON))
    dataset["annotations"][1].update(image_id=7, segmentation=segmentation)
    path = write(folder, dataset)
    dataset, changes = read_coco_json(path, mask_format)
    masks = [annotation["segmentation"] for annotation in dataset["annotations"]]
    assert masks == [POLYGON, segmentation if is_loadable else []]
    assert changes == ({} if is_loadable else {"annotation segmentation": 1})


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 4, 5, 8])
def test_orientation(folder, orientation, suffix):
    """Sizes are compared after the Exif orientation is applied."""
    exif, name, is_turned = Image.Exif(), f"a.{suffix}", orientation >= 5
    exif[0x0112] = orientation
    Image.new("RGB", (80, 100) if is_turned else (100, 80)).save(folder / name, exif=exif)
    check_images(with_image(name, (100, 80)), str(folder), "x.json")
    if suffix == "jpg" or not is_turned:  # the tag of a PNG is not read if the stored size is right
        with pytest.raises(InputError, match=f"{name}: the image is 100 x .* says 80 x 100$"):
            check_images(with_image(name, (80, 100)), str(folder), "x.json")


def test_byte_order_mark(folder):
    """Removed from the file that evaluation reads."""
    path = write(folder, "\ufeff" + json.dumps(DATASET))
    for _ in range(2):
        register_coco_json("test_mark", path, str(folder), str(folder / "cache"))
        assert len(DatasetCatalog.get("test_mark")) == 2
        assert COCO(MetadataCatalog.get("test_mark").json_file).getCatIds() == [20, 3]


def test_paths(folder):
    """Nothing outside of the image directory is opened; absolute paths inside of it are fine."""
    (folder / "a.png").rename(folder / "..a.png")
    (folder / "x").mkdir()
    for name in (f"{folder}/..a.png", f"{folder}/x/../..a.png", "..a.png", "x/../..a.png"):
        check_images(with_image(name, (100, 80)), str(folder), "x.json")
    check_images({"images": with_image(f"{folder}/..a.png", (100, 80))["images"][:1]}, "/", "x")
    for name in ("../..a.png", "/etc/hostname", "x/../../..a.png", ".."):
        with pytest.raises(InputError, match="names an image outside of the image directory"):
            check_images(with_image(name, (100, 80)), str(folder), "x.json")


@pytest.mark.parametrize(
    ("size", "lengths", "limit", "new"),
    [
        *(((2, 20000), (800,), 1333, "0 x 1333"), ((20000, 2), (800,), 1333, "1333 x 0")),
        *(((2666, 1), (800,), 1333, None), ((2667, 1), (800,), 1333, "1333 x 0")),
        *(((64, 64), (9, 8192), 10**5, None), ((64, 64), (9, 8193), 10**5, "8193 x 8193")),
        *(((2, 20000), (0,), 1333, None), ((20000, 10), (0, 800), 10**7, "1600000 x 800")),
    ],
)
def test_resized(size, lengths, limit, new):
    """To 1 to 2^26 pixels; a length of 0 keeps the size."""
    limits = {"INPUT.A and INPUT.B": ((0,), 1), "INPUT.C and INPUT.D": (lengths, limit)}
    names, sizes = ["a.png", "b.png", "c.png"], np.array([(64, 64), (64, 64), size])
    arguments = (names, sizes, "root")
    image_checks.check_resized(*arguments, {})
    if new is None:
        image_checks.check_resized(*arguments, limits)
        return
    name = names[sizes.tolist().index([*size])]
    message = f"root/{name}: {size[0]} x {size[1]} pixels become {new} with INPUT.C and INPUT.D "
    with pytest.raises(InputError, match=f"{message}.{lengths[-1]}, {limit}., which no network"):
        image_checks.check_resized(*arguments, limits)


def test_categories(folder):
    """Names in the order of their ids, also with a byte order mark."""
    text = json.dumps({"categories": [{"id": 20, "name": "cat"}, {"id": 3, "name": 7}]})
    for content in (text, f"\ufeff{text}"):
        assert read_categories(write(folder, content)) == ["7", "cat"]
    for content in ({}, [], {"categories": [{"id": 3}]}, {"categories": 3}, "{", None):
        path = str(folder / "none.json") if content is None else write(folder, content)
        with pytest.raises(InputError, match=f"^{path}: no COCO JSON with categorie"):
            read_categories(path)
