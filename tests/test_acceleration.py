# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from conftest import ROOT, calibrate_norms, demo_cfg, random_inputs
from oracle import double_precision

from detectron2 import modeling
from detectron2.utils.events import EventStorage

from libra_d2.config import BASELINE
from libra_d2.modeling.acceleration import accelerate
from libra_d2.modeling.folded_conv import FoldedConv2d
from libra_d2.modeling.roi_align import ParallelROIAlign

LEVERS = ["channels_last", "fold_norm", "parallel_roi_align"]


@pytest.fixture
def float64():
    with double_precision():
        yield


def make_model(name):
    """In float64, with frozen batch norms that do something."""
    file = "libra_faster_rcnn" if name == "plain" else name
    cfg = demo_cfg(ROOT / f"configs/Demo/{file}_R_18_FPN.yaml", MODEL__RESNETS__NORM="FrozenBN")
    if name == "plain":
        cfg.merge_from_list(BASELINE)
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.PROPOSAL_GENERATOR.NAME = "StandardROIHeads", "RPN"
    else:
        cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE = True
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    model = modeling.build_model(cfg).double()
    calibrate_norms(model.backbone, torch.randn(2, 3, 64, 64, dtype=torch.float64) * 60)
    return model


def outputs(model, inputs):
    """Losses, gradients and detections."""
    torch.manual_seed(1)
    with EventStorage():
        losses = model.train()(copy.deepcopy(inputs))
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found = model.eval()(copy.deepcopy(inputs))[0]["instances"]
    return {**losses, **gradients, "boxes": found.pred_boxes.tensor, "scores": found.scores}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["libra_faster_rcnn", "libra_retinanet", "plain"])
def test_same_numbers(name):
    """Losses, gradients and detections in float64, with all levers; checkpoint keys stay."""
    plain = make_model(name)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    inputs = random_inputs(3, 2)
    found, expected = outputs(fast, inputs), outputs(plain, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Gradients are sums over all pixels, of terms that cancel.
        bound = 1e-9 * max(value.abs().max().item(), 1) if value.numel() else 0
        torch.testing.assert_close(found[key], value, rtol=0, atol=bound)


@pytest.mark.parametrize("lever", LEVERS)
def test_levers(lever):
    """Each alone does what it says, and nothing else."""
    model = make_model("libra_faster_rcnn")
    accelerate(model, **{**dict.fromkeys(LEVERS, False), lever: True})
    features = model.backbone(torch.randn(1, 3, 64, 96, dtype=torch.float64))
    channels_last = [x.is_contiguous(memory_format=torch.channels_last) for x in features.values()]
    types = {type(module) for module in model.modules()}
    assert {
        "channels_last": all(channels_last),
        "fold_norm": FoldedConv2d in types,
        "parallel_roi_align": ParallelROIAlign in types,
    } == {**dict.fromkeys(LEVERS, False), lever: True}


def test_compiled_backbone():
    """Graphs are made for it alone; the keys of checkpoints stay."""
    model = make_model("libra_faster_rcnn")
    keys, image = list(model.state_dict()), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = model.backbone(image)
    torch._dynamo.reset()
    accelerate(model, compile_backbone=True, backend="eager")
    assert list(model.state_dict()) == keys
    for name, feature in model.backbone(image).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
