# SPDX-License-Identifier: Apache-2.0
import copy
import math
from collections import Counter

import pytest
from test_coco_json import DATASET, write

from detectron2.data.datasets import load_coco_json

from libra_d2.data.coco_json import read_coco_json
from libra_d2.data.coco_schema import SCHEMA, EntryChecker, are_numbers, shorten
from libra_d2.errors import InputError

KINDS = {"image": "images", "annotation": "annotations", "category": "categories"}
SURROGATE = "\ud800.png"


def dataset_with(kind, field, value):
    """DATASET whose first entry of a kind has that value; references to an id are changed, too."""
    dataset = copy.deepcopy(DATASET)
    entry = dataset[KINDS[kind]][0]
    if field == "id" and kind != "annotation":
        for annotation in dataset["annotations"]:
            if annotation[f"{kind}_id"] == entry["id"]:
                annotation[f"{kind}_id"] = value
    entry[field] = value
    # An annotation may name an id that is refused; it is checked last.
    return {key: dataset[key] for key in ("images", "categories", "annotations")}


def read(folder, dataset, mask_format=None):
    return read_coco_json(write(folder, dataset), mask_format)


REFUSED = {
    **{(kind, "id"): [None, [], {}, True, "", math.nan, math.inf] for kind in KINDS},
    ("annotation", "image_id"): [None, [], {}, True, "", 12345],
    ("annotation", "category_id"): [None, [], {}, False, 12345],
    ("annotation", "bbox"): [
        *(None, 3, "1,2,3,4", {}, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, None]),
        *([True, True, True, True], [1, 2, 3, math.nan], [0, 0, 10**400, 4], [0, 0, 1.1e15, 4]),
        *([1, 2, 3, 4, 5], [1, 2, 3, True], [-(10**16), 0, 1, 1]),
    ],
    ("annotation", "area"): ["9", [9], {}, True, math.nan, math.inf, -1, 10**400],
    ("annotation", "iscrowd"): [2, -1, 0.5, 2.0, "0", [], {}, math.nan],
    ("annotation", "ignore"): [1, True, "no", []],
    ("category", "name"): [None, [], {}, "", "  ", True, math.nan, math.inf, "dog"],
    ("image", "file_name"): [None, 3, [], {}, "", " ", "a\0.png", SURROGATE, "b.png"],
    ("image", "width"): [None, "100", 0, 0.0, -1, -2.0, 1.5, True, [], math.nan, 2**31],
    ("image", "height"): [None, 0, 2**31],
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(*key, value) for key, values in REFUSED.items() for value in values],
)
def test_refused(tmp_path, kind, field, value):
    """The message is one line that names file, entry and field."""
    with pytest.raises(InputError) as error:
        read(tmp_path, dataset_with(kind, field, value))
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/instances.json: {kind} ")
    assert "\n" not in line
    message = f" has the {field} {shorten(value)}; it must be "
    if value in (12345, "dog", "b.png"):  # legal by itself
        message = field.replace("_id", " id") if value == 12345 else f"the same {field}, {value!r}"
    assert message in line


MISSING = object()
LEGAL = {  # values, and what they are repaired to
    ("annotation", "iscrowd"): [(value, 0) for value in (MISSING, None, False, 0.0)],
    ("annotation", "area"): [(0,), (0.5,), (1e15,), (10**15,), (MISSING, 1200), (None, 1200)],
    ("annotation", "bbox"): [([0.0, 0, 1e-9, 80],)],
    ("annotation", "ignore"): [(0,), (False,)],
    ("category", "name"): [(7, "7"), (-2.5, "-2.5"), (" a",), ("\u65e5",)],
    ("image", "width"): [(100.0, 100), (41,), (2**31 - 1,)],
    ("image", "height"): [(80.0, 80)],
    ("image", "file_name"): [("a",), (" \u00e9/..\\n ",)],
}


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [(*key, values) for key, cases in LEGAL.items() for values in cases],
)
def test_legal(tmp_path, kind, field, values):
    """Kept, or repaired and counted by field."""
    dataset = dataset_with(kind, field, values[0])
    if values[0] is MISSING:
        del dataset[KINDS[kind]][0][field]
    dataset, changes = read(tmp_path, dataset)
    assert dataset[KINDS[kind]][0][field] == values[-1]
    assert type(dataset[KINDS[kind]][0][field]) is type(values[-1])
    assert changes == ({f"{kind} {field}": 1} if len(values) > 1 else {})


@pytest.mark.parametrize("value", [True, 1.0])
def test_crowds(tmp_path, value):
    """Repairs of a field are counted together, those of 'ignore' are not."""
    dataset = dataset_with("annotation", "ignore", None)
    crowd = dataset["annotations"][1]
    crowd.update(iscrowd=value, area=None)
    dataset["annotations"].append({**crowd, "id": 3, "bbox": [1, 2, 0.5, 0.25]})
    dataset, changes = read(tmp_path, dataset)
    kept = [(a["iscrowd"], a["area"], a.get("ignore")) for a in dataset["annotations"]]
    assert kept == [(0, 9, 0), (1, 3600, None), (1, 0.125, None)]
    assert type(crowd["iscrowd"]) is not type(dataset["annotations"][1]["iscrowd"]) is int
    assert changes == {"annotation iscrowd": 2, "annotation area": 2}


def test_urls(tmp_path):
    """LVIS' images are in the folder of their split; 'file_name' takes precedence."""
    dataset = dataset_with("image", "coco_url", "http://x.org/z/val2017/a.png")
    assert read(tmp_path, dataset)[0]["images"][0]["file_name"] == "a.png"
    del dataset["images"][0]["file_name"]
    assert read(tmp_path, dataset)[0]["images"][0]["file_name"] == "val2017/a.png"
    for bad in (3, "", None):
        dataset["images"][0]["coco_url"] = bad
        with pytest.raises(InputError, match="s.json: image id 7 has no 'file_name'$"):
            read(tmp_path, dataset)
    dataset["images"][0].update(coco_url="x/a.png", file_name=None)
    with pytest.raises(InputError, match="has the file_name None; it must be the name of a file$"):
        read(tmp_path, dataset)


def test_messages(tmp_path):
    """Entries without an id are named by their number; values are cut after 60 characters."""
    dataset = copy.deepcopy(DATASET)
    del dataset["images"][1]["id"]
    with pytest.raises(InputError, match="s.json: image number 1 has no 'id'$"):
        read(tmp_path, dataset)
    with pytest.raises(InputError, match="s.json: category number 0 has the id None; it must be a"):
        read(tmp_path, dataset_with("category", "id", None))
    dataset["images"][1] = 3
    with pytest.raises(InputError, match="s.json: image number 1 must be an object, not 3$"):
        read(tmp_path, dataset)
    assert [shorten("x" * n) for n in (58, 59)] == [repr("x" * 58), "'" + "x" * 59 + "..."]


@pytest.mark.parametrize("kind", KINDS)
def test_ids(tmp_path, kind):
    for value in (-5, 0, 2**62, 2**80, 1.5):
        read(tmp_path, dataset_with(kind, "id", value))
    with pytest.raises(InputError, match=f"some {kind} ids are text and some are numbers"):
        read(tmp_path, dataset_with(kind, "id", "a"))
    with pytest.raises(InputError, match=f"{kind} id {DATASET[KINDS[kind]][1]['id']} occurs more"):
        read(tmp_path, dataset_with(kind, "id", DATASET[KINDS[kind]][1]["id"]))


def test_numbers():
    """The smallest image, and of which polygons consist."""
    entry = {"id": 1, "width": 1.0, "height": 1, "file_name": "a"}
    assert repr(EntryChecker("image", "", Counter())(entry)["width"]) == "1"
    for value in ([], [1], [1, 0.5], [-0.5e15, 0.5e15]):
        assert are_numbers(value)
    bad = ("6", None, True, math.nan, math.inf, -1.1e15, 10**400)
    for value in (None, (1,), *([1, 0.5, x] for x in bad)):
        assert not are_numbers(value)


VALUES = [
    *(None, True, 0, -1, 7, 2**70, 0.5, 1e300, math.nan, "", "x", "\ud800", "1\n2", [], [[]], {}),
    *([1, "a"], [[1, 2, 3]], [[1, 2, 3, 4, 5, 6]], [1, 2, 3, 4], [3], {"id": 3}, [{"id": 3}]),
    *({"size": [80, 100], "counts": x} for x in ([8000], "0", "P", {}, [8001, -1], None)),
]


@pytest.mark.parametrize("mask_format", [None, "polygon", "bitmask"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(tmp_path, kind, mask_format):
    """Any value in any field gives a dataset that Detectron2 can load, or an error of one line."""
    num_read = 0
    for field in (*SCHEMA[kind], "segmentation", "coco_url"):
        for i, value in enumerate(VALUES):
            dataset = dataset_with(kind, field, value)
            for annotation in dataset["annotations"]:
                annotation.setdefault("segmentation", [[1, 2, 3, 4, 5, 6]])
            try:
                found, _ = read(tmp_path, dataset, mask_format)
            except InputError as e:
                assert "\n" not in str(e)  # noqa: PT017
                continue
            name = f"any_{kind}_{field}_{mask_format}_{i}"
            load_coco_json(write(tmp_path, found), str(tmp_path), name)
            num_read += 1
    assert num_read > 0
