# SPDX-License-Identifier: Apache-2.0
"""Annotations in COCO's JSON format, checked while they are read."""

import json
import logging
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from ..errors import InputError, counted
from .coco_schema import EntryChecker, are_numbers, shorten
from .json_lists import JSONLists
from .run_lengths import check_run_lengths

__all__ = ["COCOEntries", "log_changes", "read_categories", "read_coco_json"]

logger = logging.getLogger(__name__)

_KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}


def _check_mask(segmentation: Any, size: Tuple[int, int], mask_format: str, where: str) -> None:
    """Raise InputError unless Detectron2 can train on the mask of an object, see COCOEntries."""
    if not segmentation:
        raise InputError(
            f"{where} has no 'segmentation' (needed by models with masks and for --iou-type segm)"
        )
    if isinstance(segmentation, dict):
        try:
            check_run_lengths(segmentation, height=size[1], width=size[0])
        except ValueError as e:
            raise InputError(f"{where}: {e}") from None
        if mask_format == "polygon":
            raise InputError(
                f"{where} has a run-length mask; set INPUT.MASK_FORMAT to 'bitmask' to use it"
            )
        return
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        if not are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2 != 0:
            raise InputError(
                f"{where}: a polygon must be a list of 6 or more numbers in pairs, "
                f"[x, y, x, y, ...]; found {shorten(polygon)}"
            )


def _is_loadable(segmentation: Any, size: Tuple[int, int]) -> bool:
    """Whether Detectron2 can load a mask that no model is trained on."""
    if isinstance(segmentation, dict):
        try:
            check_run_lengths(segmentation, height=size[1], width=size[0])
        except ValueError:
            return False
        return True
    if not segmentation:
        return segmentation in (None, [])
    # Detectron2 drops polygons with an odd number of coordinates or too few.
    return isinstance(segmentation, list) and all(isinstance(x, list) for x in segmentation)


def _clip(box: List[float], width: int, height: int) -> List[float]:
    """The part of a box, [x, y, width, height], that is in an image of that size."""
    left, right = (min(max(v, 0), width) for v in (box[0], box[0] + box[2]))
    top, bottom = (min(max(v, 0), height) for v in (box[1], box[1] + box[3]))
    return [left, top, right - left, bottom - top]


class COCOEntries:
    """
    The entries of a file in COCO's format, LVIS' variant of it included, checked and repaired one
    after the other.

    Boxes are clipped to their image and those without area are dropped. Fields are checked and
    repaired as in :mod:`coco_schema`.
    """

    def __init__(self, json_file: str, mask_format: Optional[str] = None):
        """
        Args:
            json_file: path of the JSON file.
            mask_format: ``INPUT.MASK_FORMAT``, "polygon" or "bitmask", if each object must have a
                mask.
        """
        self.json_file = json_file
        self.mask_format = mask_format
        self.lists = JSONLists(json_file, tuple(_KINDS))
        #: how many boxes were "clipped" and "dropped", and how many values of each field, such as
        #: "annotation iscrowd", were repaired; complete after the last entry
        self.changes: Counter = Counter()

    def __iter__(self) -> Iterator[Tuple[str, Dict[str, Any]]]:
        """
        The name of its list, and each entry that is left. Images precede annotations.

        Raises:
            InputError: if the file is missing, cut short, or inconsistent. The message names the
                entry.
        """
        self.changes.clear()
        self._checkers = {
            k: EntryChecker(x, self.json_file, self.changes) for k, x in _KINDS.items()
        }
        self._sizes: Dict[Any, Tuple[int, int]] = {}
        self._first_uses: Dict[Any, Any] = {}  # of category ids: the annotation's id
        self._num_kept = self._num_objects = 0
        self._has_odd_ids = False
        yield from self._read(lambda key: key != "annotations" or "images" in self.lists.found)
        self._check_lists()
        if self.lists.found.index("annotations") < self.lists.found.index("images"):
            yield from self._read(lambda key: key == "annotations")
        self._check_all()

    def _read(self, is_read: Callable[[str], bool]) -> Iterator[Tuple[str, Dict[str, Any]]]:
        for key, entry in self.lists:
            if not is_read(key):
                continue
            entry = self._checkers[key](entry)
            if key == "images":
                self._sizes[entry["id"]] = entry["width"], entry["height"]
            if key != "annotations" or self._keep(entry):
                yield key, entry

    def _keep(self, annotation: Dict[str, Any]) -> bool:
        """Check and clip an annotation; False if nothing of it is left."""
        id = annotation["image_id"]
        if id not in self._sizes:
            self._check_lists()
            where = self._where(annotation["id"])
            alike = [x for x in self._sizes if str(x) == str(id)]
            hint = f"; it has {alike[0]!r}: use numbers in both, or text" if alike else ""
            shown = repr(id) if alike else shorten(id)
            raise InputError(f"{where} names image id {shown}, which 'images' lacks{hint}")
        self._first_uses.setdefault(annotation["category_id"], annotation["id"])
        size = self._sizes[id]
        x, y, width, height = annotation["bbox"]
        is_inside = x >= 0 and y >= 0 and x + width <= size[0] and y + height <= size[1]
        if not is_inside or min(width, height) <= 0:
            clipped = _clip(annotation["bbox"], *size)
            if min(clipped[2:]) <= 0:
                self.changes["dropped"] += 1
                return False
            # Rounding errors of x + width are smaller than this.
            if max(abs(a - b) for a, b in zip(annotation["bbox"], clipped)) > 1e-2:
                self.changes["clipped"] += 1
                annotation["bbox"] = clipped
        segmentation = annotation.get("segmentation")
        if self.mask_format is not None and not annotation["iscrowd"]:
            _check_mask(segmentation, size, self.mask_format, self._where(annotation["id"]))
        elif not _is_loadable(segmentation, size):
            self.changes["annotation segmentation"] += 1
            annotation["segmentation"] = []
        self._num_kept += 1
        self._num_objects += not annotation["iscrowd"]
        # pycocotools takes the id 0 for "not matched".
        id = annotation["id"]
        self._has_odd_ids |= not (type(id) is int and 0 < id < 2**31)
        return True

    def _where(self, id: Any) -> str:
        return f"{self.json_file}: annotation id {shorten(id)}"

    def _check_lists(self) -> None:
        for key in _KINDS:
            is_read = key in self.lists.found
            if not is_read and (self.lists.is_complete or key in self.lists.rest):
                raise InputError(f"{self.json_file}: not in COCO format, there is no list {key!r}")
            if is_read and key != "annotations" and not self._checkers[key].count:
                raise InputError(f"{self.json_file}: there are no {key}")

    def _check_all(self) -> None:
        """Checks for which all entries must have been read."""
        for id, annotation in self._first_uses.items():
            if id not in self._checkers["categories"].ids:
                raise InputError(
                    f"{self._where(annotation)} names category id {shorten(id)}, which "
                    "'categories' lacks"
                )
        if not self._num_objects:
            raise InputError(
                f"{self.json_file}: there are no objects in it (crowds and empty boxes aside)"
            )
        if self._has_odd_ids:
            self.changes["annotation id"] += self._num_kept


def read_coco_json(json_file: str, mask_format: Optional[str] = None) -> Tuple[Dict, Counter]:
    """
    Read all of a JSON file with :class:`COCOEntries`, which has the arguments and the errors.
    Annotations are numbered anew if pycocotools cannot use their ids.

    Returns:
        the dataset, and the :attr:`COCOEntries.changes`.
    """
    entries = COCOEntries(json_file, mask_format)
    lists: Dict[str, List] = {key: [] for key in _KINDS}
    for key, entry in entries:
        lists[key].append(entry)
    if entries.changes["annotation id"]:
        for number, annotation in enumerate(lists["annotations"], 1):
            annotation["id"] = number
    return {**entries.lists.rest, **lists}, +entries.changes


def log_changes(json_file: str, changes: Counter) -> None:
    """Log the changes that :func:`read_coco_json` has made as warnings."""
    boxes = {"clipped": "that extended beyond the image", "dropped": "without an area in the image"}
    done = [f"{k} {counted(changes[k], 'box')} {which}" for k, which in boxes.items() if changes[k]]
    if done:
        logger.warning(f"{json_file}: {', and '.join(done)}")
    repaired = {k: n for k, n in changes.items() if k not in ("clipped", "dropped")}
    if repaired:
        counts = ", ".join(f"{what} of {n}" for what, n in repaired.items())
        logger.warning(f"{json_file}: repaired or filled in: {counts}")


def read_categories(path: str) -> List[str]:
    """Names of the categories in a COCO JSON, in the order of a model's classes."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            categories = json.load(f)["categories"]
        return [str(c["name"]) for c in sorted(categories, key=lambda c: c["id"])]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: no COCO JSON with categories ({e})") from e
