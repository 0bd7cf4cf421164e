# SPDX-License-Identifier: Apache-2.0
"""What a dataset consists of, in a few words that are compared when it is used again."""

import hashlib
import json
import os
from typing import Any, Dict, Iterable, List, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..utils.digest import sha256
from .class_names import class_names

__all__ = ["digest", "file_digest", "fingerprint", "image_fingerprint", "record_fingerprint"]

_LENGTH = 16  # of a digest: hexadecimal digits, enough to tell files apart


def file_digest(path: str) -> str:
    """The start of the SHA-256 of a file's content."""
    return sha256(PathManager.get_local_path(path))[:_LENGTH]


def image_fingerprint(files: Iterable[Tuple]) -> str:
    """The number of images, and a digest of their names and sizes in bytes, whatever the order."""
    files = sorted(files)
    return f"{len(files)} ({digest(files)})"


def record_fingerprint(records: Sequence[Dict[str, Any]]) -> str:
    """As :func:`image_fingerprint`, of the ids and names of images in Detectron2's format."""
    return image_fingerprint(
        (str(record["image_id"]), os.path.basename(str(record.get("file_name"))))
        for record in records
    )


def digest(content: Any) -> str:
    """The start of the SHA-256 of lists, dicts, numbers and text."""
    text = json.dumps(content, skipkeys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; of objects their class, as their text may have an address."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__qualname__


def _moved(record: Dict[str, Any]) -> Dict[str, Any]:
    """A record without the directories of its files."""
    return {
        k: os.path.basename(v) if isinstance(v, str) and str(k).endswith("file_name") else v
        for k, v in record.items()
    }


def fingerprint(dataset_name: str) -> Dict[str, Union[str, List[str]]]:
    """
    Returns:
        what is known of a registered dataset: the names of its "classes"; digests of its
        "annotations" and, if it is one of :func:`libra_d2.data.register_coco_json`, of its
        "images". Empty if it is not registered.
    """
    if dataset_name not in DatasetCatalog:
        return {}
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    found = {"classes": list(class_names(dataset_name))}
    if metadata.get("fingerprint"):
        found.update(metadata.fingerprint)
    elif json_file:
        found["annotations"] = file_digest(json_file) if PathManager.isfile(json_file) else "absent"
    else:
        records = DatasetCatalog.get(dataset_name)
        found["annotations"] = digest([_moved(record) for record in records])
    return found
