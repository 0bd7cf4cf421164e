# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil

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


def test_convert(voc, tmp_path, capsys):
    """Boxes count from 0 and contain both corners; difficult objects, if any, are crowds."""
    path = voc / "Annotations/b.xml"
    text = path.read_text().replace("<difficult>0</difficult>", "")
    path.write_text(text.replace("cat", "\n cat "))
    dataset = run(voc)
    text = "2 images, 3 objects, 1 of them difficult; nothing is annotated in 0 of the images"
    assert text in capsys.readouterr().out
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
        (f"{SIZE}<object/></annotation>", "c.xml: object 1 (?): it lacks <name>"),
        (f"{SIZE}{OBJECT.format('a', 0, 'x', 1, 2, 2)}</annotation>", "c.xml: object 1 (a): could"),
        (f"{SIZE}{OBJECT.format('a', 'no', 1, 1, 2, 2)}</annotation>", "c.xml: object 1 (a): inva"),
        (f"{SIZE}</annotation>", "c.*: there is no image for c.xml"),
        (f"{SIZE}{OBJECT.format('cow', 0, 1, 1, 2, 2)}</annotation>", "--classes: 'cow' in"),
    ],
)
def test_broken_files(text, message, voc, refused):
    (voc / "Annotations/c.xml").write_text(f"<annotation>{text}")
    assert message in refused(run, voc, *(["--classes", "cat", "dog"] if "cow" in text else []))
    assert not (voc / "out.json").exists()


SECOND = "c.xml: object 2 (cow): "


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("nan", 1, 2, 2), f"{SECOND}<xmin> is nan, no number of pixels"),
        ((1, 1, 2, "1e999"), f"{SECOND}<ymax> is 1e999, no number of pixels"),
        ((1, 1, "1e200", 2), f"{SECOND}<xmax> is 1e200, no number of pixels up to 2147483647"),
        (("-1e200", 1, 2, 2), f"{SECOND}<xmin> is -1e200, no number of pixels"),
        ((5, 1, 4, 2), f"{SECOND}<xmin> is 5, beyond <xmax>, 4"),
        ((1, 2.5, 4, 2), f"{SECOND}<ymin> is 2.5, beyond <ymax>, 2"),
        (("width", 0), "c.xml: <width> is 0, no whole number of pixels"),
        (("height", "30.5"), "c.xml: <height> is 30.5, no whole number of pixels"),
        (("height", "inf"), "c.xml: <height> is inf, no whole number of pixels"),
        (("width", "1e300"), "c.xml: <width> is 1e300, no whole number of pixels up to 2147483647"),
        (("width", -3), "c.xml: <width> is -3, no whole number of pixels"),
    ],
)
def test_no_box(values, message, voc, refused):
    """Boxes and images without extent; nothing is written that is no JSON."""
    size, corners = SIZE, (1, 1, 1, 1)
    if len(values) == 2:
        size = re.sub(f"<{values[0]}>.*</{values[0]}>", "<{0}>{1}</{0}>".format(*values), SIZE)
    else:
        corners = values
    objects = OBJECT.format("dog", 0, 1, 1, 1, 1) + OBJECT.format("cow", 0, *corners)
    (voc / "Annotations/c.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    assert message in refused(run, voc)
    assert not (voc / "out.json").exists()


@pytest.mark.parametrize("names", [("a.xml", "c.xml"), ("a.XML", "a.xml")])
def test_two_files_of_one_image(names, voc, refused):
    for name in names:
        shutil.copyfile(voc / "Annotations/b.xml", voc / "x")
        text = (voc / "x").read_text().replace("b.png", "other.bmp")
        (voc / "Annotations" / name).write_text(text)
    message = f"{names[0]} and {names[1]} stand for the same image, other.bmp"
    assert message in refused(run, voc)


@pytest.mark.parametrize(
    ("images", "used"),
    [
        (["b.jpg", "b.png"], "b.png"),  # <filename>
        (["b.JPG", "b.jpg"], "b.jpg"),
        (["b.JPG", "b.jpeg"], "b.jpeg"),
        (["b.JPG"], "b.JPG"),
        (["b.jpg", "stale.png"], "b.jpg"),  # renamed, unlike the text of its XML file
    ],
)
def test_image_of_a_file(images, used, voc):
    name = "stale.png" if "stale.png" in images else "b.png"
    text = (voc / "Annotations/b.xml").read_text().replace("b.png", name)
    (voc / "Annotations/b.xml").write_text(text)
    (voc / "JPEGImages/b.png").unlink()
    for image in images:
        Image.new("RGB", (40, 30)).save(voc / "JPEGImages" / image)
    assert [image["file_name"] for image in run(voc)["images"]] == ["other.bmp", used]


@pytest.mark.parametrize("is_listed", [False, True])
def test_case_of_suffix(is_listed, voc):
    (voc / "Annotations/b.xml").rename(voc / "Annotations/b.XML")
    (voc / "list.txt").write_text("a\nb\n")
    dataset = run(voc, *(["--list", voc / "list.txt"] if is_listed else []))
    assert [image["file_name"] for image in dataset["images"]] == ["other.bmp", "b.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_in_other_scripts(encoding, voc):
    """In the list, which may have a byte order mark, in file names and of classes."""
    (voc / "Annotations/b.xml").rename(voc / "Annotations/Ä犬.xml")
    (voc / "JPEGImages/b.png").rename(voc / "JPEGImages/Ä犬.png")
    text = (voc / "Annotations/Ä犬.xml").read_text().replace("cat", "猫")
    (voc / "Annotations/Ä犬.xml").write_text(text, encoding="utf-8")
    (voc / "val.txt").write_text("Ä犬\n", encoding=encoding)
    dataset = run(voc, "--list", voc / "val.txt")
    assert [image["file_name"] for image in dataset["images"]] == ["Ä犬.png"]
    assert [category["name"] for category in dataset["categories"]] == ["猫"]


def test_subfolders(voc):
    """Their files are converted, too; the images are in the same subfolders. Not hidden ones."""
    for name in ("Annotations/sub/b.xml", "JPEGImages/sub/b.png", "Annotations/.sub/b.xml"):
        (voc / name).parent.mkdir()
        shutil.copy(voc / re.sub(r"\.?sub/", "", name), voc / name)
    names = [x["file_name"] for x in run(voc)["images"]]
    assert len(names) == 3
    assert names[1:] == ["b.png", "sub/b.png"]


@pytest.mark.parametrize(
    "output",
    [
        *("Annotations/a.xml", "JPEGImages/other.bmp", "val.txt", "link.json"),
        *("Annotations/b.xml", "Annotations/sub/d.xml", "JPEGImages/b.png"),  # not in the list
        *("Annotations/sub/c.xml", "JPEGImages/sub/c.png"),
    ],
)
def test_inputs_stay(output, voc, refused):
    for name in ("Annotations/sub/c.xml", "Annotations/sub/d.xml", "JPEGImages/sub/c.png"):
        (voc / name).parent.mkdir(exist_ok=True)
        shutil.copy(voc / name.replace("sub/c", "b").replace("sub/d", "b"), voc / name)
    (voc / "val.txt").write_text("a\nsub/c")
    (voc / "link.json").symlink_to("val.txt")
    before = (voc / output).read_bytes()
    assert "which would be overwritten" in refused(
        run, voc, "--list", voc / "val.txt", "--output", voc / output
    )
    assert (voc / output).read_bytes() == before


def test_again(voc):
    """The output of an earlier run is replaced, next to the images, too."""
    for classes in (["cat", "dog"], ["dog", "cat"]):
        output = voc / "JPEGImages/out.json"
        (voc / "out.json").write_text("{}")
        run(voc, "--output", output, "--classes", *classes)
        assert [x["name"] for x in json.loads(output.read_text())["categories"]] == classes


def test_repeated_class(voc, refused):
    assert "--classes: one of ['cat', 'dog', 'cat'] is there twice" in refused(
        run, voc, "--classes", "cat", "dog", "cat"
    )


def test_missing_files(voc, refused):
    for name, message in (
        ("--list", "--list: /none: "),
        ("--annotations", "/none: no such folder"),
    ):
        assert message in refused(run, voc, name, "/none")
