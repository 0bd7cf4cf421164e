# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import re

import numpy as np
import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog, load_proposals_into_dataset
from detectron2.structures import BoxMode

from libra_d2.data import prepare_proposals, register_coco_json
from libra_d2.data.fingerprint import record_fingerprint
from libra_d2.data.proposals import write_proposals
from libra_d2.errors import InputError

NAME = "test_proposals"


@pytest.fixture
def ids(synthetic, tmp_path, tmp_path_factory):
    """Image ids of a registered dataset of 96 x 100 pixels, in descending order as in its JSON."""
    dataset = json.loads((synthetic / "instances.json").read_text())
    dataset["images"] = [{**image, "height": 100} for image in dataset["images"][::-1]]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(dataset))
    cache = tmp_path_factory.mktemp("cache")
    register_coco_json(NAME, str(path), str(synthetic / "images"), str(cache), amount=0)
    yield [image["id"] for image in dataset["images"]]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def arrays(num_images):
    """mmdetection's proposals: boxes and scores, best first; the last image has none."""
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
    """Each image gets its own boxes, in the same order, with the logits of their scores."""
    theirs = arrays(len(ids))
    theirs[3][[0, 1, -1], 4] = 1.0, 1 - 1e-7, 0.0
    path = prepare_proposals(write(tmp_path, theirs), NAME, str(tmp_path / "cache"))
    assert re.fullmatch(rf"{tmp_path}/cache/{NAME}-\w{{16}}.pkl", path)
    for record in load_proposals_into_dataset(DatasetCatalog.get(NAME), path):
        expected = theirs[ids.index(record["image_id"])]
        np.testing.assert_array_equal(record["proposal_boxes"], expected[:, :4])
        score = expected[:, 4].astype(np.float64).clip(1e-12, 1 - 1e-12)
        logits = record["proposal_objectness_logits"]
        np.testing.assert_allclose(logits, np.log(score) - np.log1p(-score), rtol=1e-5, atol=1e-6)
        assert record["proposal_bbox_mode"] == BoxMode.XYXY_ABS


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(indexes=c.pop("ids"), scores=c.pop("objectness_logits")),  # Detectron's
        lambda c: c.update(ids=list(map(str, c["ids"]))),
        lambda c: c.update(bbox_mode=int(BoxMode.XYWH_ABS)),
        lambda c: c.pop("bbox_mode"),
        # At the borders, and partly outside.
        lambda c: c["boxes"].__setitem__(
            slice(1, 4),
            [np.tile([96.0, 100], (11, 2)), np.zeros((10, 4)), np.tile([-3.0, 0, 2, 1], (9, 1))],
        ),
    ],
)
def test_from_detectron2(ids, tmp_path, change):
    """The file is used unchanged; it may have more images than the dataset."""
    content = detectron2s([99, *ids])
    change(content)
    path = write(tmp_path, content)
    assert prepare_proposals(path, NAME, str(tmp_path / "cache")) == path
    assert not (tmp_path / "cache").exists()


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


def put(key, position, value):
    return lambda content: content[key].__setitem__(position, value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda c: c["boxes"].pop(), "not proposals, which are 'ids', 'boxes' and 'obj"),
        (lambda c: c.pop("ids"), "not .*; found 'boxes', 'objectness_logits', 'bbox_mode'$"),
        (lambda c: c["objectness_logits"].pop(), "'objectness_logits' of equal length; found 'ids"),
        (lambda c: c.clear(), "'objectness_logits' of equal length; found nothing"),
        (put("boxes", 2, np.zeros((3, 5))), "boxes of image number 2 must .* of shape .3, 5.$"),
        (put("boxes", 2, [[0, 0, 1, 1]]), "boxes of image number 2 .* list"),
        (put("boxes", 0, np.zeros((11, 2, 4))), "number 0 must .* R x 4 .* shape .11, 2, 4"),
        (put("boxes", 2, np.zeros((9, 4), int)), "boxes of image number 2 must"),
        (lambda c: c["boxes"][1].__setitem__(0, np.nan), "number 1 must be a finite R x 4 array"),
        (put("objectness_logits", 2, np.zeros(())), "logits of image number 2 .* of shape ..$"),
        (put("boxes", 2, np.zeros((11, 4))), "image id 10 has 11 boxes, but 9 scores"),
        (lambda c: c.update(bbox_mode=2), "have the mode 2; use 0 .absolute XYXY. or 1 .XYWH"),
        (
            lambda c: c["boxes"][1].__setitem__(slice(3, 5), [[96.5, 0, 97, 1], [0, 99, 1, 99]]),
            "id 11 has a box, .96.5, 0.0, 97.0, 1.0., .*outside of its 96 x 100",
        ),
        (lambda c: c["boxes"][1].__iadd__(-1), "id 11 has a box, .-.* outside of its"),
        (
            lambda c: (
                c.update(bbox_mode=1) or put("boxes", 1, np.tile([-3.0, 0, 2, 1], (10, 1)))(c)
            ),
            "id 11 has a box, .-3.0, 0.0, 2.0, 1.0., that is outside",
        ),
        (put("ids", 0, 99), "no proposals for 1 image of .* first of them id 12"),
        (put("ids", slice(4, 9), [99] * 5), "for 5 images .*, the first of them id 4$"),
        *(([np.zeros((2, 5))] * n, f"proposals for {n} images, but .* has 12$") for n in (11, 13)),
        ([np.zeros((2, 4), np.float32)] * 12, "proposals of image number 0 must .* R x 5"),
        ([Malicious()] * 12, "not loaded, .* refers to .*open, which may run code"),
        (pickle.dumps(arrays(12))[:500], "not loaded, .* cut short"),
        (b'{"images": []}', "not loaded, .* cut short: it is no pickle file$"),
        (b"<html>", "not loaded"),
        ("text", "not proposals, neither Detectron2's dict nor"),
    ],
)
def test_bad_file(ids, tmp_path, monkeypatch, content, message):
    """Contents, or changes of a good file of Detectron2's, are refused in one line."""
    monkeypatch.chdir(tmp_path)
    if callable(content):
        change, content = content, detectron2s(ids)
        change(content)
    with pytest.raises(InputError, match=message) as error:
        prepare_proposals(write(tmp_path, content), NAME, str(tmp_path))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/proposals.pkl: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instances.json", "proposals.pkl"]


def test_other_images(ids, tmp_path):
    """Proposals that say for which images they are: only for these."""
    records = DatasetCatalog.get(NAME)
    known = record_fingerprint(records)
    moved = [{**x, "file_name": x["file_name"].replace("images", "moved")} for x in records[::-1]]
    renumbered = [{**records[0], "image_id": 99}, *records[1:]]
    assert record_fingerprint(moved) == known != record_fingerprint(renumbered)
    columns = (detectron2s(ids)[name] for name in ("ids", "boxes", "objectness_logits"))
    path = str(tmp_path / "written.pkl")
    write_proposals(path, *columns, images=known)
    assert prepare_proposals(path, NAME, str(tmp_path)) == path
    path = write(tmp_path, {**detectron2s(ids), "images": "12 (0)"})
    with pytest.raises(
        InputError, match=f"for 12 .0. images, which are not the 12 .* of data.*{NAME}"
    ):
        prepare_proposals(path, NAME, str(tmp_path))


def test_no_file(ids, tmp_path):
    """No proposal file, and mmdetection's proposals without the JSON that they follow."""
    with pytest.raises(InputError, match="none.pkl: no such proposal file; tools/dump_proposals"):
        prepare_proposals("none.pkl", NAME, "none")
    MetadataCatalog.remove(NAME)
    with pytest.raises(InputError, match=f"order of a COCO JSON, and dataset '{NAME}' has none"):
        prepare_proposals(write(tmp_path, arrays(12)), NAME, str(tmp_path))
    prepare_proposals(write(tmp_path, detectron2s(ids)), NAME, str(tmp_path))
