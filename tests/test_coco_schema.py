# SPDX-License-Identifier: Apache-2.0
import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coco_json import DATASET

from libra_d2.data.coco_json import read_coco_json
from libra_d2.data.coco_schema import SCHEMA
from libra_d2.errors import InputError

KINDS = {"image": "images", "annotation": "annotations", "category": "categories"}
SURROGATE = "\ud800.png"


def dataset_with(kind, field, value):
    """DATASET in which the first entry of a kind has that value; ids are changed everywhere."""
    dataset = copy.deepcopy(DATASET)
    entry = dataset[KINDS[kind]][0]
    if field == "id" and kind != "annotation":
        for annotation in dataset["annotations"]:
            if annotation[f"{kind}_id"] == entry["id"]:
                annotation[f"{kind}_id"] = value
    entry[field] = value
    return dataset


def read(tmp_path, dataset):
    path = tmp_path / "a.json"
    path.write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
    return read_coco_json(str(path))


REFUSED = {
    **{
        (kind, "id"): [None, [], [1], {}, True, "", math.nan, math.inf]
        for kind in ("image", "annotation", "category")
    },
    ("annotation", "image_id"): [None, [], {}, True, "", 12345],
    ("annotation", "category_id"): [None, [], {}, False, 12345],
    ("annotation", "bbox"): [
        *(None, 3, "1,2,3,4", {}, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, None]),
        *([True, True, True, True], [1, 2, 3, math.nan], [0, 0, 10**400, 4], [0, 0, 1e300, 4]),
    ],
    ("annotation", "area"): ["9", [9], {}, True, math.nan, math.inf, -1, 10**400],
    ("annotation", "iscrowd"): [2, -1, 0.5, "0", [], {}, math.nan],
    ("annotation", "ignore"): [1, True, "no", []],
    ("category", "name"): [None, [], {}, "", "  ", True, math.nan, "dog"],
    ("image", "file_name"): [None, 3, [], {}, "", " ", "a\0.png", SURROGATE, "b.png"],
    ("image", "width"): [None, "100", 0, -1, 1.5, True, [], math.nan, 2**40],
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(*key, value) for key, values in REFUSED.items() for value in values],
)
def test_refused(tmp_path, kind, field, value):
    """In one line that names file, entry and field."""
    with pytest.raises(InputError) as error:
        read(tmp_path, dataset_with(kind, field, value))
    line = str(error.value)
    assert line.startswith(str(tmp_path / "a.json"))
    assert "\n" not in line
    assert len(line) < len(str(tmp_path)) + 300
    assert field.replace("_", " ").split()[0] in line
    assert kind in line


REPAIRED = [
    ("annotation", "iscrowd", None, 0),
    ("annotation", "iscrowd", False, 0),
    ("annotation", "iscrowd", 0.0, 0),
    ("annotation", "area", None, 1200),
    ("category", "name", 7, "7"),
    ("image", "width", 100.0, 100),
]


@pytest.mark.parametrize(("kind", "field", "value", "expected"), REPAIRED)
def test_put_right(tmp_path, kind, field, value, expected):
    """With a count by field."""
    dataset, changes = read(tmp_path, dataset_with(kind, field, value))
    assert dataset[KINDS[kind]][0][field] == expected
    assert type(dataset[KINDS[kind]][0][field]) is type(expected)
    assert changes == {f"{kind} {field}": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-5, 0, 2**62, 2**80, 1.5])
def test_ids_that_work(tmp_path, kind, value):
    read(tmp_path, dataset_with(kind, "id", value))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_two_types(tmp_path, kind):
    with pytest.raises(InputError, match=f"some {kind} ids are text and some are numbers"):
        read(tmp_path, dataset_with(kind, "id", "a"))


def test_fields_that_detectron2_reads():
    """Each is in the schema, masks and keypoints aside."""
    assert set(SCHEMA["image"]) == {"id", "width", "height", "file_name"}
    assert set(SCHEMA["category"]) == {"id", "name"}
    assert {"id", "image_id", "category_id", "bbox", "iscrowd", "area"} < set(SCHEMA["annotation"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda children: (
        st.lists(children, max_size=5)
        | st.dictionaries(st.sampled_from(["id", "size", "counts", "x"]), children, max_size=3)
    ),
    max_leaves=8,
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "drop", "repeat", "whole"]),
        st.sampled_from([*KINDS.values()]),
        st.integers(0, 1),
        st.sampled_from(
            [*SCHEMA["image"], *SCHEMA["annotation"], "name", "segmentation", "coco_url"]
        ),
        JSON,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(MUTATIONS, st.sampled_from([None, "polygon", "bitmask"]))
def test_mutated(tmp_path_factory, mutations, mask_format):
    """Any JSON in place of any value: a dataset that pycocotools reads, or one line."""
    dataset = copy.deepcopy(DATASET)
    for what, key, position, field, value in mutations:
        entries = dataset.get(key)
        if what == "whole":
            dataset[key] = value
        elif isinstance(entries, list) and position < len(entries):
            if what == "drop":
                entries.pop(position)
            elif what == "repeat":
                entries.append(copy.deepcopy(entries[position]))
            elif isinstance(entries[position], dict):
                entries[position][field] = value
    path = tmp_path_factory.mktemp("mutated") / "a.json"
    path.write_text(json.dumps(dataset))
    message = None
    try:
        found, _ = read_coco_json(str(path), mask_format)
    except InputError as e:
        message = str(e)
    if message is not None:
        assert "\n" not in message
        return
    path.write_text(json.dumps(found))
    from detectron2.data.datasets import load_coco_json

    records = load_coco_json(str(path), str(path.parent), f"mutated_{path.parent.name}")
    assert len(records) == len(found["images"])
