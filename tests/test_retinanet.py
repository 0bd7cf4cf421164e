# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import ROOT, load_cfg, random_inputs
from test_normalizer import another_process

from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from libra_d2.errors import ArgumentError
from libra_d2.modeling import BalancedL1Loss, LibraRetinaNet

pytestmark = pytest.mark.rounding

CONFIG = ROOT / "configs/COCO-Detection/libra_retinanet_R_50_FPN_1x.yaml"


def config(**overrides):
    """The published model, but narrow, shallow, and with batch norm, which suits random weights."""
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
    "RETINANET__SMOOTH_L1_LOSS_BETA": 0.3,
    "LIBRA__RETINANET__LOW_QUALITY_IOU": -1.0,
    "LIBRA__RETINANET__PADDING_ANCHORS": True,
    "LIBRA__BFP__ENABLED": False,
    "LIBRA__RETINANET__NORMALIZER": "moving_average",
    "LIBRA__RETINANET__P7_RELU": True,
    "LIBRA__RETINANET__CLIP_BOXES": False,
}


def arguments_of_losses(model, inputs):
    """Anchors and fixed predictions for two images."""
    torch.manual_seed(4)
    sizes = [(12 // 2**i + 1, 16 // 2**i + 1) for i in range(5)]
    anchors = model.anchor_generator([torch.zeros(1, 1, *size) for size in sizes])
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in inputs])
    logits, deltas = ([torch.randn(2, len(a), 4) for a in anchors] for _ in range(2))
    return anchors, logits, labels, deltas, boxes


def losses_of(model, inputs):
    """Losses of fixed predictions for two images, and their numbers of foreground anchors."""
    arguments = arguments_of_losses(model, inputs)
    with EventStorage() as storage:
        result = model.losses(*arguments)
    labels = torch.stack(arguments[2])
    count = ((labels >= 0) & (labels < 4)).sum(dim=1)
    assert storage.latest()["num_pos_anchors"][0] == count.sum() / 2
    return result, count


def test_normalizer(monkeypatch):
    """The foreground anchors of each image, at least one, and their mean over processes."""
    keys = [key for key in ALL_OFF if key.startswith("RETINANET") or "LOW_QUALITY" in key]
    inputs, libra = random_inputs(3, 0), build(**{key: ALL_OFF[key] for key in keys})
    plain, count = losses_of(build(**{**ALL_OFF, **PLAIN}), inputs)
    assert count[0] > 3
    assert count[1] == 0
    moving_average = 0.9 * 100 + 0.1 * count[0]
    another = float(count[0] + 11)
    for divisor in (count[0] + 1, count[0] + 6):
        losses, _ = losses_of(libra, inputs)
        for name in ("loss_cls", "loss_box_reg"):
            torch.testing.assert_close(losses[name], plain[name] * moving_average / divisor)
        another_process(monkeypatch, another)


def test_balanced_l1():
    """The sum over the foreground of both images, of the deltas to its matches."""
    model, inputs = build(LIBRA__BALANCED_L1__BETA=0.3), random_inputs(3, 2)
    anchors, _, labels, deltas, boxes = arguments_of_losses(model, inputs)
    losses, count = losses_of(model, inputs)
    expected = 0
    for label, matched, predicted in zip(labels, boxes, torch.cat(deltas, dim=1)):
        chosen = (label >= 0) & (label < 4)
        own = Boxes.cat(anchors).tensor[chosen]
        targets = model.box2box_transform.get_deltas(own, matched[chosen])
        expected += BalancedL1Loss(beta=0.3, form="reference")(predicted[chosen], targets, "sum")
    assert count.min() > 1
    torch.testing.assert_close(losses["loss_box_reg"], expected / count.sum())


def test_top_block():
    """P7 is made of P6, by default without a ReLU in between."""
    for relu in (False, True):
        block = build(LIBRA__RETINANET__P7_RELU=relu).backbone.top_block
        p6, p7 = block(torch.randn(1, block.p6.in_channels, 7, 9))
        assert p6.min() < 0
        assert torch.equal(p7, block.p7(p6.relu() if relu else p6))


def test_all_off_is_the_parent():
    """The same losses, also of several steps, weights and detections as Detectron2's RetinaNet."""
    libra, plain = build(**ALL_OFF).eval(), build(**{**ALL_OFF, **PLAIN}).eval()
    assert type(plain) is RetinaNet
    plain.load_state_dict(libra.state_dict(), strict=True)
    for loss_type, num in (("smooth_l1", 3), ("giou", 2), ("smooth_l1", 0)):
        libra.box_reg_loss_type = plain.box_reg_loss_type = loss_type
        batch = [*random_inputs(num), *random_inputs(0, size=(64, 64))]
        found, expected = losses_of(libra, batch)[0], losses_of(plain, batch)[0]
        # The sum of the focal loss has another order.
        assert found["loss_cls"].item() == pytest.approx(expected["loss_cls"].item(), rel=1e-5)
        assert found["loss_box_reg"] == expected["loss_box_reg"]
        assert len(found) == len(expected) == 2
    torch.nn.init.normal_(libra.head.cls_score.weight, std=0.2)
    plain.load_state_dict(libra.state_dict())
    inputs = [{"image": random_inputs(0)[0]["image"]}]
    with torch.no_grad():
        a, b = (model(inputs)[0]["instances"].get_fields() for model in (libra, plain))
    assert len(a["scores"]) > 0
    assert torch.equal(a["scores"], b["scores"])
    assert torch.equal(a["pred_boxes"].tensor, b["pred_boxes"].tensor)


@pytest.mark.parametrize(("clip", "trace"), [(True, False), (True, True), (False, False)])
def test_clipping(clip, trace, monkeypatch):
    """Two boxes that are equal once clipped, one outside the image, and one across its corner."""
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: trace)
    model = build(LIBRA__RETINANET__CLIP_BOXES=clip, LIBRA__BFP__ENABLED=False)
    boxes = [[10.0, 10, 70, 50], [10, 10, 65, 90], [-40, 0, -8, 32], [-5, -3, 8, 9]]
    result = model.inference_single_image(
        [Boxes(torch.tensor(boxes))],
        [torch.tensor([0.9, 0.8, 0.7, 0.6])[:, None]],
        [torch.zeros(4, 4)],
        image_size=(50, 60),
    )
    # Boxes without area have a score of 0, until postprocessing drops them, or are not in traces.
    expected = [0.9, 0.6, 0.0][: 3 - trace] if clip else [0.9, 0.8, 0.7, 0.6]
    assert result.scores.tolist() == pytest.approx(expected)
    result = detector_postprocess(result, 50, 60)
    assert result.scores.tolist() == pytest.approx([0.9, 0.6] if clip else [0.9, 0.8, 0.6])
    expected = [[10, 10, 60, 50], [10, 10, 60, 50], [0, 0, 8, 9]][clip:]
    assert result.pred_boxes.tensor.flatten().tolist() == pytest.approx(sum(expected, []))


def test_arguments():
    """Defaults of the arguments, and values from a config."""
    arguments = RetinaNet.from_config(config())
    del arguments["box_reg_loss_type"]
    model = LibraRetinaNet(**arguments)
    assert (model.normalizer, model.box_reg_loss_type) == ("batch", "smooth_l1")
    assert (model.clip_boxes, model.padding_anchors) == (True, False)
    assert model.balanced_l1.arguments == BalancedL1Loss(beta=0.11).arguments
    assert model.anchor_matcher is arguments["anchor_matcher"]
    keys = {"RETINANET__PADDING_ANCHORS": True, "RETINANET__LOW_QUALITY_IOU": 0.1}
    keys["NORMALIZE_OVER"] = "process"
    model = build(**{f"LIBRA__{k}": v for k, v in keys.items()})
    assert model.padding_anchors
    assert model.backbone.bfp.refine_level == 1  # P4
    assert model.anchor_matcher.min_iou == 0.1
    with pytest.raises(ArgumentError, match="^normalizer is 'images': use one of"):
        build(LIBRA__RETINANET__NORMALIZER="images")
    assert model.normalize_over == "process"
    with pytest.raises(ArgumentError, match="^normalize_over is 'image': use one of"):
        build(LIBRA__NORMALIZE_OVER="image")
