# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from conftest import ROOT, demo_cfg

from detectron2.config import CfgNode, get_cfg

import libra_d2
from libra_d2 import add_libra_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def load(path):
    cfg = get_cfg()
    add_libra_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load(path):
    cfg = load(path)
    assert cfg.VERSION == 2
    assert cfg.MODEL.ROI_HEADS.NAME == "LibraROIHeads"


def test_adds_nothing_but_libra():
    plain, cfg = get_cfg(), get_cfg()
    add_libra_config(cfg)
    added = set(leaves(cfg)) - set(leaves(plain))
    assert added
    assert all(key.startswith("MODEL.LIBRA.") for key in added)
    del cfg.MODEL["LIBRA"]
    assert cfg == plain
    assert "LIBRA" not in get_cfg().MODEL  # Detectron2's defaults are not touched


def test_every_key_is_explained():
    source = (Path(libra_d2.__file__).parent / "config.py").read_text().splitlines()
    cfg = demo_cfg()
    for key in leaves(cfg.MODEL.LIBRA, "MODEL.LIBRA."):
        (position,) = [i for i, line in enumerate(source) if f"cfg.{key} = " in line]
        assert source[position - 1].strip().startswith("# "), key


def test_published_recipe(mmdet):
    """The Libra Faster R-CNN R-50 of the reference, value by value where both have a key."""
    from mmengine.config import Config

    folder = Path(mmdet.__file__).parent / ".mim/configs/libra_rcnn"
    reference = Config.fromfile(folder / "libra-faster-rcnn_r50_fpn_1x_coco.py")
    model, cfg = (
        reference.model,
        load(ROOT / "configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml"),
    )
    bfp, bbox_head = model.neck[1], model.roi_head.bbox_head
    train, test, libra = model.train_cfg, model.test_cfg, cfg.MODEL.LIBRA
    sampler = train.rcnn.sampler
    iters_per_epoch = -(-117266 // 16)
    steps = reference.param_scheduler
    assert model.data_preprocessor.bgr_to_rgb
    assert model.backbone.style == "pytorch"
    pairs = {
        "format": (cfg.INPUT.FORMAT, "RGB"),
        "mean": (cfg.MODEL.PIXEL_MEAN, model.data_preprocessor.mean),
        "std": (cfg.MODEL.PIXEL_STD, model.data_preprocessor.std),
        "stride": (cfg.MODEL.RESNETS.STRIDE_IN_1X1, False),
        "depth": (cfg.MODEL.RESNETS.DEPTH, model.backbone.depth),
        "frozen": (cfg.MODEL.BACKBONE.FREEZE_AT, model.backbone.frozen_stages + 1),
        "channels": (cfg.MODEL.FPN.OUT_CHANNELS, model.neck[0].out_channels),
        "levels": (len(cfg.MODEL.RPN.IN_FEATURES), model.neck[0].num_outs),
        "refine level": (libra.BFP.REFINE_LEVEL, bfp.refine_level),
        "refine type": (libra.BFP.REFINE_TYPE, bfp.refine_type),
        "anchors": (
            cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            [[s * 8] for s in model.rpn_head.anchor_generator.strides],
        ),
        "ratios": (
            cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            [model.rpn_head.anchor_generator.ratios],
        ),
        "rpn IoUs": (
            cfg.MODEL.RPN.IOU_THRESHOLDS,
            [train.rpn.assigner.neg_iou_thr, train.rpn.assigner.pos_iou_thr],
        ),
        "rpn batch": (cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, train.rpn.sampler.num),
        "rpn positives": (cfg.MODEL.RPN.POSITIVE_FRACTION, train.rpn.sampler.pos_fraction),
        "rpn cap": (libra.RPN.MAX_NEG_PER_POS, train.rpn.sampler.neg_pos_ub),
        "rpn border": (cfg.MODEL.RPN.BOUNDARY_THRESH, train.rpn.allowed_border),
        "rpn loss": (cfg.MODEL.RPN.SMOOTH_L1_BETA, 0.0),
        "pre nms": (
            (cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST),
            (train.rpn_proposal.nms_pre, test.rpn.nms_pre),
        ),
        "post nms": (
            (cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
            (train.rpn_proposal.max_per_img, test.rpn.max_per_img),
        ),
        "rpn nms": (cfg.MODEL.RPN.NMS_THRESH, test.rpn.nms.iou_threshold),
        "roi batch": (cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, sampler.num),
        "roi positives": (cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION, sampler.pos_fraction),
        "add gt": (cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT, sampler.add_gt_as_proposals),
        "bins": (libra.SAMPLER.NUM_BINS, sampler.neg_sampler.num_bins),
        "mode": (libra.SAMPLER.MODE, "reference"),
        "roi IoU": (cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS, [train.rcnn.assigner.pos_iou_thr]),
        "classes": (cfg.MODEL.ROI_HEADS.NUM_CLASSES, bbox_head.num_classes),
        "fc": (cfg.MODEL.ROI_BOX_HEAD.FC_DIM, bbox_head.fc_out_channels),
        "resolution": (cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, bbox_head.roi_feat_size),
        "weights": (
            cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
            [pytest.approx(1 / s) for s in bbox_head.bbox_coder.target_stds],
        ),
        "loss": (cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE, "balanced_l1"),
        "alpha": (libra.BALANCED_L1.ALPHA, bbox_head.loss_bbox.alpha),
        "gamma": (libra.BALANCED_L1.GAMMA, bbox_head.loss_bbox.gamma),
        "beta": (libra.BALANCED_L1.BETA, bbox_head.loss_bbox.beta),
        "score": (cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, test.rcnn.score_thr),
        "nms": (cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, test.rcnn.nms.iou_threshold),
        "detections": (cfg.TEST.DETECTIONS_PER_IMAGE, test.rcnn.max_per_img),
        "lr": (cfg.SOLVER.BASE_LR, reference.optim_wrapper.optimizer.lr),
        "momentum": (cfg.SOLVER.MOMENTUM, reference.optim_wrapper.optimizer.momentum),
        "decay": (cfg.SOLVER.WEIGHT_DECAY, reference.optim_wrapper.optimizer.weight_decay),
        "batch": (cfg.SOLVER.IMS_PER_BATCH, reference.auto_scale_lr.base_batch_size),
        "warmup": (
            (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR),
            (steps[0].end, steps[0].start_factor),
        ),
        "steps": (
            cfg.SOLVER.STEPS,
            [iters_per_epoch * epoch for epoch in steps[1].milestones],
        ),
        "gamma of the schedule": (cfg.SOLVER.GAMMA, steps[1].gamma),
        "iterations": (cfg.SOLVER.MAX_ITER, iters_per_epoch * reference.train_cfg.max_epochs),
    }
    as_list = lambda x: list(x) if isinstance(x, (list, tuple)) else x  # noqa: E731
    different = {k: (a, b) for k, (a, b) in pairs.items() if as_list(a) != as_list(b)}
    assert not different
    (resize,) = [t for t in reference.train_pipeline if t.type == "Resize"]
    assert resize.scale == (cfg.INPUT.MAX_SIZE_TRAIN, *cfg.INPUT.MIN_SIZE_TRAIN)
    assert resize.scale == (cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
