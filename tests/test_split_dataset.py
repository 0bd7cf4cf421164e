# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest

from libra_d2.tools.split_dataset import main

GROUPS = ("--group-by", "^[^_]+")


@pytest.fixture
def dataset(tmp_path):
    """Three scenes of ten images with an object each; the last image shows the only dog."""
    names = [f"{scene}_{i}.jpg" for scene in ("hall", "yard", "street") for i in range(10)]
    box = {"bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}
    content = {
        "info": {"year": 2026},
        "images": [
            {"id": i, "file_name": name, "width": 9, "height": 9} for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 2 if i == 29 else 1, **box}
            for i in range(30)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path


def run(folder, *args):
    """The names of the images in both parts."""
    files = [str(folder / name) for name in ("train.json", "val.json")]
    outputs = ["--train-output", files[0], "--val-output", files[1]]
    main([str(folder / "all.json"), *outputs, *args])
    parts = [json.loads((folder / name).read_text()) for name in ("train.json", "val.json")]
    for part in parts:
        ids = {x["id"] for x in part["images"]}
        assert [x["image_id"] for x in part["annotations"]] == sorted(ids)
        assert [x["name"] for x in part["categories"]] == ["cat", "dog"]
        assert part["info"] == {"year": 2026}
    return [{x["file_name"] for x in part["images"]} for part in parts]


def test_split(dataset, capsys):
    """Each image is in one part; another seed gives another split, the same one the same."""
    train, val = run(dataset)
    assert (len(train), len(val), len(train | val)) == (24, 6, 30)
    lines = capsys.readouterr().out.splitlines()
    dogs = int("street_9.jpg" in val)
    assert f"val.json: 6 images; objects: cat {6 - dogs}, dog {dogs}" in lines[1 + dogs]
    assert ("warning" in lines[-1]) != bool(dogs)
    assert run(dataset) == [train, val]
    assert run(dataset, "--seed", "1")[1] not in (val, set())
    assert len(run(dataset, "--val-share", "0.5")[1]) == 15


def test_groups(dataset):
    """Images of one scene are not separated."""
    for seed in range(5):
        _, val = run(dataset, *GROUPS, "--val-share", "0.3", "--seed", str(seed))
        assert len(val) == 10
        assert len({name.split("_")[0] for name in val}) == 1
    for share, number in (("0.01", 10), ("0.6", 20)):  # the nearest, but for none
        assert len(run(dataset, *GROUPS, "--val-share", share)[1]) == number
    assert len(run(dataset, "--group-by", "^street", "--val-share", "0.9")[1]) > 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        *(
            (("--val-share", x), f"--val-share is {x}.0: use a value between 0 and 1")
            for x in ("0", "1")
        ),
        (("--group-by", "("), "--group-by: ( is no regular expression"),
        (("--group-by", "_"), "its 30 images are one group"),
        (("--val-share", "0.99"), "0.99 leaves none of the 30 images to train on"),
        (("--val-output", "all.json"), "all.json"),
        (("--val-output", "train.json"), "train.json"),
    ],
)
def test_bad_arguments(dataset, args, message, refused, monkeypatch):
    monkeypatch.chdir(dataset)
    before = (dataset / "all.json").read_text()
    assert message in refused(run, dataset, *args)
    assert [x.name for x in dataset.iterdir()] == ["all.json"]
    assert (dataset / "all.json").read_text() == before


def test_infinite_numbers(dataset, refused):
    content = json.loads((dataset / "all.json").read_text())
    content["annotations"][3]["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
    (dataset / "all.json").write_text(json.dumps(content))
    assert "all.json: it has a number that is NaN or infinite" in refused(run, dataset)
    assert not (dataset / "train.json").exists()


def test_changed_boxes(dataset, capsys):
    """What was put right in the annotations is said; crowd regions are not counted."""
    content = json.loads((dataset / "all.json").read_text())
    content["annotations"][3]["bbox"] = [5, 5, 9, 9]
    content["annotations"][4]["iscrowd"] = 1
    (dataset / "all.json").write_text(json.dumps(content))
    run(dataset)
    out = capsys.readouterr().out
    assert "clipped 1 box that extended" in out
    assert sum(map(int, re.findall(r"(?:cat|dog) (\d+)", out))) == 29
