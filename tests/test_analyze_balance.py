# SPDX-License-Identifier: Apache-2.0
import html
import itertools
import json
import pickle
import re
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_cfg
from matplotlib.figure import Figure
from PIL import Image

from detectron2.modeling import build_model

from libra_d2 import analysis
from libra_d2.analysis.html_page import Section, Side, write_page
from libra_d2.analysis.judgments import judge
from libra_d2.tools import analyze_balance
from libra_d2.tools.analyze_balance import FIGURES

# The first level, and the number of recorded candidates and errors of four images.
SYSTEMS = [("fast_rcnn", 2, 4, 4), ("retinanet", 3, 0, 4), ("rpn", 2, 0, 0)]
LOSS = {"alpha": 0.4, "gamma": 1.2, "beta": 0.5, "form": "reference"}
SETTINGS = [
    *(x for k, v in LOSS.items() for x in (f"MODEL.LIBRA.BALANCED_L1.{k.upper()}", v)),
    *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4], "MODEL.LIBRA.SAMPLER.NUM_BINS", 2),
    *("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.25, "MODEL.LIBRA.BFP.REFINE_LEVEL", 1),
    *("INPUT.MIN_SIZE_TEST", 64, "MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.DEVICE", "cpu"),
]


def proposals(folder):
    """The options for two proposals in each image, which are written to a file."""
    content = {"ids": [*range(1, 13)], "objectness_logits": [np.zeros(2, np.float32)] * 12}
    content["boxes"] = [np.array([[0, 0, 20, 20], [30, 30, 90, 80]], np.float32)] * 12
    (folder / "proposals").write_bytes(pickle.dumps({**content, "bbox_mode": 0}))
    return ["--val-proposals", folder / "proposals"]


def arguments(system, synthetic, folder, *extra):
    (config,) = ROOT.glob(f"configs/Demo/*{system}_R_18_FPN.yaml")
    data = ["--val-json", synthetic / "instances.json", "--val-images", synthetic / "images"]
    command = ["--config-file", config, "--num-images", "4", *data, *extra, "OUTPUT_DIR", folder]
    return [str(x) for x in command]


@pytest.mark.parametrize(("system", "first", "num_candidates", "num_errors"), SYSTEMS)
def test_page(system, first, num_candidates, num_errors, synthetic, tmp_path, monkeypatch, capsys):
    """Numbers, figures and the text of the page, for the records of all images together."""
    beta = 0.1 if system == "retinanet" else 0.25  # the plain detector's
    settings = [*SETTINGS, "MODEL.LIBRA.BFP.ENABLED", system != "rpn", "INPUT.FORMAT", "BGR"]
    extra = proposals(tmp_path) if system == "fast_rcnn" else []
    extra += ["MODEL.WEIGHTS", tmp_path / "&lt;.pth", *settings]
    command = arguments(system, synthetic, tmp_path, *extra)
    cfg = load_cfg(command[1])
    cfg.merge_from_list([*settings, "MODEL.RETINANET.NUM_CLASSES", 4])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "&lt;.pth")
    images, recordings, record = [], [], analyze_balance.record

    def see_images(model, batches):
        assert torch.initial_seed() == 0
        images.extend(batches)
        recordings.append(record(model, images))
        return recordings[0]

    titles, save = {}, Figure.savefig

    def see_title(figure, file, **kwargs):
        titles[Path(file.name).name.partition(".png")[0]] = figure.get_suptitle()
        save(figure, file, **kwargs) if system == "fast_rcnn" else file.write(file.name.encode())

    heat_maps, draw = [], analyze_balance.plot_heat_maps

    def see_heat_maps(*args):
        heat_maps.append(args)
        return draw(*args)

    monkeypatch.setattr(analyze_balance, "record", see_images)
    monkeypatch.setattr(analyze_balance, "plot_heat_maps", see_heat_maps)
    monkeypatch.setattr(Figure, "savefig", see_title)
    torch.manual_seed(7)
    analyze_balance.main(command)
    folder = tmp_path / "balance"
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "index.html")
    # Spread over the images with objects, all but image 5; resized as in evaluation.
    files = [str(synthetic / f"images/{i:06}.jpg") for i in (0, 3, 8, 11)]
    assert [image["file_name"] for (image,) in images] == files
    assert {image["image"].shape for (image,) in images} == {(3, 64, 64)}
    ((drawn, _, photograph),) = heat_maps
    assert drawn is recordings[0].levels[0]
    assert np.array_equal(photograph, Image.open(files[0]))

    levels, candidates, errors = (
        getattr(recordings[0], name) for name in ("levels", "candidates", "box_errors")
    )
    assert (len(candidates), len(errors)) == (num_candidates, num_errors)
    assert system != "fast_rcnn" or len(candidates[0].labels) == 2 + 3
    numbers = json.loads((folder / "balance.json").read_text())
    loss, plain = {**LOSS, "smooth_l1_beta": beta}, f"smooth L1 (beta {beta})"
    expected = {"num_images": 4, "features": analysis.feature_statistics(levels)}
    percentages = {"levels": [], "heat_maps": [], "losses": []}
    if candidates:
        again = analysis.sample_statistics(candidates, num_bins=2, negative_iou_thresh=0.4)
        expected["samples"] = seen = numbers["samples"]
        assert {**seen, **{k: again[k] for k in [*again][:3]}} == seen  # all but random samples
        shares = [seen[k]["negatives"][0] for k in [*again][2:5]]
        percentages = {"samples": shares, **percentages}
    if errors:
        expected["objective"] = seen = analysis.objective_statistics(torch.cat(errors), **loss)
        kinds = (plain, "smooth L1 (beta 0.5)", "balanced L1")
        shares = [seen["inliers"], *(seen[kind]["inlier_gradient"] for kind in kinds)]
        percentages["gradient_shares"] = shares
    judgments = numbers.pop("judgments")
    assert judgments == [x._asdict() for x in judge(numbers)]
    assert numbers == expected
    page = html.unescape((folder / "index.html").read_text())
    config, weights, data = (
        "/".join(Path(x).parts[-4:])
        for x in (command[1], tmp_path / "&lt;.pth", synthetic / "instances.json")
    )
    about = f"{config}, {weights},\n4 images of {data}"
    assert f"<p>{about}</p>" in page
    assert titles == {name: "" if name == "losses" else about for name in percentages}
    marks = {"speaks for it": "▲ ", "speaks against it": "▼ ", "says little": ""}
    for row in judgments:
        link = f'<a href="#{row["figure"]}">{row["measured"]}</a>'
        says = marks[row["says"]] + row["says"]
        assert f"<tr><td>{row['idea']}</td><td>{link}</td><td>{says}</td></tr>" in page
    assert [x in page for x in ("<main>", "<h3>")] == [True, False]
    assert "The limits are rules of thumb" in page
    parts = re.findall('<h2 id="(.*?)">(.*?)</h2>.*?<p>(.*?)</p><img .*base64,(.*)">', page)
    assert [x[0] for x in parts] == list(percentages)
    for (name, title, text, data), shares in zip(parts, percentages.values()):
        assert b64decode(data) == (folder / f"{name}.png").read_bytes()
        assert re.findall("[0-9]+%", text) == [f"{share:.0%}" for share in shares]
        assert title.endswith(f" and {plain}") == (name == "losses")
        assert (f"at the size of p{first + 1}," in text) == (name == "levels" and system != "rpn")
        assert ("less than 0.04 IoU" in text) == (name == "samples")


def test_two_models(synthetic, tmp_path, monkeypatch, refused):
    """Each with its own config and weights, on the same images; what one lacks is said."""
    paths, number = {}, itertools.count()
    titles = {}

    def draw(figure, file, **kwargs):
        titles[Path(file.name).name.partition(".png")[0]] = figure.get_suptitle()
        file.write(b"%d" % next(number))

    monkeypatch.setattr(Figure, "savefig", draw)
    for system in ("faster_rcnn", "retinanet"):
        cfg = load_cfg(arguments(system, synthetic, tmp_path)[1])
        cfg.merge_from_list([*SETTINGS, "MODEL.RETINANET.NUM_CLASSES", 4])
        paths[system] = tmp_path / f"{system}.pth"
        torch.save({"model": build_model(cfg).state_dict()}, paths[system])
    first, second = (arguments(x, synthetic, tmp_path) for x in paths)
    opts = ["MODEL.WEIGHTS", paths["faster_rcnn"], *SETTINGS]
    b = ["--weights-b", paths["retinanet"], "--config-file-b", second[1]]
    analyze_balance.main([str(x) for x in [*b, *first, *opts]])
    numbers = json.loads((tmp_path / "balance/balance.json").read_text())
    for side, command, name in (("", first, "faster_rcnn"), ("_b", second, "retinanet")):
        config = "/".join(Path(command[1]).parts[-4:])
        about = titles[f"levels{side}"]
        assert about.startswith(f"{config}, ")
        assert f"/{name}.pth,\n" in about
    alone = {}
    for name, command in (("faster_rcnn", first), ("retinanet", second)):
        own = ["MODEL.WEIGHTS", paths[name], *SETTINGS, "OUTPUT_DIR", tmp_path / name]
        analyze_balance.main([str(x) for x in [*command, *own]])
        alone[name] = json.loads((tmp_path / name / "balance/balance.json").read_text())
    assert numbers.pop("b") == alone["retinanet"]
    assert numbers == alone["faster_rcnn"]
    page = html.unescape((tmp_path / "balance/index.html").read_text())
    files = [b64decode(x) for x in re.findall('base64,(.*?)">', page)]
    folder = tmp_path / "balance"
    names = ["samples", *(f"{x}{y}" for x in FIGURES[1:] for y in ("", "_b"))]
    assert files == [(folder / f"{name}.png").read_bytes() for name in names]
    assert page.count("This model has none.") == 1
    assert page.count("<h3>B</h3>") == 6
    assert "<main class=two>" in page
    command, count = [str(x) for x in [*b[2:], *first, *opts]], next(number) + 1
    assert "--config-file-b goes with --weights-b" in refused(analyze_balance.main, command)
    command = [str(x) for x in [*b[:2], *first, *opts]]  # nothing is analyzed before
    error = refused(analyze_balance.main, command)
    assert error.startswith(f"error: --weights-b: {paths['retinanet']}: ")
    assert "; --config-file-b names a config for the second model alone" in error
    assert number.__reduce__()[1] == (count,)


def test_figure_of_the_second_model(tmp_path):
    """One that only the second model has is in the second column."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"1")
    second = Side("", sections={"levels": Section("Levels & more", "", str(picture))})
    write_page(str(tmp_path / "index.html"), "", "", [Side(""), second])
    figures = '<h2 id="levels">Levels &amp; more</h2><div class="sides"><div><h3>A</h3>'
    figures += "<p>This model has none.</p></div><div><h3>B</h3><figure><p></p>"
    assert figures in (tmp_path / "index.html").read_text()


def test_second_weights(synthetic, tmp_path, monkeypatch):
    """
    Without another config both have the first one, and the same proposals; there are 11 images with
    objects.
    """
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **kwargs: file.write(b"1"))
    path, cfg = tmp_path / "weights.pth", load_cfg(arguments("fast_rcnn", synthetic, tmp_path)[1])
    cfg.merge_from_list(SETTINGS)
    torch.save({"model": build_model(cfg).state_dict()}, path)
    extra = ["--weights-b", path, "--num-images", 99, *proposals(tmp_path)]
    extra += ["MODEL.WEIGHTS", path, *SETTINGS]
    analyze_balance.main(arguments("fast_rcnn", synthetic, tmp_path, *extra))
    numbers = json.loads((tmp_path / "balance/balance.json").read_text())
    assert numbers.pop("b") == numbers
    assert numbers["num_images"] == 11


def test_before_training(synthetic, tmp_path, refused, monkeypatch):
    """
    Weights of a model with other classes are analyzed but for what depends on the classes, here on
    a dataset of the config.
    """
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **kwargs: file.write(b"1"))
    path, cfg = tmp_path / "weights.pth", load_cfg(arguments("faster_rcnn", synthetic, tmp_path)[1])
    cfg.merge_from_list([*SETTINGS, "MODEL.ROI_HEADS.NUM_CLASSES", 7])
    torch.save({"model": build_model(cfg).state_dict()}, path)
    command = arguments("faster_rcnn", synthetic, tmp_path, "MODEL.WEIGHTS", path, *SETTINGS)
    assert "weights of another model" in refused(analyze_balance.main, command)
    start = command.index("--val-json")
    command[start : start + 4] = ["DATASETS.TRAIN", "('own_val',)"]  # of the call before
    analyze_balance.main(["--before-training", *command])
    numbers = json.loads((tmp_path / "balance/balance.json").read_text())
    assert sorted(numbers) == ["features", "judgments", "num_images", "samples"]
    titles = re.findall("<h2[^>]*>(.*?):", (tmp_path / "balance/index.html").read_text())
    assert titles == ["Samples", "Features", "Features"]


@pytest.mark.parametrize(
    ("system", "extra", "message"),
    [
        ("faster_rcnn", [], "MODEL.WEIGHTS: name the weights"),
        ("faster_rcnn", ["--before-training"], "name the weights that the training starts from"),
        ("faster_rcnn", ["--num-images", "0"], "--num-images is 0: use 1 or more"),
        ("fast_rcnn", [], "DATASETS.PROPOSAL_FILES_TEST"),
        (
            "fast_rcnn",
            ["--train-json", "{}/instances.json", "--train-images", "{}/images"],
            "DATASETS.PROPOSAL_FILES_TRAIN",
        ),
    ],
)
def test_errors(system, extra, message, synthetic, tmp_path, refused):
    extra = [x.format(synthetic) for x in extra]
    command = arguments(system, synthetic, tmp_path, *extra, "MODEL.DEVICE", "cpu")
    assert message in refused(analyze_balance.main, command)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *(("--val-images", ""), ("--val-json", "balance.json"), ("MODEL.WEIGHTS", "levels.png")),
        *(("--weights-b", "losses_b.png"), ("--val-proposals", "index.html")),
        ("--config-file-b", "samples_b.png"),
    ],
)
def test_inputs_stay(option, name, synthetic, tmp_path, refused):
    """No file of the report is an input."""
    (tmp_path / "balance").mkdir()
    path = tmp_path / "balance" / name
    if name:
        path.write_text("precious")
    extra = ["--weights-b", "none", option, path, "MODEL.DEVICE", "cpu"]
    error = refused(analyze_balance.main, arguments("faster_rcnn", synthetic, tmp_path, *extra))
    kind = "file" if name else "folder"
    assert f"OUTPUT_DIR: {path} and {option}, {path}, are the same {kind}" in error
    assert not name or path.read_text() == "precious"


def test_images_stay(synthetic, tmp_path, refused):
    """Those of the dataset, with or without objects, be they in the folder of the report."""
    dataset = json.loads((synthetic / "instances.json").read_text())
    with_objects = {x["image_id"] for x in dataset["annotations"]}
    image = next(x for x in dataset["images"] if x["id"] not in with_objects)
    shutil.copytree(synthetic / "images", tmp_path / "balance")
    path = (tmp_path / "balance" / image["file_name"]).rename(tmp_path / "balance/samples.png")
    before, image["file_name"] = path.read_bytes(), path.name
    for x in dataset["images"]:
        x["file_name"] = f"balance/{x['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(dataset))
    data = ["--val-json", tmp_path / "a.json", "--val-images", tmp_path, "MODEL.DEVICE", "cpu"]
    message = f"OUTPUT_DIR: {path} and an image of own_val, {path}, are the same file"
    command = arguments("faster_rcnn", synthetic, tmp_path, *data)
    assert message in refused(analyze_balance.main, command)
    assert path.read_bytes() == before
