# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import ROOT, assert_same_detections, load_cfg, random_inputs

from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from libra_d2.errors import ArgumentError
from libra_d2.modeling import LibraRetinaNet, balanced_l1_loss

CONFIG = ROOT / "configs/COCO-Detection/libra_retinanet_R_50_FPN_1x.yaml"


def build(**overrides):
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
    return build_model(cfg)


PLAIN = {
    "META_ARCHITECTURE": "RetinaNet",
    "BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
    "RETINANET__BBOX_REG_LOSS_TYPE": "smooth_l1",
}
ALL_OFF = {
    "RETINANET__BBOX_REG_LOSS_TYPE": "smooth_l1",
    "LIBRA__RETINANET__LOW_QUALITY_IOU": -1.0,
    "LIBRA__RETINANET__PADDING_ANCHORS": True,
    "LIBRA__BFP__ENABLED": False,
    "LIBRA__RETINANET__NORMALIZER": "moving_average",
    "LIBRA__RETINANET__P7_RELU": True,
    "LIBRA__RETINANET__CLIP_BOXES": False,
}


@pytest.fixture
def losses_of():
    """Function that computes the losses of fixed predictions for two images."""
    inputs = random_inputs(3, 0)

    def losses(model):
        torch.manual_seed(4)
        sizes = [(12 // 2**i + 1, 16 // 2**i + 1) for i in range(5)]
        anchors = model.anchor_generator([torch.zeros(1, 1, *size) for size in sizes])
        gt_labels, gt_boxes = model.label_anchors(anchors, [x["instances"] for x in inputs])
        logits = [torch.randn(2, len(a), 4) for a in anchors]
        deltas = [torch.randn(2, len(a), 4, requires_grad=True) for a in anchors]
        with EventStorage():
            result = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        labels = torch.stack(gt_labels)
        foreground = (labels >= 0) & (labels < 4)
        boxes = Boxes.cat(anchors).tensor.expand(2, -1, -1)[foreground]
        targets = model.box2box_transform.get_deltas(boxes, torch.stack(gt_boxes)[foreground])
        return result, foreground, torch.cat(deltas, dim=1)[foreground], targets

    return losses


def test_normalizer(losses_of):
    """Foreground anchors of the first image, and one for the second, which has no objects."""
    plain, foreground, _, _ = losses_of(build(**{**ALL_OFF, **PLAIN}))
    kwargs = {
        "RETINANET__BBOX_REG_LOSS_TYPE": "smooth_l1",
        "LIBRA__RETINANET__LOW_QUALITY_IOU": -1.0,  # the same foreground
    }
    libra, _, _, _ = losses_of(build(**kwargs))
    count = foreground.sum(dim=1)
    assert count[0] > 3
    assert count[1] == 0
    moving_average = 0.9 * 100 + 0.1 * count[0]
    for name in ("loss_cls", "loss_box_reg"):
        torch.testing.assert_close(libra[name], plain[name] * moving_average / (count[0] + 1))


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


def test_plain_checkpoint():
    """Loads with nothing but the weights of the balanced feature pyramid missing."""
    incompatible = build().load_state_dict(build(**{**ALL_OFF, **PLAIN}).state_dict(), strict=False)
    assert not incompatible.unexpected_keys
    assert len(incompatible.missing_keys) == 8
    assert all(key.startswith("backbone.bfp.refine.") for key in incompatible.missing_keys)


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
    """Two boxes that are one once clipped, and one that lies outside of the image."""
    model = build(LIBRA__RETINANET__CLIP_BOXES=clip, LIBRA__BFP__ENABLED=False)
    anchors = [Boxes(torch.tensor([[10.0, 10, 60, 50], [10, 10, 60, 90], [-40, 0, -8, 32]]))]
    scores = torch.tensor([0.9, 0.8, 0.7])[:, None]
    result = model.inference_single_image(
        anchors, [scores], [torch.zeros(3, 4)], image_size=(50, 60)
    )
    # What has no area is there without a score, until results are scaled to the image's size.
    assert result.scores.tolist() == pytest.approx([0.9, 0.0] if clip else [0.9, 0.8, 0.7])
    result = detector_postprocess(result, 50, 60)
    assert result.scores.tolist() == pytest.approx([0.9] if clip else [0.9, 0.8])


def test_levels():
    """The pyramid P3 to P7 is balanced at P4."""
    backbone = build().backbone
    assert list(backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert backbone.bfp.refine_level == 1


@pytest.mark.parametrize("num_boxes", [(5, 2), (3, 0), (0, 0)])
def test_train_step(num_boxes):
    model = build()
    with EventStorage():
        losses = model(random_inputs(*num_boxes, size=(128, 128)))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = build(RETINANET__SCORE_THRESH_TEST=0.02)
    with EventStorage():
        for _ in range(3):  # running statistics of batch norm
            model(random_inputs(3, 3))
    torch.nn.init.normal_(model.head.cls_score.weight, std=2.0)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize("convert", ["trace", "script"])
def test_trace_and_script(detector, convert):
    """As Detectron2's own RetinaNet."""
    first, second = (
        [{"image": x[0]["image"]}] for x in (random_inputs(0), random_inputs(0, size=(160, 96)))
    )
    with torch.no_grad():
        expected = detector(second)[0]["instances"]
        if convert == "trace":
            adapter = TracingAdapter(detector, first)
            traced = torch.jit.trace(adapter, adapter.flattened_inputs)
            output = adapter.outputs_schema(traced(second[0]["image"]))[0]["instances"]
        else:
            fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
            output = scripting_with_instances(detector, fields)(second)[0]
    assert len(expected) > 10
    found = {name: getattr(output, name) for name in ("pred_boxes", "pred_classes", "scores")}
    assert_same_detections(found, expected.get_fields())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"LIBRA__RETINANET__NORMALIZER": "images"},
            "MODEL.LIBRA.RETINANET.NORMALIZER is 'images'",
        ),
        (
            {"LIBRA__BALANCED_L1__ALPHA": -1.0},
            "MODEL.LIBRA.BALANCED_L1.ALPHA is -1.0: use a positive",
        ),
        ({"LIBRA__BFP__REFINE_LEVEL": 5}, "MODEL.LIBRA.BFP.REFINE_LEVEL is 5"),
    ],
)
def test_bad_arguments(overrides, message):
    """For users of a config, with the key."""
    with pytest.raises(ArgumentError) as error:
        build(**overrides)
    assert error.value.in_config.startswith(message)


def test_registered():
    assert isinstance(build(), LibraRetinaNet)
