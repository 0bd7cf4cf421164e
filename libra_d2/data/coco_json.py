# SPDX-License-Identifier: Apache-2.0
"""Datasets of the user's own in COCO's JSON format: checked when they are registered."""

import json
import logging
import math
import os
from collections import Counter
from typing import Dict, List, Optional, Tuple

from PIL import Image
from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm
from detectron2.utils.colormap import colormap

from ..atomic_write import atomic_write
from ..errors import InputError

__all__ = ["read_coco_json", "check_images", "register_coco_json"]

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION = 0x0112
_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)


def _index(entries: List[Dict], keys: Tuple[str, ...], what: str, json_file: str) -> Dict:
    """Index ``entries`` by their id; raise InputError for missing keys and repeated ids."""
    index = {}
    for position, entry in enumerate(entries):
        missing = [key for key in ("id", *keys) if key not in entry]
        if missing:
            raise InputError(f"{json_file}: {what} number {position} has no {missing[0]!r}")
        if entry["id"] in index:
            raise InputError(f"{json_file}: {what} id {entry['id']} occurs more than once")
        index[entry["id"]] = entry
    return index


def _check_segmentation(annotation: Dict, image: Dict, mask_format: str, where: str) -> None:
    """Raise InputError unless the annotation has a mask that Detectron2 can read."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        raise InputError(f"{where} has no 'segmentation', which a model with masks is trained on")
    if isinstance(segmentation, dict):  # run lengths
        size = [image["height"], image["width"]]
        if segmentation.get("size") != size or not segmentation.get("counts"):
            raise InputError(f"{where}: its run-length mask must have 'counts' and the size {size}")
        if mask_format == "polygon":
            raise InputError(
                f"{where} has a run-length mask; set INPUT.MASK_FORMAT to 'bitmask' to use it"
            )
        return
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        if not (
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(v, (int, float)) and math.isfinite(v) for v in polygon)
        ):
            raise InputError(
                f"{where}: a polygon must be a list of 6 or more numbers, [x, y, x, y, ...]; "
                f"found {str(polygon)[:60]}"
            )


def read_coco_json(json_file: str, mask_format: Optional[str] = None) -> Tuple[Dict, Counter]:
    """
    Read and check annotations in COCO format (LVIS' variant of it included).

    Boxes are clipped to their image and those without area are dropped. What LVIS leaves out
    (``file_name``, ``iscrowd``) is filled in, and the annotation id 0, which pycocotools takes for
    "not matched", is replaced.

    Args:
        json_file: path of the JSON file.
        mask_format: ``INPUT.MASK_FORMAT``, "polygon" or "bitmask", if each object must have a mask.

    Returns:
        the dataset, with its boxes in order; and how many boxes were "clipped" and "dropped",
        and how many values "adapted".

    Raises:
        InputError: if the file is missing, cut short, or inconsistent. The message names the entry.
    """
    if not os.path.isfile(json_file):
        raise InputError(f"{json_file}: no such annotation file")
    try:
        with open(json_file, encoding="utf-8") as f:
            dataset = json.load(f)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{json_file}: not valid JSON, is the file cut short? ({e})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise InputError(f"{json_file}: not in COCO format, there is no list {key!r}")
        if not all(isinstance(entry, dict) for entry in dataset[key]):
            raise InputError(f"{json_file}: not in COCO format, {key!r} must hold objects")
        if not dataset[key] and key != "annotations":
            raise InputError(f"{json_file}: there are no {key}")

    images = _index(dataset["images"], ("width", "height"), "image", json_file)
    categories = _index(dataset["categories"], ("name",), "category", json_file)
    changes: Counter = Counter()
    for image in images.values():
        if "file_name" not in image:
            if "coco_url" not in image:
                raise InputError(f"{json_file}: image id {image['id']} has no 'file_name'")
            # LVIS' images are named as in the URL, folder included.
            changes["adapted"] += 1
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        for key in ("width", "height"):
            if not (isinstance(image[key], int) and image[key] > 0):
                raise InputError(
                    f"{json_file}: image id {image['id']} has the {key} {image[key]!r}; "
                    "it must be a positive integer"
                )

    keys = ("image_id", "category_id", "bbox")
    annotations = _index(dataset["annotations"], keys, "annotation", json_file)
    if 0 in annotations:
        changes["adapted"] += 1
        annotations[0]["id"] = max(annotations) + 1
    kept = []
    for annotation in dataset["annotations"]:
        where = f"{json_file}: annotation id {annotation['id']}"
        image = images.get(annotation["image_id"])
        if image is None:
            raise InputError(f"{where} names image id {annotation['image_id']}, which is not there")
        if annotation["category_id"] not in categories:
            raise InputError(
                f"{where} names category id {annotation['category_id']}, which is not there"
            )
        if annotation.get("ignore", 0):
            raise InputError(f"{where} has 'ignore' set, which COCO lacks; use 'iscrowd'")
        box = annotation["bbox"]
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
        ):
            raise InputError(f"{where} has the bbox {box}; it must be 4 numbers, [x, y, w, h]")
        left, right = (min(max(v, 0), image["width"]) for v in (box[0], box[0] + box[2]))
        top, bottom = (min(max(v, 0), image["height"]) for v in (box[1], box[1] + box[3]))
        if right <= left or bottom <= top:
            changes["dropped"] += 1
            continue
        clipped = [left, top, right - left, bottom - top]
        # Sums of floating point numbers reach over the border by less than this.
        if max(abs(a - b) for a, b in zip(box, clipped)) > 1e-2:
            changes["clipped"] += 1
            annotation["bbox"] = clipped
        if "iscrowd" not in annotation:
            changes["adapted"] += 1
            annotation["iscrowd"] = 0
        if "area" not in annotation:
            changes["adapted"] += 1
            annotation["area"] = clipped[2] * clipped[3]
        if mask_format is not None and not annotation["iscrowd"]:
            _check_segmentation(annotation, image, mask_format, where)
        kept.append(annotation)
    if not any(annotation["iscrowd"] == 0 for annotation in kept):
        raise InputError(f"{json_file}: there are no objects in it (crowds and empty boxes aside)")
    dataset["annotations"] = kept
    return dataset, changes


def check_images(dataset: Dict, image_root: str, json_file: str) -> None:
    """
    Check that each image exists, is an image, and is as large as the annotations say. Only file
    headers are read; progress is shown.

    Raises:
        InputError: names the first image for which this is not so.
    """
    if not os.path.isdir(image_root):
        raise InputError(f"{image_root}: no such image directory")
    quiet = not comm.is_main_process()
    for image in tqdm(dataset["images"], desc="checking images", unit="image", disable=quiet):
        path = os.path.join(image_root, image["file_name"])
        expected = (image["width"], image["height"])
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such image; {json_file} names it")
        try:
            with Image.open(path) as file:
                size = file.size
                # Detectron2 applies the orientation that cameras write. It may be at the end of a
                # PNG file, which is not worth reading if the size is right.
                if file.format != "PNG" or size != expected:
                    orientation = file.getexif().get(_EXIF_ORIENTATION)
                    if orientation in _TRANSPOSING_ORIENTATIONS:
                        size = size[::-1]
        except (OSError, SyntaxError, Image.DecompressionBombError) as e:
            raise InputError(f"{path}: not a readable image ({e})") from None
        if size != expected:
            raise InputError(
                f"{path}: the image is {size[0]} x {size[1]} pixels, but {json_file} says "
                f"{expected[0]} x {expected[1]}"
            )


def class_colors(num_classes: int) -> List[Tuple[int, int, int]]:
    """Colors of Detectron2's, RGB in 0 to 255, for pictures in which each class has one."""
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    return [tuple(colors[i % len(colors)]) for i in range(num_classes)]


def register_coco_json(
    name: str,
    json_file: str,
    image_root: str,
    cache_dir: str,
    mask_format: Optional[str] = None,
) -> List[str]:
    """
    Check a dataset and register it with Detectron2. If its annotations had to be changed (see
    :func:`read_coco_json`), a warning says how, and the changed ones are written to
    ``<cache_dir>/<name>.json`` and used for training and evaluation alike.

    Args:
        name: name to register; one that is registered already is replaced.
        json_file, image_root: annotations, and the directory that their file names start from.
        cache_dir: directory for changed annotations.
        mask_format: see :func:`read_coco_json`. None registers boxes only.

    Returns:
        names of the classes, in the order of their category ids.

    Raises:
        InputError: see :func:`read_coco_json` and :func:`check_images`.
    """
    dataset, changes = read_coco_json(json_file, mask_format)
    check_images(dataset, image_root, json_file)
    if changes["clipped"] or changes["dropped"]:
        logger.warning(
            f"{json_file}: {changes['clipped']} boxes reached out of their image and were clipped, "
            f"{changes['dropped']} boxes had no area in their image and were dropped."
        )
    if changes:
        os.makedirs(cache_dir, exist_ok=True)
        used_file = os.path.join(cache_dir, f"{name}.json")
        with atomic_write(used_file, "w") as f:
            json.dump(dataset, f)
        json_file = used_file

    def load() -> List[Dict]:
        dicts = load_coco_json(json_file, image_root, name)
        if mask_format is None:  # pictures of the ground truth show what a model is trained on
            for annotation in (a for d in dicts for a in d["annotations"]):
                annotation.pop("segmentation", None)
        return dicts

    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    classes = [c["name"] for c in sorted(dataset["categories"], key=lambda c: c["id"])]
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=classes,
        thing_colors=class_colors(len(classes)),
    )
    return classes
