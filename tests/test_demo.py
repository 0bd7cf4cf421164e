# SPDX-License-Identifier: Apache-2.0
"""The demo as its user runs it, with the weights of models that were not trained."""

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, load_cfg
from PIL import Image

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from libra_d2.demo.demo import build_argument_parser, main, setup
from libra_d2.evaluation.side_by_side import match_detections

DOCS = ["--input", str(ROOT / "docs/images")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the demo's model for four classes, and of the plain one."""
    folder, files = tmp_path_factory.mktemp("weights"), []
    for balanced in (True, False):
        cfg = load_cfg(DEMO_CONFIG)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
        cfg.MODEL.LIBRA.BFP.ENABLED = balanced
        files.append(folder / f"balanced_{balanced}.pth")
        torch.save({"model": build_model(cfg).state_dict()}, files[-1])
    return [str(file) for file in files]


def run(synthetic, weights, *args, threshold=0.15):
    categories = synthetic / "instances.json"
    main(
        [
            *("--config-file", str(DEMO_CONFIG), "--categories", str(categories)),
            *("--confidence-threshold", str(threshold), *map(str, args)),
            *("--opts", "MODEL.WEIGHTS", weights, "INPUT.MIN_SIZE_TEST", "96"),
        ]
    )


def test_folder_and_pattern(synthetic, weights, tmp_path):
    images = sorted((synthetic / "images").iterdir())
    pattern = f"{synthetic}/images/*1.jpg"
    run(synthetic, weights[0], "--input", images[0], pattern, "--output", tmp_path / "out")
    expected = {images[0].name} | {x.name for x in images if x.name.endswith("1.jpg")}
    assert {x.name for x in (tmp_path / "out").iterdir()} == expected
    # Something was drawn: random weights find many objects at such a low threshold.
    picture = np.array(Image.open(tmp_path / "out" / images[0].name))
    assert picture.shape == (640, 640, 3)
    original = np.array(Image.open(images[0]).resize((640, 640), Image.Resampling.BILINEAR))
    assert (np.abs(picture.astype(int) - original).max(axis=2) > 40).mean() > 0.01


def test_one_image_into_a_file(synthetic, weights, tmp_path):
    image = next((synthetic / "images").iterdir())
    run(synthetic, weights[0], "--input", image, "--output", tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").size == (640, 640)


def test_side_by_side(synthetic, weights, tmp_path):
    image = next((synthetic / "images").iterdir())
    args = ["--plain-weights", weights[1], "--input", image, "--output", tmp_path / "a.png"]
    run(synthetic, weights[0], *args)
    assert Image.open(tmp_path / "a.png").size == (1280, 640)


def test_video(synthetic, weights, tmp_path):
    """As many frames as the video has."""
    writer = cv2.VideoWriter(
        str(tmp_path / "in.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 96)
    )
    for path in sorted((synthetic / "images").iterdir())[:3]:
        writer.write(cv2.imread(str(path)))
    writer.release()
    args = ["--video-input", tmp_path / "in.mp4", "--output", tmp_path / "out"]
    run(synthetic, weights[0], *args)
    video = cv2.VideoCapture(str(tmp_path / "out/in.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert video.get(cv2.CAP_PROP_FPS) == 10


def test_unreadable_image(synthetic, weights, tmp_path, capsys):
    """The others are drawn; then it is named."""
    (tmp_path / "in").mkdir()
    image = next((synthetic / "images").iterdir())
    (tmp_path / "in/a.png").write_bytes(image.read_bytes()[:300])
    (tmp_path / "in/b.png").write_bytes(image.read_bytes())
    (tmp_path / "in/notes.txt").write_text("not an image")
    with pytest.raises(SystemExit, match="2"):
        run(synthetic, weights[0], "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["b.png"]
    assert "1 of 2 images cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "/none/*.jpg"], "/none/*.jpg: no such image"),
        (["--video-input", "/none.mp4"], "/none.mp4: this is no video"),
        (["--video-input", str(ROOT / "setup.py")], "setup.py: this is no video"),
        (["--webcam", "--confidence-threshold", "2"], "--confidence-threshold is 2.0"),
        (["--webcam", "--plain-weights", "a.pth"], "two detectors side by side need --input"),
        (["--webcam", "--plain-config-file", "a.yaml"], "goes with --plain-weights"),
        (["--webcam"], "--webcam: this is no video"),
        ([*DOCS, "--categories", str(ROOT / "setup.py")], "--categories: "),
        ([*DOCS, "--opts", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        ([*DOCS, "--opts", "MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS"),
    ],
)
def test_errors(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--config-file", str(DEMO_CONFIG), *args])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert message in line


def test_no_window(synthetic, weights, capsys):
    image = next((synthetic / "images").iterdir())
    with pytest.raises(SystemExit, match="2"):
        run(synthetic, weights[0], "--input", image)
    assert "use --output" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_name_of_the_model_zoo(suffix, tmp_path, monkeypatch):
    """It stands for the published weights, and leaves no directory behind."""
    monkeypatch.chdir(tmp_path)
    name = f"COCO-Detection/libra_retinanet_R_50_FPN_1x{suffix}"
    args = build_argument_parser().parse_args(["--config-file", name, "--webcam"])
    cfg = setup(args, args.config_file, [])
    assert cfg.MODEL.META_ARCHITECTURE == "LibraRetinaNet"
    assert cfg.MODEL.WEIGHTS == "libra://COCO-Detection/libra_retinanet_R_50_FPN_1x"
    cfg = setup(args, args.config_file, ["MODEL.WEIGHTS", "own.pth"])
    assert cfg.MODEL.WEIGHTS == "own.pth"
    assert not list(tmp_path.iterdir())


def detections(*boxes):
    instances = Instances((100, 100), pred_boxes=Boxes(torch.tensor([b[:4] for b in boxes]) * 1.0))
    instances.pred_classes = torch.tensor([b[4] for b in boxes])
    return instances


def test_match_detections():
    """The same class, enough overlap, and one partner each."""
    theirs = detections((0, 0, 10, 10, 1), (50, 50, 60, 60, 2))
    ours = detections((0, 0, 10, 9, 1), (0, 1, 10, 10, 1), (50, 50, 60, 60, 1), (50, 50, 60, 54, 2))
    assert match_detections(ours, theirs).tolist() == [True, False, False, False]
    assert match_detections(ours, theirs[:0]).tolist() == [False] * 4
    assert match_detections(ours[:0], theirs).tolist() == []
