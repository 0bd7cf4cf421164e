# SPDX-License-Identifier: Apache-2.0
"""The demo for exported models, which stands alone."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, example, full_disk
from PIL import Image, ImageDraw

from detectron2.data.transforms import ResizeShortestEdge

from libra_d2.data.resize import OpenCVResizeShortestEdge
from libra_d2.demo.onnx_demo import main, resize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

INPUT = {
    "names": ["image"],
    "format": "BGR",
    "interpolation": "opencv",
    "shorter_side": 30,
    "longer_side_at_most": 1000,
}


def make_model(path, names=("image",), **about):
    """
    A model that finds an object of class 1 from the second pixel to the last but one, the blue
    channel of its first pixel being the score in percent; and one that is not sure, of class 0.
    """
    node, info, t = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
    constants = {
        "percent": np.float32(100),
        "corners": np.array([[1, 1, 39, 29], [0, 0, 9, 9]], np.float32),
        "labels": np.array([1, 0]),
        "low": np.array([0.4], np.float32),
    }
    nodes = [
        node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.asarray(value)))
        for name, value in {**constants, "start": [0, 0, 0], "end": [1, 1, 1]}.items()
    ]
    nodes += [
        node("Slice", ["image", "start", "end"], ["pixel"]),
        node("Reshape", ["pixel", "one"], ["flat"]),
        node("Div", ["flat", "percent"], ["high"]),
        node("Concat", ["high", "low"], ["scores"], axis=0),
        node("Identity", ["corners"], ["boxes"]),
        node("Identity", ["labels"], ["classes"]),
    ]
    one = onnx.numpy_helper.from_array(np.array([1]))
    nodes.insert(0, node("Constant", [], ["one"], value=one))
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [info(name, t.FLOAT, [3, None, None] if name == "image" else [None]) for name in names],
        [
            info("boxes", t.FLOAT, [2, 4]),
            info("classes", t.INT64, [2]),
            info("scores", t.FLOAT, [2]),
        ],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in about.items()})
    onnx.save(model, str(path))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: a model, an image of 80 x 60 pixels, and what is none."""
    make_model(tmp_path / "model.onnx", input=INPUT, classes=["dog", "猫"])
    Image.new("RGB", (80, 60), (20, 10, 90)).save(tmp_path / "ä.png")
    Image.new("RGB", (80, 60)).save(tmp_path / "whole.png")
    half = (tmp_path / "whole.png").read_bytes()[:60]
    (tmp_path / "half.png").write_bytes(half)
    (tmp_path / "junk").write_bytes(b"\x08junk" * 100)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("ä.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_red(path):
    return (np.array(Image.open(path).convert("RGB")).astype(int) - [255, 0, 0] == 0).all(axis=2)


@pytest.mark.parametrize("output", ["out.png", "new/folder/ö.PNG"])
def test_picture(output, folder, capsys, monkeypatch):
    """Resized by one half; the box is drawn in the pixels of the image, around the sure object."""
    texts = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *args, fill: texts.append(args[1:]))
    main(["model.onnx", "ä.png", output])
    assert capsys.readouterr().out == f"1 objects: {output}\n"
    red = is_red(folder / output)
    assert red[2:59, 2].all()
    assert red[2, 2:79].all()
    assert not red[:2].any()
    assert not red[20:50, 10:70].any()
    assert texts == [([2, 2], "猫 90%")]


@pytest.mark.parametrize(
    ("interpolation", "augmentation"),
    [("opencv", OpenCVResizeShortestEdge), ("pillow", ResizeShortestEdge)],
)
@pytest.mark.parametrize("size", [(47, 61), (61, 47)])
def test_resize(interpolation, augmentation, size):
    """To the nearest size, 30 x 39 or 39 x 30 here, as in training."""
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    wanted = {**INPUT, "interpolation": interpolation, "format": "RGB"}
    expected = augmentation(30, 1000).get_transform(pixels).apply_image(pixels)
    found, _ = resize(Image.fromarray(pixels), wanted)
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


def test_orientation(folder):
    """As cameras note it in the file; its lower left becomes the upper left."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = Image.new("RGB", (60, 80))
    image.paste((20, 10, 90), (0, 40, 30, 80))
    image.save(folder / "turned.png", exif=exif)
    main(["model.onnx", "turned.png", "out.png"])
    blue = np.array(Image.open(folder / "out.png"))[:, :, 2]
    assert blue.shape == (60, 80)
    assert (blue[20:30, 10:40] == 90).all()
    assert not blue[:, 40:].any()
    assert not blue[30:].any()


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"shorter_side": 60, "longer_side_at_most": 40}, 1),
        ({"interpolation": "pillow"}, 1),
        ({"format": "RGB"}, 0),
    ],
)
def test_other_inputs(folder, capsys, changes, number):
    """The limit of the longer side counts; the model sees the channels in the order it is for."""
    make_model(folder / "model.onnx", input={**INPUT, **changes}, classes=["dog", "cat"])
    main(["model.onnx", "ä.png", "out.png"])
    assert capsys.readouterr().out == f"{number} objects: out.png\n"
    red = is_red(folder / "out.png")
    assert red[2:59, 2].all() == red[2, 2:79].all() == bool(number)


def test_size_is_kept(folder):
    """If INPUT.MIN_SIZE_TEST is 0; the object of the model is then in the upper left."""
    make_model(folder / "model.onnx", input={**INPUT, "shorter_side": 0}, classes=["dog", "cat"])
    main(["model.onnx", "ä.png", "out.png"])
    red = is_red(folder / "out.png")
    assert red[1:30, 1].all()
    assert not red[31:].any()


def test_16_bits(folder):
    """65535 becomes 255, as in training."""
    for name, value in (("dark", 40 * 257), ("sure", 90 * 257)):
        Image.fromarray(np.full((60, 80), value, np.uint16)).save(folder / f"{name}.png")
        main(["model.onnx", f"{name}.png", f"{name}.jpg.png"])
        assert (
            np.array(Image.open(folder / f"{name}.jpg.png"))[30, 40].tolist() == [value // 257] * 3
        )
        assert is_red(folder / f"{name}.jpg.png").any() == (name == "sure")


def test_full_disk(folder, capsys):
    """The picture that was there is as before, and nothing else is left."""
    random = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(random).save(folder / "noise.png")
    Image.new("RGB", (80, 60)).save(folder / "out.png")
    before = {x: x.is_dir() or x.read_bytes() for x in folder.iterdir()}
    with full_disk(5000), pytest.raises(SystemExit, match="2"):
        main(["model.onnx", "noise.png", "out.png"])
    assert capsys.readouterr().err == "error: out.png: File too large\n"
    assert {x: x.is_dir() or x.read_bytes() for x in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx", "ä.png", "out.png"], "none.onnx: No such file or directory"),
        (["junk", "ä.png", "out.png"], "junk: "),
        (["folder.png", "ä.png", "out.png"], "folder.png: Is a directory"),
        (["foreign.onnx", "ä.png", "out.png"], "foreign.onnx: not written by tools/export_model"),
        (["odd.onnx", "ä.png", "out.png"], "odd.onnx: "),
        (["boxes.onnx", "ä.png", "out.png"], "boxes.onnx: a model without RPN needs proposals"),
        (["own.onnx", "ä.png", "out.png"], "own.onnx: it does not say how images are resized"),
        (["model.onnx", "float.tiff", "out.png"], "float.tiff: floating point pixels"),
        (["model.onnx", "none.jpg", "out.png"], "none.jpg: No such file or directory"),
        (["model.onnx", "junk", "out.png"], "junk: cannot identify image file"),
        (["model.onnx", "half.png", "out.png"], "half.png: image file is truncated"),
        (["model.onnx", "ä.png", "out.docx"], "out.docx: no suffix of a picture"),
        (["model.onnx", "ä.png", "out"], "out: no suffix of a picture"),
        (["model.onnx", "ä.png", "out.psd"], "out.psd: no suffix of a picture"),  # read only
        (["model.onnx", "ä.png", "folder.png"], "folder.png: no file"),
        (["model.onnx", "ä.png", "junk/a.png"], "junk/a.png: File exists"),
        (["model.onnx", "ä.png", "ä.png"], "ä.png: an input, which would be overwritten"),
        (["model.onnx", "ä.png", "link.png"], "link.png: an input, which would be overwritten"),
    ],
)
def test_errors(arguments, message, folder, capfd):
    """One line and exit status 2; the inputs are as before, and nothing is written."""
    make_model(folder / "foreign.onnx")
    make_model(folder / "odd.onnx", input=["image"], classes=[])
    make_model(folder / "own.onnx", input={**INPUT, "shorter_side": None}, classes=[])
    Image.new("F", (80, 60)).save(folder / "float.tiff")
    inputs = {**INPUT, "names": ["boxes", "image"]}
    make_model(folder / "boxes.onnx", ["image", "rois"], input=inputs, classes=[])
    before = {x: x.is_dir() or x.read_bytes() for x in folder.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert {x: x.is_dir() or x.read_bytes() for x in folder.iterdir()} == before


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["a", "b"], 2), (["-h"], 0)])
def test_usage(arguments, status, capsys):
    with pytest.raises(SystemExit, match=str(status)):
        main(arguments)
    output = capsys.readouterr()
    assert re.match(r"usage: .* \[-h\] model image output\n", output.err or output.out)


def test_stands_alone(folder):
    """Without this project, Detectron2 and PyTorch, and in any locale."""
    code = (
        "import runpy, sys;"
        "sys.modules.update(dict.fromkeys(['torch', 'detectron2', 'libra_d2']));"
        f"sys.argv[0] = {str(ROOT / 'demo/onnx_demo.py')!r};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, "model.onnx", "ä.png"]
    for output, status in (("ö.png", 0), ("ä.png", 2)):
        done = subprocess.run([*command, output], env=environment, capture_output=True)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
    assert is_red(folder / "ö.png").any()


def test_example_of_onnx(folder, capsys):
    """What the page runs on a black image: a score of 0, and the object that is not sure."""
    exec(example("deployment.md", "onnxruntime.InferenceSession"), {})
    about, high, low = capsys.readouterr().out.splitlines()
    assert about == str(INPUT)
    assert high == "猫 0.0 [ 1.  1. 39. 29.]"
    assert low == "dog 0.4 [0. 0. 9. 9.]"


def test_example_of_torchscript(folder, capsys):
    """With an operator of torchvision; the image is resized, and its channels are turned around."""
    torch = pytest.importorskip("torch")
    from torchvision.ops import nms

    class Model(torch.nn.Module):
        def forward(self, image):
            height, width = image.shape[1:]
            boxes = torch.tensor([[0, 0, width - 1, height], [0, 0, width, height]]).float()
            scores = torch.stack([image[2].mean() + 0.25, image[0].mean() / 510])
            kept = nms(boxes, scores, 0.5)
            return boxes[kept], kept, scores[kept]

    torch.jit.script(Model()).save("model.ts")
    Image.new("RGB", (40, 24), (0, 0, 255)).save("photo.jpg", format="PNG")
    for longer, height in ((100, 24), (15, 24)):
        about = {"shorter_side": 12, "longer_side_at_most": longer, "format": "BGR"}
        content = {"classes": ["dog", "cat"], "input": about}
        (folder / "model.ts.json").write_text(json.dumps(content))
        exec(example("deployment.md", "torch.jit.load"), {})
        assert capsys.readouterr().out == f"cat 0.5 [0.0, 0.0, 40.0, {height:.1f}]\n"


@pytest.mark.parametrize(
    "box", [(10.0, 20.0, 66.0, 48.0), (3.3, 4.6, 41.9, 71.2), (-5.0, -8.0, 30.5, 100.0)]
)
def test_example_of_masks(box):
    """As Detectron2 pastes them, but for the outermost half pixel of the mask."""
    torch = pytest.importorskip("torch")
    from detectron2.layers import paste_masks_in_image
    from detectron2.structures import Boxes

    namespace = {}
    exec(example("deployment.md", "def paste_mask"), namespace)
    y, x = np.mgrid[:28, :28]
    mask = np.exp(-((x - 12.0) ** 2 / 80 + (y - 15.0) ** 2 / 40)).astype(np.float32)
    found = namespace["paste_mask"](mask, box, 70, 80)
    boxes = Boxes(torch.tensor([box]))
    expected = paste_masks_in_image(torch.from_numpy(mask)[None], boxes, (80, 70))[0].numpy()
    assert found.shape == (80, 70)
    assert expected.sum() > 100
    assert (found != expected).mean() < 0.001
