# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, demo_cfg, load_cfg
from PIL import Image
from test_train_net import QUICK

from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from libra_d2.config import make_recipe
from libra_d2.demo import onnx_demo
from libra_d2.engine import read_config
from libra_d2.errors import InputError
from libra_d2.tools.export_checks import check, check_detections, detect, make_input, raw_outputs
from libra_d2.tools.export_model import (
    check_parts,
    class_names,
    export_onnx,
    main,
    other_images,
    read_sample,
)

pytestmark = pytest.mark.rounding

# A threshold that scores of untrained models exceed.
LOW = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.005", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.005"]
FOUR = ["MODEL.ROI_HEADS.NUM_CLASSES", "4", "MODEL.RETINANET.NUM_CLASSES", "4"]
LOW += ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"]
LOW += ["MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "300"]
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


@pytest.mark.parametrize(
    ("system", "channels", "interpolation"),
    [("retinanet", "RGB", "pillow"), ("mask_rcnn", "BGR", "opencv")],
)
def test_export(system, channels, interpolation, synthetic, tmp_path, capsys):
    """TorchScript detects the same in an image of another size, in a process without Detectron2."""
    model = weights_of(system, tmp_path)
    images = ["INPUT.FORMAT", channels, "MODEL.LIBRA.INPUT.INTERPOLATION", interpolation]
    export(system, synthetic, tmp_path / "model.ts", *images)
    raw, line, path = capsys.readouterr().out.splitlines()[-3:]
    with torch.no_grad():
        image = str(synthetic / "images/000001.jpg")
        sample = read_sample(read_config(str(config_of(system)), [*SIZE, *images]), image)
        counts = [len(detect(model, [{"image": x}])[0]) for x in (sample, *other_images(sample))]
    assert re.fullmatch(r"before thresholds: the same to \S+ of the largest value", raw)
    pattern = r"detections: the same (.*) in images of other sizes(; rounding decides on \d+ more)?"
    text, rest = re.fullmatch(pattern, line).groups()
    same, lost = (list(map(int, re.findall(r"\d+", x or "0"))) for x in (text, rest))
    assert all(a <= b for a, b in zip(same, counts))
    # Of these scores few are equal but for rounding, on any processor.
    assert sum(same) + lost[0] == sum(counts)
    assert lost[0] < 0.1 * sum(counts)
    assert (path, counts[0] > 0) == (f"{tmp_path}/model.ts", True)
    description = json.loads((tmp_path / "model.ts.json").read_text())
    assert "MIN_SIZE_TEST: 96\n" in description.pop("config")
    sizes = {"shorter_side": 96, "longer_side_at_most": 128, "interpolation": interpolation}
    assert description == {
        "input": {**sizes, "names": ["image"], "format": channels, "device": "cpu"},
        "output": ["pred_boxes", "pred_classes", "scores", "pred_masks"][: 3 + ("mask" in system)],
        "classes": ["square", "triangle", "circle", "star"],
    }
    another = 255 * torch.rand(3, 130, 70)
    torch.save(another, tmp_path / "image.pth")
    code = (
        "import sys, torch, torchvision; model = torch.jit.load('model.ts');"
        "found = model(torch.load('image.pth')); torch.save(found, 'found.pth');"
        "assert not any(x.requires_grad for x in (*found, *model.parameters()));"
        "assert not {'detectron2', 'libra_d2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pth")
    assert check_detections(model, lambda image: found, {"image": another}, 0)[0] > 0


@pytest.mark.parametrize("system", ["retinanet", "mask_rcnn", "fast_rcnn", "cascade_rcnn"])
def test_onnx(system, synthetic, tmp_path, capsys):
    """ONNX detects the same in images of other sizes, and in images without content."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = weights_of(system, tmp_path)
    path = str(tmp_path / "model.onnx")
    export(system, synthetic, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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
    for size in ((203, 160), (33, 40)):  # height, width
        for image in (255 * torch.rand(3, *size), torch.full((3, *size), 114.0)):
            sample = make_input(image, with_proposals=system == "fast_rcnn")
            arrays = {name: value.numpy() for name, value in sample.items()}
            found = [torch.as_tensor(x) for x in session.run(None, arrays)]
            same, _ = check_detections(model, lambda *_, found=found: found, sample, 1e-5)
            assert same > 0 or image.min() == 114
    if system == "retinanet":
        onnx_demo.main([path, str(synthetic / "images/000001.jpg"), str(tmp_path / "out.jpg")])
        assert capsys.readouterr().out.endswith(f"0 objects: {tmp_path}/out.jpg\n")


@pytest.mark.parametrize(("suffix", "device"), [("onnx", "cpu"), ("ts", "cuda")])
def test_device(suffix, device, synthetic, tmp_path, monkeypatch, refused):
    """ONNX files are exported on the CPU."""

    def fail(recipe, path):
        raise InputError(f"on {recipe.device}")

    monkeypatch.setattr("libra_d2.tools.export_model.read_sample", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = ["retinanet", synthetic, tmp_path / f"model.{suffix}", "MODEL.DEVICE", "cuda"]
    assert refused(export, *args).endswith(f"error: on {device}\n")


def test_wrong_export(tmp_path):
    """An exported model with another weight, or other thresholds, is refused."""
    pytest.importorskip("onnxruntime")
    model = weights_of("faster_rcnn", tmp_path)
    torch.manual_seed(0)
    image = 255 * torch.rand(3, 96, 128)
    samples = [{"image": x} for x in (image, image.flip(2))]

    exported = export_onnx(model, samples[0], detect, str(tmp_path / "a"))
    raw = export_onnx(model, make_input(image, True), raw_outputs, str(tmp_path / "b"))
    predictor = model.roi_heads.box_predictor
    check(model, samples, exported, lambda sample: raw)
    changes = (("test_nms_thresh", 0.7), ("test_nms_thresh", 0.3), ("test_score_thresh", 1))
    for name, value in changes:
        before = getattr(predictor, name)
        setattr(predictor, name, value)
        with pytest.raises(InputError, match="128 x 96 pixels the exported model (lacks|has) "):
            check(model, samples, exported, lambda sample: raw)
        setattr(predictor, name, before)
    with torch.no_grad():
        predictor.cls_score.weight[2] *= 1.02
    with pytest.raises(InputError, match="computed before thresholds differs by 0.0.* of the larg"):
        check(model, samples, exported, lambda sample: raw)


LAZY = """
import os
from detectron2.config import LazyCall, LazyConfig
from detectron2.data import transforms as T
from libra_d2.config.reading import detectron2_configs
from test_train_net import OneNumber

common = os.path.join(detectron2_configs(), "common")
dataloader = LazyConfig.load(f"{common}/data/coco.py").dataloader
dataloader.test.mapper.augmentations = [LazyCall(T.Resize)(shape=(64, 96))]
optimizer = LazyConfig.load(f"{common}/optim.py").SGD
lr_multiplier = LazyConfig.load(f"{common}/coco_schedule.py").lr_multiplier_1x
train = LazyConfig.load(f"{common}/train.py").train
train.device = "cpu"
model = LazyCall(OneNumber)(num_classes=1, proposal_generator=0)
"""


@pytest.mark.parametrize("is_lazy", [False, True])
def test_own_architecture(is_lazy, tmp_path, synthetic, capsys):
    """
    One that reads "height" and has no known head, and images that are resized by own rules; it
    knows the class that it has learned.
    """
    weights, output = tmp_path / "a.pth", tmp_path / "model.ts"
    run = {"training data 'a' classes": ["cat"]}
    torch.save({"model": {"number": torch.ones(())}, "run": run}, weights)
    (tmp_path / "lazy.py").write_text(LAZY)
    options = [*map(str, QUICK), "MODEL.WEIGHTS", str(weights), *FOUR[:1], "1"]
    if is_lazy:
        options = [f"train.init_checkpoint={weights}"]
    image = str(synthetic / "images/000001.jpg")
    args = ["--config-file", str(tmp_path / "lazy.py") if is_lazy else "", "--sample-image", image]
    main([*args, "--output", str(output), *options])
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "before thresholds: nothing was compared: this model has no known head"
    assert lines[1] == "detections: the same 1, and 1, 1, 1, 1, 1 in images of other sizes"
    description = json.loads((tmp_path / "model.ts.json").read_text())
    sides = tuple(description["input"][x] for x in ("shorter_side", "longer_side_at_most"))
    assert (sides == (None, None)) == is_lazy
    assert description["classes"] == ["cat"]


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
    """Those that the model has learned, else of the first dataset if they fit, else numbers."""
    MetadataCatalog.get("a").thing_classes = ["a", "b", "c", "d"]
    MetadataCatalog.get("b").thing_classes = ["a"]
    cfg = demo_cfg(DATASETS__TRAIN=tuple(train), DATASETS__TEST=tuple(test))
    assert class_names(make_recipe(cfg), None, []) == list("abcd" if named else "0123")
    assert class_names(make_recipe(cfg), None, list("wxyz")) == list("wxyz")


def test_categories(tmp_path):
    """Class names from a file, whose number must be right."""
    path = tmp_path / "a.json"
    categories = [{"id": 9 - i, "name": f"c{i}"} for i in range(4)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    assert class_names(make_recipe(demo_cfg()), str(path), list("wxyz")) == ["c3", "c2", "c1", "c0"]
    with pytest.raises(InputError, match="a.json: 4 classes, but the model has 5$"):
        class_names(make_recipe(demo_cfg(MODEL__ROI_HEADS__NUM_CLASSES=5)), str(path), [])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"MODEL__META_ARCHITECTURE": "PanopticFPN"}, "panoptic segmentation"),
        ({"MODEL__KEYPOINT_ON": True}, "keypoints"),
        ({}, ""),
    ],
)
def test_parts_that_cannot_be_exported(options, name):
    model = build_model(demo_cfg(MODEL__MASK_ON=not name or "panoptic" in name, **options))
    error = pytest.raises(InputError, match=f"^this model has {name}, which") if name else None
    with error or contextlib.nullcontext():
        check_parts(model)


@pytest.mark.parametrize(
    ("image", "extra", "message"),
    [
        ("none.jpg", [], "none.jpg: the image cannot be used"),
        ("images/000001.jpg", ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        ("none.jpg", ["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "only models that detect obj"),
    ],
)
def test_errors(image, extra, message, synthetic, tmp_path, refused):
    assert message in refused(
        export, "faster_rcnn", synthetic, tmp_path / "model.ts", *extra, image=image
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("weights.pth", "weights.pth and MODEL.WEIGHTS, {}/weights.pth, are the same file"),
        ("link", "link.json and --categories, {}/a.json, are the same file"),
        ("000001.jpg", "000001.jpg and --sample-image, {}/000001.jpg, are the same file"),
        ("a.yaml", "a.yaml and --config-file, {}/a.yaml, are the same file"),
        ("dir.onnx", "dir.onnx is not a file"),
    ],
)
def test_inputs_stay(output, message, synthetic, tmp_path, monkeypatch, refused):
    """The file beside the output included; nothing is computed, and nothing else is written."""
    shutil.copy(synthetic / "images/000001.jpg", tmp_path)
    shutil.copy(synthetic / "instances.json", tmp_path / "a.json")
    (tmp_path / "weights.pth").write_text("weights")
    (tmp_path / "link.json").symlink_to("a.json")
    (tmp_path / "a.yaml").write_text(f"_BASE_: {config_of('retinanet')}")
    (tmp_path / "dir.onnx").mkdir()
    before = {x: x.is_dir() or x.read_bytes() for x in tmp_path.iterdir()}
    extra = ["--categories", tmp_path / "a.json", "MODEL.WEIGHTS", tmp_path / "weights.pth"]
    args = ["--config-file", tmp_path / "a.yaml", "--sample-image", tmp_path / "000001.jpg"]
    expected = f"--output: {tmp_path}/{message.format(tmp_path)}"
    assert expected in refused(
        main, [str(x) for x in [*args, "--output", tmp_path / output, *extra]]
    )
    assert {x: x.is_dir() or x.read_bytes() for x in tmp_path.iterdir()} == before
