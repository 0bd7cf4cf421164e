# SPDX-License-Identifier: Apache-2.0
"""Combinations that docs/own_project.md lists."""

import copy
import re

import pytest
import torch
from conftest import ROOT, assert_same_detections, build_model, demo_cfg, random_inputs
from test_lazy import inputs_for
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from detectron2.export import scripting_with_instances
from detectron2.modeling import build_backbone
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from libra_d2.errors import InputError


def test_page_names_tests_that_exist():
    page = (ROOT / "docs/own_project.md").read_text()
    table = page.split("## What works together")[1].split("##")[0]
    file = None
    found = re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", table)
    assert len(found) > 10
    for name, test in found:
        file = name or file
        source = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in source, (file, test)


@pytest.mark.parametrize("name", ["panoptic", "keypoint"])
def test_yaml(name):
    """LibraROIHeads in a panoptic model and with a keypoint head."""
    panoptic = {"MODEL__META_ARCHITECTURE": "PanopticFPN", "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32}
    overrides = panoptic if name == "panoptic" else {"MODEL__KEYPOINT_ON": True}
    model = build_model(demo_cfg(**overrides))
    inputs = inputs_for(name)
    with EventStorage() as storage:
        losses = model(inputs)
        sum(losses.values()).backward()
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
    assert ("loss_keypoint" in losses) == (name == "keypoint")
    assert ("loss_sem_seg" in losses) == (name == "panoptic")
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_rotated():
    """A balanced pyramid below rotated ROI heads; balanced L1 loss is refused."""
    overrides = {
        "MODEL__ROI_HEADS__NAME": "RROIHeads",
        "MODEL__PROPOSAL_GENERATOR__NAME": "RRPN",
        "MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator",
        "MODEL__ANCHOR_GENERATOR__ANGLES": [[-45, 0, 45]],
        "MODEL__RPN__BBOX_REG_WEIGHTS": (1, 1, 1, 1, 1),
        "MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS": (10, 10, 5, 5, 1),
        "MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIAlignRotated",
        "MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "smooth_l1",
        "MODEL__ROI_BOX_HEAD__SMOOTH_L1_BETA": 1.0,
    }
    assert hasattr(build_model(demo_cfg(**overrides)).backbone, "bfp")
    overrides["MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE"] = "balanced_l1"
    with pytest.raises(InputError, match="RotatedFastRCNNOutputLayers supports"):
        build_model(demo_cfg(**overrides))


def test_gradient_checkpointing():
    """Recomputing the backbone in the backward pass gives the same gradients."""
    backbone = build_backbone(demo_cfg()).double()
    torch.nn.init.normal_(backbone.bfp.refine.conv_out.weight, std=0.1)
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        one = copy.deepcopy(backbone).eval()
        features = checkpoint(one, image, use_reentrant=False) if recompute else one(image)
        sum(x.square().sum() for x in features.values()).backward()
        gradients.append([p.grad for p in one.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", ["faster_rcnn", "cascade_rcnn", "retinanet"])
def test_copies(config):
    """Deep copies and averaged weights of a model in training detect the same."""
    cfg = demo_cfg(ROOT / f"configs/Demo/libra_{config}_R_18_FPN.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 4, 0.005
    model = build_model(cfg)
    torch.nn.init.normal_(model.backbone.bfp.refine.conv_out.weight, std=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with EventStorage():
        sum(model(random_inputs(3, 2)).values()).backward()
    optimizer.step()
    averaged.update_parameters(model)
    averaged.update_parameters(model)  # with a decay of 0, the model's own
    copied = copy.deepcopy(model)
    image = [{"image": random_inputs(1)[0]["image"]}]
    with torch.no_grad():
        expected = model.eval()(image)[0]["instances"]
        assert len(expected) > 0
        for other in (copied, averaged.module):
            # Batch norm's statistics are not averaged.
            for mine, its in zip(other.buffers(), model.buffers()):
                mine.copy_(its)
            found = other.eval()(image)[0]["instances"]
            torch.testing.assert_close(found.scores, expected.scores)
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("system", ["faster_rcnn", "retinanet"])
def test_script(system):
    """Scripted models detect the same; test_export_model traces them."""
    cfg = demo_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NORM = 4, ""
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.02, 0.3
    model = build_model(cfg)
    with EventStorage():
        for _ in range(3):  # running statistics of batch norm
            model(random_inputs(3, 3))
    head = model.head if system == "retinanet" else model.roi_heads.box_predictor
    torch.nn.init.normal_(head.cls_score.weight, std=20.0 if system == "retinanet" else 0.3)
    torch.nn.init.normal_(model.backbone.bfp.refine.conv_out.weight, std=0.1)
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    of_rpn = {"proposal_boxes": Boxes, "objectness_logits": torch.Tensor}
    inputs = [{"image": random_inputs(0, size=(160, 96))[0]["image"]}]
    with torch.no_grad():
        expected = model.eval()(inputs)[0]["instances"]
        scripted = scripting_with_instances(model, {**fields, **of_rpn})
        if system == "retinanet":
            (output,) = scripted(inputs)
        else:
            (output,) = scripted.inference(inputs, do_postprocess=False)
    assert len(expected) > 3
    assert_same_detections({x: getattr(output, x) for x in fields}, expected.get_fields())
