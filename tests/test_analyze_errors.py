# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from test_error_page import read as read_page
from test_matching import random_dataset

from libra_d2.evaluation.detection_metrics import METRICS
from libra_d2.tools.analyze_errors import describe_comparison, main


@pytest.fixture
def files(tmp_path):
    """The arguments for annotations and two results."""
    dataset, results = random_dataset(2, name="red|cell")
    contents = {"val": dataset, "a": results[::2], "b": results}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    names = {"--val-json": "val", "--results": "a", "--results-b": "b"}
    return {option: str(tmp_path / f"{name}.json") for option, name in names.items()}


def run(files, output, *more):
    main([*(x for pair in files.items() for x in pair), "--output", str(output), *more])


def read(folder):
    return json.loads((folder / "errors.json").read_text())


def cells(*values):
    return [f"{x:.1f}" if isinstance(x, float) else str(x) for x in values]


def lines_of(folder):
    return [
        [cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]
        for line in (folder / "errors.md").read_text().splitlines()
    ]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_one_model(files, tmp_path, capsys, iou_type):
    """All numbers, and tables of them; what is compared, or of the other type, is not there."""
    files.pop("--results-b")
    other = "bbox" if iou_type == "segm" else "segmentation"
    results = json.loads((tmp_path / "a.json").read_text())
    results = [{k: v for k, v in x.items() if k != other} for x in results]
    (tmp_path / "a.json").write_text(json.dumps(results))
    run(files, tmp_path / "new/out", "--iou-type", iou_type)
    written = [str(tmp_path / "new/out" / name) for name in ("errors.md", "index.html")]
    output = capsys.readouterr()
    assert output.out.splitlines() == written
    assert "no detections" not in output.err
    numbers = read(tmp_path / "new/out")
    (model,) = numbers["models"]
    assert (numbers["iou_type"], model["results"]) == (iou_type, [files["--results"]])
    assert numbers["comparisons"] == []
    lines, metrics = lines_of(tmp_path / "new/out"), model["metrics"]
    by_iou = list(METRICS[:12])
    assert lines[lines.index(by_iou) + 2] == cells(*(metrics[name] for name in by_iou))
    name = "localization errors"
    assert cells(name, round(model["errors"]["localization"]), metrics[name]) in lines
    assert cells("false negatives", "", metrics["false negatives"]) in lines
    small, own = model["ranges"]["small"], model["classes"]["red|cell"]
    counts = [round(small[k]) for k in ("objects", "missed")]
    assert cells("small", *counts, *(small[k] for k in ("AP", "AR"))) in lines
    assert cells("red/cell", round(own["objects"]), *(own[k] for k in ("AP", "AP50"))) in lines
    seen = model["calibration"]
    assert cells(*(seen["bins"][0][k] for k in ("detections", "score", "precision"))) in lines
    error = f"{seen['expected calibration error']:.1f} % (expected calibration error)."
    assert [f"Scores and precision differ by {error}"] in lines


def test_repaired_annotations(files, tmp_path, caplog):
    dataset = json.loads((tmp_path / "val.json").read_text())
    dataset["annotations"][0]["iscrowd"] = None
    (tmp_path / "val.json").write_text(json.dumps(dataset))
    run(files, tmp_path / "out")
    assert "filled in: annotation iscrowd of 1" in caplog.text


def test_several_runs(files, tmp_path, refused):
    """As many of both models, none twice; a less b, and b less a, is 0 on average."""
    a, b = files["--results"], files["--results-b"]
    args = ["--val-json", files["--val-json"], "--output", str(tmp_path / "out"), "--results"]
    for results, message in (
        ([a, b, "--results-b", b], "--results-b names 1 files, but --results 2"),
        ([a, f"{tmp_path}/./a.json", "--results-b", a, b], "error: --results names the same file"),
        ([a, b, "--results-b", b, b], "error: --results-b names the same file twice"),
    ):
        assert message in refused(main, [*args, *results])
    main([*args, a, b, "--results-b", b, a])
    (comparison,) = read(tmp_path / "out")["comparisons"]
    assert (comparison["pairs"], comparison["metrics"][0]["difference"]) == (2, 0)
    run(files, tmp_path / "first")
    assert comparison["objects"] == read(tmp_path / "first")["comparisons"][0]["objects"]


def test_images_that_differ_most():
    """Ten at each end; those without objects are left out."""
    names = ("image_id", "a", "b", "difference", "only_a", "only_b")
    rows = [dict(zip(names, (f"{i}|b", 0.0, 1.0, i - 11.0, 1.0, 0.5))) for i in range(21)]
    rows.append(dict(zip(names, (99, None, None, None, 200_000.26, 1 / 3))))
    for pairs, chance in ((1, "the choice of the images only"), (2, "means of 2 pairs of runs")):
        found = describe_comparison({"pairs": pairs, "metrics": [], "images": rows})
        assert chance in found[1]
        assert found[2] == "A alone finds 200,021.3 objects, B alone 10.8."
        lines = [x.strip("| ").split(" | ") for x in found[3].splitlines()[2:]]
        assert [x[0].strip() for x in lines] == [f"{i}\\|b" for i in (*range(10), *range(11, 21))]
        assert {(x[4].strip(), x[5].strip()) for x in lines} == {("1", "0.5")}


def test_two_models(files, tmp_path):
    """The differences come first."""
    run(files, tmp_path / "out")
    numbers, lines = read(tmp_path / "out"), lines_of(tmp_path / "out")
    files.pop("--val-json")
    assert [x["results"] for x in numbers["models"]] == [[x] for x in files.values()]
    (comparison,) = numbers["comparisons"]
    row = comparison["metrics"][0]
    assert row["difference"] == row["b"] - row["a"]
    interval = f"{row['low']:+.1f} to {row['high']:+.1f}"
    difference = f"{row['difference']:+.1f}"
    assert cells("AP", row["a"], row["b"], difference, interval, row["says"]) in lines
    images = comparison["images"]
    only = [sum(x[f"only_{name}"] for x in images) for name in "ab"]
    assert [f"A alone finds {only[0]:.0f} objects, B alone {only[1]:.0f}."] in lines
    worst = images[0]
    assert [str(worst["image_id"]), f"{worst['a']:.1f}"] in [x[:2] for x in lines]
    objects = comparison["objects"]
    assert len(objects) == numbers["models"][0]["ranges"]["all"]["objects"]
    for mine, other, found in (("iou_a", "iou_b", only[0]), ("iou_b", "iou_a", only[1])):
        assert found == sum(x[mine] is not None and x[other] is None for x in objects)
    titles = [line[0] for line in lines if line[0].startswith("## ")]
    assert [title[:4] for title in titles] == ["## B", "## A", "## B"]


def test_page(files, tmp_path, capsys, monkeypatch):
    """It has the same numbers, and as many images as asked for; without Plotly, none is written."""
    images = json.loads((tmp_path / "val.json").read_text())["images"]
    for image in images:
        Image.new("RGB", (30, 30)).save(tmp_path / image["file_name"])
    run(files, tmp_path / "out", "--val-images", str(tmp_path), "--max-images", "3")
    data, pictures = read_page(tmp_path / "out/index.html")
    numbers = read(tmp_path / "out")
    assert data["comparisons"][0]["metrics"] == numbers["comparisons"][0]["metrics"]
    assert data["names"] == [files["--results"], files["--results-b"]]
    assert [data["num_images"], len(data["images"])] == [12, 3]
    assert all(x["jpeg"] for x in pictures)

    monkeypatch.setattr("libra_d2.tools.analyze_errors.find_spec", lambda name: None)
    capsys.readouterr()
    run(files, tmp_path / "other")
    assert 'pip install "libra_d2[report]"' in capsys.readouterr().out
    assert not (tmp_path / "other/index.html").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-images", "-1", "--max-images -1: use 0 or more"),
        ("--val-images", "none", "--val-images: none: no such directory"),
        ("--val-images", ".", "no such image; "),
    ],
)
def test_bad_options(files, tmp_path, refused, option, value, message):
    """Before anything is written."""
    assert message in refused(run, files, tmp_path / "out", option, value)
    assert not list(tmp_path.glob("out/*"))


def test_no_detections(files, tmp_path, capsys):
    """A warning names the results that lack those of more than half of the images with objects."""
    dataset = json.loads((tmp_path / "val.json").read_text())
    images = sorted({x["image_id"] for x in dataset["annotations"] if not x["iscrowd"]})
    results = json.loads((tmp_path / "b.json").read_text())
    for path, num in ((tmp_path / "a.json", 0), (tmp_path / "b.json", (len(images) + 1) // 2)):
        path.write_text(json.dumps([x for x in results if x["image_id"] in images[:num]]))
    run(files, tmp_path / "out")
    warning = f"a.json: {len(images)} of {len(images)} images with objects have no detections: "
    assert re.findall("no detections", (error := capsys.readouterr().err)) == ["no detections"]
    assert warning in error
    assert read(tmp_path / "out")["models"][0]["metrics"]["AP"] == 0


def test_object_without_mask(files, tmp_path, refused):
    dataset = json.loads((tmp_path / "val.json").read_text())
    del next(x for x in dataset["annotations"] if not x["iscrowd"])["segmentation"]
    (tmp_path / "val.json").write_text(json.dumps(dataset))
    error = refused(run, files, tmp_path / "out", "--iou-type", "segm")
    assert "has no 'segmentation' (needed by models with masks and for --iou-type segm)" in error


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--results", '{"a": 1}', "a.json: not in COCO's result format"),
        ("--results-b", "[[]]", "b.json: detection number 0: [] is no detection"),
        ("--val-json", "[]", "val.json: not in COCO format"),
    ],
)
def test_broken_input(files, tmp_path, refused, option, content, message):
    with open(files[option], "w") as f:
        f.write(content)
    error = refused(run, files, tmp_path / "out")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--results", "--results-b", "--val-json"])
def test_no_input_is_written_over(files, tmp_path, refused, option):
    Path(files[option]).rename(tmp_path / "errors.json")
    files[option] = str(tmp_path / "errors.json")
    assert "are the same file" in refused(run, files, tmp_path)
