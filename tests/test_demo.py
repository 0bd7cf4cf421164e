# SPDX-License-Identifier: Apache-2.0
"""The demo as its user runs it, with the weights of models that were not trained."""

import logging

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, build_model, load_cfg
from PIL import Image
from test_train_net import QUICK, OneNumber, small_data

from libra_d2.demo.demo import build_argument_parser, main, setup

DOCS = ["--input", str(ROOT / "docs/images")]
COLOR = (30, 60, 90)  # RGB


@pytest.fixture
def small(tmp_path):
    """`small_data` whose images have that color; and weights that find its objects, and none."""
    folder = small_data(tmp_path / "data")
    for path in (folder / "images").iterdir():
        Image.new("RGB", (64, 48), COLOR).save(path)
    for number in (0.0, 1.0):
        torch.save({"model": {"number": torch.tensor(number)}}, folder / f"{number:.0f}.pth")
    return folder


@pytest.fixture
def logged():
    """What the demo logs."""
    handler, messages = logging.Handler(), []
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("libra_d2.demo").addHandler(handler)
    yield messages
    logging.getLogger("libra_d2.demo").removeHandler(handler)


def run(small, *args, opts=()):
    main(
        [
            *("--config-file", str(DEMO_CONFIG), "--categories", str(small / "instances.json")),
            *map(str, [*args, "--opts", "MODEL.WEIGHTS", small / "1.pth", *QUICK, *opts]),
        ]
    )


def is_drawn(picture):
    """Whether a box is around the object, in a picture of 640 x 480 with the right colors."""
    off = np.abs(picture.astype(int) - COLOR).max(axis=2)
    assert off.shape == (480, 640)
    assert off[340:].max() < 20  # what is far from the object; videos are not exact
    lines = [off[316:325, 100:300].max(axis=0), off[150:250, 396:405].max(axis=1)]
    assert len({(line > 40).all() for line in lines}) == 1  # below it and on its right
    return (lines[0] > 40).all()


def test_folder_and_pattern(small, tmp_path, logged):
    images, out = small / "images", tmp_path / "out"
    run(small, "--input", images / "2.png", images, f"{images}/*1.png", "--output", out)
    assert logged == [f"{images}/{i}.png: 1 objects" for i in (2, 1, 2, 1)]
    assert sorted(x.name for x in out.iterdir()) == ["1.png", "2.png"]
    assert is_drawn(np.array(Image.open(out / "1.png")))


def test_side_by_side(small, tmp_path):
    """The plain detector, which finds nothing here, is on the left."""
    args = ["--plain-weights", small / "0.pth", "--input", small / "images/1.png"]
    run(small, *args, "--output", tmp_path / "a.PNG")
    picture = np.array(Image.open(tmp_path / "a.PNG"))
    assert [is_drawn(half) for half in np.split(picture, 2, axis=1)] == [False, True]


def test_video(small, tmp_path):
    """As many frames as the video has, in its colors and at its rate."""
    writer = cv2.VideoWriter(
        str(tmp_path / "in.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (640, 480)
    )
    for _ in range(3):
        writer.write(np.full((480, 640, 3), COLOR[::-1], dtype=np.uint8))
    writer.release()
    run(small, "--video-input", tmp_path / "in.mp4", "--output", tmp_path / "out")
    video = cv2.VideoCapture(str(tmp_path / "out/in.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert video.get(cv2.CAP_PROP_FPS) == 10
    assert not is_drawn(video.read()[1][:, :, ::-1])  # its box is elsewhere in a large frame


def test_what_the_model_gets(small, tmp_path, monkeypatch):
    """In the order of INPUT.FORMAT, resized as in evaluation."""
    given, forward = [], OneNumber.forward
    monkeypatch.setattr(OneNumber, "forward", lambda m, x: given.extend(x) or forward(m, x))
    for channels, color in (("RGB", COLOR), ("BGR", COLOR[::-1])):
        opts = ["INPUT.FORMAT", channels, "INPUT.MIN_SIZE_TEST", 72]
        run(small, "--input", small / "images/1.png", "--output", tmp_path, opts=opts)
        assert (given[-1]["height"], given[-1]["width"]) == (48, 64)
        assert given[-1]["image"].shape == (3, 72, 96)
        assert (given[-1]["image"] == torch.tensor(color)[:, None, None]).all()


def test_threshold(small, tmp_path, logged):
    """Of random weights, which are sure of nothing, and of classes of one's own."""
    cfg = load_cfg(DEMO_CONFIG)
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", 2
    torch.save({"model": build_model(cfg).state_dict()}, small / "1.pth")
    for threshold in (0.0, 1.0):
        args = ["--input", small / "images/1.png", "--output", tmp_path / "out"]
        opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "TEST.DETECTIONS_PER_IMAGE", 3]
        run(small, *args, "--confidence-threshold", threshold, opts=opts)
    assert [x.split(": ")[-1] for x in logged] == ["3 objects", "0 objects"]


def test_unusable_files(small, tmp_path, capsys):
    """The other images are drawn; then the one that cannot be read is named."""
    images, out = small / "images", tmp_path / "out"
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    (images / "notes.txt").write_text("not an image")
    for output, message in (
        (out, "1 of 2 images cannot be read: "),
        (small / "1.pth", "is a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(small, "--input", images, "--output", output)
        assert message in capsys.readouterr().err
    assert [x.name for x in out.iterdir()] == ["2.png"]


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
        ([*DOCS, "--categories", str(ROOT / "setup.py")], "setup.py: no COCO JSON"),
        ([*DOCS, "--opts", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        ([*DOCS, "--opts", "MODEL.LOAD_PROPOSALS", "True"], "a model without RPN needs proposals"),
    ],
)
def test_errors(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--config-file", str(DEMO_CONFIG), *args])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert message in line


def test_no_window(small, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(small, "--input", small / "images/1.png")
    assert "use --output" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_name_of_the_model_zoo(suffix, tmp_path, monkeypatch):
    """It stands for the published weights, and leaves no directory behind."""
    monkeypatch.chdir(tmp_path)
    name = f"COCO-Detection/libra_retinanet_R_50_FPN_1x{suffix}"
    args = build_argument_parser().parse_args(["--config-file", name, "--webcam"])
    recipe = setup(args, args.config_file, [])
    assert recipe.is_retinanet
    assert recipe.weights == "libra://COCO-Detection/libra_retinanet_R_50_FPN_1x"
    cfg = recipe.config.MODEL
    assert cfg.RETINANET.SCORE_THRESH_TEST == cfg.ROI_HEADS.SCORE_THRESH_TEST == 0.5
    own = ["MODEL.WEIGHTS", "own.pth"]
    assert setup(args, args.config_file, own).weights == "own.pth"
    # The plain detector: the same without the ideas, unless it has a config of its own.
    for plain_config, has_pyramid in ((None, False), (args.config_file, True)):
        args.plain_config_file = plain_config
        recipe = setup(args, args.config_file, own, "plain.pth")
        assert recipe.weights == "plain.pth"
        assert has_pyramid == recipe.config.MODEL.LIBRA.BFP.ENABLED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["yaml", "py"])
def test_names_of_detectron2(suffix):
    """Its zoo's weights, for the plain detector."""
    args = build_argument_parser().parse_args(["--config-file", "", "--webcam"])
    recipe = setup(args, f"COCO-Detection/retinanet_R_50_FPN_1x.{suffix}", [])
    assert recipe.weights.startswith("https://")
    assert recipe.score_threshold == 0.5
