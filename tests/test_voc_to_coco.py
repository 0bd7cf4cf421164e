# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image

from libra_d2.data import register_coco_json
from libra_d2.tools.voc_to_coco import main

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


@pytest.fixture
def voc(tmp_path):
    """Two images with two classes, in VOC's layout; one is found by its <filename> only."""
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir()
    for stem, name, *objects in (
        ("a", "other.bmp", ("dog", 0, 1, 1, 40, 30), ("cat", 1, 11, 5, 20, 14)),
        ("b", "b.png", ("cat", 0, 3, 4, 3, 4)),
    ):
        text = f"<filename>C:\\x\\{name}</filename>{SIZE}"
        text += "".join(OBJECT.format(*x) for x in objects)
        (tmp_path / f"Annotations/{stem}.xml").write_text(f"<annotation>{text}</annotation>")
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / name)
    return tmp_path


def run(voc, *args):
    folders = ["--annotations", voc / "Annotations", "--images", voc / "JPEGImages"]
    main([str(a) for a in [*folders, "--output", voc / "out.json", *args]])
    return json.loads((voc / "out.json").read_text())


def test_convert(voc, tmp_path):
    """Boxes count from 0 and contain both corners; difficult objects are crowds."""
    dataset = run(voc)
    assert [c["name"] for c in dataset["categories"]] == ["cat", "dog"]
    assert [i["file_name"] for i in dataset["images"]] == ["other.bmp", "b.png"]
    boxes = [(a["category_id"], a["image_id"], a["bbox"]) for a in dataset["annotations"]]
    assert boxes == [(2, 1, [0, 0, 40, 30]), (1, 1, [10, 4, 10, 10]), (1, 2, [2, 3, 1, 1])]
    assert [a["iscrowd"] for a in dataset["annotations"]] == [0, 1, 0]
    assert [a["area"] for a in dataset["annotations"]] == [1200, 100, 1]
    paths = (str(voc / "out.json"), str(voc / "JPEGImages"), str(tmp_path))
    assert register_coco_json("test_voc_to_coco", *paths) == ["cat", "dog"]


def test_list_and_classes(voc):
    (voc / "val.txt").write_text("b  1\n\n")
    dataset = run(voc, "--list", voc / "val.txt", "--classes", "dog", "cat")
    assert [c["name"] for c in dataset["categories"]] == ["dog", "cat"]
    assert [a["category_id"] for a in dataset["annotations"]] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.xml: no element found"),
        ("</annotation>", "c.xml: there is no <size>"),
        (f"{SIZE}<object/></annotation>", "c.xml: an <object> lacks <name>"),
        (f"{SIZE}{OBJECT.format('a', 0, 'x', 1, 2, 2)}</annotation>", "c.xml: could not convert"),
        (f"{SIZE}</annotation>", "c.*: there is no image for c.xml"),
        (f"{SIZE}{OBJECT.format('cow', 0, 1, 1, 2, 2)}</annotation>", "['cow'] in"),
    ],
)
def test_broken_files(text, message, voc, capsys):
    (voc / "Annotations/c.xml").write_text(f"<annotation>{text}")
    with pytest.raises(SystemExit, match="2"):
        run(voc, *(["--classes", "cat", "dog"] if "cow" in text else []))
    assert message in capsys.readouterr().err
    assert not (voc / "out.json").exists()


def test_missing_files(voc, capsys):
    for name, message in (
        ("--list", "--list: /none: "),
        ("--annotations", "/none: there are no XML files"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(voc, name, "/none")
        assert message in capsys.readouterr().err
