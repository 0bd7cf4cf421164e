# SPDX-License-Identifier: Apache-2.0
"""The demo, run from its command line."""

import errno
import os
import re
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, full_disk
from PIL import Image
from test_train_net import QUICK, OneNumber, small_data

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from libra_d2.demo.demo import build_argument_parser, find_images, main, process_video, setup
from libra_d2.errors import InputError
from libra_d2.utils.meter import Meter, Result

DOCS = ["--input", str(ROOT / "docs/images")]
COLOR = (30, 60, 90)  # RGB


@pytest.fixture
def small(tmp_path):
    """`small_data` in one color; weights of the classes x and y that find no object, and all."""
    folder = small_data(tmp_path / "data")
    for path in (folder / "images").iterdir():
        Image.new("RGB", (64, 48), COLOR).save(path)
    learned = {"training data 'a' classes": ["x", "y"]}
    for number in (0.0, 1.0):
        content = {"model": {"number": torch.tensor(number)}, "run": learned}
        torch.save(content, folder / f"{number:.0f}.pth")
    return folder


@pytest.fixture
def texts(monkeypatch):
    """The labels that are drawn in a test."""
    texts, draw = [], Visualizer.draw_text
    monkeypatch.setattr(
        Visualizer,
        "draw_text",
        lambda *args, **kwargs: texts.append(args[1]) or draw(*args, **kwargs),
    )
    return texts


def run(small, *args, opts=()):
    args = ["--config-file", DEMO_CONFIG, "--categories", small / "instances.json", *args]
    main([str(x) for x in [*args, "--opts", "MODEL.WEIGHTS", small / "1.pth", *QUICK, *opts]])


def is_drawn(picture):
    """Whether a box is drawn around the object, in a 640 x 480 picture with the right colors."""
    off = np.abs(picture.astype(int) - COLOR).max(axis=2)
    assert off.shape == (480, 640)
    assert off[340:].max() < 20  # background; videos are compressed
    lines = [off[316:325, 100:300].max(axis=0), off[150:250, 396:405].max(axis=1)]
    assert len({(line > 40).all() for line in lines}) == 1  # bottom and right edge
    return (lines[0] > 40).all()


def test_folder_and_pattern(small, tmp_path, capsys, monkeypatch, texts):
    """A file's name is no pattern; the number of classes, and their names, are --categories'."""
    images, out, colors, devices = small / "images", tmp_path / "out", [], []
    monkeypatch.setattr(Visualizer, "_jitter", lambda self, color: colors.append(color) or color)
    monkeypatch.setattr(Instances, "to", lambda self, device: devices.append(device) or self)
    monkeypatch.setenv("HOME", str(small))
    (images / "1.png").rename(images / "1.PNG")
    (images / "2.png").rename(images / "[2].png")
    (images / "folder").mkdir()
    for name in ("b.txt", "a.gif", ".hidden"):
        (images / name).touch()
    run(small, "--input", "~/images/[2].png", images, f"{images}/*2*", "--output", out)
    printed = capsys.readouterr().out
    assert re.findall(f"{images}/(.*): 1 object\n", printed) == ["[2].png", "1.PNG"]
    assert f"{images}: skipped 2 files without the suffix of an image: a.gif\n" in printed
    assert sorted(x.name for x in out.iterdir()) == ["1.PNG", "[2].png"]
    assert is_drawn(np.array(Image.open(out / "1.PNG")))
    assert texts == ["a 100%"] * 2
    assert colors == [[0, 113 / 255, 188 / 255]] * 2  # that of the class
    assert devices == ["cpu"] * 2  # where objects are drawn
    heads = OneNumber.cfg.MODEL.ROI_HEADS
    assert (heads.NUM_CLASSES, heads.SCORE_THRESH_TEST) == (2, 0.5)


def test_images_of_a_folder(tmp_path, monkeypatch):
    """Those with the suffix of an image, in the order of their names."""
    names = ["1.bmp", "2.jpeg", "3.jpg", "4.png", "5.tif", "6.tiff", "7.webp"]
    monkeypatch.setattr(os, "listdir", lambda path: ["a.txt", *names[::-1]])
    assert find_images([str(tmp_path)]) == [str(tmp_path / x) for x in names]


def test_benchmark(small, capsys, monkeypatch):
    """Median time and rate of both detectors, for the image as it is."""
    values = Result("", "ms", {"detector": 20.0, "plain detector": 50.0}, {"detector": 3.0})
    values.spreads["plain detector"] = 1.0
    seen = []

    def times(meter, what, steps):
        seen.extend(len(step()["instances"]) for step in steps.values())
        return values

    monkeypatch.setattr(Meter, "times", times)
    path = small / "images/1.png"
    run(small, "--benchmark", "--plain-weights", small / "0.pth", "--input", path)
    assert seen == [1, 0]
    lines = capsys.readouterr().out.splitlines()[-3:]
    threads = torch.get_num_threads()
    assert lines[0] == f"{path}: 64 x 48 pixels, float32, cpu with {threads} threads"
    assert lines[1] == "detector: 20.0 ± 1.5 ms for an image, 50.0 images per second"
    assert lines[2] == "plain detector: 50.0 ± 0.5 ms for an image, 20.0 images per second"


def test_side_by_side(small, tmp_path, capsys, texts, refused):
    """The plain detector, which finds nothing, is on the left; its weights are not written over."""
    args = ["--plain-weights", small / "0.pth", "--input", small / "images/1.png"]
    (small / "a.yaml").write_text("INPUT: {MAX_SIZE_TEST: 77}")
    plain_config = ["--plain-config-file", small / "a.yaml"]
    run(small, *args, *plain_config, "--output", tmp_path / "a.PNG")
    assert "images/1.png: 1 object\n" in capsys.readouterr().out
    assert texts == ["a 100%"]
    plain = OneNumber.cfg  # the last model that was built
    assert (plain.MODEL.ROI_HEADS.NUM_CLASSES, plain.INPUT.MAX_SIZE_TEST) == (2, 77)
    picture = np.array(Image.open(tmp_path / "a.PNG"))[-480:]  # below the captions
    assert [is_drawn(half) for half in (picture[:, :640], picture[:, -640:])] == [False, True]
    args[1] = tmp_path / "a.PNG"
    assert f"and --plain-weights, {args[1]}, are" in refused(run, small, *args, "--output", args[1])


def video_of(path):
    """Write a video of three frames, 12.5 in a second."""
    codec = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), codec, 12.5, (640, 480))
    for _ in range(3):
        writer.write(np.full((480, 640, 3), COLOR[::-1], dtype=np.uint8))
    writer.release()
    return path


def test_video(small, tmp_path, texts):
    """The output has the name, the number of frames, their rate and the colors of the input."""
    path = video_of(tmp_path / "in.1.mp4")
    run(small, "--video-input", path, "--output", tmp_path / "out")
    video = cv2.VideoCapture(str(tmp_path / "out/in.1.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert video.get(cv2.CAP_PROP_FPS) == 12.5
    assert texts == ["a 100%"] * 3
    off = np.abs(video.read()[1][:, :, ::-1].astype(int) - COLOR).max(axis=2)
    assert off[:40, :50].max() > 40  # the box, from (8, 8) to (40, 32)
    assert off[100:].max() < 20


def test_webcam(small, tmp_path, monkeypatch, refused):
    """In a window until Escape; in a video, at an assumed rate as it has none; without frames."""
    frames, waits, open_source = [np.zeros((48, 64, 3), np.uint8)] * 3, [], cv2.VideoCapture
    camera = SimpleNamespace(isOpened=lambda: True, get=lambda name: 0, release=lambda: None)
    camera.read = lambda: (True, frames.pop()) if frames else (False, None)
    monkeypatch.setattr(cv2, "VideoCapture", lambda x: open_source(x) if x else camera)
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: None)
    monkeypatch.setattr(cv2, "waitKey", lambda wait: waits.append(wait) or 13 + 14 * len(waits[1:]))
    run(small, "--webcam")
    assert (waits, len(frames)) == ([1, 1], 1)
    (tmp_path / "v.1").mkdir()
    run(small, "--webcam", "--output", tmp_path / "v.1")
    assert open_source(str(tmp_path / "v.1/webcam.mp4")).get(cv2.CAP_PROP_FPS) == 25
    assert "webcam: it has no frames" in refused(run, small, "--webcam")


class Found:
    """A detector that finds nothing in the frames of a video, of which ``end`` is the last."""

    def __init__(self, end=None):
        self.end, self.number = end, 0

    def __call__(self, image):
        self.number += 1
        if self.number == self.end:
            raise KeyboardInterrupt
        fields = {"scores": torch.zeros(0), "pred_classes": torch.zeros(0, dtype=torch.int64)}
        return {
            "instances": Instances(image.shape[:2], pred_boxes=Boxes(torch.zeros(0, 4)), **fields)
        }


def test_half_a_video(tmp_path, capsys):
    """On a full disk the one that was there stays, and nothing else is left."""
    source = cv2.VideoCapture(str(video_of(tmp_path / "in.mp4")))
    (tmp_path / "out.mp4").write_text("before")
    message = "out.mp4: 0 of 3 frames could be written: is it an"
    with full_disk(), pytest.raises(InputError, match=message):
        process_video(source, "in", str(tmp_path / "out.mp4"), Found(), Metadata())
    assert (tmp_path / "out.mp4").read_text() == "before"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_interrupted_video(tmp_path):
    """What was drawn before Ctrl-C is kept."""
    source = cv2.VideoCapture(str(video_of(tmp_path / "in.mp4")))
    with pytest.raises(KeyboardInterrupt):
        process_video(source, "in", str(tmp_path / "out.mp4"), Found(end=3), Metadata())
    assert cv2.VideoCapture(str(tmp_path / "out.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_not_a_video(tmp_path):
    source = cv2.VideoCapture(str(video_of(tmp_path / "in.mp4")))
    with pytest.raises(InputError, match="out.xyz: OpenCV cannot write this; use an .mp4"):
        process_video(source, "in", str(tmp_path / "out.xyz"), Found(), Metadata())
    assert [x.name for x in tmp_path.iterdir()] == ["in.mp4"]


def test_model_input(small, tmp_path, monkeypatch):
    """Channels are in the order of INPUT.FORMAT; the image is resized as in evaluation."""
    given, forward = [], OneNumber.forward
    monkeypatch.setattr(OneNumber, "forward", lambda m, x: given.extend(x) or forward(m, x))
    for channels, color in (("RGB", COLOR), ("BGR", COLOR[::-1])):
        opts = ["INPUT.FORMAT", channels, "INPUT.MIN_SIZE_TEST", 72]
        run(small, "--input", small / "images/1.png", "--output", tmp_path, opts=opts)
        assert (given[-1]["height"], given[-1]["width"]) == (48, 64)
        assert given[-1]["image"].shape == (3, 72, 96)
        assert (given[-1]["image"] == torch.tensor(color)[:, None, None]).all()


@pytest.mark.parametrize(
    ("files", "pictures"),
    [
        (["a/x/1.png", "b/2.PNG"], ["1.png", "2.PNG"]),
        (["a/x/é.png", "b/x/é.png", "a/x/é.png"], ["a/x/é.png", "b/x/é.png"]),
        (["a/1.png", "a/../b/1.png", "b/x/2.png"], ["a/1.png", "b/1.png", "b/x/2.png"]),
        (["a/1", "a/1.gif"], ["1.gif.png", "1.png"]),  # with a suffix that can be written
        (["a/1.png", "b/1"], ["a/1.png", "b/1.png"]),
        (["a/1.png"], ["1.png"]),  # in a folder, whatever its name
    ],
)
def test_names_of_pictures(files, pictures, small, tmp_path, monkeypatch):
    """Images of the same name from several folders have pictures in folders, others do not."""
    monkeypatch.chdir(small)
    for name in ("a/x", "b/x"):
        (small / name).mkdir(parents=True)
    for name in files:
        shutil.copy(small / "images/1.png", name)
    out = tmp_path / "out.png"
    out.mkdir()
    run(small, "--input", *files, "--output", out)
    assert sorted(str(x.relative_to(out)) for x in out.rglob("*.*")) == pictures
    assert {Image.open(x).size for x in out.rglob("*.*")} == {(640, 480)}


def test_pictures_of_one_name(small, refused):
    """Nothing is drawn rather than one picture over the other."""
    image = small / "images/1.png"
    Image.open(image).save(small / "a.gif")
    shutil.copy(image, small / "a.gif.png")
    images = (small / "a.gif", small / "a.gif.png")
    message = f"--output: {small}/out/a.gif.png would be written twice"
    assert message in refused(run, small, "--input", *images, "--output", small / "out")
    assert not list((small / "out").iterdir())


@pytest.mark.parametrize(
    "place", ["photo.png", "images", "linked", "link.png", "../data/photo.png"]
)
def test_inputs_stay(place, small, monkeypatch, refused):
    """Nothing is written over what was given, be it a folder or through links."""
    monkeypatch.chdir(small)
    shutil.copy("images/1.png", "photo.png")
    (small / "linked").symlink_to("images")
    (small / "link.png").symlink_to("photo.png")
    before = {x: x.read_bytes() for x in small.rglob("*") if x.is_file()}
    source = "photo.png" if place.endswith("png") else "images"
    message = refused(run, small, "--input", source, "--output", place)
    assert re.search(f"--output: {place}.* and --input, {source}.*, are the same file", message)
    assert {x: x.read_bytes() for x in small.rglob("*") if x.is_file()} == before


def test_video_stays(small, tmp_path, monkeypatch, refused):
    """Also if the output is the video's folder; nor is another input written over."""
    monkeypatch.chdir(tmp_path)
    content = video_of(tmp_path / "in.mp4").read_bytes()
    for output in ("in.mp4", ".", "data/1.pth"):
        error = refused(run, small, "--video-input", "in.mp4", "--output", output)
        assert ", are the same file, which would be overwritten" in error
    assert (tmp_path / "in.mp4").read_bytes() == content


def test_half_a_picture(small, tmp_path, monkeypatch):
    """What was there before stays if a picture cannot be written, and nothing else."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1.png").write_text("before")

    def fail(image, file, format):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(SystemExit, match="^2$"):
        run(small, "--input", small / "images/1.png", "--output", tmp_path / "out")
    assert [x.read_text() for x in (tmp_path / "out").iterdir()] == ["before"]


def test_unusable_files(small, tmp_path, refused):
    """The readable images are drawn, and the first unreadable one is named."""
    images, out = small / "images", tmp_path / "out"
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    (images / "notes.txt").write_text("not an image")
    unreadable = f"1 of 2 images cannot be read: {images}/1.png"
    for output, message in ((out, unreadable), (small / "1.pth", f"File exists: {small}/1.pth")):
        assert message in refused(run, small, "--input", images, "--output", output)
    assert [x.name for x in out.iterdir()] == ["2.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "/none/*.jpg"], "/none/*.jpg: no such image"),
        (["--video-input", str(ROOT / "setup.py")], "setup.py: not a video"),
        (["--webcam", "--confidence-threshold", "2"], "--confidence-threshold is 2.0"),
        (["--webcam", "--plain-weights", "a.pth"], "two detectors side by side need --input"),
        (["--webcam", "--plain-config-file", "a.yaml"], "goes with --plain-weights"),
        (["--webcam"], "--webcam: not a video"),
        (["--webcam", "--benchmark"], "--benchmark needs --input"),
        ([*DOCS, "--categories", str(ROOT / "setup.py")], "setup.py: no COCO JSON"),
        ([*DOCS, "--opts", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        ([*DOCS, "--opts", "MODEL.LOAD_PROPOSALS", "True"], "a model without RPN needs proposals"),
    ],
)
def test_errors(args, message, refused):
    lines = refused(main, ["--config-file", str(DEMO_CONFIG), *args]).splitlines()
    (line,) = [x for x in lines if x.startswith("error:")]
    assert message in line


def test_unreadable_folder(small, monkeypatch, refused):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    error = refused(run, small, "--input", small / "images")
    assert f"error: --input: {small}/images: Permission denied" in error


def test_window(small, monkeypatch, texts):
    """In the right colors, with learned names; any key shows the next image, Escape ends it."""
    keys, shown = [13, 27], []
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: keys.pop(0))
    shutil.copy(small / "images/1.png", small / "images/3.png")
    run(small, "--input", small / "images", "--categories", "")
    assert len(shown) == 2
    assert texts == ["x 100%"] * 2
    assert is_drawn(shown[0][:, :, ::-1])


def test_no_window(small, refused):
    assert "use --output" in refused(run, small, "--input", small / "images/1.png")


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_name_of_the_model_zoo(suffix, tmp_path, monkeypatch):
    """It implies the published weights; no directory is created."""
    monkeypatch.chdir(tmp_path)
    name = f"COCO-Detection/libra_retinanet_R_50_FPN_1x{suffix}"
    threshold = ["--confidence-threshold", "0.25"]
    args = build_argument_parser().parse_args(["--config-file", name, "--webcam", *threshold])
    recipe = setup(args, args.config_file, [])
    assert recipe.is_retinanet
    assert recipe.weights == "libra://COCO-Detection/libra_retinanet_R_50_FPN_1x"
    cfg = recipe.config.MODEL
    assert cfg.RETINANET.SCORE_THRESH_TEST == cfg.ROI_HEADS.SCORE_THRESH_TEST == 0.25
    own = ["MODEL.WEIGHTS", "own.pth"]
    assert setup(args, args.config_file, own).weights == "own.pth"
    # The plain detector has the same config without balancing, unless it has its own.
    for plain_config, has_pyramid in ((None, False), (args.config_file, True)):
        args.plain_config_file = plain_config
        recipe = setup(args, args.config_file, own, "plain.pth")
        assert (recipe.weights, recipe.score_threshold) == ("plain.pth", 0.25)
        assert has_pyramid == recipe.config.MODEL.LIBRA.BFP.ENABLED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "own"), [("yaml", ["MODEL.WEIGHTS", "a"]), ("py", ["train.init_checkpoint=a"])]
)
def test_names_of_detectron2(suffix, own):
    """They imply the weights of Detectron2's model zoo, unless others are named."""
    args = build_argument_parser().parse_args(["--config-file", "", "--webcam"])
    recipe = setup(args, f"COCO-Detection/retinanet_R_50_FPN_1x.{suffix}", [])
    assert recipe.weights.startswith("https://")
    assert setup(args, f"COCO-Detection/retinanet_R_50_FPN_1x.{suffix}", own).weights == "a"
