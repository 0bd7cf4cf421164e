# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest
import torch
from conftest import random_inputs
from test_roi_heads import build
from torch.nn import functional as F

from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.errors import ArgumentError
from libra_d2.modeling.cascade import (
    LibraCascadeROIHeads,
    MaskHeadPerStage,
    build_mask_head_per_stage,
)

pytestmark = pytest.mark.rounding


def build_heads(average="probabilities"):
    """Heads in float64 that find objects, with Detectron2's losses and, by default, averages."""
    keys = {"STAGE_LOSS_WEIGHTS": (), "RESAMPLE": False, "AVERAGE": average}
    keys = {f"LIBRA__CASCADE__{name}": value for name, value in keys.items()}
    heads = build("cascade", ROI_HEADS__SCORE_THRESH_TEST=0.1, **keys).roi_heads.double()
    for predictor in heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.2)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.05)
    return heads


def batch(heads):
    """Features of two images, and 40 proposals for each, with two objects in the first."""
    objects = torch.tensor([[4.0, 6, 60, 50], [70, 20, 120, 90]]).double()
    targets, proposals = [], []
    for num in (2, 0):
        targets.append(Instances((100, 128), gt_boxes=Boxes(objects[:num])))
        targets[-1].gt_classes = torch.tensor([2, 0])[:num]
        boxes = objects.repeat(20, 1) + torch.randn(40, 4).double() * 6
        proposals.append(Instances((100, 128), proposal_boxes=Boxes(boxes)))
        proposals[-1].objectness_logits = torch.randn(40).double()
    features = {
        name: torch.randn(2, 16, 100 // stride, 128 // stride).double().requires_grad_()
        for name, stride in zip(heads.box_in_features, (4, 8, 16, 32))
    }
    return features, proposals, targets


def train(heads, forward, features, proposals, targets):
    """Losses, and the gradients of features and heads."""
    heads.proposal_append_gt = False
    with EventStorage():
        torch.manual_seed(1)
        sampled = heads.label_and_sample_proposals(proposals, targets)
        losses = forward(heads.train(), features, sampled, targets)
    variables = [
        *features.values(),
        *heads.box_head.parameters(),
        *heads.box_predictor.parameters(),
    ]
    return losses, torch.autograd.grad(sum(losses.values()), variables)


def test_losses():
    """
    Without weights of stages, losses and gradients are the parent's. Weights multiply the losses,
    and features get the gradients of all stages.
    """
    heads = build_heads()
    inputs = batch(heads)
    ours, gradients = train(heads, type(heads)._forward_box, *inputs)
    theirs, expected = train(heads, CascadeROIHeads._forward_box, *inputs)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6
    for name, loss in theirs.items():
        assert loss > 0
        assert torch.equal(ours[name], loss), name
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))
    heads.stage_loss_weights = (1, 1, 1)
    _, found = train(heads, type(heads)._forward_box, *inputs)
    for i, (a, b) in enumerate(zip(found, expected)):
        scale = 3 if i < len(inputs[0]) else 1
        torch.testing.assert_close(a, scale * b, rtol=1e-9, atol=1e-12)
    heads.stage_loss_weights = (1, 0.5, 0.25)
    weighted, _ = train(heads, type(heads)._forward_box, *inputs)
    for name, loss in theirs.items():
        weight = heads.stage_loss_weights[int(name[-1])]
        torch.testing.assert_close(weighted[name], loss * weight, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_inference(average):
    """Detectron2's detections; with the mean of logits, those of a parent whose scores it has."""
    heads = build_heads(average).eval()
    features, proposals, _ = batch(heads)
    outputs = []
    for predictor in heads.box_predictor:
        predictor.register_forward_hook(lambda *args: outputs.append(args[-1]))
    with torch.no_grad():
        found = heads._forward_box(features, proposals)
        if average == "logits":
            scores = sum(logits for logits, _ in outputs).div(3).softmax(dim=1).split(40)
            for predictor in heads.box_predictor:
                predictor.predict_probs = lambda *args: scores
        expected = CascadeROIHeads._forward_box(heads, features, proposals)
    for ours, theirs in zip(found, expected):
        assert len(ours) > 5
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert ours.pred_classes.equal(theirs.pred_classes)


def test_arguments():
    """From a config. Each predictor has its own deltas, and the loss of the config."""
    keys = {"STAGE_LOSS_WEIGHTS": (1.0, 0.5, 0.25), "RESAMPLE": True, "AVERAGE": "logits"}
    # Without masks there are no heads for them.
    sections = {"LIBRA__BALANCED_L1__ALPHA": 0.4, "LIBRA__CASCADE__MASK_HEAD_PER_STAGE": True}
    sections.update({f"LIBRA__CASCADE__{k}": v for k, v in keys.items()})
    heads = build("cascade", **sections).roi_heads
    assert not heads.mask_on
    assert (heads.stage_loss_weights, heads.resample, heads.average) == tuple(keys.values())
    weights = [predictor.box2box_transform.weights for predictor in heads.box_predictor]
    assert weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    for predictor in heads.box_predictor:
        assert predictor.box_reg_loss_type == "balanced_l1"
        assert predictor.balanced_l1.arguments["alpha"] == 0.4
    with pytest.raises(ArgumentError, match="use one number for each of the 3 stages, or none"):
        build("cascade", LIBRA__CASCADE__STAGE_LOSS_WEIGHTS=(1.0, 0.5))
    with pytest.raises(ArgumentError, match="^average is 'boxes': use one of"):
        build("cascade", LIBRA__CASCADE__AVERAGE="boxes")
    defaults = inspect.signature(LibraCascadeROIHeads.__init__).parameters
    assert [defaults[name.lower()].default for name in keys] == [(), False, "probabilities"]
    arguments = {"input_shape": heads.box_head[0].output_shape, "num_classes": 2, "conv_dims": [4]}
    arguments["plain_head"] = "detectron2.modeling.roi_heads.MaskRCNNConvUpsampleHead"
    assert len(build_mask_head_per_stage(**arguments)) == 3
    assert len(build_mask_head_per_stage(**arguments, num_stages=2)) == 2


def test_resampling():
    """
    The second stage is given what the first has made of 309 proposals, but not of the object: 100
    with an IoU of 0.01, 0.3 and 0.55, and 9 with 0.7. Its 23 negatives are from all bins of
    [0, 0.6). Another image has a single proposal.
    """
    heads = build("cascade", LIBRA__CASCADE__RESAMPLE=True).roi_heads
    matcher, sampler = heads.proposal_matcher, heads.proposal_sampler
    right = torch.tensor([1.0] * 100 + [30.0] * 100 + [55.0] * 100 + [70.0] * 9)
    boxes = F.pad(right[:, None], (2, 1)) + torch.tensor([0.0, 0, 0, 10])
    proposals = Instances((128, 128), proposal_boxes=Boxes(boxes))
    proposals.objectness_logits = right
    targets = Instances((128, 128), gt_boxes=Boxes(torch.tensor([[0.0, 0, 100, 10]])))
    targets.gt_classes = torch.tensor([2])
    with EventStorage() as storage:
        heads.batch_size_per_image, heads.positive_fraction = 1000, 1.0
        images = [proposals[-1:], proposals], [targets, targets]
        other, sampled = heads.label_and_sample_proposals(*images)
        assert (len(other), len(sampled)) == (2, 310)
        predicted = sampled.proposal_boxes.tensor.clone()
        predicted[predicted[:, 2] == 100, 2] = 140  # outside of the image
        predicted[predicted[:, 2] == 1, 0] = -9  # also outside
        heads.batch_size_per_image, heads.positive_fraction = 30, 0.25
        boxes = [other.proposal_boxes.tensor, predicted]
        others, found = heads._refine(boxes, [other, sampled], 1, images[1])
        scalars = {name: value for name, (value, _) in storage.latest().items()}
    assert torch.equal(heads._objectness[1].sort().values, right)
    assert len(others) == 2
    assert found.proposal_boxes.tensor.min() == 0
    edges = found.proposal_boxes.tensor[:, 2]
    assert set(edges[:7].tolist()) <= {70, 100}
    assert found.gt_classes.tolist() == [2] * 7 + [4] * 23
    in_bins = [(edges == x).sum().item() for x in (1, 30, 55)]
    assert sum(in_bins) == 23
    assert min(in_bins) >= 7
    assert [scalars[f"stage1/roi_head/num_bg_iou_bin_{k}"] for k in range(3)] == [
        n / 2 for n in in_bins
    ]
    assert (heads.proposal_matcher, heads.proposal_sampler) == (matcher, sampler)
    assert sampler.negative_iou_thresh == 0.5


def test_mask_head_per_stage():
    """Each of three mask heads is trained, on samples of its own, or on all boxes."""
    keys = {"LIBRA__CASCADE__MASK_HEAD_PER_STAGE": True, "LIBRA__ROI_HEADS__PAD_MASKS": True}
    model = build("cascade", MASK_ON=True, **keys)
    for resample in (True, False):
        model.roi_heads.resample = resample
        model.zero_grad()
        with EventStorage() as storage:
            losses = model(random_inputs(1, 0, size=(90, 120)))
        assert ("stage2/roi_head/num_fg_instances" in storage.latest()) == resample
        sum(losses.values()).backward()
        assert {f"loss_mask_stage{k}" for k in range(3)} < losses.keys()
        assert all(p.grad.abs().sum() > 0 for p in model.roi_heads.mask_head.parameters())


def test_masks_of_each_stage():
    """
    Each stage's head is trained on the foreground of that stage and the masks of its matches:
    objects that are squares, of which only the upper half is set for the second one. Masks are
    padded, images of 100 x 128 pixels to 128 x 128.
    """
    keys = {"MASK_HEAD_PER_STAGE": True, "STAGE_LOSS_WEIGHTS": (1.0, 0.5, 0.25), "RESAMPLE": False}
    keys = {f"LIBRA__CASCADE__{name}": value for name, value in keys.items()}
    heads = build("cascade", MASK_ON=True, LIBRA__ROI_HEADS__PAD_MASKS=True, **keys).roi_heads
    assert isinstance(heads.mask_head, MaskHeadPerStage)
    sizes = []
    for k, head in enumerate(heads.mask_head):
        head.register_forward_pre_hook(
            lambda _, x: sizes.extend(
                (*x[0].shape[2:], *y.gt_masks.image_size) for y in x[1] if y.has("gt_masks")
            )
        )
        torch.nn.init.zeros_(head.predictor.weight)
        torch.nn.init.constant_(head.predictor.bias, k + 1.0)
    for predictor in heads.box_predictor:  # boxes stay what they are
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    boxes = torch.tensor([[0.0, 0, 56, 56], [64, 28, 120, 84]])
    masks = torch.zeros(2, 100, 128, dtype=torch.bool)
    masks[0, :56, :56] = masks[1, 28:56, 64:120] = True
    targets = Instances((100, 128), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    targets.gt_classes = torch.tensor([2, 0])
    proposals = Instances((100, 128), proposal_boxes=Boxes(boxes[[1, 0, 1]]))
    proposals.objectness_logits = torch.zeros(3)
    features = {name: torch.randn(1, 16, 8, 8) for name in heads.box_in_features}
    heads.proposal_append_gt = False
    with EventStorage():
        _, losses = heads(None, features, [proposals], [targets])
    assert sizes == 3 * [(14, 14, 128, 128)]
    assert "loss_mask" not in losses
    for k in range(3):
        # Two thirds of the pixels of three boxes are 1.
        set_, unset = F.softplus(torch.tensor([-k - 1.0, k + 1.0]))
        expected = (2 * set_ + unset) / 3 * 0.5**k
        torch.testing.assert_close(losses[f"loss_mask_stage{k}"], expected)
    given = Instances((100, 128), pred_boxes=Boxes(boxes), pred_classes=torch.tensor([2, 0]))
    (found,) = heads.eval().forward_with_given_boxes(features, [given])
    expected = torch.tensor([1.0, 2, 3]).sigmoid().mean()
    torch.testing.assert_close(found.pred_masks, expected.expand(2, 1, 28, 28))
