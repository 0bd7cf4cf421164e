# SPDX-License-Identifier: Apache-2.0
import json
import pickle

import numpy as np
import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog, load_proposals_into_dataset
from detectron2.structures import BoxMode

from libra_d2.data import prepare_proposals, register_coco_json
from libra_d2.data.proposals import PartialProposals, is_complete, write_proposals
from libra_d2.errors import InputError

NAME = "test_proposals"


@pytest.fixture
def ids(synthetic, tmp_path):
    """Image ids of a registered dataset, in the order of its JSON, which is not sorted."""
    dataset = json.loads((synthetic / "instances.json").read_text())
    dataset["images"].reverse()
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(dataset))
    register_coco_json(NAME, str(path), str(synthetic / "images"), str(tmp_path))
    yield [image["id"] for image in dataset["images"]]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def arrays(num_images):
    """As mmdetection writes them: boxes and scores, best first; the last image has none."""
    rng = np.random.default_rng(0)
    return [
        np.column_stack([rng.random((n, 4)), -np.sort(-rng.random(n))]).astype(np.float32)
        for n in range(num_images - 1, -1, -1)
    ]


def write(folder, content):
    path = folder / "proposals.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return str(path)


def detectron2s(ids):
    return {
        "ids": list(ids),
        "boxes": [a[:, :4] for a in arrays(len(ids))],
        "objectness_logits": [a[:, 4] for a in arrays(len(ids))],
        "bbox_mode": BoxMode.XYXY_ABS,
    }


def test_from_mmdetection(ids, tmp_path):
    """Each image gets its own boxes, in the order of their scores."""
    theirs = arrays(len(ids))
    theirs[3][0, 4], theirs[3][1, 4] = 1.0, 1 - 1e-7
    path = prepare_proposals(write(tmp_path, theirs), NAME, str(tmp_path / "cache"))
    assert path == str(tmp_path / f"cache/{NAME}.pkl")
    read = load_proposals_into_dataset(DatasetCatalog.get(NAME), path)
    assert len(read) == len(ids)
    for record in read:
        expected = theirs[ids.index(record["image_id"])]
        np.testing.assert_array_equal(record["proposal_boxes"], expected[:, :4])
        probability = 1 / (1 + np.exp(-record["proposal_objectness_logits"].astype(np.float64)))
        np.testing.assert_allclose(probability, expected[:, 4], atol=1e-6)
        assert record["proposal_bbox_mode"] == BoxMode.XYXY_ABS


@pytest.mark.parametrize("older", [False, True])
def test_from_detectron2(ids, tmp_path, older):
    """The file is used as it is; Detectron's older names are known."""
    content = detectron2s(ids)
    if older:
        content["indexes"], content["scores"] = content.pop("ids"), content.pop("objectness_logits")
    path = write(tmp_path, content)
    assert prepare_proposals(path, NAME, str(tmp_path)) == path
    assert len(load_proposals_into_dataset(DatasetCatalog.get(NAME), path)) == len(ids)


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


def without(key):
    def change(content):
        del content[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["boxes"].pop(), "not proposals, which are 'ids', 'boxes' and 'obj"),
        (without("ids"), "not proposals, .* found 'boxes', 'objectness_logits', 'bbox_mode'"),
        (lambda c: c["boxes"].__setitem__(2, np.zeros((3, 5))), "boxes of image number 2 must"),
        (lambda c: c["boxes"].__setitem__(2, [[0, 0, 1, 1]]), "boxes of image number 2 .* list"),
        (lambda c: c["boxes"][1].__setitem__(0, np.nan), "number 1 must be a finite R x 4 array"),
        (lambda c: c["boxes"].__setitem__(1, np.zeros((2, 4))), "11 has 2 boxes, but 10 scores"),
        (lambda c: c["ids"].__setitem__(0, 99), "no proposals for 1 images .* first of them id 12"),
        (lambda c: c.update(bbox_mode=Malicious()), "not loaded, .* refers to .*open"),
    ],
)
def test_bad_detectron2_file(ids, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    content = detectron2s(ids)
    change(content)
    with pytest.raises(InputError, match=message) as error:
        prepare_proposals(write(tmp_path, content), NAME, str(tmp_path))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/proposals.pkl: ")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([np.zeros((2, 5), np.float32)], "has proposals for 1 images, but dataset .* has 12"),
        ([np.zeros((2, 4), np.float32)] * 12, "proposals of image number 0 must .* R x 5"),
        ([Malicious()] * 12, "not loaded, .* refers to .*open, which may run code"),
        (pickle.dumps(arrays(12))[:500], "not loaded, .* cut short"),
        (b"", "not loaded, .* cut short"),
        (b"<html>", "not loaded"),
        ("text", "not proposals, neither Detectron2's dict nor"),
    ],
)
def test_bad_file(ids, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        prepare_proposals(write(tmp_path, content), NAME, str(tmp_path))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instances.json", "proposals.pkl"]


def test_no_file(ids):
    with pytest.raises(InputError, match="none.pkl: no such proposal file; tools/dump_proposals"):
        prepare_proposals("none.pkl", NAME, "none")


def run(path, identity, total, stop=None):
    """Add arrays until ``total`` or ``stop`` of them are there; returns how many were read."""
    with PartialProposals(str(path), identity) as partial:
        before = len(partial.arrays)
        for array in arrays(total)[before:stop]:
            partial.append(array[:, :4], array[:, 4])
        if stop is None:
            partial.finish(str(path.with_suffix(".pkl")), list(range(total)))
    return before


@pytest.mark.parametrize("lost_bytes", [0, 1, 30, 100, 10**6])
def test_going_on(tmp_path, lost_bytes):
    """After a stop in the middle of writing, whole arrays are kept; the result is the same."""
    path = tmp_path / "x.partial"
    run(path, "a", 12, stop=7)
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - lost_bytes, 0)])
    kept = run(path, "a", 12)
    assert kept == {0: 7, 1: 6, 30: 6, 100: 6, 10**6: 0}[lost_bytes]
    assert not path.exists()
    assert is_complete(str(tmp_path / "x.pkl"), "a")
    assert not is_complete(str(tmp_path / "x.pkl"), "b")
    with open(tmp_path / "x.pkl", "rb") as f:
        result = pickle.load(f)
    for boxes, logits, expected in zip(
        result["boxes"], result["objectness_logits"], arrays(12), strict=True
    ):
        np.testing.assert_array_equal(np.column_stack([boxes, logits]), expected)


def test_another_computation_is_not_continued(tmp_path):
    path = tmp_path / "x.partial"
    run(path, "a", 12, stop=7)
    assert run(path, "b", 12) == 0


def test_nothing_left_behind(tmp_path):
    write_proposals(str(tmp_path / "a/b.pkl"), [1], [np.zeros((0, 4))], [np.zeros(0)])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.pkl"]
