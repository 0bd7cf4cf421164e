# SPDX-License-Identifier: Apache-2.0
import copy
import gzip
import json
import logging
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog

from libra_d2.data.coco_json import check_images, read_coco_json, register_coco_json
from libra_d2.data.dataset_mapper import LibraDatasetMapper
from libra_d2.data.image_reading import read_image
from libra_d2.errors import InputError

DATASET = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 100, "height": 80},
        {"id": 9, "file_name": "b.png", "width": 60, "height": 60},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 20,
            "bbox": [10, 20, 30, 40],
            "iscrowd": 0,
            "area": 9,
        },
        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0, 0, 60, 60], "iscrowd": 1, "area": 9},
    ],
    "categories": [{"id": 20, "name": "cat"}, {"id": 3, "name": "dog"}],
}


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
    """DATASET with each (key, index, field, value) applied; value None deletes the field."""
    dataset = copy.deepcopy(DATASET)
    for key, index, field, value in changes:
        if value is None:
            del dataset[key][index][field]
        else:
            dataset[key][index][field] = value
    return dataset


def test_good_data_is_used_as_it_is(folder):
    path = write(folder, DATASET)
    classes = register_coco_json("test_good", path, str(folder), str(folder / "cache"))
    assert classes == ["dog", "cat"]  # by category id
    assert MetadataCatalog.get("test_good").json_file == path
    assert not (folder / "cache").exists()
    dicts = DatasetCatalog.get("test_good")
    assert [d["annotations"][0]["category_id"] for d in dicts] == [1, 0]


def test_boxes_are_clipped_and_dropped(folder, caplog):
    dataset = changed(("annotations", 0, "bbox", [-10, 70, 30, 40]))
    for i, box in enumerate(([5, 5, 0, 9], [5, 5, 9, -2], [100, 0, 9, 9], [50, 79.999, 50.005, 9])):
        dataset["annotations"].append({**DATASET["annotations"][0], "id": 10 + i, "bbox": box})
    logging.getLogger("libra_d2").propagate = True
    register_coco_json("test_clip", write(folder, dataset), str(folder), str(folder / "cache"))
    assert "2 boxes reached out of their image and were clipped, 3 boxes had no area" in caplog.text
    # Evaluation reads the changed annotations, too.
    used = COCO(MetadataCatalog.get("test_clip").json_file)
    boxes = [a["bbox"] for a in used.loadAnns(used.getAnnIds(imgIds=7))]
    assert boxes == [[0, 70, 20, 10], [50, 79.999, 50, pytest.approx(0.001)]]
    assert len(DatasetCatalog.get("test_clip")[0]["annotations"]) == 2


def test_rounding_is_no_reason_to_clip(folder):
    _, changes = read_coco_json(
        write(folder, changed(("annotations", 1, "bbox", [0, 0, 60.001, 60])))
    )
    assert not changes


def test_lvis(folder):
    """LVIS names images by URL and has no crowds; pycocotools takes id 0 for "not matched"."""
    dataset = changed(
        ("images", 0, "file_name", None),
        ("images", 0, "coco_url", "http://images.cocodataset.org/val2017/a.png"),
        ("annotations", 0, "iscrowd", None),
        ("annotations", 0, "area", None),
        ("annotations", 0, "id", 0),
    )
    (folder / "val2017").mkdir()
    shutil.copy(folder / "a.png", folder / "val2017/a.png")
    register_coco_json("test_lvis", write(folder, dataset), str(folder), str(folder / "cache"))
    used = json.loads((folder / "cache/test_lvis.json").read_text())
    assert used["images"][0]["file_name"] == "val2017/a.png"
    annotation = used["annotations"][0]
    assert (annotation["iscrowd"], annotation["area"], annotation["id"]) == (0, 1200, 1)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (json.dumps(DATASET)[:200], "not valid JSON, is the file cut short"),
        ("", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ([], "there is no list 'images'"),
        ({"images": []}, "there are no images|there is no list 'annotations'"),
        ({**DATASET, "categories": []}, "there are no categories"),
        ({**DATASET, "annotations": [3]}, "annotation number 0 must be an object, not 3"),
        (changed(("images", 1, "width", None)), "image id 9 has no 'width'"),
        (changed(("images", 1, "width", "60")), "image id 9 has the width '60'"),
        (changed(("images", 1, "height", 0)), "image id 9 has the height 0"),
        (changed(("images", 1, "id", 7)), "image id 7 occurs more than once"),
        (changed(("images", 0, "file_name", None)), "image id 7 has no 'file_name'"),
        (changed(("annotations", 1, "id", 1)), "annotation id 1 occurs more than once"),
        (changed(("annotations", 0, "image_id", 8)), "annotation id 1 names image id 8"),
        (changed(("annotations", 0, "category_id", 1)), "annotation id 1 names category id 1"),
        (changed(("annotations", 0, "bbox", [1, 2, 3])), "annotation id 1 has the bbox"),
        (changed(("annotations", 0, "bbox", [1, 2, 3, "4"])), "must be 4 numbers"),
        (changed(("annotations", 0, "bbox", [1, 2, float("nan"), 4])), "must be 4 numbers"),
        (
            changed(("annotations", 0, "ignore", 1)),
            "annotation id 1 has the ignore 1; it must be absent",
        ),
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


def test_missing_files(folder):
    with pytest.raises(InputError, match="none.json: no such annotation file"):
        read_coco_json(str(folder / "none.json"))
    with pytest.raises(InputError, match="elsewhere: no such image directory"):
        check_images(DATASET, str(folder / "elsewhere"), "x.json")
    (folder / "b.png").unlink()
    with pytest.raises(InputError, match="b.png: no such image; x.json names it"):
        check_images(DATASET, str(folder), "x.json")


POLYGON = [[10, 20, 40, 20, 40, 60]]
RUN_LENGTHS = {"size": [80, 100], "counts": [10, 20, 7970]}


@pytest.mark.parametrize(
    ("segmentation", "mask_format"),
    [(POLYGON, "polygon"), (POLYGON, "bitmask"), (RUN_LENGTHS, "bitmask")],
)
def test_masks(folder, segmentation, mask_format):
    """Crowds need none."""
    path = write(folder, changed(("annotations", 0, "segmentation", segmentation)))
    _, changes = read_coco_json(path, mask_format)
    assert not changes


@pytest.mark.parametrize(
    ("segmentation", "mask_format", "message"),
    [
        ([], "polygon", "has no 'segmentation'"),
        ("x", "polygon", "a polygon must be a list of 6 or more numbers, .*; found 'x'"),
        ([[10, 20, 40, 20]], "polygon", "a polygon must be a list of 6 or more numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "bitmask", "a polygon must be"),
        ([[1, 2, 3, 4, 5, "6"]], "bitmask", "a polygon must be"),
        (RUN_LENGTHS, "polygon", "run-length mask; set INPUT.MASK_FORMAT to 'bitmask'"),
        ({"size": [8, 8], "counts": "a"}, "bitmask", "must have 'counts' and the size \\[80, 100"),
        ({"size": [80, 100]}, "bitmask", "must have 'counts'"),
    ],
)
def test_bad_masks(folder, segmentation, mask_format, message):
    """Found before training, if the model has masks."""
    path = write(folder, changed(("annotations", 0, "segmentation", segmentation)))
    with pytest.raises(InputError, match=f"instances.json: annotation id 1.*{message}"):
        read_coco_json(path, mask_format)
    read_coco_json(path)


def test_masks_are_registered_if_wanted(folder):
    path = write(folder, changed(("annotations", 0, "segmentation", POLYGON)))
    for mask_format in ("polygon", None):
        register_coco_json("test_masks", path, str(folder), str(folder), mask_format)
        annotation = DatasetCatalog.get("test_masks")[0]["annotations"][0]
        assert ("segmentation" in annotation) == (mask_format is not None)


def test_wrong_images(folder):
    Image.new("RGB", (60, 61)).save(folder / "b.png")
    with pytest.raises(InputError, match="b.png: the image is 60 x 61 pixels, but x.json says 60"):
        check_images(DATASET, str(folder), "x.json")
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="b.png: not a readable image"):
        check_images(DATASET, str(folder), "x.json")


def test_orientation(folder):
    """Cameras store portraits as landscapes with a tag. Detectron2 turns them, and so do we."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 100)).save(folder / "a.jpg", exif=exif)
    dataset = changed(("images", 0, "file_name", "a.jpg"))
    check_images(dataset, str(folder), "x.json")
    mapper = LibraDatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    mapped = mapper({"file_name": str(folder / "a.jpg"), "width": 100, "height": 80})
    assert mapped["image"].shape == (3, 80, 100)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_cut_short(folder, num_workers):
    """Found before training; in the middle of one, the error is one line."""
    from torch.utils.data import DataLoader

    path = folder / "a.png"
    Image.effect_noise((100, 80), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    mapper = LibraDatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    with pytest.raises(InputError, match="a.png: the image cannot be used: "):
        check_images(DATASET, str(folder), "x.json")

    class Dataset(list):
        def __getitem__(self, i):
            return mapper({"file_name": str(path), "width": 100, "height": 80})

    with pytest.raises(InputError) as error:
        next(iter(DataLoader(Dataset([0]), num_workers=num_workers)))
    assert str(error.value).startswith(f"{path}: the image cannot be used: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: text.encode("utf-16"), "encoded in UTF-16; save it as UTF-8"),
        (lambda text: text.encode("utf-16-le"), "encoded in UTF-16; save it as UTF-8"),
        (lambda text: gzip.compress(text.encode()), "compressed with gzip; unpack it"),
        (lambda text: text.encode("latin-1"), "not encoded in UTF-8 .* perhaps in Latin-1"),
    ],
)
def test_other_encodings(folder, encode, message):
    dataset = changed(("categories", 0, "name", "K\u00e4tzchen"))
    path = folder / "instances.json"
    path.write_bytes(encode(json.dumps(dataset, ensure_ascii=False)))
    with pytest.raises(InputError, match=message) as error:
        read_coco_json(str(path))
    assert "cut short" not in str(error.value)


def test_byte_order_mark(folder):
    """As Windows writes it; evaluation reads the file, too."""
    path = folder / "instances.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(DATASET).encode())
    register_coco_json("test_mark", str(path), str(folder), str(folder / "cache"))
    assert len(DatasetCatalog.get("test_mark")) == 2
    assert COCO(MetadataCatalog.get("test_mark").json_file).getCatIds() == [20, 3]


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "x/../../a.png"])
def test_images_elsewhere(folder, name):
    """Nothing outside of the image directory is opened unless it is asked for."""
    (folder / "inner").mkdir()
    dataset = changed(("images", 0, "file_name", name))
    with pytest.raises(InputError, match="names an image outside of the image directory"):
        check_images(dataset, str(folder / "inner"), "x.json")


def test_absolute_paths_on_request(folder):
    names = [str(folder / name) for name in ("a.png", "b.png")]
    images = [("images", i, "file_name", name) for i, name in enumerate(names)]
    check_images(changed(*images), "/", "x.json")
    check_images(changed(*images), str(folder), "x.json")  # they are in it


@pytest.mark.parametrize(("size", "new"), [((2, 20000), "0 x 1333"), ((20000, 2), "1333 x 0")])
def test_too_small_to_resize(folder, size, new):
    Image.new("RGB", size).save(folder / "a.png")
    dataset = changed(("images", 0, "width", size[0]), ("images", 0, "height", size[1]))
    limits = {"INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST": ((800,), 1333)}
    message = f"a.png: {size[0]} x {size[1]} pixels become {new} with INPUT.MIN_SIZE_TEST and"
    with pytest.raises(InputError, match=message):
        check_images(dataset, str(folder), "x.json", limits)
    check_images(dataset, str(folder), "x.json")


def test_too_large_when_resized(folder):
    Image.new("RGB", (20000, 10)).save(folder / "a.png")
    dataset = changed(("images", 0, "width", 20000), ("images", 0, "height", 10))
    limits = {"INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN": ((0, 800), 10**7)}
    with pytest.raises(InputError, match="become 1600000 x 800 with INPUT.MIN_SIZE_TRAIN"):
        check_images(dataset, str(folder), "x.json", limits)


@pytest.mark.parametrize("missing", [2, 20, 1500])
def test_jpeg_cut_short(folder, caplog, missing):
    """Read as OpenCV reads it, with a warning, which comes before training."""
    Image.effect_noise((100, 80), 50).convert("RGB").save(folder / "a.jpg")
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[:-missing])
    check_images(changed(("images", 0, "file_name", "a.jpg")), str(folder), "x.json")
    assert f"{folder}/a.jpg: the file is cut short; what is missing is gray" in caplog.text
    expected = cv2.imread(str(folder / "a.jpg"))
    assert np.array_equal(read_image(str(folder / "a.jpg")), expected)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "gif", "webp"])
def test_other_formats_cut_short(folder, suffix):
    """Found before training."""
    Image.effect_noise((100, 80), 50).save(folder / f"a.{suffix}")
    dataset = changed(("images", 0, "file_name", f"a.{suffix}"))
    check_images(dataset, str(folder), "x.json")
    content = (folder / f"a.{suffix}").read_bytes()
    (folder / f"a.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"a.{suffix}: "):
        check_images(dataset, str(folder), "x.json")
