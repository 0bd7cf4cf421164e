# SPDX-License-Identifier: Apache-2.0
"""Custom datasets in COCO's JSON format, checked when they are registered."""

import json
import logging
import os
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from PIL import Image
from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm

from ..errors import InputError, one_line
from ..utils.atomic_write import atomic_write
from ..utils.display import class_colors
from .coco_schema import check_entries, is_number, shorten
from .fingerprint import file_digest, image_fingerprint
from .image_reading import displayed_size, is_whole, read_image
from .resize import OpenCVResizeShortestEdge
from .run_lengths import check_run_lengths

__all__ = [
    "check_images",
    "class_colors",
    "log_changes",
    "read_categories",
    "read_coco_json",
    "register_coco_json",
]

logger = logging.getLogger(__name__)

#: for each pair of config keys, the lengths of the shorter side and the limit of the longer one
ResizeLimits = Mapping[str, Tuple[Sequence[int], int]]

_MAX_PIXELS = 2**26  # of a resized image: 50 times those of 1333 x 800


def _load_json(json_file: str) -> Any:
    """Read JSON in UTF-8; the InputError for anything else says what it is."""
    if not os.path.isfile(json_file):
        raise InputError(f"{json_file}: no such annotation file")
    try:
        with open(json_file, "rb") as f:
            content = f.read()
        if content.startswith(b"\x1f\x8b"):
            raise InputError(f"{json_file}: compressed with gzip; unpack it")
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) or content[1:4:2] == b"\0\0":
            raise InputError(f"{json_file}: encoded in UTF-16; save it as UTF-8")
        return json.loads(content.decode("utf-8-sig"))
    except OSError as e:
        raise InputError(f"{json_file}: cannot be read: {one_line(e)}") from e
    except UnicodeDecodeError as e:
        raise InputError(
            f"{json_file}: not encoded in UTF-8 (byte {e.start} is {e.object[e.start]:#x}), but "
            "perhaps in Latin-1; save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{json_file}: not valid JSON, is the file cut short? ({e})") from None


def _check_unique_names(entries: Dict, kind: str, field: str, json_file: str) -> None:
    ids: Dict[str, Any] = {}
    for id, entry in entries.items():
        first = ids.setdefault(entry[field], id)
        if first != id:
            raise InputError(
                f"{json_file}: {kind} ids {shorten(first)} and {shorten(id)} have the same "
                f"{field}, {shorten(entry[field])}"
            )


def _check_mask(segmentation: Any, image: Dict, mask_format: str, where: str) -> None:
    """Raise InputError unless Detectron2 can train on the mask of an object."""
    if not segmentation:
        raise InputError(f"{where} has no 'segmentation', which a model with masks is trained on")
    if isinstance(segmentation, dict):
        try:
            check_run_lengths(segmentation, image["height"], image["width"])
        except ValueError as e:
            raise InputError(f"{where}: {e}") from None
        if mask_format == "polygon":
            raise InputError(
                f"{where} has a run-length mask; set INPUT.MASK_FORMAT to 'bitmask' to use it"
            )
        return
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        is_list = isinstance(polygon, list) and all(map(is_number, polygon))
        if not is_list or len(polygon) < 6 or len(polygon) % 2 != 0:
            raise InputError(
                f"{where}: a polygon must be a list of 6 or more numbers, [x, y, x, y, ...]; "
                f"found {shorten(polygon)}"
            )


def _is_loadable(segmentation: Any, image: Dict) -> bool:
    """Whether Detectron2 can load a mask that no model is trained on."""
    if isinstance(segmentation, dict):
        try:
            check_run_lengths(segmentation, image["height"], image["width"])
        except ValueError:
            return False
        return True
    if not segmentation:
        return segmentation in (None, [])
    # Detectron2 drops polygons with an odd number of coordinates or too few.
    return isinstance(segmentation, list) and all(isinstance(x, list) for x in segmentation)


def _clip(box: List[float], image: Dict) -> List[float]:
    """The part of a box, [x, y, width, height], that is in the image."""
    left, right = (min(max(v, 0), image["width"]) for v in (box[0], box[0] + box[2]))
    top, bottom = (min(max(v, 0), image["height"]) for v in (box[1], box[1] + box[3]))
    return [left, top, right - left, bottom - top]


def read_coco_json(json_file: str, mask_format: Optional[str] = None) -> Tuple[Dict, Counter]:
    """
    Read and check annotations in COCO format, LVIS' variant of it included.

    Boxes are clipped to their image and those without area are dropped. Fields are checked and
    repaired as in :mod:`coco_schema`.

    Args:
        json_file: path of the JSON file.
        mask_format: ``INPUT.MASK_FORMAT``, "polygon" or "bitmask", if each object must have a mask.

    Returns:
        the dataset; and how many boxes were "clipped" and "dropped", and how many values of each
        field, such as "annotation iscrowd", were repaired.

    Raises:
        InputError: if the file is missing, cut short, or inconsistent. The message names the entry.
    """
    dataset = _load_json(json_file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise InputError(f"{json_file}: not in COCO format, there is no list {key!r}")
        if not dataset[key] and key != "annotations":
            raise InputError(f"{json_file}: there are no {key}")
    changes: Counter = Counter()
    images = check_entries(dataset["images"], "image", json_file, changes)
    categories = check_entries(dataset["categories"], "category", json_file, changes)
    _check_unique_names(categories, "category", "name", json_file)
    _check_unique_names(images, "image", "file_name", json_file)
    check_entries(dataset["annotations"], "annotation", json_file, changes)
    kept = []
    for annotation in dataset["annotations"]:
        where = f"{json_file}: annotation id {shorten(annotation['id'])}"
        for kind, entries in (("image", images), ("category", categories)):
            id = annotation[f"{kind}_id"]
            if id not in entries:
                raise InputError(f"{where} names {kind} id {shorten(id)}, which is not there")
        image = images[annotation["image_id"]]
        clipped = _clip(annotation["bbox"], image)
        if min(clipped[2:]) <= 0:
            changes["dropped"] += 1
            continue
        kept.append(annotation)
        # Rounding errors of x + width are smaller than this.
        if max(abs(a - b) for a, b in zip(annotation["bbox"], clipped)) > 1e-2:
            changes["clipped"] += 1
            annotation["bbox"] = clipped
        segmentation = annotation.get("segmentation")
        if mask_format is not None and not annotation["iscrowd"]:
            _check_mask(segmentation, image, mask_format, where)
        elif not _is_loadable(segmentation, image):
            changes["annotation segmentation"] += 1
            annotation["segmentation"] = []
    if all(annotation["iscrowd"] for annotation in kept):
        raise InputError(f"{json_file}: there are no objects in it (crowds and empty boxes aside)")
    # pycocotools takes the id 0 for "not matched".
    if not all(type(a["id"]) is int and 0 < a["id"] < 2**31 for a in kept):
        changes["annotation id"] += len(kept)
        for number, annotation in enumerate(kept, 1):
            annotation["id"] = number
    dataset["annotations"] = kept
    return dataset, changes


def log_changes(json_file: str, changes: Counter) -> None:
    """Log the changes that :func:`read_coco_json` has made as warnings."""
    if changes["clipped"] or changes["dropped"]:
        logger.warning(
            f"{json_file}: {changes['clipped']} boxes reached out of their image and were clipped, "
            f"{changes['dropped']} boxes had no area in their image and were dropped."
        )
    repaired = {k: n for k, n in changes.items() if k not in ("clipped", "dropped")}
    if repaired:
        counts = ", ".join(f"{what} of {n}" for what, n in repaired.items())
        logger.warning(f"{json_file}: repaired or filled in: {counts}")


def _path_of(file_name: str, image_root: str, json_file: str) -> str:
    """Path of an image, which has to be in ``image_root``."""
    path = os.path.join(image_root, file_name)
    inside = os.path.relpath(os.path.normpath(path), os.path.normpath(image_root))
    if inside.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{path}: {json_file} names an image outside of the image directory {image_root}. If "
            "you trust it, name a directory that all of its images are in, such as /"
        )
    return path


def _check_resized(path: str, width: int, height: int, limits: ResizeLimits) -> None:
    """Raise InputError if an image is resized to less than a pixel or to too many."""
    for keys, (lengths, limit) in limits.items():
        for length in filter(None, lengths):  # 0 keeps the size
            shape = OpenCVResizeShortestEdge.get_output_shape(height, width, length, limit)
            if min(shape) < 1 or shape[0] * shape[1] > _MAX_PIXELS:
                raise InputError(
                    f"{path}: {width} x {height} pixels become {shape[1]} x {shape[0]} with {keys} "
                    f"({length}, {limit}), which no network can use; change them, or leave the "
                    "image out"
                )


def check_images(
    dataset: Dict, image_root: str, json_file: str, limits: Optional[ResizeLimits] = None
) -> str:
    """
    Check that each image of a dataset, see :func:`read_coco_json`, is in ``image_root``, is an
    image, has the size in the annotations, and can be resized to ``limits``. JPEG and PNG files are
    only decoded if their end is missing.

    Returns:
        the :func:`image_fingerprint` of the images.

    Raises:
        InputError: names the first image for which this is not so.
    """
    if not os.path.isdir(image_root):
        raise InputError(f"{image_root}: no such image directory")
    quiet, files = not comm.is_main_process(), []
    for image in tqdm(dataset["images"], desc="checking images", unit="image", disable=quiet):
        path = _path_of(image["file_name"], image_root, json_file)
        expected = (image["width"], image["height"])
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such image; {json_file} names it")
        try:
            with Image.open(path) as file:
                size = file.size
                # Detectron2 applies the Exif orientation. It may be at the end of a PNG file, which
                # is not worth reading if the size is right.
                if file.format != "PNG" or size != expected:
                    size = displayed_size(file)
                whole = is_whole(path, file.format)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise InputError(f"{path}: not a readable image ({one_line(e)})") from None
        if size != expected:
            raise InputError(
                f"{path}: the image is {size[0]} x {size[1]} pixels, but {json_file} says "
                f"{expected[0]} x {expected[1]}"
            )
        _check_resized(path, *size, limits or {})
        if not whole:
            read_image(path)
        files.append((image["file_name"], os.path.getsize(path)))
    return image_fingerprint(files)


def register_coco_json(
    name: str,
    json_file: str,
    image_root: str,
    cache_dir: str,
    mask_format: Optional[str] = None,
    limits: Optional[ResizeLimits] = None,
) -> List[str]:
    """
    Check a dataset and register it with Detectron2. If :func:`read_coco_json` had to change its
    annotations, a warning says how, and training and evaluation use the changed ones, which are
    written to ``<cache_dir>/<name>-<digest>.json``.

    Args:
        name: name to register; one that is registered already is replaced.
        json_file, image_root: annotations, and the directory that their file names are relative to.
        mask_format: see :func:`read_coco_json`. None registers boxes only.
        limits: what the images are resized to.

    Returns:
        names of the classes, in the order of their category ids.

    Raises:
        InputError: see :func:`read_coco_json` and :func:`check_images`.
    """
    dataset, changes = read_coco_json(json_file, mask_format)
    images = check_images(dataset, image_root, json_file, limits)
    digests = {"annotations": file_digest(json_file), "images": images}
    log_changes(json_file, changes)
    with open(json_file, "rb") as f:
        has_byte_order_mark = f.read(3) == b"\xef\xbb\xbf"
    if +changes or has_byte_order_mark:
        os.makedirs(cache_dir, exist_ok=True)
        json_file = os.path.join(cache_dir, f"{name}-{digests['annotations']}.json")
        with atomic_write(json_file, "w") as f:
            json.dump(dataset, f)

    def load() -> List[Dict]:
        dicts = load_coco_json(json_file, image_root, name)
        if mask_format is None:  # the ground truth that is drawn is what a model is trained on
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
        num_images=len(dataset["images"]),
        fingerprint=digests,
    )
    return classes


def read_categories(path: str) -> List[str]:
    """Names of the categories in a COCO JSON, in the order of a model's classes."""
    try:
        with open(path, encoding="utf-8") as f:
            categories = json.load(f)["categories"]
        return [str(c["name"]) for c in sorted(categories, key=lambda c: c["id"])]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: no COCO JSON with categories ({e})") from e
