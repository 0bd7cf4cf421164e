# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_cfg

from detectron2.modeling import build_model

from libra_d2.tools.export_model import check, detect, main, match

SYSTEMS = ["retinanet", "mask_rcnn"]
# Scores that untrained models reach.
LOW = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.005", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.005"]


def weights_of(system, folder):
    cfg = load_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(LOW)
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return model


def arguments(system, image, folder, *extra):
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    args = ["--config-file", config, "--sample-image", image, "--output", folder / "model.ts"]
    opts = ["MODEL.WEIGHTS", folder / "weights.pth", "INPUT.MIN_SIZE_TEST", 96, *LOW]
    return [str(a) for a in [*args, *opts, "MODEL.DEVICE", "cpu", *extra]]


@pytest.mark.parametrize("system", SYSTEMS)
def test_export(system, synthetic, tmp_path, capsys):
    """The file detects the same in an image of another size, in a process without Detectron2."""
    model = weights_of(system, tmp_path)
    image = next((synthetic / "images").iterdir())
    main(arguments(system, image, tmp_path))
    shown = capsys.readouterr().out.splitlines()
    assert int(shown[-2].split()[2]) > 0
    description = json.loads((tmp_path / "model.ts.json").read_text())
    assert description["input"]["format"] == "RGB"
    names = ["pred_boxes", "pred_classes", "scores"]
    assert description["output"] == names + ["pred_masks"] * (system == "mask_rcnn")
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


def test_order_of_equal_scores():
    """Detections are the same in another order; not so if one is there twice."""
    boxes, classes = torch.rand(3, 4) * 50, torch.tensor([0, 1, 1])
    fields, order = (boxes, classes, torch.tensor([0.9, 0.5, 0.5])), torch.tensor([0, 2, 1])
    assert torch.equal(match(fields, tuple(x[order] for x in fields)), order)
    twice = tuple(x[torch.tensor([0, 1, 1])] for x in fields)
    assert match(fields, twice).unique().numel() < 3


def test_cascade(synthetic, tmp_path, capsys):
    """Upstream's main branch can export it; of 0.6 it is said that it cannot."""
    weights_of("cascade_rcnn", tmp_path)
    try:
        main(arguments("cascade_rcnn", next((synthetic / "images").iterdir()), tmp_path))
    except SystemExit:
        assert "0.6 cannot save the trace of this model" in capsys.readouterr().err
    assert (tmp_path / "model.ts").exists() == (tmp_path / "model.ts.json").exists()


def test_another_model_is_noticed(tmp_path):
    """Which is what the check is for."""
    torch.manual_seed(1)
    first, second = weights_of("faster_rcnn", tmp_path), weights_of("faster_rcnn", tmp_path)
    with pytest.raises(RuntimeError, match="cannot be traced"):
        check(first, lambda image: detect(second, [{"image": image}]), 255 * torch.rand(3, 96, 96))


@pytest.mark.parametrize(
    ("image", "extra", "message"),
    [
        ("/none.jpg", [], "/none.jpg: the image cannot be used"),
        (None, ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS: name the weights"),
        (None, ["MODEL.LOAD_PROPOSALS", "True"], "only models that detect objects"),
    ],
)
def test_errors(image, extra, message, synthetic, tmp_path, capsys):
    image = image or next((synthetic / "images").iterdir())
    with pytest.raises(SystemExit, match="2"):
        main(arguments("faster_rcnn", image, tmp_path, *extra))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.ts").exists()
