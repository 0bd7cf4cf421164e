# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, load_cfg
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from libra_d2.config import make_recipe
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

SYSTEMS = ["retinanet", "mask_rcnn"]
# Scores that untrained models reach.
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


def arguments(system, image, folder, *extra):
    args = ["--config-file", config_of(system), "--sample-image", image]
    args += ["--output", folder / "model.ts", "MODEL.WEIGHTS", folder / "weights.pth"]
    return [str(a) for a in [*args, *SIZE, *LOW, *FOUR, "MODEL.DEVICE", "cpu", *extra]]


@pytest.mark.parametrize("system", SYSTEMS)
def test_export(system, synthetic, tmp_path, capsys):
    """The file detects the same in an image of another size, in a process without Detectron2."""
    model = weights_of(system, tmp_path)
    image = next((synthetic / "images").iterdir())
    main(arguments(system, image, tmp_path))
    line, path = capsys.readouterr().out.splitlines()[-2:]
    with torch.no_grad():  # the same tests by hand: the sample and five other images
        sample = read_sample(read_config(str(config_of(system)), SIZE), str(image))
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
        "classes": ["0", "1", "2", "3"],
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
    with torch.no_grad():
        expected = detect(model, [{"image": another}])
    assert len(expected[0]) > 0
    index = match(expected, found)
    assert len(index.unique()) == len(index)
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b[index], rtol=1e-4, atol=1e-3)


ONNX = ["faster_rcnn", "retinanet", "mask_rcnn", "fast_rcnn", "cascade_rcnn"]
SIZES = [(128, 96), (97, 131), (203, 160), (33, 40)]  # height, width


@pytest.mark.parametrize("system", ONNX)
def test_onnx(system, synthetic, tmp_path, capsys):
    """
    onnxruntime detects the same in images of many sizes, of which one alone was exported: as many
    objects, corners to 0.05 pixels, scores to 1e-4. So it does where there is nothing.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    model = weights_of(system, tmp_path)
    image = next((synthetic / "images").iterdir())
    args = arguments(system, image, tmp_path)
    args[args.index("--output") + 1] = str(tmp_path / "model.onnx")
    main([*args[:6], "--categories", str(synthetic / "instances.json"), *args[6:]])
    assert "the same " in capsys.readouterr().out
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    about = session.get_modelmeta().custom_metadata_map
    description = json.loads((tmp_path / "model.onnx.json").read_text())
    assert {key: json.loads(value) for key, value in about.items()} == description
    classes = json.loads((synthetic / "instances.json").read_text())["categories"]
    assert description["classes"] == [x["name"] for x in classes]
    inputs = ["boxes", "image"] if system == "fast_rcnn" else ["image"]
    assert [x.name for x in session.get_inputs()] == description["input"]["names"] == inputs
    assert [x.name for x in session.get_outputs()] == description["output"]
    assert description["output"][3:] == ["pred_masks"] * (system == "mask_rcnn")
    torch.manual_seed(1)
    for size in SIZES:
        for content in (255 * torch.rand(3, *size), torch.full((3, *size), 114.0)):
            sample = make_input(content, with_proposals=system == "fast_rcnn")
            arrays = {name: value.numpy() for name, value in sample.items()}
            found = [torch.as_tensor(x) for x in session.run(None, arrays)]
            with torch.no_grad():
                expected = detect(model, [sample])
            assert [x.shape for x in found] == [x.shape for x in expected], size
            # The last ones of 100 are a matter of equal scores.
            clear = [x[expected[2] > expected[2].amin(dim=0) + 1e-4] for x in expected]
            expected = clear if len(expected[0]) else expected
            index = match(expected, found)
            assert len(index.unique()) == len(index)
            bounds = (0.05, 0.5, 1e-4, 1e-4)
            for a, b, bound in zip(expected, found, bounds):
                assert len(a) == 0 or (a.float() - b[index].float()).abs().max() < bound, size


def test_onnx_demo(synthetic, tmp_path):
    """The script needs neither Detectron2 nor PyTorch, and finds what the model finds."""
    pytest.importorskip("onnxruntime")
    weights_of("faster_rcnn", tmp_path)
    image = next((synthetic / "images").iterdir())
    args = arguments("faster_rcnn", image, tmp_path)
    args[args.index("--output") + 1] = str(tmp_path / "model.onnx")
    main(args)
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'detectron2', 'libra_d2', 'cv2'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = [ROOT / "demo/onnx_demo.py", tmp_path / "model.onnx", image, tmp_path / "out.jpg"]
    command = [sys.executable, "-c", code, *script]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"0 objects: {tmp_path / 'out.jpg'}\n"
    assert (tmp_path / "out.jpg").exists()


def model_that_finds(fields):
    """A model that detects the same in any image."""

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
        (changed(2, 1, 0.9e-4), None),
        (changed(2, 1, -1.2e-4), "scores of the exported model differ by up to 0.00012:"),
        (changed(3, 0, 0.9e-4), None),
        (changed(3, 0, 2e-4), "pred_masks of the exported model differ by up to 0.0002:"),
        (changed(1, 0, 1), "pred_classes of the exported model differ by up to 1:"),
        # The last one, of the lowest score, may be any; not so one with more.
        (changed(0, 3, 9), None),
        (changed(1, 3, 3), None),
        (tuple(x[:3] for x in FOUND), "the model detects 4 objects, but exported 3:"),
        (FOUND[:3], "the model detects 4 objects, but exported 4:"),
        (TWICE, "the exported model detects other objects:"),
    ],
)
def test_check(found, message):
    """Any order, corners to 0.05 pixels, scores and masks to 1e-4; it says in which size."""
    model, sample = model_that_finds(FOUND), {"image": torch.zeros(3, 20, 30)}
    assert check(model_that_finds(NOTHING), lambda image: NOTHING, sample) == 0
    if message is None:
        assert check(model, lambda image: found, sample) == 4
        return
    with pytest.raises(InputError, match="the model cannot be exported$") as error:
        check(model, lambda image: found, sample)
    assert str(error.value).startswith(f"in an image of 30 x 20 pixels {message}")


def test_order_of_equal_scores():
    """The nearest of the same class, where a thousandth of a score counts as a pixel."""
    order = torch.tensor([0, 2, 1, 3])
    assert torch.equal(match(FOUND, tuple(x[order] for x in FOUND)), order)
    boxes, classes = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    boxes[1, 2] = 1  # one corner is a pixel to the right
    for score, nearest in ((0.5009, 0), (0.5011, 1)):
        found = (boxes, classes, torch.tensor([score, 0.5]))
        assert match((boxes[:1], classes[:1], torch.tensor([0.5])), found).tolist() == [nearest]
    assert match(TWICE, FOUND).tolist() == [0, 1, 1, 3]
    assert match(NOTHING, NOTHING).tolist() == []


def test_other_images():
    """Their sizes and content: the image itself, mirrored at the diagonal, gray; boxes in it."""
    image = torch.arange(3 * 80 * 60).view(3, 80, 60).float()
    images = other_images(image)
    sizes = [(60, 40), (79, 97), (113, 30), (60, 80), (80, 60)]
    assert [tuple(x.shape) for x in images] == [(3, *size) for size in sizes]
    rows, columns = torch.arange(60) * 80 // 60, torch.arange(40) * 60 // 40
    assert torch.equal(images[0], image[:, rows[:, None], columns])
    assert torch.equal(images[3], image.transpose(1, 2))
    assert images[3].is_contiguous()
    assert (images[4] == 114).all()

    boxes = make_input(image, with_proposals=True)["boxes"]
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert boxes.shape == (200, 4)
    assert boxes.min() >= 0
    assert (boxes[:, 2:].amax(dim=0) / torch.tensor([60, 80]) - 0.95).abs().max() <= 0.05


def test_sample(tmp_path):
    """As the model gets it: in its order of channels, the shorter side resized, 0 to 255."""
    pixels = torch.tensor([[[200, 100, 0]]], dtype=torch.uint8).expand(20, 40, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    cfg = load_cfg(DEMO_CONFIG)
    for cfg.INPUT.FORMAT, colors in (("RGB", [200, 100, 0]), ("BGR", [0, 100, 200])):
        cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.DEVICE = 30, "cpu"
        image = read_sample(make_recipe(cfg), str(tmp_path / "a.png"))
        assert (image.dtype, image.shape) == (torch.float32, (3, 30, 60))
        assert image[:, 3, 7].tolist() == image[:, -1, -1].tolist() == colors


@pytest.mark.parametrize(("system", "number"), [("faster_rcnn", 2), ("retinanet", 3)])
def test_class_names(system, number, tmp_path):
    """From a file, which must have as many; else those of the dataset if as many; else numbers."""
    cfg = load_cfg(config_of(system))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES = 2, 3
    names = [f"class {i}" for i in range(number)]
    MetadataCatalog.get(f"export_right_{number}").thing_classes = names
    MetadataCatalog.get(f"export_wrong_{number}").thing_classes = [*names, "one more"]
    for train, test, named in (
        *(("", "", False), ("none", "", False), ("right", "", True), ("wrong", "right", True)),
        *(("right", "wrong", False), ("right", "none", False)),
    ):
        for key, kind in (("TRAIN", train), ("TEST", test)):
            cfg.DATASETS[key] = (f"export_{kind}_{number}", "export_other") if kind else ()
        assert class_names(make_recipe(cfg), None) == (
            names if named else [str(i) for i in range(number)]
        )
    path = tmp_path / "a.json"
    categories = [{"id": 9 - i, "name": f"c{i}"} for i in range(number)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    assert class_names(make_recipe(cfg), str(path)) == [f"c{i}" for i in reversed(range(number))]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 5
    with pytest.raises(InputError, match=f"a.json: {number} classes, but the model has 5$"):
        class_names(make_recipe(cfg), str(path))


@pytest.mark.parametrize(
    ("image", "extra", "message"),
    [
        ("/none.jpg", [], "/none.jpg: the image cannot be used"),
        (None, ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        (None, ["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "only models that detect objects"),
    ],
)
def test_errors(image, extra, message, synthetic, tmp_path, capsys):
    image = image or next((synthetic / "images").iterdir())
    with pytest.raises(SystemExit, match="2"):
        main(arguments("faster_rcnn", image, tmp_path, *extra))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.ts").exists()
