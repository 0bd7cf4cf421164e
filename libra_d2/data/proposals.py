# SPDX-License-Identifier: Apache-2.0
"""
Files of precomputed proposals, for models without an RPN (Fast R-CNN).

Detectron2 reads a pickled dict of "ids" (image ids), "boxes" (for each image (R, 4), absolute XYXY
in pixels of the image file) and "objectness_logits" (for each image (R,)). mmdetection 2.x writes a
pickled list of (R, 5) arrays, box and score, one for each image in the order of the COCO JSON.
"""

import json
import logging
import os
import pickle
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import InputError, counted, one_line
from ..utils.atomic_write import atomic_write
from ..utils.safe_reading import load_arrays
from .dataset_cache import load_records
from .fingerprint import file_digest, record_fingerprint

__all__ = ["prepare_proposals", "write_proposals"]

logger = logging.getLogger(__name__)


def write_proposals(
    path: str,
    ids: List,
    boxes: List[np.ndarray],
    objectness_logits: List[np.ndarray],
    images: str = "",
) -> None:
    """
    Write proposals in Detectron2's format, see the module; the directory is created.

    Args:
        path: of the file.
        ids, boxes, objectness_logits: a value for each image.
        images: what the images are, see :func:`record_fingerprint`; "" if unknown.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    content = {
        "ids": ids,
        "boxes": boxes,
        "objectness_logits": objectness_logits,
        "bbox_mode": int(BoxMode.XYXY_ABS),
        "images": images,
    }
    with atomic_write(path) as f:
        pickle.dump(content, f, protocol=4)


def _check_arrays(path: str, arrays: List, columns: Tuple[int, ...], what: str) -> None:
    """Raise InputError unless all are finite floating point arrays of shape (R, *columns)."""
    for position, array in enumerate(arrays):
        shape = getattr(array, "shape", None)
        if not (
            isinstance(array, np.ndarray)
            and array.dtype.kind == "f"
            and array.ndim == 1 + len(columns)
            and shape[1:] == columns
            and np.isfinite(array).all()
        ):
            wanted = " x ".join(["R", *map(str, columns)])
            raise InputError(
                f"{path}: {what} of image number {position} must be a finite {wanted} array of "
                f"floating point numbers; found {type(array).__name__} of shape {shape}"
            )


def _from_mmdetection(path: str, arrays: List, dataset_name: str) -> Tuple[List, List, List]:
    """Ids, boxes and logits of mmdetection's proposals."""
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        raise InputError(
            f"{path}: proposals in mmdetection's format are in the order of a COCO JSON, and "
            f"dataset {dataset_name!r} has none"
        )
    with open(json_file, encoding="utf-8") as f:
        ids = [image["id"] for image in json.load(f)["images"]]
    if len(ids) != len(arrays):
        raise InputError(
            f"{path}: has proposals for {len(arrays)} images, but dataset {dataset_name!r} "
            f"({json_file}) has {len(ids)}"
        )
    _check_arrays(path, arrays, (5,), "proposals")
    scores = [array[:, 4].astype(np.float64).clip(1e-12, 1 - 1e-12) for array in arrays]
    logits = [np.log(score / (1 - score)).astype(np.float32) for score in scores]
    return ids, [array[:, :4] for array in arrays], logits


def _from_detectron2(
    path: str, content: Dict, dataset_name: str, records: Sequence[Dict[str, Any]]
) -> Tuple[List, List, List]:
    """Ids, boxes and logits of Detectron2's proposals, or of Detectron's, under older names."""
    ids = content.get("ids", content.get("indexes"))
    boxes = content.get("boxes")
    logits = content.get("objectness_logits", content.get("scores"))
    if not all(hasattr(x, "__len__") and len(x) == len(ids) for x in (ids, boxes, logits)):
        raise InputError(
            f"{path}: not proposals, which are 'ids', 'boxes' and 'objectness_logits' of equal "
            f"length; found {', '.join(map(repr, content)) or 'nothing'}"
        )
    if content.get("bbox_mode", BoxMode.XYXY_ABS) not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise InputError(
            f"{path}: its boxes have the mode {content['bbox_mode']!r}; use "
            f"{int(BoxMode.XYXY_ABS)} (absolute XYXY) or {int(BoxMode.XYWH_ABS)} (XYWH)"
        )
    theirs, ours = content.get("images"), record_fingerprint(records)
    if theirs and theirs != ours:
        raise InputError(
            f"{path}: proposals for {theirs} images, which are not the {ours} of dataset "
            f"{dataset_name!r}; tools/dump_proposals.py writes proposals for these"
        )
    _check_arrays(path, boxes, (4,), "boxes")
    _check_arrays(path, logits, (), "objectness_logits")
    return ids, boxes, logits


def _check_inside(path: str, boxes: np.ndarray, record: Dict[str, Any], is_xywh: bool) -> None:
    """Raise InputError if a box is wholly outside of its image, and so made for another one."""
    size = np.array([record["width"], record["height"]])
    first, second = boxes[:, :2], boxes[:, 2:] + (boxes[:, :2] if is_xywh else 0)
    outside = ((first > size) | (second < 0)).any(axis=1)
    if outside.any():
        box = boxes[outside][0].round(1).tolist()
        raise InputError(
            f"{path}: image id {record['image_id']} has a box, {box}, that is outside of its "
            f"{size[0]} x {size[1]} pixels: are these proposals for other images?"
        )


def prepare_proposals(path: str, dataset_name: str, cache_dir: str) -> str:
    """
    Check the proposals for a dataset. Nothing in the file is executed.

    Args:
        path: a file in either format, see the module.
        dataset_name: a registered dataset.
        cache_dir: directory for ``<dataset_name>-<digest>.pkl``, mmdetection's proposals converted.

    Returns:
        path of the file in Detectron2's format.

    Raises:
        InputError: if the file is missing, cut short, would execute code, or does not have
            proposals for each image of the dataset, or says that it is for other images.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such proposal file; tools/dump_proposals.py writes one")
    try:
        content: Any = load_arrays(path)
    except Exception as e:  # a broken file can fail in any way
        raise InputError(
            f"{path}: not loaded, because a proposal file must not hold anything but arrays, "
            f"numbers and text, or because it is cut short: {one_line(e)}"
        ) from e
    records = load_records(dataset_name)
    if isinstance(content, list):
        ids, boxes, logits = _from_mmdetection(path, content, dataset_name)
    elif isinstance(content, dict):
        ids, boxes, logits = _from_detectron2(path, content, dataset_name, records)
    else:
        raise InputError(
            f"{path}: not proposals, neither Detectron2's dict nor mmdetection's list of arrays"
        )
    for id, boxes_i, logits_i in zip(ids, boxes, logits):
        if len(boxes_i) != len(logits_i):
            raise InputError(
                f"{path}: image id {id} has {len(boxes_i)} boxes, but {len(logits_i)} scores"
            )
    # Detectron2 compares ids as text.
    by_id = {str(record["image_id"]): record for record in records}
    is_xywh = isinstance(content, dict) and content.get("bbox_mode") == BoxMode.XYWH_ABS
    for id, boxes_i in zip(map(str, ids), boxes):
        if id in by_id and len(boxes_i):
            _check_inside(path, boxes_i, by_id[id], is_xywh)
    missing = by_id.keys() - set(map(str, ids))
    if missing:
        raise InputError(
            f"{path}: there are no proposals for {counted(len(missing), 'image')} of dataset "
            f"{dataset_name!r}, the first of them id {min(missing)}"
        )
    if isinstance(content, list):
        path = os.path.join(cache_dir, f"{dataset_name}-{file_digest(path)}.pkl")
        write_proposals(path, ids, boxes, logits)
        logger.info(f"Converted mmdetection's proposals to {path}")
    return path
