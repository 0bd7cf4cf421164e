# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    calibrate_norms,
    demo_cfg,
    load_cfg,
    random_inputs,
    reference_config,
)

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

import libra_d2
from libra_d2 import add_libra_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS = [path for path in CONFIGS if not path.name.startswith("Base-")]


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_configs_load(path):
    cfg = load_cfg(path)
    assert cfg.VERSION == 2
    assert cfg.MODEL.BACKBONE.NAME.startswith("build_libra_")
    if path.parent.name == "Demo":  # as `make demo CONFIG=` has it
        assert f"./output/{path.stem}" == cfg.OUTPUT_DIR


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


def as_lists(x):
    """Configs have tuples where others have lists."""
    return [as_lists(y) for y in x] if isinstance(x, (list, tuple)) else x


def necks(model):
    """The reference's FPN, and its balanced feature pyramid if there is one."""
    return model.neck if isinstance(model.neck, list) else [model.neck]


def common_pairs(cfg, reference):
    """(ours, the reference's) of what all systems share."""
    model, optimizer = reference.model, reference.optim_wrapper.optimizer
    warmup, steps = reference.param_scheduler
    iters_per_epoch = -(-117266 // reference.auto_scale_lr.base_batch_size)
    libra, bfp = cfg.MODEL.LIBRA, ([*necks(model), None])[1]
    # With proposals, the steps that transform them as well are nested.
    pipeline = [t for x in reference.train_pipeline for t in x.get("transforms", [x])]
    (resize,) = [t for t in pipeline if t.type == "Resize"]
    return {
        "format": (cfg.INPUT.FORMAT, "RGB" if model.data_preprocessor.bgr_to_rgb else "BGR"),
        "mean": (cfg.MODEL.PIXEL_MEAN, model.data_preprocessor.mean),
        "std": (cfg.MODEL.PIXEL_STD, model.data_preprocessor.std),
        "train size": ((cfg.INPUT.MAX_SIZE_TRAIN, *cfg.INPUT.MIN_SIZE_TRAIN), resize.scale),
        "test size": ((cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST), resize.scale),
        "style": (cfg.MODEL.RESNETS.STRIDE_IN_1X1, model.backbone.style == "caffe"),
        "depth": (cfg.MODEL.RESNETS.DEPTH, model.backbone.depth),
        "groups": (cfg.MODEL.RESNETS.NUM_GROUPS, model.backbone.get("groups", 1)),
        "width": (cfg.MODEL.RESNETS.WIDTH_PER_GROUP, model.backbone.get("base_width", 64)),
        "frozen statistics": (
            cfg.MODEL.RESNETS.NORM,
            "FrozenBN" if model.backbone.norm_eval else "BN",
        ),
        "trained scale and shift": (
            cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE,
            model.backbone.norm_cfg.requires_grad,
        ),
        "frozen": (cfg.MODEL.BACKBONE.FREEZE_AT, model.backbone.frozen_stages + 1),
        "channels": (cfg.MODEL.FPN.OUT_CHANNELS, necks(model)[0].out_channels),
        "levels of the FPN": (
            cfg.MODEL.FPN.IN_FEATURES,
            [f"res{i}" for i in range(2 + necks(model)[0].get("start_level", 0), 6)],
        ),
        "bfp": (
            libra.BFP.ENABLED and (libra.BFP.REFINE_LEVEL, libra.BFP.REFINE_TYPE),
            bfp is not None and (bfp.refine_level, bfp.refine_type),
        ),
        "sampler": (libra.SAMPLER.MODE if "roi_head" in model else "reference", "reference"),
        "loss form": (libra.BALANCED_L1.FORM, "reference"),
        "lr": (cfg.SOLVER.BASE_LR, optimizer.lr),
        "momentum": (cfg.SOLVER.MOMENTUM, optimizer.momentum),
        "decay": (cfg.SOLVER.WEIGHT_DECAY, optimizer.weight_decay),
        "batch": (cfg.SOLVER.IMS_PER_BATCH, reference.auto_scale_lr.base_batch_size),
        "warmup": (
            (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR),
            # Of so many iterations, the last one has the full rate; test_schedule compares them.
            (warmup.end - 1, warmup.start_factor),
        ),
        "steps": (cfg.SOLVER.STEPS, [iters_per_epoch * epoch for epoch in steps.milestones]),
        "decay of the lr": (cfg.SOLVER.GAMMA, steps.gamma),
        "iterations": (cfg.SOLVER.MAX_ITER, iters_per_epoch * reference.train_cfg.max_epochs),
    }


def balanced_l1_pairs(cfg, loss_type, loss):
    return {
        "box loss": (loss_type, "balanced_l1" if loss.type == "BalancedL1Loss" else loss.type),
        "alpha": (cfg.MODEL.LIBRA.BALANCED_L1.ALPHA, loss.alpha),
        "gamma": (cfg.MODEL.LIBRA.BALANCED_L1.GAMMA, loss.gamma),
        "beta": (cfg.MODEL.LIBRA.BALANCED_L1.BETA, loss.beta),
        "weight": (1.0, loss.loss_weight),
    }


def faster_rcnn_pairs(cfg, reference):
    return {**rpn_pairs(cfg, reference), **box_head_pairs(cfg, reference)}


def fast_rcnn_pairs(cfg, reference):
    (train,) = [t for t in reference.train_pipeline if t.type == "LoadProposals"]
    (test,) = [t for t in reference.test_pipeline if t.type == "LoadProposals"]
    return {
        **box_head_pairs(cfg, reference),
        "no rpn": (cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN", "rpn_head" in reference.model),
        "precomputed": (cfg.MODEL.LOAD_PROPOSALS, True),
        "proposals, training": (
            cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN,
            train.num_max_proposals,
        ),
        "proposals, test": (
            cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST,
            test.num_max_proposals or 1000000,
        ),
    }


def rpn_pairs(cfg, reference):
    model, libra, rpn = reference.model, cfg.MODEL.LIBRA, cfg.MODEL.RPN
    train, test, anchors = model.train_cfg, model.test_cfg, model.rpn_head.anchor_generator
    # A proposal network alone needs no proposals while it is trained.
    proposals = train.get("rpn_proposal", {"nms_pre": 2000, "max_per_img": 1000})
    return {
        "levels": (len(rpn.IN_FEATURES), necks(model)[0].num_outs),
        "anchors": (cfg.MODEL.ANCHOR_GENERATOR.SIZES, [[s * 8] for s in anchors.strides]),
        "ratios": (cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS, [anchors.ratios]),
        "rpn IoUs": (
            rpn.IOU_THRESHOLDS,
            (train.rpn.assigner.neg_iou_thr, train.rpn.assigner.pos_iou_thr),
        ),
        "rpn low quality": (libra.RPN.LOW_QUALITY_IOU, train.rpn.assigner.min_pos_iou),
        "rpn normalizer": (libra.RPN.NORMALIZER, "sampled"),
        "rpn batch": (rpn.BATCH_SIZE_PER_IMAGE, train.rpn.sampler.num),
        "rpn positives": (rpn.POSITIVE_FRACTION, train.rpn.sampler.pos_fraction),
        "rpn cap": (libra.RPN.MAX_NEG_PER_POS, train.rpn.sampler.neg_pos_ub),
        "rpn border": (rpn.BOUNDARY_THRESH, train.rpn.allowed_border),
        "rpn loss": (
            (rpn.BBOX_REG_LOSS_TYPE, rpn.SMOOTH_L1_BETA, model.rpn_head.loss_bbox.type),
            ("smooth_l1", 0.0, "L1Loss"),
        ),
        "pre nms, test": (rpn.PRE_NMS_TOPK_TEST, test.rpn.nms_pre),
        "post nms, test": (rpn.POST_NMS_TOPK_TEST, test.rpn.max_per_img),
        "pre nms, training": (rpn.PRE_NMS_TOPK_TRAIN, proposals["nms_pre"]),
        "post nms, training": (rpn.POST_NMS_TOPK_TRAIN, proposals["max_per_img"]),
        "rpn nms": (rpn.NMS_THRESH, test.rpn.nms.iou_threshold),
    }


def box_head_pairs(cfg, reference):
    model, libra, train = reference.model, cfg.MODEL.LIBRA, reference.model.train_cfg
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    test, bbox_head, sampler = model.test_cfg, model.roi_head.bbox_head, train.rcnn.sampler
    return {
        **balanced_l1_pairs(cfg, box_head.BBOX_REG_LOSS_TYPE, bbox_head.loss_bbox),
        "roi batch": (heads.BATCH_SIZE_PER_IMAGE, sampler.num),
        "roi positives": (heads.POSITIVE_FRACTION, sampler.pos_fraction),
        "add gt": (heads.PROPOSAL_APPEND_GT, sampler.add_gt_as_proposals),
        "bins": (libra.SAMPLER.NUM_BINS, sampler.neg_sampler.num_bins),
        "roi IoU": (heads.IOU_THRESHOLDS, [train.rcnn.assigner.pos_iou_thr]),
        "classes": (heads.NUM_CLASSES, bbox_head.num_classes),
        "fc": (box_head.FC_DIM, bbox_head.fc_out_channels),
        "resolution": (box_head.POOLER_RESOLUTION, bbox_head.roi_feat_size),
        "deltas": (
            box_head.BBOX_REG_WEIGHTS,
            [pytest.approx(1 / std) for std in bbox_head.bbox_coder.target_stds],
        ),
        "score": (heads.SCORE_THRESH_TEST, test.rcnn.score_thr),
        "nms": (heads.NMS_THRESH_TEST, test.rcnn.nms.iou_threshold),
        "detections": (cfg.TEST.DETECTIONS_PER_IMAGE, test.rcnn.max_per_img),
    }


def retinanet_pairs(cfg, reference):
    model, head = reference.model, reference.model.bbox_head
    ours, anchors = cfg.MODEL.RETINANET, head.anchor_generator
    scales = [anchors.octave_base_scale * 2 ** (i / anchors.scales_per_octave) for i in range(3)]
    assigner, test = model.train_cfg.assigner, model.test_cfg
    return {
        **balanced_l1_pairs(cfg, ours.BBOX_REG_LOSS_TYPE, head.loss_bbox),
        "levels": (len(ours.IN_FEATURES), necks(model)[0].num_outs),
        "anchors": (
            cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            [[pytest.approx(stride * scale) for scale in scales] for stride in anchors.strides],
        ),
        "ratios": (cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS, [anchors.ratios]),
        "IoUs": (ours.IOU_THRESHOLDS, [assigner.neg_iou_thr, assigner.pos_iou_thr]),
        "convolutions": (ours.NUM_CONVS, head.stacked_convs),
        "classes": (ours.NUM_CLASSES, head.num_classes),
        "focal loss": (
            (ours.FOCAL_LOSS_ALPHA, ours.FOCAL_LOSS_GAMMA),
            (head.loss_cls.alpha, head.loss_cls.gamma),
        ),
        "deltas": (ours.BBOX_REG_WEIGHTS, head.bbox_coder.target_stds),
        "score": (ours.SCORE_THRESH_TEST, test.score_thr),
        "candidates": (ours.TOPK_CANDIDATES_TEST, test.nms_pre),
        "nms": (ours.NMS_THRESH_TEST, test.nms.iou_threshold),
        "detections": (cfg.TEST.DETECTIONS_PER_IMAGE, test.max_per_img),
        "clipping": (cfg.MODEL.LIBRA.RETINANET.CLIP_BOXES, test.min_bbox_size == 0),
        "normalizer": (cfg.MODEL.LIBRA.RETINANET.NORMALIZER, "batch"),
        "low quality": (cfg.MODEL.LIBRA.RETINANET.LOW_QUALITY_IOU, assigner.min_pos_iou),
        "P7": (
            cfg.MODEL.LIBRA.RETINANET.P7_RELU,
            necks(model)[0].get("relu_before_extra_convs", False),
        ),
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        ("libra_faster_rcnn_R_50", "libra-faster-rcnn_r50", faster_rcnn_pairs),
        ("libra_faster_rcnn_R_101", "libra-faster-rcnn_r101", faster_rcnn_pairs),
        (
            "libra_faster_rcnn_X_101_64x4d",
            "libra-faster-rcnn_x101-64x4d",
            faster_rcnn_pairs,
        ),
        ("libra_fast_rcnn_R_50", "libra-fast-rcnn_r50", fast_rcnn_pairs),
        ("libra_retinanet_R_50", "libra-retinanet_r50", retinanet_pairs),
        ("rpn_R_50", "rpn_r50", rpn_pairs),
    ],
)
def test_published_recipe(mmdet, ours, theirs, pairs):
    """What the reference's config says, value by value where both have a key."""
    reference = reference_config(mmdet, theirs)
    cfg = load_cfg(ROOT / f"configs/COCO-Detection/{ours}_FPN_1x.yaml")
    pairs = {**common_pairs(cfg, reference), **pairs(cfg, reference)}
    assert not {k: (a, b) for k, (a, b) in pairs.items() if as_lists(a) != as_lists(b)}


def ablations():
    """The arguments in docs/ablations.md's table, by what is left."""
    section = (ROOT / "docs/ablations.md").read_text().split("## Arguments")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    return {what.strip(): arguments.strip(" `").split() for what, arguments in rows[2:]}


@pytest.mark.parametrize(
    ("what", "negatives", "positives", "refine", "loss"),
    [
        ("baseline", "random", "random", None, "smooth_l1"),
        ("sampling", "iou_balanced", "instance_balanced", None, "smooth_l1"),
        ("feature pyramid", "random", "random", "NonLocalBlock", "smooth_l1"),
        ("balanced L1", "random", "random", None, "balanced_l1"),
        ("all", "iou_balanced", "instance_balanced", "NonLocalBlock", "balanced_l1"),
        ('refine type "none"', "iou_balanced", "instance_balanced", "Identity", "balanced_l1"),
        ('refine type "conv"', "iou_balanced", "instance_balanced", "Conv2d", "balanced_l1"),
        (
            'refine type "non_local"',
            "iou_balanced",
            "instance_balanced",
            "NonLocalBlock",
            "balanced_l1",
        ),
    ],
)
def test_ablations(what, negatives, positives, refine, loss):
    """Each row of the table in docs/ablations.md leaves what it says."""
    assert len(ablations()) == 8
    cfg = demo_cfg()
    cfg.merge_from_list(ablations()[what])
    model = build_model(cfg)
    bfp = getattr(model.backbone, "bfp", None)
    assert (bfp and type(bfp.refine).__name__) == refine
    sampler, predictor = model.roi_heads.proposal_sampler, model.roi_heads.box_predictor
    assert (sampler.negatives, sampler.positives) == (negatives, positives)
    assert predictor.box_reg_loss_type == loss


def at_real_depth(path):
    """A model of a config of COCO's, with statistics in place of weights, and its input."""
    cfg = load_cfg(path)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    inputs = random_inputs(3, size=(128, 160))
    calibrate_norms(model.backbone, inputs[0]["image"][None] / 64 - 2)
    if cfg.MODEL.LOAD_PROPOSALS:
        inputs[0]["proposals"] = Instances(
            (128, 160),
            proposal_boxes=random_inputs(300, size=(128, 160))[0]["instances"].gt_boxes,
            objectness_logits=torch.zeros(300),
        )
    return cfg, model, inputs


@pytest.mark.parametrize(
    "path",
    [p for p in MODELS if p.parent.name not in ("BCCD", "Demo")],
    ids=lambda p: p.stem,
)
def test_train_and_detect(path):
    """Each model at its real depth: one step, in which all is trained but stem and res2."""
    cfg, model, inputs = at_real_depth(path)
    with EventStorage():
        losses = model(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("stem" in name or "res2" in name for name in trained)
    assert any("res3.0.conv1.weight" in name for name in trained)
    norms_trained = any("res3.0.conv1.norm.weight" in name for name in trained)
    assert norms_trained == cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    del inputs[0]["instances"]
    with torch.no_grad():
        (result,) = model.eval()(inputs)
    if "rpn" in path.stem:
        assert 0 < len(result["proposals"]) <= 1000
    else:
        assert len(result["instances"]) <= 100
        assert result["instances"].has("pred_masks") == cfg.MODEL.MASK_ON
