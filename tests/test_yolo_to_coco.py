# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image

from libra_d2.data import register_coco_json
from libra_d2.tools.yolo_to_coco import main


@pytest.fixture
def yolo(tmp_path):
    """An image with a box and a polygon, one that is turned, one that has nothing in it."""
    for folder in ("images/day", "labels/day"):
        (tmp_path / folder).mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "images/a.jpg")
    Image.new("RGB", (40, 20)).save(tmp_path / "images/day/b.JPG", exif=turned)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/empty.png")
    (tmp_path / "labels/a.txt").write_text(
        "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.5 0.2 0.5 0.9 0.3 1.009\n", encoding="utf-8-sig"
    )
    (tmp_path / "labels/day/b.txt").write_text("1 0.5 0.25 0.1 0.5")
    (tmp_path / "labels/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: {0: cat, 1: dog}\n")
    return tmp_path


def run(yolo, *args):
    folders = ["--labels", yolo / "labels", "--images", yolo / "images"]
    main([str(x) for x in [*folders, "--output", yolo / "images/out.json", *args]])
    return json.loads((yolo / "images/out.json").read_text())


@pytest.mark.parametrize("names", ["{0: cat, 1: dog}", "[cat, dog]", None])
def test_convert(yolo, names, capsys):
    """With each kind of names; the output of an earlier run is replaced, beside the images, too."""
    (yolo / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    values = ["--data", yolo / "data.yaml"] if names else ["--classes", "cat", "dog"]
    (yolo / "images/out.json").write_text("{}")
    dataset = run(yolo, *values)
    assert "3 images, 3 objects; nothing is annotated in 1" in capsys.readouterr().out
    images = [(x["file_name"], x["width"], x["height"]) for x in dataset["images"]]
    assert images == [("a.jpg", 40, 20), ("day/b.JPG", 20, 40), ("empty.png", 8, 8)]
    box, polygon, other = dataset["annotations"]
    assert [x["image_id"] for x in (box, polygon, other)] == [1, 1, 2]
    assert [x["category_id"] for x in (box, polygon, other)] == [2, 1, 2]
    assert box["bbox"] == pytest.approx([15, 5, 10, 10])
    assert box["area"] == pytest.approx(100)
    assert box["segmentation"] == []
    assert box["iscrowd"] == 0
    assert polygon["segmentation"] == [pytest.approx([4, 4, 20, 4, 20, 18, 12, 20])]
    assert polygon["bbox"] == pytest.approx([4, 4, 16, 16])
    assert polygon["area"] == pytest.approx(16 * 16 - 8 * 16 / 2 - 8 * 2 / 2)  # without its corners
    assert other["bbox"] == pytest.approx([9, 0, 2, 20])
    paths = (str(yolo / "images/out.json"), str(yolo / "images"), str(yolo))
    assert register_coco_json("test_yolo_to_coco", *paths) == ["cat", "dog"]


def test_images_without_labels(yolo):
    """They may have the same name."""
    Image.new("RGB", (8, 8)).save(yolo / "images/empty.jpg")
    assert len(run(yolo, "--classes", "cat", "dog")["images"]) == 4


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "labels/a.txt",
            "0 0 0 1 1\n2 0 0 1 1",
            "a.txt: line 2: the class is 2, but there are nam",
        ),
        ("labels/a.txt", "-1 0 0 1 1", "a.txt: line 1: the class is -1"),
        ("labels/a.txt", "0 0.5 0.5 1", "3 numbers after the class are neither a box nor"),
        ("labels/a.txt", "0 0.5 0.5 1 1 0.9", "5 numbers after the class"),
        ("labels/a.txt", "0 20 10 10 10", "a.txt: line 1: coordinates must be shares"),
        ("labels/a.txt", "0 0 0 1.011 1", "a.txt: line 1: coordinates must be shares"),
        ("labels/a.txt", "0 nan 0 1 1", "a.txt: line 1: coordinates must be shares"),
        ("labels/a.txt", "0 x 0 1 1", "a.txt: line 1: could not convert"),
        ("labels/c.txt", "", "c.txt: there is no image for it"),
        ("images/c.png", "not an image", "c.png: not a readable image"),
        ("images/a.png", "", "images/a.jpg have the same text file: remove one"),
        ("data.yaml", "names: {1: cat, 2: dog}", "data.yaml: 'names' must be a list, or a map"),
        ("data.yaml", "nc: 2", "data.yaml: 'names' must be"),
        ("data.yaml", "names: ab", "data.yaml: 'names' must be"),
        ("data.yaml", "names: ~", "data.yaml: 'names' must be"),
        ("data.yaml", "names: []", "data.yaml: 'names' must be"),
        ("data.yaml", "names: {a: cat, b: dog}", "data.yaml: 'names' must be"),
        ("data.yaml", "names", "data.yaml: 'names' must be"),
        ("data.yaml", "[", "data.yaml: not a readable YAML file (while parsing a flow node"),
        ("data.yaml", "names: [a, b, a]", "data.yaml: the class 'a' is there twice"),
    ],
)
def test_broken_files(yolo, file, text, message, refused):
    (yolo / file).write_text(text)
    assert message in refused(run, yolo, "--data", yolo / "data.yaml")
    assert not (yolo / "images/out.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--labels", "images"], "there are no text files in it"),
        (["--images", "labels"], "there are no images in it"),
        (["--images", "none"], "/none: no such folder"),
        (["--labels", "none"], "/none: no such folder"),
        (["--data", "none.yaml"], "none.yaml: not a readable YAML file ([Errno 2] No such file"),
        (["--output", "data.yaml"], "--output: "),
        (["--output", "labels/a.txt"], "--output: "),
        (["--output", "images/a.jpg"], "--output: "),
    ],
)
def test_bad_arguments(yolo, args, message, refused):
    before = {path: path.read_bytes() for path in yolo.rglob("*.*")}
    assert message in refused(run, yolo, "--data", yolo / "data.yaml", args[0], yolo / args[1])
    assert {path: path.read_bytes() for path in yolo.rglob("*.*")} == before
