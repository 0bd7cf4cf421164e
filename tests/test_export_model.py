# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, demo_cfg, load_cfg
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from libra_d2.config import make_recipe
from libra_d2.demo import onnx_demo
from libra_d2.engine import read_config
from libra_d2.errors import InputError
from libra_d2.tools.export_model import (
    FIELDS,
    check,
    class_names,
    detect,
    main,
    make_input,
    match,
    other_images,
    read_sample,
)

# A threshold that scores of untrained models exceed.
LOW = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.005", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.005"]
FOUR = ["MODEL.ROI_HEADS.NUM_CLASSES", "4", "MODEL.RETINANET.NUM_CLASSES", "4"]
SIZE = ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "128"]


def config_of(system):
    return ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"


def weights_of(system, folder):
    cfg = load_cfg(config_of(system))
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([*LOW, *FOUR])
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return model


def export(system, synthetic, output, *extra, image="images/000001.jpg"):
    args = ["--config-file", config_of(system), "--sample-image", synthetic / image]
    args += ["--output", output, "--categories", synthetic / "instances.json"]
    args += ["MODEL.WEIGHTS", output.parent / "weights.pth", "MODEL.DEVICE", "cpu"]
    main([str(x) for x in [*args, *SIZE, *LOW, *FOUR, *extra]])


@pytest.mark.parametrize("system", ["retinanet", "mask_rcnn"])
def test_export(system, synthetic, tmp_path, capsys):
    """TorchScript detects the same in an image of another size, in a process without Detectron2."""
    model = weights_of(system, tmp_path)
    export(system, synthetic, tmp_path / "model.ts")
    line, path = capsys.readouterr().out.splitlines()[-2:]
    with torch.no_grad():
        image = str(synthetic / "images/000001.jpg")
        sample = read_sample(read_config(str(config_of(system)), SIZE), image)
        counts = [len(detect(model, [{"image": x}])[0]) for x in (sample, *other_images(sample))]
    others = ", ".join(map(str, counts[1:]))
    assert line == f"the same {counts[0]} detections, and {others} in images of other sizes"
    assert (path, counts[0] > 0) == (f"{tmp_path}/model.ts", True)
    description = json.loads((tmp_path / "model.ts.json").read_text())
    assert "MIN_SIZE_TEST: 96\n" in description.pop("config")
    sizes = {"shorter_side": 96, "longer_side_at_most": 128, "interpolation": "pillow"}
    assert description == {
        "input": {**sizes, "names": ["image"], "format": "RGB", "device": "cpu"},
        "output": ["pred_boxes", "pred_classes", "scores", "pred_masks"][: 3 + ("mask" in system)],
        "classes": ["square", "triangle", "circle", "star"],
    }
    another = 255 * torch.rand(3, 130, 70)
    torch.save(another, tmp_path / "image.pth")
    code = (
        "import sys, torch, torchvision; model = torch.jit.load('model.ts');"
        "torch.save(model(torch.load('image.pth')), 'found.pth');"
        "assert not {'detectron2', 'libra_d2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pth")
    assert check(model, lambda image: found, {"image": another}) > 0


@pytest.mark.parametrize("system", ["retinanet", "mask_rcnn", "fast_rcnn", "cascade_rcnn"])
def test_onnx(system, synthetic, tmp_path, capsys):
    """ONNX detects the same in images of other sizes, and in images without content."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = weights_of(system, tmp_path)
    path = str(tmp_path / "model.onnx")
    export(system, synthetic, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    graph = pytest.importorskip("onnx").load(path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}  # folded
    about = session.get_modelmeta().custom_metadata_map
    description = json.loads((tmp_path / "model.onnx.json").read_text())
    assert {key: json.loads(value) for key, value in about.items()} == description
    inputs = ["boxes", "image"] if system == "fast_rcnn" else ["image"]
    assert [x.name for x in session.get_inputs()] == description["input"]["names"] == inputs
    assert [x.name for x in session.get_outputs()] == description["output"]
    assert description["output"][3:] == ["pred_masks"] * (system == "mask_rcnn")
    torch.manual_seed(1)
    for size in ((128, 96), (97, 131), (203, 160), (33, 40)):  # height, width
        for image in (255 * torch.rand(3, *size), torch.full((3, *size), 114.0)):
            sample = make_input(image, with_proposals=system == "fast_rcnn")
            arrays = {name: value.numpy() for name, value in sample.items()}
            found = [torch.as_tensor(x) for x in session.run(None, arrays)]
            check(model, lambda *_, found=found: found, sample)
    if system == "retinanet":
        onnx_demo.main(path, str(synthetic / "images/000001.jpg"), str(tmp_path / "out.jpg"))
        assert capsys.readouterr().out.endswith(f"0 objects: {tmp_path}/out.jpg\n")


def test_requirements_of_onnx_demo():
    text = (ROOT / "demo/onnx_demo.py").read_text()
    modules = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert modules == {"json", "sys", "numpy", "PIL", "onnxruntime", "cv2"}


def model_that_finds(fields):
    """A model with constant detections."""

    def model(inputs):
        found = dict(zip(FIELDS, fields), pred_boxes=Boxes(fields[0]))
        return [{"instances": Instances(inputs[0]["image"].shape[-2:], **found)}]

    return model


BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 40], [5, 5, 9, 9]])
SCORES = torch.tensor([0.9, 0.5, 0.5, 0.1])
FOUND = (BOXES, torch.tensor([0, 1, 2, 1]), SCORES, torch.ones(4, 1, 2, 2))
TWICE, NOTHING = (tuple(x[index] for x in FOUND) for index in ([0, 1, 1, 3], []))


def changed(field, index, difference):
    fields = [x.clone() for x in FOUND]
    fields[field].view(4, -1)[index, -1] += difference
    return tuple(fields)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (FOUND, None),
        (tuple(x[torch.tensor([2, 0, 3, 1])] for x in FOUND), None),
        (changed(0, 0, -0.04), None),
        (changed(0, 0, -0.06), "pred_boxes of the exported model differ by up to 0.06:"),
        (changed(2, 1, -1.2e-4), "scores of the exported model differ by up to 0.00012:"),
        (changed(3, 0, 2e-4), "pred_masks of the exported model differ by up to 0.0002:"),
        (changed(1, 0, 1), "pred_classes of the exported model differ by up to 1:"),
        # Detections with the lowest score may differ.
        (changed(0, 3, 9), None),
        (changed(1, 3, 3), None),
        (tuple(x[:3] for x in FOUND), "the model detects 4 objects, but exported 3:"),
        (TWICE, "the exported model detects other objects:"),
    ],
)
def test_check(found, message):
    """Detections may differ in order, boxes by 0.05 pixels, scores and masks by 1e-4."""
    model, sample = model_that_finds(FOUND), {"image": torch.zeros(3, 20, 30)}
    assert check(model_that_finds(NOTHING), lambda image: NOTHING, sample) == 0
    if message is None:
        assert check(model, lambda image: found, sample) == 4
        return
    with pytest.raises(InputError, match="the model cannot be exported$") as error:
        check(model, lambda image: found, sample)
    assert str(error.value).startswith(f"in an image of 30 x 20 pixels {message}")


def test_match():
    """Among detections of the same class; a score difference of 0.001 counts as a pixel."""
    boxes, classes = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    boxes[1, 2] = 1  # one corner is a pixel to the right
    for score, nearest in ((0.5009, 0), (0.5011, 1)):
        found = (boxes, classes, torch.tensor([score, 0.5]))
        assert match((boxes[:1], classes[:1], torch.tensor([0.5])), found).tolist() == [nearest]
    assert match(TWICE, FOUND).tolist() == [0, 1, 1, 3]


def test_other_images():
    """Resized, transposed and gray images; proposals are inside the image."""
    image = torch.arange(3 * 80 * 60).view(3, 80, 60).float()
    images = other_images(image)
    sizes = [(60, 40), (79, 97), (113, 30), (60, 80), (80, 60)]
    assert [tuple(x.shape) for x in images] == [(3, *size) for size in sizes]
    assert torch.equal(images[3], image.transpose(1, 2))
    assert images[3].is_contiguous()
    assert (images[4] == 114).all()
    boxes = make_input(image, with_proposals=True)["boxes"]
    assert boxes.shape == (200, 4)
    assert (boxes >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] <= torch.tensor([60, 80])).all()


def test_sample(tmp_path):
    """Values are in [0, 255], channels in the order of INPUT.FORMAT, the shorter side resized."""
    pixels = torch.tensor([[[200, 100, 0]]], dtype=torch.uint8).expand(20, 40, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    for channels, colors in (("RGB", [200, 100, 0]), ("BGR", [0, 100, 200])):
        recipe = make_recipe(demo_cfg(INPUT__FORMAT=channels, INPUT__MIN_SIZE_TEST=30))
        image = read_sample(recipe, str(tmp_path / "a.png"))
        assert (image.dtype, image.shape) == (torch.float32, (3, 30, 60))
        assert image[:, 3, 7].tolist() == image[:, -1, -1].tolist() == colors


@pytest.mark.parametrize(
    ("train", "test", "named"), [((), (), 0), ("a", (), 1), ("b", "ab", 1), ("a", "b", 0)]
)
def test_class_names(train, test, named):
    """Those of the first dataset if their number is right, else numbers."""
    MetadataCatalog.get("a").thing_classes = ["a", "b", "c", "d"]
    MetadataCatalog.get("b").thing_classes = ["a"]
    cfg = demo_cfg(DATASETS__TRAIN=tuple(train), DATASETS__TEST=tuple(test))
    assert class_names(make_recipe(cfg), None) == list("abcd" if named else "0123")


def test_categories(tmp_path):
    """Class names from a file, whose number must be right."""
    path = tmp_path / "a.json"
    categories = [{"id": 9 - i, "name": f"c{i}"} for i in range(4)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    assert class_names(make_recipe(demo_cfg()), str(path)) == ["c3", "c2", "c1", "c0"]
    with pytest.raises(InputError, match="a.json: 4 classes, but the model has 5$"):
        class_names(make_recipe(demo_cfg(MODEL__ROI_HEADS__NUM_CLASSES=5)), str(path))


@pytest.mark.parametrize(
    ("image", "extra", "message"),
    [
        ("none.jpg", [], "none.jpg: the image cannot be used"),
        ("images/000001.jpg", ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        ("none.jpg", ["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "only models that detect obj"),
    ],
)
def test_errors(image, extra, message, synthetic, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        export("faster_rcnn", synthetic, tmp_path / "model.ts", *extra, image=image)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.ts").exists()
