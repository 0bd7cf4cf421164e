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
    """Two images with two classes, in VOC's layout."""
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir()
    objects = {
        "a": OBJECT.format("dog", 0, 1, 1, 40, 30) + OBJECT.format("cat", 1, 11, 5, 20, 14),
        "b": OBJECT.format("cat", 0, 3, 4, 3, 4),
    }
    for stem, text in objects.items():
        (tmp_path / f"Annotations/{stem}.xml").write_text(
            f"<annotation><filename>C:\\x\\{stem}.png</filename>{SIZE}{text}</annotation>"
        )
        Image.new("RGB", (40, 30)).save(tmp_path / f"JPEGImages/{stem}.png")
    return tmp_path


def run(voc, *args):
    folders = ["--annotations", voc / "Annotations", "--images", voc / "JPEGImages"]
    main([str(a) for a in [*folders, "--output", voc / "out.json", *args]])
    return json.loads((voc / "out.json").read_text())


def test_convert(voc, tmp_path):
    """Boxes with both corners in them, counted from 0; difficult ones are crowds."""
    dataset = run(voc)
    assert [c["name"] for c in dataset["categories"]] == ["cat", "dog"]
    assert [i["file_name"] for i in dataset["images"]] == ["a.png", "b.png"]
    boxes = [(a["category_id"], a["image_id"], a["bbox"]) for a in dataset["annotations"]]
    assert boxes == [(2, 1, [0, 0, 40, 30]), (1, 1, [10, 4, 10, 10]), (1, 2, [2, 3, 1, 1])]
    assert [a["iscrowd"] for a in dataset["annotations"]] == [0, 1, 0]
    assert [a["area"] for a in dataset["annotations"]] == [1200, 100, 1]
    # What train_net.py reads.
    register_coco_json(
        "test_voc_to_coco", str(voc / "out.json"), str(voc / "JPEGImages"), str(tmp_path)
    )


def test_list_and_classes(voc):
    (voc / "val.txt").write_text("b  1\n\n")
    dataset = run(voc, "--list", voc / "val.txt", "--classes", "dog", "cat")
    assert [c["name"] for c in dataset["categories"]] == ["dog", "cat"]
    assert [a["category_id"] for a in dataset["annotations"]] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "c.xml: no element found"),
        ("<annotation></annotation>", "c.xml: there is no <size>"),
        (f"<annotation>{SIZE}<object/></annotation>", "c.xml: an <object> lacks <name>"),
        (
            f"<annotation>{SIZE}{OBJECT.format('a', 0, 'x', 1, 2, 2)}</annotation>",
            "c.xml: could not",
        ),
        (f"<annotation>{SIZE}</annotation>", "c.*: there is no image for c.xml"),
        (f"<annotation>{SIZE}{OBJECT.format('cow', 0, 1, 1, 2, 2)}</annotation>", "['cow'] in"),
    ],
)
def test_broken_files(text, message, voc, capsys):
    (voc / "Annotations/c.xml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run(voc, *(["--classes", "cat", "dog"] if "cow" in text else []))
    assert message in capsys.readouterr().err
    assert not (voc / "out.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--list", "/none.txt"], "--list: /none.txt: "),
        (["--annotations", "/none"], "/none: there are no XML files"),
    ],
)
def test_missing_files(args, message, voc, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(voc, *args)
    assert message in capsys.readouterr().err
