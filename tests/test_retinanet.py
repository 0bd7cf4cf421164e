# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import ROOT, assert_same_detections, load_cfg, random_inputs
from test_normalizer import another_process

from detectron2.export import scripting_with_instances
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from libra_d2.errors import ArgumentError
from libra_d2.modeling import BalancedL1Loss, LibraRetinaNet, balanced_l1_loss

CONFIG = ROOT / "configs/COCO-Detection/libra_retinanet_R_50_FPN_1x.yaml"


def config(**overrides):
    """The published model, narrow and shallow, with batch norm that random weights need."""
    cfg = load_cfg(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.merge_from_list(["DEPTH", 18, "RES2_OUT_CHANNELS", 64, "NORM", "BN"])
    cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE = False
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    for key, value in overrides.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


def build(**overrides):
    return build_model(config(**overrides))


PLAIN = {
    "META_ARCHITECTURE": "RetinaNet",
    "BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
    "RETINANET__BBOX_REG_LOSS_TYPE": "smooth_l1",
}
ALL_OFF = {
    "RETINANET__BBOX_REG_LOSS_TYPE": "smooth_l1",
    "RETINANET__FOCAL_LOSS_ALPHA": 0.4,  # as given
    "RETINANET__FOCAL_LOSS_GAMMA": 1.5,
    "LIBRA__RETINANET__LOW_QUALITY_IOU": -1.0,
    "LIBRA__RETINANET__PADDING_ANCHORS": True,
    "LIBRA__BFP__ENABLED": False,
    "LIBRA__RETINANET__NORMALIZER": "moving_average",
    "LIBRA__RETINANET__P7_RELU": True,
    "LIBRA__RETINANET__CLIP_BOXES": False,
}


@pytest.fixture
def losses_of():
    """Function that computes the losses of fixed predictions for two images, one of them empty."""
    two = random_inputs(3, 0)

    def losses(model, inputs=two):
        torch.manual_seed(4)
        sizes = [(12 // 2**i + 1, 16 // 2**i + 1) for i in range(5)]
        anchors = model.anchor_generator([torch.zeros(1, 1, *size) for size in sizes])
        gt_labels, gt_boxes = model.label_anchors(anchors, [x["instances"] for x in inputs])
        logits = [torch.randn(2, len(a), 4) for a in anchors]
        deltas = [torch.randn(2, len(a), 4, requires_grad=True) for a in anchors]
        with EventStorage() as storage:
            result = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        labels = torch.stack(gt_labels)
        foreground = (labels >= 0) & (labels < 4)
        assert storage.latest()["num_pos_anchors"][0] == foreground.sum() / 2
        boxes = Boxes.cat(anchors).tensor.expand(2, -1, -1)[foreground]
        targets = model.box2box_transform.get_deltas(boxes, torch.stack(gt_boxes)[foreground])
        return result, foreground, torch.cat(deltas, dim=1)[foreground], targets

    return losses


def test_normalizer(losses_of, monkeypatch):
    """
    Foreground anchors of the first image, and one for the second, which has no objects; of several
    processes the mean.
    """
    smooth = {
        **{key: value for key, value in ALL_OFF.items() if key.startswith("RETINANET")},
        "LIBRA__RETINANET__LOW_QUALITY_IOU": -1.0,  # the same foreground
    }
    plain, foreground, _, _ = losses_of(build(**{**ALL_OFF, **PLAIN}))
    libra = build(**smooth)
    count = foreground.sum(dim=1)
    assert count[0] > 3
    assert count[1] == 0
    moving_average = 0.9 * 100 + 0.1 * count[0]
    another = float(count[0] + 11)
    for divisor in (count[0] + 1, count[0] + 6):
        losses, _, _, _ = losses_of(libra)
        for name in ("loss_cls", "loss_box_reg"):
            torch.testing.assert_close(losses[name], plain[name] * moving_average / divisor)
        another_process(monkeypatch, another)


def test_moving_average(losses_of):
    """Without objects 1 is counted in each step, starting from 100; one per image otherwise."""
    empty = random_inputs(0, 0)
    batch = losses_of(build(), empty)[0]["loss_cls"] * 2
    model = build(LIBRA__RETINANET__NORMALIZER="moving_average")
    for divisor in (90.1, 0.9 * 90.1 + 0.1):
        losses, _, _, _ = losses_of(model, empty)
        torch.testing.assert_close(losses["loss_cls"], batch / divisor)
        assert losses["loss_box_reg"] == 0


@pytest.mark.parametrize("normalizer", ["batch", "moving_average"])
def test_balanced_l1(losses_of, normalizer):
    """The published form with beta 0.11, over the foreground, divided as the other loss is."""
    model = build(LIBRA__RETINANET__NORMALIZER=normalizer)
    losses, foreground, deltas, targets = losses_of(model)
    count = foreground.sum()
    divisor = count + 1 if normalizer == "batch" else 0.9 * 100 + 0.1 * count
    expected = balanced_l1_loss(deltas, targets, 0.11, form="reference", reduction="sum") / divisor
    torch.testing.assert_close(losses["loss_box_reg"], expected)


def test_all_off_is_the_parent(losses_of):
    """The same losses, weights and detections as plain RetinaNet."""
    libra, plain = build(**ALL_OFF).eval(), build(**{**ALL_OFF, **PLAIN}).eval()
    assert type(plain) is RetinaNet
    plain.load_state_dict(libra.state_dict(), strict=True)
    assert losses_of(libra)[0] == losses_of(plain)[0]
    torch.nn.init.normal_(libra.head.cls_score.weight, std=0.2)
    plain.load_state_dict(libra.state_dict())
    inputs = [{"image": random_inputs(0)[0]["image"]}]
    with torch.no_grad():
        a, b = (model(inputs)[0]["instances"].get_fields() for model in (libra, plain))
    assert len(a["scores"]) > 0
    assert torch.equal(a["scores"], b["scores"])
    assert torch.equal(a["pred_boxes"].tensor, b["pred_boxes"].tensor)


@pytest.mark.parametrize("relu", [True, False])
def test_p7(relu):
    backbone = build(LIBRA__RETINANET__P7_RELU=relu, LIBRA__BFP__ENABLED=False).backbone.eval()
    features = backbone(torch.randn(1, 3, 128, 128))
    p6 = features["p6"]
    assert (p6 < 0).any()
    p7 = backbone.top_block.p7(p6.relu() if relu else p6)
    torch.testing.assert_close(features["p7"], p7)


@pytest.mark.parametrize("clip", [True, False])
def test_clipping(clip):
    """Two boxes that are one once clipped, one outside of the image, and one across its corner."""
    model = build(LIBRA__RETINANET__CLIP_BOXES=clip, LIBRA__BFP__ENABLED=False)
    boxes = [[10.0, 10, 70, 50], [10, 10, 65, 90], [-40, 0, -8, 32], [-5, -3, 8, 9]]
    result = model.inference_single_image(
        [Boxes(torch.tensor(boxes))],
        [torch.tensor([0.9, 0.8, 0.7, 0.6])[:, None]],
        [torch.zeros(4, 4)],
        image_size=(50, 60),
    )
    # What has no area is there without a score, until results are scaled to the image's size.
    assert result.scores.tolist() == pytest.approx(
        [0.9, 0.6, 0.0] if clip else [0.9, 0.8, 0.7, 0.6]
    )
    result = detector_postprocess(result, 50, 60)
    assert result.scores.tolist() == pytest.approx([0.9, 0.6] if clip else [0.9, 0.8, 0.6])
    expected = [[10, 10, 60, 50], [10, 10, 60, 50], [0, 0, 8, 9]][clip:]
    assert result.pred_boxes.tensor.flatten().tolist() == pytest.approx(sum(expected, []))


DEFAULTS = {"normalizer": "batch", "clip_boxes": True, "padding_anchors": False}
DEFAULTS["box_reg_loss_type"] = "smooth_l1"


def test_defaults():
    """Made with the arguments of the parent, and with those of a config."""
    arguments = RetinaNet.from_config(config())
    del arguments["box_reg_loss_type"]
    model = LibraRetinaNet(**arguments)
    assert {name: getattr(model, name) for name in DEFAULTS} == DEFAULTS
    assert model.balanced_l1.arguments == BalancedL1Loss(beta=0.11).arguments
    assert model.anchor_matcher is arguments["anchor_matcher"]
    model = build(LIBRA__RETINANET__PADDING_ANCHORS=True, LIBRA__RETINANET__LOW_QUALITY_IOU=0.1)
    assert model.padding_anchors
    assert model.backbone.bfp.refine_level == 1  # P4
    assert model.anchor_matcher.min_iou == 0.1


def test_script():
    """As Detectron2's own RetinaNet; test_export_model traces it."""
    detector = build(RETINANET__SCORE_THRESH_TEST=0.02)
    with EventStorage():
        for _ in range(3):  # running statistics of batch norm
            detector(random_inputs(3, 3))
    torch.nn.init.normal_(detector.head.cls_score.weight, std=2.0)
    torch.nn.init.normal_(detector.head.bbox_pred.weight, std=0.5)
    image = [{"image": random_inputs(0, size=(160, 96))[0]["image"]}]
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    with torch.no_grad():
        expected = detector.eval()(image)[0]["instances"]
        output = scripting_with_instances(detector, fields)(image)[0]
    assert len(expected) > 10
    found = {name: getattr(output, name) for name in fields}
    assert_same_detections(found, expected.get_fields())


def test_bad_normalizer():
    with pytest.raises(ArgumentError, match="^normalizer is 'images': use one of"):
        build(LIBRA__RETINANET__NORMALIZER="images")
