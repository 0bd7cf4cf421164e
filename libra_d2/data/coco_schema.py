# SPDX-License-Identifier: Apache-2.0
"""
Every field of a COCO JSON that is read: which values are legal, which are put right, and which are
refused. :mod:`coco_json` checks what the fields say about each other.
"""

import math
import os
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple

from ..errors import InputError

__all__ = ["SCHEMA", "Field", "check_entries"]

MISSING = object()
# Larger images than any file format has.
MAX_SIDE = 2**31 - 1


class Field(NamedTuple):
    """One field of an entry."""

    #: whether a value can be used as it is
    legal: Callable[[Any], bool]
    #: what a legal value is, for the message
    what: str
    #: the legal value that is meant by another one, possibly MISSING, in an entry; None for none
    repair: Callable[[Any, Dict[str, Any]], Any] = lambda value, entry: None


def is_number(value: Any) -> bool:
    """Whether it is a finite number below 1e15; truth values are none."""
    return type(value) in (int, float) and abs(value) <= 1e15


def _is_id(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int or (type(value) is str and value != "")


def _is_file_name(value: Any) -> bool:
    if type(value) is not str or not value.strip() or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _whole(value: Any, entry: Dict[str, Any]) -> Any:
    """640.0 is 640."""
    return int(value) if type(value) is float and value.is_integer() and value > 0 else None


def _file_of_url(value: Any, entry: Dict[str, Any]) -> Any:
    """LVIS' images are named as in the URL, folder included."""
    url = entry.get("coco_url")
    return "/".join(url.split("/")[-2:]) if value is MISSING and _is_file_name(url) else None


def _zero(value: Any, entry: Dict[str, Any]) -> Any:
    """LVIS leaves it out; some writers write null or a truth value."""
    if value is MISSING or value is None:
        return 0
    return int(value) if type(value) in (bool, float) and value in (0, 1) else None


def _box_area(value: Any, entry: Dict[str, Any]) -> Any:
    """That of the box, which has been checked by then."""
    x, y, width, height = entry["bbox"]
    return max(width, 0) * max(height, 0) if value is MISSING or value is None else None


def _text(value: Any, entry: Dict[str, Any]) -> Any:
    is_text = type(value) is int or (type(value) is float and math.isfinite(value))
    return str(value) if is_text else None


_ID = Field(_is_id, "a number or text")
_SIDE = Field(
    lambda v: type(v) is int and 0 < v <= MAX_SIDE, "a positive integer, in pixels", _whole
)

#: fields of the entries of each kind, in the order in which they are checked
SCHEMA: Dict[str, Dict[str, Field]] = {
    "image": {
        "id": _ID,
        "width": _SIDE,
        "height": _SIDE,
        "file_name": Field(_is_file_name, "the name of a file", _file_of_url),
    },
    "category": {
        "id": _ID,
        "name": Field(lambda v: type(v) is str and v.strip() != "", "text", _text),
    },
    "annotation": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": Field(
            lambda v: type(v) is list and len(v) == 4 and all(map(is_number, v)),
            "4 numbers, [x, y, width, height]",
        ),
        "area": Field(lambda v: is_number(v) and v >= 0, "a number of 0 or more", _box_area),
        "iscrowd": Field(lambda v: type(v) is int and v in (0, 1), "0 or 1", _zero),
        "ignore": Field(
            lambda v: type(v) in (int, bool) and not v,
            "absent or 0: COCO lacks it, use 'iscrowd'",
            lambda value, entry: 0 if value is MISSING or value is None else None,
        ),
    },
}


def shorten(value: Any, length: int = 60) -> str:
    """A value for a message, in one line."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def check_entries(entries: List[Any], kind: str, json_file: str, repaired: Counter) -> Dict:
    """
    Check the entries of one kind against :data:`SCHEMA`, and put right what can be.

    Args:
        entries: of one of the lists of the JSON. Modified in place.
        kind: key of SCHEMA.
        json_file: for the message.
        repaired: counts the values that were put right, by kind and field.

    Returns:
        the entries by their id.

    Raises:
        InputError: names file, entry, field and value.
    """
    index: Dict[Any, Dict] = {}
    fields = SCHEMA[kind].items()
    for position, entry in enumerate(entries):
        if type(entry) is not dict:
            raise InputError(
                f"{json_file}: {kind} number {position} must be an object, not {shorten(entry)}"
            )
        for name, field in fields:
            value = entry.get(name, MISSING)
            if field.legal(value):
                continue
            meant = field.repair(value, entry)
            if meant is None:
                which = f"number {position}" if name == "id" else f"id {shorten(entry['id'])}"
                if value is MISSING:
                    raise InputError(f"{json_file}: {kind} {which} has no {name!r}")
                raise InputError(
                    f"{json_file}: {kind} {which} has the {name} {shorten(value)}; it must be "
                    f"{field.what}"
                )
            entry[name] = meant
            if name != "ignore":
                repaired[f"{kind} {name}"] += 1
        if entry["id"] in index:
            raise InputError(f"{json_file}: {kind} id {shorten(entry['id'])} occurs more than once")
        index[entry["id"]] = entry
    types = {type(key) is str for key in index}
    if len(types) > 1:
        raise InputError(f"{json_file}: some {kind} ids are text and some are numbers")
    return index
