# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.modeling import LibraFastRCNNOutputLayers


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
    predictor = build(
        balanced_l1_alpha=1.0, balanced_l1_gamma=math.log(3), cls_agnostic_bbox_reg=cls_agnostic
    )
    deltas = torch.full((4, 3, 4), 100.0)  # must not be looked at
    deltas[0, 2] = torch.tensor([0.5, -0.5, 0, 0])
    deltas[2, 0] = torch.tensor([0, 0, 3.0, 0])
    if cls_agnostic:
        deltas = torch.stack([deltas[0, 2], deltas[1, 0], deltas[2, 0], deltas[3, 0]])
    loss = predictor.box_reg_loss(BOXES, BOXES, deltas.flatten(1), torch.tensor([2, 3, 0, 3]))
    expected = (2 * (math.log(2) - 0.5) + 3.5 * math.log(3) - 1) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_beta_and_form():
    arguments = {"balanced_l1_beta": 0.11, "balanced_l1_form": "reference"}
    deltas, classes = torch.full((4, 12), 0.05), torch.tensor([0, 1, 2, 3])
    losses = [
        build(**kwargs).box_reg_loss(BOXES, BOXES, deltas, classes)
        for kwargs in ({}, {"balanced_l1_beta": 0.11}, arguments)
    ]
    assert len({round(loss.item(), 6) for loss in losses}) == 3


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


def test_bad_arguments():
    with pytest.raises(ValueError, match="beta must be a positive number, got 0"):
        build(balanced_l1_beta=0.0)
