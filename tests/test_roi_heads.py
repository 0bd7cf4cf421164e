# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from conftest import ROOT, assert_same_detections, demo_cfg, random_inputs

from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.modeling import (
    BalancedSampler,
    LibraCascadeROIHeads,
    LibraFastRCNNOutputLayers,
    LibraROIHeads,
)
from libra_d2.modeling.balanced_sampling import MODES


def build(config="faster", **overrides):
    """The demo's model of that name, with smaller heads."""
    path = ROOT / f"configs/Demo/libra_{config}_rcnn_R_18_FPN.yaml"
    return build_model(demo_cfg(path, **{f"MODEL__{k}": v for k, v in overrides.items()}))


def boxes_with_ious(*ious):
    """Boxes whose IoU with the box [0, 0, 100, 10] is as given: they are cut off at the right."""
    return Boxes(torch.tensor([[0, 0, 100 * iou, 10.0] for iou in ious]).reshape(-1, 4))


def sample(heads, proposal_ious, has_gt=True):
    """Match and sample proposals of one image with one object of class 2 (or none)."""
    targets = Instances((128, 128), gt_boxes=boxes_with_ious(*[1.0] * has_gt))
    targets.gt_classes = torch.full((int(has_gt),), 2)
    proposals = Instances((128, 128), proposal_boxes=boxes_with_ious(*proposal_ious))
    proposals.objectness_logits = torch.zeros(len(proposals))
    with EventStorage() as storage:
        (sampled,) = heads.label_and_sample_proposals([proposals], [targets])
        return sampled, {k: v for k, (v, _) in storage.latest().items()}


IOUS = [0.01] * 200 + [0.2] * 60 + [0.4] * 30 + [0.7] * 9


@pytest.mark.parametrize("config", ["faster", "mask", "cascade"])
@pytest.mark.parametrize("negatives", ["iou_balanced", "random"])
def test_label_and_sample_proposals(config, negatives):
    """64 proposals: 9 positives and the object itself, 18 negatives from each of three bins."""
    heads = build(config, LIBRA__SAMPLER__NEGATIVES=negatives).roi_heads
    sampled, scalars = sample(heads, IOUS)
    assert len(sampled) == 64
    foreground = sampled[sampled.gt_classes == 2]
    assert len(foreground) == 10
    assert (foreground.proposal_boxes.tensor[:, 2] >= 70).all()
    background = sampled[sampled.gt_classes == 4]
    assert (background.proposal_boxes.tensor[:, 2] <= 40).all()
    in_bins = [(background.proposal_boxes.tensor[:, 2] == x).sum().item() for x in (1, 20, 40)]
    assert sum(in_bins) == 54
    assert (in_bins == [18, 18, 18]) == (negatives == "iou_balanced")
    # The statistics tell what was drawn, by whichever sampler.
    assert [scalars[f"roi_head/num_bg_iou_bin_{k}"] for k in range(3)] == in_bins
    assert scalars["roi_head/num_fg_instances"] == 1
    assert scalars["roi_head/num_fg_samples"] == 10


def test_without_ground_truth():
    sampled, scalars = sample(build().roi_heads, IOUS, has_gt=False)
    assert (sampled.gt_classes == 4).all()
    assert len(sampled) == 64
    assert scalars["roi_head/num_bg_iou_bin_0"] == 64
    assert scalars["roi_head/num_fg_instances"] == 0


def test_without_proposals():
    """Only the ground truth that is added to them."""
    sampled, _ = sample(build().roi_heads, [])
    assert sampled.gt_classes.tolist() == [2]


def test_ignored_proposals_are_not_sampled():
    heads = build(ROI_HEADS__IOU_THRESHOLDS=[0.3, 0.6], ROI_HEADS__IOU_LABELS=[0, -1, 1]).roi_heads
    sampled, scalars = sample(heads, IOUS)
    widths = sampled.proposal_boxes.tensor[:, 2]
    assert not (widths == 40).any()
    # The bins end at 0.3: [0, 0.1), [0.1, 0.2), [0.2, 0.3).
    assert scalars["roi_head/num_bg_iou_bin_2"] == (widths == 20).sum()


def test_matcher_can_be_replaced():
    """It is a plain one between two steps, whose thresholds can be seen."""
    heads = build().roi_heads
    sample(heads, IOUS)
    assert type(heads.proposal_matcher) is Matcher
    heads.proposal_matcher = Matcher([0.3], [0, 1])
    sampled, _ = sample(heads, IOUS)
    # What overlaps by 0.4 is foreground now; there is none above 0.7 but the object itself.
    widths = sampled[sampled.gt_classes == 2].proposal_boxes.tensor[:, 2]
    assert (widths < 70).any()


BOX_LOSSES = {"loss_cls", "loss_box_reg"}
LOSSES = {
    "faster": BOX_LOSSES,
    "mask": {*BOX_LOSSES, "loss_mask"},
    "cascade": {f"{loss}_stage{k}" for loss in BOX_LOSSES for k in range(3)},
}


@pytest.mark.parametrize("config", LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_boxes", [(5, 2), (3, 0), (0, 0)])
def test_train_step(config, mode, num_boxes):
    """Finite losses and gradients of all parameters, images without objects included."""
    model = build(config, LIBRA__SAMPLER__MODE=mode)
    with EventStorage():
        losses = model(random_inputs(*num_boxes))
    assert set(losses) == {*LOSSES[config], "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads"])
def test_keys_of_the_parent(name):
    config = "cascade" if name == "CascadeROIHeads" else "mask"
    plain_loss = {"ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "smooth_l1"}
    plain = build(config, ROI_HEADS__NAME=name, **plain_loss).roi_heads
    heads = build(config).roi_heads
    assert type(plain).__name__ == name
    heads.load_state_dict(plain.state_dict(), strict=True)


def test_balanced_l1_in_each_stage():
    """Each of the cascade's predictors has its own deltas and the loss of the config."""
    heads = build("cascade", LIBRA__BALANCED_L1__ALPHA=0.4).roi_heads
    weights = [predictor.box2box_transform.weights for predictor in heads.box_predictor]
    assert weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    for predictor in heads.box_predictor:
        assert predictor.box_reg_loss_type == "balanced_l1"
        assert predictor.balanced_l1.arguments["alpha"] == 0.4


def test_built_without_config():
    """Explicit arguments, taken from a plain Detectron2 head."""
    cfg = demo_cfg(
        MODEL__ROI_HEADS__NAME="StandardROIHeads",
        MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="smooth_l1",
    )
    plain = build_model(cfg).roi_heads
    heads = LibraROIHeads(
        num_classes=4,
        batch_size_per_image=64,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=plain.box_in_features,
        box_pooler=plain.box_pooler,
        box_head=plain.box_head,
        box_predictor=LibraFastRCNNOutputLayers(
            plain.box_head.output_shape,
            box2box_transform=plain.box_predictor.box2box_transform,
            num_classes=4,
            box_reg_loss_type="balanced_l1",
        ),
        proposal_sampler=BalancedSampler(num_bins=2),
    )
    _, scalars = sample(heads, IOUS)
    assert scalars["roi_head/num_bg_iou_bin_0"] == scalars["roi_head/num_bg_iou_bin_1"] == 27
    assert heads.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("libra", "parent"),
    [(LibraROIHeads, StandardROIHeads), (LibraCascadeROIHeads, CascadeROIHeads)],
)
def test_registered(libra, parent):
    assert ROI_HEADS_REGISTRY.get(libra.__name__) is libra
    assert issubclass(libra, parent)


@pytest.fixture(scope="module", params=["faster", "cascade"])
def detector(request):
    """A model in evaluation mode whose detections are spread over classes and positions."""
    torch.manual_seed(0)
    model = build(request.param, ROI_HEADS__SCORE_THRESH_TEST=0.3)
    with EventStorage():
        for _ in range(3):  # running statistics of batch norm
            model(random_inputs(3, 3))
    for name, parameter in model.roi_heads.named_parameters():
        if name.endswith("cls_score.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.backbone.bfp.refine.conv_out.weight, std=0.1)
    return model.eval()


def test_trace(detector):
    """As Detectron2's own models: a traced model detects the same in an image of another size."""
    first, second = random_inputs(0), random_inputs(0, size=(160, 96))
    inference = lambda model, inputs: [  # noqa: E731
        {"instances": x} for x in model.inference(inputs, do_postprocess=False)
    ]
    with torch.no_grad():
        adapter = TracingAdapter(detector, [{"image": first[0]["image"]}], inference)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs)
        (expected,) = detector.inference([{"image": second[0]["image"]}], do_postprocess=False)
        (output,) = adapter.outputs_schema(traced(second[0]["image"]))
    expected, output = expected.get_fields(), output["instances"].get_fields()
    assert len(expected["scores"]) > 3
    assert_same_detections(output, expected)


@pytest.mark.parametrize("detector", ["faster"], indirect=True)  # CascadeROIHeads cannot be
def test_script(detector):
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
    }
    inputs = [{"image": random_inputs(0)[0]["image"]}]
    with torch.no_grad():
        scripted = scripting_with_instances(detector, fields)
        (output,) = scripted.inference(inputs, do_postprocess=False)
        (expected,) = detector.inference(inputs, do_postprocess=False)
    expected = expected.get_fields()
    assert len(expected["scores"]) > 3
    names = ("pred_boxes", "pred_classes", "scores")
    assert_same_detections({name: getattr(output, name) for name in names}, expected)


def test_matcher_looks_like_detectron2s():
    """What reads the thresholds finds them, in a copy of the model as well."""
    for heads in (build("faster").roi_heads, copy.deepcopy(build("faster").roi_heads)):
        assert heads.proposal_matcher.thresholds == [-float("inf"), 0.5, float("inf")]
        assert heads.proposal_matcher.labels == [0, 1]
