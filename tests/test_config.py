# SPDX-License-Identifier: Apache-2.0
import inspect
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    build_model,
    demo_cfg,
    load_cfg,
    reference_config,
)

import detectron2.model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

import libra_d2
from libra_d2 import add_libra_config
from libra_d2.engine import read_config
from libra_d2.modeling import LibraCascadeROIHeads, LibraRetinaNet, LibraROIHeads
from libra_d2.modeling.reference_recipe import LibraRPN
from libra_d2.utils.leaves import leaves

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS = [path for path in CONFIGS if not path.name.startswith("Base-")]


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_configs_load(path):
    cfg = read_config(str(path), []).config  # which checks the values
    assert cfg.VERSION == 2
    assert cfg.MODEL.BACKBONE.NAME.startswith("build_libra_")
    if path.parent.name == "Demo":  # as `make demo CONFIG=` has it
        assert f"./output/{path.stem}" == cfg.OUTPUT_DIR


def test_adds_nothing_but_libra():
    plain, cfg = get_cfg(), get_cfg()
    add_libra_config(cfg)
    added = set(dict(leaves(cfg))) - set(dict(leaves(plain)))
    assert added
    assert all(key.startswith("MODEL.LIBRA.") for key in added)
    del cfg.MODEL["LIBRA"]
    assert cfg == plain
    assert "LIBRA" not in get_cfg().MODEL  # Detectron2's defaults are not touched


def test_every_key_is_explained():
    source = (Path(libra_d2.__file__).parent / "config/defaults.py").read_text().splitlines()
    cfg = demo_cfg()
    for key, _ in leaves(cfg.MODEL.LIBRA, "MODEL.LIBRA."):
        (position,) = [i for i, line in enumerate(source) if f"cfg.{key} = " in line]
        assert source[position - 1].strip().startswith("# "), key


@pytest.mark.parametrize(
    ("kind", "system"),
    [
        (LibraRPN, "faster_rcnn"),
        (LibraROIHeads, "faster_rcnn"),
        (LibraCascadeROIHeads, "faster_rcnn"),
        (LibraRetinaNet, "retinanet"),
    ],
)
def test_defaults_of_arguments(kind, system):
    """Parts that are built without a config are those that its defaults describe."""
    cfg = detectron2.model_zoo.get_config(f"COCO-Detection/{system}_R_50_FPN_1x.yaml")
    add_libra_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = "cpu", True
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
    values = kind.from_config(cfg, *([] if kind is LibraRetinaNet else [shapes]))
    own = {
        name: x.default
        for base in kind.__mro__
        if base.__module__.startswith("libra_d2.") and "__init__" in vars(base)
        for name, x in inspect.signature(base.__init__).parameters.items()
        if x.default is not inspect.Parameter.empty and name in values
    }
    own.pop("balanced_l1", None)  # a module, or None for smooth L1
    assert len(own) >= 2
    assert {name: values[name] for name in own} == own


def as_lists(x):
    """Configs have tuples where others have lists."""
    return [as_lists(y) for y in x] if isinstance(x, (list, tuple)) else x


def necks(model):
    """The reference's FPN, and its balanced feature pyramid if there is one."""
    return model.neck if isinstance(model.neck, list) else [model.neck]


def common_pairs(cfg, reference):
    """(ours, the reference's) of what all systems share."""
    model, ours, inputs = reference.model, cfg.MODEL, cfg.INPUT
    data, backbone, neck = model.data_preprocessor, model.backbone, necks(model)[0]
    batch_size, bfp = reference.auto_scale_lr.base_batch_size, ([*necks(model), None])[1]
    resnet, libra = ours.RESNETS, ours.LIBRA
    # With proposals, the steps that transform them as well are nested.
    pipeline = [t for x in reference.train_pipeline for t in x.get("transforms", [x])]
    (resize,) = [t for t in pipeline if t.type == "Resize"]
    levels = [f"res{i}" for i in range(2 + neck.get("start_level", 0), 6)]
    refinement = bfp is not None and (bfp.refine_level, bfp.refine_type)
    enabled = libra.BFP.ENABLED and (libra.BFP.REFINE_LEVEL, libra.BFP.REFINE_TYPE)
    return {
        "format": (inputs.FORMAT, "RGB" if data.bgr_to_rgb else "BGR"),
        "mean": (ours.PIXEL_MEAN, data.mean),
        "std": (ours.PIXEL_STD, data.std),
        "train size": ((inputs.MAX_SIZE_TRAIN, *inputs.MIN_SIZE_TRAIN), resize.scale),
        "test size": ((inputs.MAX_SIZE_TEST, inputs.MIN_SIZE_TEST), resize.scale),
        "style": (resnet.STRIDE_IN_1X1, backbone.style == "caffe"),
        "depth": (resnet.DEPTH, backbone.depth),
        "groups": (resnet.NUM_GROUPS, backbone.get("groups", 1)),
        "width": (resnet.WIDTH_PER_GROUP, backbone.get("base_width", 64)),
        "frozen statistics": (resnet.NORM, "FrozenBN" if backbone.norm_eval else "BN"),
        "trained scale and shift": (libra.TRAIN_NORM_AFFINE, backbone.norm_cfg.requires_grad),
        "frozen": (ours.BACKBONE.FREEZE_AT, backbone.frozen_stages + 1),
        "channels": (ours.FPN.OUT_CHANNELS, neck.out_channels),
        "levels of the FPN": (ours.FPN.IN_FEATURES, levels),
        "bfp": (enabled, refinement),
        "sampler": (libra.SAMPLER.MODE if "roi_head" in model else "reference", "reference"),
        "loss form": (libra.BALANCED_L1.FORM, "reference"),
        "batch": (cfg.SOLVER.IMS_PER_BATCH, batch_size),
    }


def balanced_l1_pairs(cfg, loss_type, loss):
    ours = cfg.MODEL.LIBRA.BALANCED_L1
    return {
        "box loss": (loss_type, "balanced_l1" if loss.type == "BalancedL1Loss" else loss.type),
        "alpha": (ours.ALPHA, loss.alpha),
        "gamma": (ours.GAMMA, loss.gamma),
        "beta": (ours.BETA, loss.beta),
        "weight": (1.0, loss.loss_weight),
    }


def faster_rcnn_pairs(cfg, reference):
    return {**rpn_pairs(cfg, reference), **box_head_pairs(cfg, reference)}


def fast_rcnn_pairs(cfg, reference):
    pipelines = (reference.train_pipeline, reference.test_pipeline)
    train, test = ([t for t in x if t.type == "LoadProposals"] for x in pipelines)
    topk = (train[0].num_max_proposals, test[0].num_max_proposals or 1000000)
    ours = cfg.DATASETS
    return {
        **box_head_pairs(cfg, reference),
        "no rpn": (cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN", "rpn_head" in reference.model),
        "precomputed": (cfg.MODEL.LOAD_PROPOSALS, True),
        "proposals, training": (ours.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, topk[0]),
        "proposals, test": (ours.PRECOMPUTED_PROPOSAL_TOPK_TEST, topk[1]),
    }


def rpn_pairs(cfg, reference):
    rpn, train, test = cfg.MODEL.RPN, reference.model.train_cfg, reference.model.test_cfg
    sampler = train.rpn.sampler
    # A proposal network alone needs no proposals while it is trained.
    proposals = train.get("rpn_proposal", {"nms_pre": 2000, "max_per_img": 1000})
    return {
        "levels": (len(rpn.IN_FEATURES), necks(reference.model)[0].num_outs),
        "rpn batch": (rpn.BATCH_SIZE_PER_IMAGE, sampler.num),
        "rpn positives": (rpn.POSITIVE_FRACTION, sampler.pos_fraction),
        "rpn low quality": (cfg.MODEL.LIBRA.RPN.LOW_QUALITY_IOU, train.rpn.assigner.min_pos_iou),
        "rpn cap": (cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS, sampler.neg_pos_ub),
        "rpn border": (rpn.BOUNDARY_THRESH, train.rpn.allowed_border),
        "pre nms, test": (rpn.PRE_NMS_TOPK_TEST, test.rpn.nms_pre),
        "post nms, test": (rpn.POST_NMS_TOPK_TEST, test.rpn.max_per_img),
        "pre nms, training": (rpn.PRE_NMS_TOPK_TRAIN, proposals["nms_pre"]),
        "post nms, training": (rpn.POST_NMS_TOPK_TRAIN, proposals["max_per_img"]),
        "rpn nms": (rpn.NMS_THRESH, test.rpn.nms.iou_threshold),
    }


def box_head_pairs(cfg, reference):
    model, train, test = reference.model, reference.model.train_cfg.rcnn, reference.model.test_cfg
    heads, sampler = cfg.MODEL.ROI_HEADS, train.sampler
    loss_type = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
    return {
        **balanced_l1_pairs(cfg, loss_type, model.roi_head.bbox_head.loss_bbox),
        "roi batch": (heads.BATCH_SIZE_PER_IMAGE, sampler.num),
        "roi positives": (heads.POSITIVE_FRACTION, sampler.pos_fraction),
        "add gt": (heads.PROPOSAL_APPEND_GT, sampler.add_gt_as_proposals),
        "bins": (cfg.MODEL.LIBRA.SAMPLER.NUM_BINS, sampler.neg_sampler.num_bins),
        "roi IoU": (heads.IOU_THRESHOLDS, [train.assigner.pos_iou_thr]),
        "score": (heads.SCORE_THRESH_TEST, test.rcnn.score_thr),
        "nms": (heads.NMS_THRESH_TEST, test.rcnn.nms.iou_threshold),
        "detections": (cfg.TEST.DETECTIONS_PER_IMAGE, test.rcnn.max_per_img),
    }


def retinanet_pairs(cfg, reference):
    ours, test = cfg.MODEL.RETINANET, reference.model.test_cfg
    assigner = reference.model.train_cfg.assigner
    return {
        "low quality": (cfg.MODEL.LIBRA.RETINANET.LOW_QUALITY_IOU, assigner.min_pos_iou),
        **balanced_l1_pairs(cfg, ours.BBOX_REG_LOSS_TYPE, reference.model.bbox_head.loss_bbox),
        "classes": (ours.NUM_CLASSES, reference.model.bbox_head.num_classes),
        "score": (ours.SCORE_THRESH_TEST, test.score_thr),
        "candidates": (ours.TOPK_CANDIDATES_TEST, test.nms_pre),
        "nms": (ours.NMS_THRESH_TEST, test.nms.iou_threshold),
        "detections": (cfg.TEST.DETECTIONS_PER_IMAGE, test.max_per_img),
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        ("libra_faster_rcnn_R_50", "libra-faster-rcnn_r50", faster_rcnn_pairs),
        ("libra_faster_rcnn_R_101", "libra-faster-rcnn_r101", faster_rcnn_pairs),
        ("libra_faster_rcnn_X_101_64x4d", "libra-faster-rcnn_x101-64x4d", faster_rcnn_pairs),
        ("libra_fast_rcnn_R_50", "libra-fast-rcnn_r50", fast_rcnn_pairs),
        ("libra_retinanet_R_50", "libra-retinanet_r50", retinanet_pairs),
        ("rpn_R_50", "rpn_r50", rpn_pairs),
    ],
)
def test_published_recipe(mmdet, ours, theirs, pairs):
    """
    The values of mmdetection's config, except those whose effect test_parity (anchors, matching,
    losses) and test_schedule (optimizer, learning rate) compare.
    """
    reference = reference_config(mmdet, theirs)
    cfg = load_cfg(ROOT / f"configs/COCO-Detection/{ours}_FPN_1x.yaml")
    pairs = {**common_pairs(cfg, reference), **pairs(cfg, reference)}
    assert not {k: (a, b) for k, (a, b) in pairs.items() if as_lists(a) != as_lists(b)}


def ablations():
    """The arguments in the table of docs/ablations.md, by the name of the row."""
    section = (ROOT / "docs/ablations.md").read_text().split("## Arguments")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    return {what.strip(): arguments.strip(" `").split() for what, arguments in rows[2:]}


@pytest.mark.parametrize(
    ("what", "sampling", "refine", "loss"),
    [
        ("baseline", False, None, "smooth_l1"),
        ("sampling", True, None, "smooth_l1"),
        ("feature pyramid", False, "NonLocalBlock", "smooth_l1"),
        ("balanced L1", False, None, "balanced_l1"),
        ("all", True, "NonLocalBlock", "balanced_l1"),
        ('refine type "none"', True, "Identity", "balanced_l1"),
        ('refine type "conv"', True, "Conv2d", "balanced_l1"),
        ('refine type "non_local"', True, "NonLocalBlock", "balanced_l1"),
    ],
)
def test_ablations(what, sampling, refine, loss):
    """Each row of the table has the ideas that it names."""
    assert len(ablations()) == 8
    cfg = demo_cfg()
    cfg.merge_from_list(ablations()[what])
    model = build_model(cfg)
    bfp = getattr(model.backbone, "bfp", None)
    assert (bfp and type(bfp.refine).__name__) == refine
    sampler, predictor = model.roi_heads.proposal_sampler, model.roi_heads.box_predictor
    drawn = ("iou_balanced", "instance_balanced") if sampling else ("random", "random")
    assert (sampler.negatives, sampler.positives) == drawn
    assert predictor.box_reg_loss_type == loss
