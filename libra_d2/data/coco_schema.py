# SPDX-License-Identifier: Apache-2.0
"""
The fields of a COCO JSON: which values are legal, which are repaired, and which are refused.
:mod:`coco_json` checks how they refer to each other.
"""

import math
import os
from collections import Counter
from typing import Any, Callable, Dict, NamedTuple, Set

from ..errors import InputError

__all__ = ["SCHEMA", "EntryChecker", "Field"]

MISSING = object()
MAX_SIDE = 2**31 - 1  # pixels, more than any image format allows


class Field(NamedTuple):
    """One field of an entry."""

    #: whether a value can be used as it is
    legal: Callable[[Any], bool]
    #: what a legal value is, for the message
    what: str
    #: the legal value that another one, possibly MISSING, stands for in an entry, or None
    repair: Callable[[Any, Dict[str, Any]], Any] = lambda value, entry: None


def is_number(value: Any) -> bool:
    """Whether it is a number, not a bool, of absolute value 1e15 at most."""
    return type(value) in (int, float) and abs(value) <= 1e15


def are_numbers(value: Any) -> bool:
    """Whether it is a list of numbers, no bools, whose absolute values are 1e15 at most in all."""
    # Polygons have many; a loop would take three times as long.
    try:
        is_list = type(value) is list and {*map(type, value)} <= {int, float}
        return is_list and sum(map(abs, value)) <= 1e15
    except OverflowError:  # an int beyond all floats
        return False


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
    """640.0 stands for 640."""
    return int(value) if type(value) is float and value.is_integer() and value > 0 else None


def _file_of_url(value: Any, entry: Dict[str, Any]) -> Any:
    """LVIS names images only by their URL: split and file name."""
    url = entry.get("coco_url")
    return "/".join(url.split("/")[-2:]) if value is MISSING and _is_file_name(url) else None


def _zero(value: Any, entry: Dict[str, Any]) -> Any:
    """LVIS leaves it out; some tools write null or a bool."""
    if value in (MISSING, None):
        return 0
    return int(value) if type(value) in (bool, float) and value in (0, 1) else None


def _box_area(value: Any, entry: Dict[str, Any]) -> Any:
    """The area of the box, which is checked before."""
    _, _, width, height = entry["bbox"]
    return width * height if value in (MISSING, None) else None


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
            lambda v: v is MISSING or (type(v) in (int, bool) and not v),
            "absent or 0: COCO lacks it, use 'iscrowd'",
            lambda value, entry: 0 if value is None else None,
        ),
    },
}


# Fields that identify an entry, besides its id.
_NAMES = {"image": "file_name", "category": "name"}


def shorten(value: Any, length: int = 60) -> str:
    """One line that stands for a value in a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


class EntryChecker:
    """Checks the entries of one list of a JSON, one after the other, against their kind."""

    def __init__(self, kind: str, json_file: str, repaired: Counter):
        """
        Args:
            kind: one of :data:`SCHEMA`.
            json_file: its path, for messages.
            repaired: counts repaired values by kind and field.
        """
        self.kind, self.json_file, self.repaired = kind, json_file, repaired
        self._fields = tuple(SCHEMA[kind].items())
        self._name = _NAMES.get(kind)
        self._named: Dict[str, Any] = {}  # ids
        #: those of the entries so far
        self.ids: Set[Any] = set()
        #: the number of entries so far
        self.count = 0
        self._has_text = False

    def __call__(self, entry: Any) -> Dict[str, Any]:
        """
        Check the next entry, and repair it in place.

        Raises:
            InputError: names file, entry, field and value.
        """
        if type(entry) is not dict:
            raise InputError(
                f"{self.json_file}: {self.kind} number {self.count} must be an object, not "
                f"{shorten(entry)}"
            )
        for name, field in self._fields:
            value = entry.get(name, MISSING)
            if not field.legal(value):
                self._repair(entry, name, field, value)
        self._check_id(entry["id"])
        if self._name is not None:
            self._check_name(entry["id"], entry[self._name])
        self.count += 1
        return entry

    def _repair(self, entry: Dict[str, Any], name: str, field: Field, value: Any) -> None:
        meant = field.repair(value, entry)
        if meant is None:
            which = f"number {self.count}" if name == "id" else f"id {shorten(entry['id'])}"
            where = f"{self.json_file}: {self.kind} {which} has"
            if value is MISSING:
                raise InputError(f"{where} no {name!r}")
            raise InputError(f"{where} the {name} {shorten(value)}; it must be {field.what}")
        entry[name] = meant
        if name != "ignore":
            self.repaired[f"{self.kind} {name}"] += 1

    def _check_id(self, id: Any) -> None:
        is_text = type(id) is str
        if self.ids and is_text is not self._has_text:
            raise InputError(
                f"{self.json_file}: some {self.kind} ids are text and some are numbers"
            )
        self._has_text = is_text
        if id in self.ids:
            raise InputError(
                f"{self.json_file}: {self.kind} id {shorten(id)} occurs more than once"
            )
        self.ids.add(id)

    def _check_name(self, id: Any, name: str) -> None:
        first = self._named.setdefault(name, id)
        if first != id:
            raise InputError(
                f"{self.json_file}: {self.kind} ids {shorten(first)} and {shorten(id)} have the "
                f"same {self._name}, {shorten(name)}"
            )
