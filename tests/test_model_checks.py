# SPDX-License-Identifier: Apache-2.0
"""Checks of the combination of a model's parts, when it is built."""

import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs
from conftest import build_model as build_on_device
from omegaconf import OmegaConf

from detectron2 import model_zoo
from detectron2.modeling import ROI_HEADS_REGISTRY, ProposalNetwork, StandardROIHeads
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage

from libra_d2 import add_libra_config
from libra_d2 import model_zoo as libra_zoo
from libra_d2.config import make_recipe
from libra_d2.config.model_checks import check_features
from libra_d2.errors import InputError
from libra_d2.modeling import LibraFastRCNNOutputLayers, LibraRes5ROIHeads

CONFIGS = {name: f"libra_{name}" for name in ("faster_rcnn", "retinanet", "fast_rcnn")}
CONFIGS["rpn"] = "rpn"
LOSS, BASE = "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "LIBRA.BFP.BASE_BACKBONE"
PLAIN_HEADS = f"ROI_HEADS.NAME=StandardROIHeads {LOSS}=smooth_l1"
PLAIN = f"BACKBONE.NAME=build_resnet_fpn_backbone PROPOSAL_GENERATOR.NAME=RPN {PLAIN_HEADS}"
LIBRA_BACKBONE = "BACKBONE.NAME=build_libra_backbone"


def build_model(cfg):
    """The model, whose weights take neither memory nor time."""
    with torch.device("meta"):
        return build_on_device(cfg)


def config(name, options=""):
    """Of a small model; with keys below MODEL, as "RPN.NMS_THRESH=0.5 DEVICE=cpu"."""
    if name == "c4":  # Detectron2's
        cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
        add_libra_config(cfg)
        options = (
            "DEVICE=meta RESNETS.NORM=BN RESNETS.DEPTH=18 RESNETS.RES2_OUT_CHANNELS=64 "
            "RESNETS.STRIDE_IN_1X1=False BACKBONE.FREEZE_AT=0 RPN.POST_NMS_TOPK_TRAIN=60 "
            f"ROI_BOX_HEAD.POOLER_RESOLUTION=4 ROI_HEADS.NUM_CLASSES=4 {options}"
        )
    else:
        cfg = demo_cfg(ROOT / f"configs/Demo/{CONFIGS[name]}_R_18_FPN.yaml", MODEL__DEVICE="meta")
    for option in options.split():
        key, _, value = option.partition("=")
        cfg.merge_from_list([f"MODEL.{key}", value])
    return cfg


ALL = "smooth_l1, giou, diou, ciou"
RCNN_LOSS = rf"^MODEL.{LOSS} \(roi_heads.box_predictor.box_reg_loss_type in a LazyConfig\) is "
RETINANET_LOSS = (
    r"^MODEL.RETINANET.BBOX_REG_LOSS_TYPE \(box_reg_loss_type in a LazyConfig\) is 'l2', but "
)
NO_LEVEL = "names '{}', which MODEL.BACKBONE.NAME 'build_libra_resnet_fpn_backbone' does not return"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            *("faster_rcnn", "ROI_HEADS.NAME=StandardROIHeads"),
            f"{RCNN_LOSS}'balanced_l1', but FastRCNNOutputLayers supports {ALL}: use LibraROI",
        ),
        (
            *("faster_rcnn", f"{LOSS}=l2"),
            f"{RCNN_LOSS}'l2', but LibraFastRCNNOutputLayers supports {ALL}, balanced_l1: use",
        ),
        ("c4", f"{LOSS}=balanced_l1", "FastRCNNOutputLayers supports .*LibraRes5ROIHeads"),
        (
            *("retinanet", "META_ARCHITECTURE=RetinaNet RETINANET.BBOX_REG_LOSS_TYPE=l2"),
            f"{RETINANET_LOSS}RetinaNet supports {ALL}: use LibraRetinaNet",
        ),
        (
            *("retinanet", "RETINANET.BBOX_REG_LOSS_TYPE=l2"),
            f"{RETINANET_LOSS}LibraRetinaNet supports {ALL}, balanced_l1: use LibraRetinaNet",
        ),
        (
            *("faster_rcnn", "RPN.BBOX_REG_LOSS_TYPE=balanced_l1"),
            f"MODEL.RPN.BBOX_REG_LOSS_TYPE .*but LibraRPN supports {ALL}: balanced L1 loss is one",
        ),
        (
            *("retinanet", "BACKBONE.NAME=build_libra_resnet_fpn_backbone"),
            f"MODEL.RETINANET.IN_FEATURES {NO_LEVEL.format('p7')}, but p3, p4, p5, p6; .* is build",
        ),
        (
            *("faster_rcnn", "ROI_HEADS.IN_FEATURES=('p2','p9')"),
            f"^MODEL.ROI_HEADS.IN_FEATURES {NO_LEVEL.format('p9')}, but p2, p3, p4, p5, p6$",
        ),
        ("faster_rcnn", "RPN.IN_FEATURES=('p2','p9')", "^MODEL.RPN.IN_FEATURES names 'p9', "),
        (
            "retinanet",
            "FPN.IN_FEATURES=('res3','res9')",
            "^MODEL.FPN.IN_FEATURES names 'res9', which the network below .* return$",
        ),
        ("faster_rcnn", "FPN.FUSE_TYPE=max", "^MODEL: it cannot be built: AssertionError$"),
        ("rpn", "FPN.IN_FEATURES=('res2','res9')", "^MODEL.FPN.IN_FEATURES names 'res9', "),
        (
            *("faster_rcnn", f"{LIBRA_BACKBONE} {BASE}=build_libra_resnet_fpn_backbone"),
            "BASE_BACKBONE.* is 'FPN': it has a balanced feature pyramid already",
        ),
        (
            *("c4", f"{LIBRA_BACKBONE} {BASE}=build_resnet_backbone"),
            "MODEL.LIBRA.BFP.REFINE_LEVEL is 2: the pyramid has 1 levels",
        ),
    ],
)
def test_wrong_combinations(name, options, message):
    """The message has the problem, the key and what to use instead."""
    with pytest.raises(InputError, match=message):
        build_model(config(name, options))


@pytest.mark.parametrize("loss", ALL.split(", "))
def test_losses_of_detectron2(loss):
    """All parts of models have Detectron2's box losses, this project's included."""
    for name in ("LibraRPN", "RPN"):
        options = f"PROPOSAL_GENERATOR.NAME={name} RPN.BBOX_REG_LOSS_TYPE={loss} {LOSS}={loss}"
        build_model(config("faster_rcnn", options))
    build_model(config("retinanet", f"RETINANET.BBOX_REG_LOSS_TYPE={loss}"))


def test_unbuildable():
    """What a part of a YAML model complains of is one line."""
    cfg = demo_cfg(MODEL__META_ARCHITECTURE="PanopticFPN", MODEL__SEM_SEG_HEAD__CONVS_DIM=16)
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    with pytest.raises(InputError, match="^MODEL: it cannot be built: .*num_channels .16."):
        make_recipe(cfg).build_model()


@pytest.mark.parametrize(
    ("name", "options", "key", "example"),
    [
        ("faster_rcnn", "", "META_ARCHITECTURE", "LibraRetinaNet"),
        ("faster_rcnn", "", "BACKBONE.NAME", "build_libra_resnet_fpn_backbone"),
        ("faster_rcnn", "", "ROI_HEADS.NAME", "StandardROIHeads"),
        ("rpn", "", "PROPOSAL_GENERATOR.NAME", "LibraRPN"),
        ("faster_rcnn", LIBRA_BACKBONE, BASE, "build_resnet_backbone"),
    ],
)
def test_unknown_names(name, options, key, example):
    """The message has the key and the known names, sorted; keys that are not used are free."""
    message = f"MODEL.{key} is 'X': no component has this name; there are "
    with pytest.raises(InputError) as error:
        build_model(config(name, f"{options} {key}=X"))
    start, known = str(error.value)[: len(message)], str(error.value)[len(message) :].split(", ")
    assert start == message
    assert example in known
    assert known == sorted(known)


def test_unused_names():
    unused = f"PROPOSAL_GENERATOR.NAME=X ROI_HEADS.NAME=X {BASE}=X"
    assert build_model(config("retinanet", unused)).training


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("box_reg_loss_type", "l2", r"\(box_reg_loss_type in a LazyConfig\) is 'l2', but Libra"),
        (
            *("backbone.in_features", ["res3", "res9"]),
            "^model: it .* there is no 'res9', which model.backbone.in_features.1 names$",
        ),
        (
            "backbone.in_features",
            "res5",
            r"^model.backbone.in_features is 'res5': .* \['res5'\] ",
        ),
        (
            "head_in_features",
            ["p3", "p9"],
            "^model.head_in_features has 'p9', but the backbone has p3, p4, p5, p6, p7$",
        ),
        ("classes", 1, "^model.classes: LibraRetinaNet has no such argument$"),  # not that similar
        ("num_clases", 1, r"^model.num_clases: .* no such argument; did you mean num_classes\?$"),
        (
            "anchor_generator.size",
            [8],
            r"^model.anchor_generator.size: DefaultAnchorGenerator .*; did you mean sizes\?$",
        ),
        ("backbone.refine_level", 7, "^(?!model).*refine_level.* is 7"),
    ],
)
def test_lazy(place, value, message):
    """Errors of a LazyConfig have its names."""
    cfg = libra_zoo.get_config("COCO-Detection/libra_retinanet_R_50_FPN_1x.py")
    OmegaConf.update(cfg.model, place, value)
    cfg.train.device = "meta"
    with pytest.raises(InputError, match=message):
        build_model(cfg)


def test_features():
    """Of the RPN and the heads, by their most specific name; own models may have others."""
    path = ROOT / "configs/Demo/libra_mask_rcnn_R_18_FPN.yaml"
    model = build_model(demo_cfg(path, MODEL__DEVICE="meta"))
    model.proposal_generator.in_features = ["p2", "p1"]
    with pytest.raises(InputError, match="^model.proposal_generator.in_features has 'p1', but"):
        check_features(model)
    model.proposal_generator.in_features = []
    model.roi_heads.mask_in_features = ("neck",)
    model.roi_heads.num_in_features, model.roi_heads.text_features = 5, ["x"]
    with pytest.raises(InputError, match="^model.roi_heads.mask_in_features has 'neck', but "):
        check_features(model)
    model.roi_heads.in_features = model.roi_heads.box_in_features = ["p9"]
    model.roi_heads.mask_in_features = []
    with pytest.raises(InputError, match="^model.roi_heads.box_in_features has 'p9', but"):
        check_features(model)
    for part in (model.roi_heads, model):  # a user's own
        kind, part.__class__ = type(part), type("Own", (type(part),), {"__module__": "own"})
        check_features(model)
        part.__class__ = kind
    del model.backbone._out_feature_channels
    check_features(model)
    check_features(torch.nn.Linear(2, 2))


def test_lazy_device():
    """The model of an R-CNN's RPN alone is on the device of the config."""
    recipe = make_recipe(libra_zoo.get_config("COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.py"))
    recipe.device = "meta"
    model = recipe.rpn_only().build_model()
    assert type(model) is ProposalNetwork
    assert {x.device.type for x in (*model.parameters(), model.pixel_mean)} == {"meta"}


@ROI_HEADS_REGISTRY.register()
class OwnLossHeads(StandardROIHeads):
    """Their predictor has its own loss."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        return {**ret, "box_predictor": OwnLoss(cfg, ret["box_head"].output_shape)}


class OwnLoss(LibraFastRCNNOutputLayers):
    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        return pred_deltas.sum() * 0


def test_own_losses_are_not_checked():
    build_model(config("faster_rcnn", f"ROI_HEADS.NAME=OwnLossHeads {LOSS}=my_loss"))


# One key of each section, with another value than its default.
VALUES = {
    **{"BFP": "REFINE_LEVEL=1", "SAMPLER": "NUM_BINS=4", "BALANCED_L1": "ALPHA=0.2"},
    **{"RPN": "NORMALIZER=batch_size", "RETINANET": "NORMALIZER=moving_average"},
    **{"INPUT": "INTERPOLATION=opencv", "TRAINER": "EMA_DECAY=0.5"},
}


@pytest.mark.parametrize(
    ("name", "options", "unread"),
    [
        ("faster_rcnn", "", "RETINANET"),
        ("faster_rcnn", PLAIN, "BALANCED_L1 BFP RETINANET RPN SAMPLER"),
        ("faster_rcnn", PLAIN_HEADS, "BALANCED_L1 RETINANET SAMPLER"),
        ("faster_rcnn", f"{PLAIN} LIBRA.BFP.ENABLED=False", "BALANCED_L1 RETINANET RPN SAMPLER"),
        ("c4", "", "BALANCED_L1 BFP RETINANET RPN SAMPLER"),
        ("fast_rcnn", "", "RETINANET"),
        ("retinanet", "", "RPN SAMPLER"),
        ("rpn", "", "RETINANET"),
        ("rpn", "PROPOSAL_GENERATOR.NAME=RPN", "RETINANET RPN"),
        ("rpn", "LIBRA.CASCADE.RESAMPLE=True LIBRA.ROI_HEADS.PAD_MASKS=True", "RETINANET"),
    ],
)
def test_unread_keys(name, options, unread, caplog):
    """One warning of the keys that no part of the model reads, except those of its other stage."""
    detectron2_logger._LOG_COUNTER.clear()
    keys = {section: f"LIBRA.{section}.{value}" for section, value in VALUES.items()}
    cfg = config(name, f"{options} {' '.join(keys.values())}")
    build_model(cfg)
    build_model(cfg)
    expected = [f"MODEL.{keys[x].split('=')[0]}" for x in unread.split()]
    (record,) = [r for r in caplog.records if "reads" in r.getMessage()]
    start, _, found = record.getMessage().partition(" reads ")
    assert (record.levelname, start) == ("WARNING", "No part of this model")
    assert sorted(found.split(", ")) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_own_configs_are_read(path, caplog):
    """The configs of this project cause no warning, with the ideas on or off."""
    if "101" in path.stem:
        pytest.skip("built elsewhere, and large")
    detectron2_logger._LOG_COUNTER.clear()
    for enabled in (True, False):
        build_model(demo_cfg(path, MODEL__LIBRA__BFP__ENABLED=enabled, MODEL__DEVICE="meta"))
    assert "reads" not in caplog.text


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (f"{PLAIN} LIBRA.TRAIN_NORM_AFFINE=True", "TRAIN_NORM_AFFINE"),
        (f"{PLAIN} LIBRA.NORMALIZE_OVER=process", "NORMALIZE_OVER"),
        (f"{PLAIN} LIBRA.ROI_HEADS.PAD_MASKS=True", "ROI_HEADS.PAD_MASKS"),
        ("LIBRA.CASCADE.RESAMPLE=True", "CASCADE.RESAMPLE"),
    ],
)
def test_changed_default(options, key, caplog):
    """A key outside of sections, and keys of parts that are not there."""
    detectron2_logger._LOG_COUNTER.clear()
    build_model(config("faster_rcnn", options))
    assert caplog.messages[-1] == f"No part of this model reads MODEL.LIBRA.{key}"


@pytest.mark.parametrize("name", ["rpn", "fast_rcnn", "retinanet"])
def test_who_normalizes(name, caplog):
    """Each of these models reads NORMALIZE_OVER."""
    detectron2_logger._LOG_COUNTER.clear()
    build_model(config(name, "LIBRA.NORMALIZE_OVER=process"))
    assert "reads" not in caplog.text


def test_c4():
    """Balanced samples and balanced L1 loss in a C4 model."""
    cfg = config("c4", f"DEVICE=cpu ROI_HEADS.NAME=LibraRes5ROIHeads {LOSS}=balanced_l1")
    torch.manual_seed(1)
    model = build_on_device(cfg)
    torch.manual_seed(1)
    plain = build_on_device(config("c4", "DEVICE=cpu"))
    assert type(model.roi_heads) is LibraRes5ROIHeads
    for (name, a), (other, b) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert name == other
        assert torch.equal(a, b), name
    with EventStorage() as storage:
        losses = model(random_inputs(3, 0))
        sum(losses.values()).backward()
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("faster_rcnn", "LIBRA.SAMPLER.NUM_BINS=0", "MODEL.LIBRA.SAMPLER.NUM_BINS is 0"),
        ("faster_rcnn", "LIBRA.SAMPLER.NAME=X", "MODEL.LIBRA.SAMPLER.NAME is 'X': use one of"),
        ("faster_rcnn", "LIBRA.BALANCED_L1.BETA=-1.0", "MODEL.LIBRA.BALANCED_L1.BETA is -1.0"),
        ("faster_rcnn", "LIBRA.RPN.NORMALIZER=X", "MODEL.LIBRA.RPN.NORMALIZER is 'X'"),
        ("faster_rcnn", "LIBRA.RPN.LOW_QUALITY_IOU=1.5", "MODEL.LIBRA.RPN.LOW_QUALITY_IOU is 1.5"),
        ("retinanet", "LIBRA.RETINANET.LOW_QUALITY_IOU=2.0", "MODEL.LIBRA.RETINANET.LOW_QUALITY_I"),
        ("faster_rcnn", "LIBRA.TRAIN_NORM_AFFINE=True", "MODEL.LIBRA.TRAIN_NORM_AFFINE is set, an"),
        ("faster_rcnn", "ROI_HEADS.IOU_THRESHOLDS=[1.5]", "MODEL.ROI_HEADS.IOU_THRESHOLDS[0] is 1"),
    ],
)
def test_keys_of_arguments(name, options, message):
    """Components name their arguments; messages name the keys."""
    with pytest.raises(InputError) as error:
        build_model(config(name, options))
    assert str(error.value).startswith(message)
