# SPDX-License-Identifier: Apache-2.0
"""
Datasets that are read and checked once, and then mapped into memory by all processes.

:func:`cache_coco_json` and :func:`cache_registered` read a dataset in one process, and write a file
of :class:`MappedRecords` whose name depends on all that it is made from. The other processes, and
later runs, map that file.
"""

import json
import logging
import os
import re
from collections import Counter
from contextlib import closing, suppress
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import numpy as np
from pycocotools import mask as coco_masks
from torch.utils import data as torchdata

import detectron2
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import print_instances_class_histogram
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .. import __version__
from ..errors import InputError, one_line
from ..utils.atomic_write import atomic_write
from ..utils.display import class_colors
from .coco_json import COCOEntries, log_changes
from .fingerprint import digest, file_digest, image_fingerprint
from .image_checks import UNKNOWN, ImageChecks, ResizeLimits, check_resized
from .mapped_records import LAYOUT, MappedRecords, Outline, RecordWriter, all_objects

__all__ = [
    "CachedDataset",
    "cache_coco_json",
    "cache_registered",
    "load_dataset",
    "load_records",
    "outline",
    "register_cached",
    "register_coco_json",
    "use_cached",
]

logger = logging.getLogger(__name__)

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")  # that Detectron2 keeps
# Detectron2's functions whose records depend on the JSON, the image directory and nothing else.
_CACHEABLE = ("detectron2.data.datasets.coco", "detectron2.data.datasets.lvis")


class CachedDataset(NamedTuple):
    """A dataset in a file, see :func:`register_cached`."""

    #: of the file of :class:`MappedRecords`
    path: str
    #: directory that the names of images are relative to
    image_root: str
    #: values of its metadata
    metadata: Dict[str, Any]


class _Loader:
    """The function of a dataset in Detectron2's catalog whose records are mapped."""

    def __init__(self, cached: CachedDataset, original: Optional[Callable] = None):
        self.records = MappedRecords(cached.path, cached.image_root)
        self.original = original

    def __call__(self) -> List[Dict[str, Any]]:
        return list(self.records)


def _find(path: str, json_file: str) -> Optional[MappedRecords]:
    """The records that were made of a file; None if there are none, and it has to be read."""
    try:
        records = MappedRecords(path)
    except (OSError, ValueError, KeyError):  # there are none, cut short, or of another version
        logger.info(f"Reading {json_file}")
        return None
    logger.info(f"{json_file} was read before: using {path}")
    return records


def _remove_others(path: str) -> None:
    """Remove the files of earlier content of a dataset, whose names have another digest."""
    folder, file = os.path.split(path)
    name, own = re.fullmatch(r"(.*)-([0-9a-f]+)\.records", file).groups()
    for other in os.listdir(folder):
        found = re.fullmatch(rf"{re.escape(name)}-([0-9a-f]{{{len(own)}}})[-.].*", other)
        if found and found[1] != own:
            with suppress(OSError):
                os.remove(os.path.join(folder, other))


def _as_detectron2(annotation: Dict[str, Any], with_masks: bool) -> Optional[Dict[str, Any]]:
    """
    As ``detectron2.data.datasets.load_coco_json``; None for an object whose polygons have too few
    corners, which Detectron2 leaves out.
    """
    found = {key: annotation[key] for key in _KEYS if key in annotation}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        segmentation = coco_masks.frPyObjects(segmentation, *segmentation["size"])
    elif segmentation and not isinstance(segmentation, dict):
        segmentation = [x for x in segmentation if len(x) % 2 == 0 and len(x) >= 6]
        if not segmentation:
            return None
    if segmentation and with_masks:  # the ground truth that is drawn is what a model is trained on
        found["segmentation"] = segmentation
    if found.get("keypoints"):  # from indices of pixels to coordinates
        found["keypoints"] = [
            v if i % 3 == 2 else v + 0.5 for i, v in enumerate(found["keypoints"])
        ]
    found["bbox_mode"] = int(BoxMode.XYWH_ABS)
    return found


class _Images:
    """The image files of a dataset, and a file with their states when they were checked."""

    def __init__(
        self, records: str, image_root: str, json_file: str, limits: ResizeLimits, amount: int
    ):
        folder = digest(os.path.realpath(image_root))
        self.states_file = f"{os.path.splitext(records)[0]}-{folder}.npy"
        self.image_root, self.json_file = image_root, json_file
        self.limits, self.amount = limits, amount
        self.names: Sequence[str] = []
        self.before = self.states = np.empty((0, 2))
        self.checks: Optional[ImageChecks] = None

    def check(self, names: Sequence[str], sizes: np.ndarray, is_idle: bool = True) -> None:
        """Start to check those that were not checked before, see :class:`ImageChecks`."""
        check_resized(names, sizes, self.image_root, self.limits)
        self.names, self.before = names, np.full((len(names), 2), UNKNOWN)
        with suppress(OSError, ValueError, EOFError):  # there is none, or it is cut short
            self.before[:] = np.load(self.states_file)
        self.states = self.before.copy()
        self.checks = ImageChecks(
            *(names, sizes, self.image_root, self.json_file),
            amount=self.amount,
            states=self.states,
            is_idle=is_idle,
        )

    def close(self) -> None:
        """End the checks, as after an error in the annotations."""
        if self.checks is not None:
            self.checks.close()

    def finish(self) -> str:
        """Wait for the checks; returns the :func:`image_fingerprint`."""
        try:
            self.checks.finish()
        finally:
            if not np.array_equal(self.states, self.before):
                with atomic_write(self.states_file) as file:
                    np.save(file, self.states)
        return image_fingerprint(zip(self.names, self.states[:, 0].tolist()))


def _write_records(path: str, entries: COCOEntries, images: _Images) -> None:
    """The images are checked while the annotations are read."""
    writer, categories = RecordWriter(), []
    for key, entry in entries:
        if key == "annotations" and images.checks is None:
            images.check(*writer.images(), is_idle=False)
        if key == "images":
            fields = {key: entry[key] for key in ("height", "width")}
            writer.add_image(entry["file_name"], {**fields, "image_id": entry["id"]})
        elif key == "categories":
            categories.append((entry["id"], entry["name"]))
        else:
            found = _as_detectron2(entry, entries.mask_format is not None)
            if found is not None:
                writer.add_object(entry["image_id"], found)
    ids, classes = zip(*sorted(categories))
    info = {
        "classes": classes,
        "changes": +entries.changes,
        "has_byte_order_mark": entries.lists.has_byte_order_mark,
    }
    writer.save(path, info, list(ids))


def _write_changed(path: str, entries: COCOEntries, is_renumbered: bool) -> None:
    """Write the checked entries as a JSON file."""
    previous, number = "", 0
    with atomic_write(path, "w") as file:
        for key, entry in entries:
            if key != previous:
                file.write(f"{'], ' if previous else '{'}{json.dumps(key)}: [")
            if key == "annotations" and is_renumbered:
                number += 1
                entry["id"] = number
            file.write(f"{', ' if key == previous else ''}{json.dumps(entry)}")
            previous = key
        file.write("]")
        for name, value in entries.lists.rest.items():
            file.write(f", {json.dumps(name)}: {json.dumps(value)}")
        file.write("}")


def cache_coco_json(
    name: str,
    json_file: str,
    image_root: str,
    cache_dir: str,
    mask_format: Optional[str] = None,
    limits: Optional[ResizeLimits] = None,
    amount: int = -1,
) -> CachedDataset:
    """
    Read and check a dataset, unless an earlier call has left its file in ``cache_dir``.

    If :class:`COCOEntries` had to change annotations, a warning says how, and evaluation uses the
    changed ones, which are written to ``<cache_dir>/<name>-<digest>.json``.

    Args:
        name: of the dataset.
        json_file, image_root: annotations, and the directory that their file names are relative to.
        cache_dir: directory for files, created when needed.
        mask_format: see :class:`COCOEntries`. None leaves masks out.
        limits: what the images are resized to.
        amount: how many images to check, see :class:`ImageChecks`.

    Raises:
        InputError: see :class:`COCOEntries` and :class:`ImageChecks`.
    """
    entries = COCOEntries(json_file, mask_format)
    annotations = entries.lists.digest()
    key = digest([annotations, mask_format, __version__, LAYOUT])
    path = os.path.join(cache_dir, f"{name}-{key}.records")
    records = _find(path, json_file)
    with closing(_Images(path, image_root, json_file, limits or {}, amount)) as images:
        if records is None:
            os.makedirs(cache_dir, exist_ok=True)
            _write_records(path, entries, images)
            records = MappedRecords(path)
            _remove_others(path)
        else:
            images.check(records.all_names(), records.all_sizes)
        image_content = images.finish()
    changes = Counter(records.info["changes"])
    log_changes(json_file, changes)
    if changes or records.info["has_byte_order_mark"]:
        json_file = f"{os.path.splitext(path)[0]}.json"
        if not os.path.exists(json_file):
            _write_changed(json_file, entries, "annotation id" in changes)
    classes = records.info["classes"]
    metadata = {
        "json_file": json_file,
        "image_root": image_root,
        "evaluator_type": "coco",
        "thing_classes": classes,
        "thing_colors": class_colors(len(classes)),
        "thing_dataset_id_to_contiguous_id": records.class_of,
        "num_images": len(records),
        "fingerprint": {"annotations": annotations, "images": image_content},
    }
    return CachedDataset(path, image_root, metadata)


def register_cached(name: str, cached: CachedDataset) -> List[str]:
    """
    Register a dataset with Detectron2, or replace one that is registered already.

    Returns:
        names of the classes, in the order of their category ids.
    """
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, _Loader(cached))
    MetadataCatalog.get(name).set(**cached.metadata)
    return cached.metadata["thing_classes"]


def register_coco_json(name: str, *args: Any, **kwargs: Any) -> List[str]:
    """:func:`register_cached` of :func:`cache_coco_json`, which has the arguments."""
    return register_cached(name, cache_coco_json(name, *args, **kwargs))


def _original(name: str) -> Optional[Callable]:
    """Detectron2's own function for a dataset of COCO or LVIS, if ``name`` is one."""
    function = DatasetCatalog.data.get(name)
    function = function.original if isinstance(function, _Loader) else function
    return function if getattr(function, "__module__", None) in _CACHEABLE else None


def cache_registered(name: str, cache_dir: str) -> Optional[CachedDataset]:
    """
    As :func:`cache_coco_json`, for a dataset that Detectron2 has registered, or that
    ``register_coco_instances`` has, without checks.

    Returns:
        None for other datasets, and those whose file is not there.
    """
    original, metadata = _original(name), MetadataCatalog.get(name)
    json_file = PathManager.get_local_path(metadata.get("json_file") or "")
    if original is None or not os.path.isfile(json_file):
        return None
    annotations = file_digest(json_file)
    versions = (__version__, LAYOUT, detectron2.__version__)
    key = digest([annotations, metadata.get("image_root"), *versions])
    path = os.path.join(cache_dir, f"{name.replace(os.sep, '_')}-{key}.records")
    if _find(path, json_file) is None:
        os.makedirs(cache_dir, exist_ok=True)
        writer = RecordWriter()
        try:
            for record in original():
                writer.add_record(record)
        except (KeyError, TypeError, ValueError) as e:
            logger.info(f"dataset {name!r} is kept in memory: {one_line(e)}")
            return None
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        info = {"classes": metadata.get("thing_classes"), "ids": ids and list(ids.items())}
        writer.save(path, info)
        _remove_others(path)
    info = MappedRecords(path).info
    found = {
        "thing_classes": info["classes"],
        "thing_dataset_id_to_contiguous_id": info["ids"] and dict(info["ids"]),
        "fingerprint": {"annotations": annotations},
    }
    return CachedDataset(path, "", {k: v for k, v in found.items() if v})


def use_cached(name: str, cached: CachedDataset) -> None:
    """Replace the function of a registered dataset, see :func:`cache_registered`."""
    loader = _Loader(cached, _original(name))
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**cached.metadata)


def load_records(name: str) -> Sequence[Dict[str, Any]]:
    """The images of a registered dataset in Detectron2's format; mapped into memory if they can."""
    function = DatasetCatalog.data.get(name)
    return function.records if isinstance(function, _Loader) else DatasetCatalog.get(name)


def load_dataset(
    names: Union[str, Sequence[str]],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Optional[Sequence[str]] = None,
    check_consistency: bool = True,
) -> Sequence[Dict[str, Any]]:
    """
    Detectron2's ``get_detection_dataset_dicts``, which has the arguments. Datasets in files are
    mapped into memory; with proposals, and beside others, they are loaded.
    """
    names = [names] if isinstance(names, str) else list(names)
    loaders = [DatasetCatalog.data.get(name) for name in names if proposal_files is None]
    if not loaders or not all(isinstance(x, _Loader) for x in loaders):
        return get_detection_dataset_dicts(
            names, filter_empty, min_keypoints, proposal_files, check_consistency
        )
    datasets = [x.records for x in loaders]
    total = sum(map(len, datasets))
    if filter_empty:
        datasets = [x.select(x.num_objects() > 0) for x in datasets]
    if min_keypoints > 0:
        datasets = [x.select(x.num_keypoints() >= min_keypoints) for x in datasets]
    left = sum(map(len, datasets))
    logger.info(f"Removed {total - left} images with no usable annotations. {left} images left.")
    if not left:
        raise InputError(f"{', '.join(names)}: no image has an object to train on")
    if check_consistency:
        check_metadata_consistency("thing_classes", names)
        classes = MetadataCatalog.get(names[0]).get("thing_classes")
        if classes:
            print_instances_class_histogram([{"annotations": all_objects(datasets)}], classes)
    return datasets[0] if len(datasets) == 1 else torchdata.ConcatDataset(datasets)


def outline(dataset: Sequence[Dict[str, Any]]) -> Sequence[Dict[str, Any]]:
    """The classes of each image of a :func:`load_dataset`, for samplers."""
    parts = dataset.datasets if isinstance(dataset, torchdata.ConcatDataset) else [dataset]
    return Outline(parts) if isinstance(parts[0], MappedRecords) else dataset
