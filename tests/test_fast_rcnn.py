# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.modeling import BalancedL1Loss, LibraFastRCNNOutputLayers


def build(cls=LibraFastRCNNOutputLayers, **kwargs):
    kwargs.setdefault("box_reg_loss_type", "balanced_l1")
    return cls(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=3,
        **kwargs,
    )


BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [5, 5, 30, 20], [1, 1, 4, 4]])


@pytest.mark.parametrize("cls_agnostic", [False, True])
def test_hand_computed(cls_agnostic):
    """
    Two of four proposals are foreground, and are their ground truth: all target deltas are 0.
    With alpha = 1, gamma = ln 3, the loss is ln 2 - 0.5 at 0.5 and 3.5 ln 3 - 1 at 3 (see
    test_balanced_l1_loss). The sum is divided by the 4 proposals.
    """
    loss = BalancedL1Loss(alpha=1.0, gamma=math.log(3))
    predictor = build(balanced_l1=loss, cls_agnostic_bbox_reg=cls_agnostic)
    deltas = torch.full((4, 3, 4), 100.0)  # must not be looked at
    deltas[0, 2] = torch.tensor([0.5, -0.5, 0, 0])
    deltas[2, 0] = torch.tensor([0, 0, 3.0, 0])
    if cls_agnostic:
        deltas = torch.stack([deltas[0, 2], deltas[1, 0], deltas[2, 0], deltas[3, 0]])
    loss = predictor.box_reg_loss(BOXES, BOXES, deltas.flatten(1), torch.tensor([2, 3, 0, 3]))
    expected = (2 * (math.log(2) - 0.5) + 3.5 * math.log(3) - 1) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_beta_and_form():
    """Three different losses, the first being that of the paper."""
    deltas, classes = torch.full((4, 12), 0.05), torch.tensor([0, 1, 2, 3])
    parameters = ({}, {"beta": 0.11}, {"beta": 0.11, "form": "reference"})
    losses = [
        build(balanced_l1=BalancedL1Loss(**p)).box_reg_loss(BOXES, BOXES, deltas, classes).item()
        for p in parameters
    ]
    assert losses[0] == build().box_reg_loss(BOXES, BOXES, deltas, classes)
    assert losses[1] == pytest.approx(0.11 * losses_at(0.05 / 0.11), rel=1e-5)
    assert losses[2] > 1.5 * losses[1]


def losses_at(error):
    """The paper's loss of 12 errors, divided by 4 proposals."""
    b = math.expm1(3)
    return 3 * (0.5 / b * (b * error + 1) * math.log(b * error + 1) - 0.5 * error)


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_other_losses_are_the_parents(loss_type):
    deltas, classes = torch.randn(4, 12), torch.tensor([0, 1, 2, 3])
    libra, plain = [
        build(cls, box_reg_loss_type=loss_type).box_reg_loss(BOXES, BOXES + 1, deltas, classes)
        for cls in (LibraFastRCNNOutputLayers, FastRCNNOutputLayers)
    ]
    assert torch.equal(libra, plain)


def test_plain_detectron2_does_not_know_the_loss():
    """What this class is there for; the parent raises rather than training with something else."""
    with pytest.raises((ValueError, AssertionError), match="balanced_l1"):
        build(FastRCNNOutputLayers).box_reg_loss(
            BOXES, BOXES, torch.zeros(4, 12), torch.tensor([0, 1, 2, 3])
        )


@pytest.mark.parametrize(("num_proposals", "num_foreground"), [(0, 0), (4, 0), (4, 4)])
def test_losses_have_gradients(num_proposals, num_foreground):
    predictor = build()
    proposals = Instances((32, 32), proposal_boxes=Boxes(BOXES[:num_proposals]))
    proposals.gt_classes = torch.full((num_proposals,), 3)
    proposals.gt_classes[:num_foreground] = 1
    if num_foreground:
        proposals.gt_boxes = Boxes(BOXES[:num_proposals] + 1)
    predictions = predictor(torch.randn(num_proposals, 8))
    with EventStorage():
        losses = predictor.losses(predictions, [proposals])
    assert (losses["loss_box_reg"] > 0) == (num_foreground > 0)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in predictor.parameters())


def test_state_dict_of_the_parent():
    assert build().state_dict().keys() == build(FastRCNNOutputLayers).state_dict().keys()
