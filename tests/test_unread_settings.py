# SPDX-License-Identifier: Apache-2.0
"""Parts of a model that do not go together are found when it is built."""

import logging

import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs

from detectron2 import model_zoo
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage

from libra_d2 import add_libra_config
from libra_d2.checkpoint import build_model
from libra_d2.errors import InputError
from libra_d2.modeling import LibraFastRCNNOutputLayers, LibraRes5ROIHeads, LibraROIHeads

RETINANET = ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml"


def c4_cfg(**overrides):
    """Detectron2's C4 model with ResNet-18."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    add_libra_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 60
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            demo_cfg(MODEL__ROI_HEADS__NAME="StandardROIHeads"),
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE .* is 'balanced_l1', but a FastRCNNOutputLayers "
            "knows smooth_l1, giou, diou, ciou: use LibraROIHeads",
        ),
        (
            c4_cfg(MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="balanced_l1"),
            "FastRCNNOutputLayers knows .*LibraRes5ROIHeads",
        ),
        (
            demo_cfg(RETINANET, MODEL__META_ARCHITECTURE="RetinaNet"),
            "MODEL.RETINANET.BBOX_REG_LOSS_TYPE .*RetinaNet knows.*use LibraRetinaNet",
        ),
        (
            demo_cfg(MODEL__RPN__BBOX_REG_LOSS_TYPE="balanced_l1"),
            "MODEL.RPN.BBOX_REG_LOSS_TYPE .*a LibraRPN knows",
        ),
        (demo_cfg(MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="l2"), "is 'l2', but"),
        (
            demo_cfg(RETINANET, MODEL__BACKBONE__NAME="build_libra_resnet_fpn_backbone"),
            "MODEL.RETINANET.IN_FEATURES names 'p7', which MODEL.BACKBONE.NAME "
            "'build_libra_resnet_fpn_backbone' does not return.*build_libra_retinanet",
        ),
        (
            demo_cfg(MODEL__ROI_HEADS__IN_FEATURES=("p2", "p9")),
            "MODEL.ROI_HEADS.IN_FEATURES names 'p9'",
        ),
        (
            demo_cfg(
                MODEL__BACKBONE__NAME="build_libra_backbone",
                MODEL__LIBRA__BFP__BASE_BACKBONE="build_libra_resnet_fpn_backbone",
            ),
            "BASE_BACKBONE.* is 'FPN': it has a balanced feature pyramid already",
        ),
        (
            c4_cfg(
                MODEL__BACKBONE__NAME="build_libra_backbone",
                MODEL__LIBRA__BFP__BASE_BACKBONE="build_resnet_backbone",
            ),
            "MODEL.LIBRA.BFP.REFINE_LEVEL is 2: the pyramid has 1 levels",
        ),
    ],
)
def test_wrong_combinations(cfg, message):
    with pytest.raises(InputError, match=message):
        build_model(cfg)


@ROI_HEADS_REGISTRY.register()
class OwnLossHeads(StandardROIHeads):
    """Their predictor has a loss of its own, of any name."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        return {**ret, "box_predictor": OwnLoss(cfg, ret["box_head"].output_shape)}


class OwnLoss(LibraFastRCNNOutputLayers):
    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        return pred_deltas.sum() * 0


def test_own_losses_are_the_users_business():
    build_model(
        demo_cfg(
            MODEL__ROI_HEADS__NAME="OwnLossHeads",
            MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="my_loss",
        )
    )


@pytest.fixture
def warnings(caplog):
    detectron2_logger._LOG_COUNTER.clear()
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if "reads" in r.getMessage()]


@pytest.mark.parametrize(
    ("cfg", "unread"),
    [
        (
            c4_cfg(MODEL__LIBRA__SAMPLER__NUM_BINS=4, MODEL__LIBRA__BFP__REFINE_TYPE="conv"),
            "MODEL.LIBRA.BFP.REFINE_TYPE, MODEL.LIBRA.SAMPLER.NUM_BINS",
        ),
        (demo_cfg(RETINANET, MODEL__LIBRA__SAMPLER__MODE="reference"), "MODEL.LIBRA.SAMPLER.MODE"),
        (
            demo_cfg(
                MODEL__ROI_HEADS__NAME="StandardROIHeads",
                MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="smooth_l1",
                MODEL__LIBRA__BALANCED_L1__ALPHA=0.2,
                MODEL__LIBRA__RETINANET__P7_RELU=True,
            ),
            "MODEL.LIBRA.BALANCED_L1.ALPHA, MODEL.LIBRA.RETINANET.P7_RELU",
        ),
    ],
)
def test_unread_keys(cfg, unread, warnings):
    """They are named, once."""
    build_model(cfg)
    build_model(cfg)
    assert warnings() == [f"No part of this model reads {unread}"]


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").glob("*/*.yaml")),
    ids=lambda p: p.stem,
)
def test_own_configs_are_read(path, warnings):
    """Nothing is warned of in the configs of this project, with the ideas on or off."""
    if "101" in path.stem:
        pytest.skip("built elsewhere, and large")
    for enabled in (True, False):
        build_model(demo_cfg(path, MODEL__LIBRA__BFP__ENABLED=enabled))
    assert warnings() == []


def test_c4():
    """Balanced samples and balanced L1 loss in a C4 model."""
    cfg = c4_cfg(
        MODEL__ROI_HEADS__NAME="LibraRes5ROIHeads",
        MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="balanced_l1",
    )
    torch.manual_seed(1)
    model = build_model(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = "smooth_l1"
    torch.manual_seed(1)
    plain = build_model(cfg)
    assert type(model.roi_heads) is LibraRes5ROIHeads
    for (name, a), (other, b) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert name == other
        assert torch.equal(a, b), name
    with EventStorage() as storage:
        losses = model(random_inputs(3, 0))
        sum(losses.values()).backward()
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_dilated_c5():
    """A DC5 model has the heads of one with a pyramid."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml")
    add_libra_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.MODEL.ROI_HEADS.NAME = "LibraROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = "balanced_l1"
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 60
    model = build_model(cfg)
    assert type(model.roi_heads) is LibraROIHeads
    with EventStorage() as storage:
        assert torch.isfinite(sum(model(random_inputs(2, size=(64, 64))).values()))
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
