# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from conftest import demo_cfg
from test_normalizer import another_process

from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.errors import ArgumentError
from libra_d2.modeling import BalancedL1Loss, LibraFastRCNNOutputLayers

pytestmark = pytest.mark.rounding


def build(cls=LibraFastRCNNOutputLayers, box_reg_loss_type="balanced_l1", **kwargs):
    kwargs["box2box_transform"] = Box2BoxTransform(weights=(10, 10, 5, 5))
    kwargs["box_reg_loss_type"] = box_reg_loss_type
    return cls(ShapeSpec(channels=8), num_classes=2, **kwargs)


BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [5, 5, 30, 20], [1, 1, 4, 4]])


@pytest.mark.parametrize("cls_agnostic", [False, True])
def test_hand_computed(cls_agnostic):
    """
    Two of four proposals are foreground and equal to their ground truth: all target deltas are 0.
    With alpha = 1, gamma = ln 3, the loss is ln 2 - 0.5 at 0.5 and 3.5 ln 3 - 1 at 3 (see
    test_balanced_l1_loss). The sum is divided by the 4 proposals. A single one is one, too.
    """
    loss = BalancedL1Loss(alpha=1.0, gamma=math.log(3))
    predictor = build(balanced_l1=loss, cls_agnostic_bbox_reg=cls_agnostic)
    deltas = torch.full((4, 2, 4), 100.0)  # must be ignored
    deltas[0, 1] = torch.tensor([0.5, -0.5, 0, 0])
    deltas[2, 0] = torch.tensor([0, 0, 3.0, 0])
    if cls_agnostic:
        deltas = deltas[range(4), [1, 0, 0, 0]]
    classes = torch.tensor([1, 2, 0, -1])  # 2 is background, -1 is ignored
    loss = predictor.box_reg_loss(BOXES, BOXES, deltas.flatten(1), classes)
    expected = (2 * (math.log(2) - 0.5) + 3.5 * math.log(3) - 1) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss = predictor.box_reg_loss(BOXES[:1], BOXES[:1], deltas[:1].flatten(1), classes[:1])
    assert loss.item() == pytest.approx(2 * math.log(2) - 1, rel=1e-6)


@pytest.mark.parametrize("parameters", [{}, {"alpha": 0.4, "gamma": 1.2, "form": "reference"}])
def test_targets_and_parameters(parameters):
    """Targets are the deltas to the ground truth; the loss is the one given, or the paper's."""
    loss = BalancedL1Loss(**parameters)
    predictor = build(balanced_l1=loss) if parameters else build()
    deltas, classes = torch.randn(4, 2, 4), torch.tensor([0, 1, 1, 0])
    truth = BOXES.clone()
    truth[0] += torch.tensor([-1.0, 0, 1, 0])  # 10 pixels wide, now 12
    truth[1] += torch.tensor([1.0, -2, 1, -2])  # 20 pixels wide and high
    targets = torch.zeros(4, 4)
    targets[0, 2] = 5 * math.log(1.2)
    targets[1, :2] = torch.tensor([10 * 1 / 20, 10 * -2 / 20])
    expected = loss(deltas[range(4), classes], targets, "sum") / 4
    found = predictor.box_reg_loss(BOXES, truth, deltas.flatten(1), classes)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_other_losses_are_the_parents(loss_type):
    deltas, classes = torch.randn(4, 8), torch.tensor([0, 1, 2, 2])
    libra, plain = [
        build(cls, box_reg_loss_type=loss_type).box_reg_loss(BOXES, BOXES + 1, deltas, classes)
        for cls in (LibraFastRCNNOutputLayers, FastRCNNOutputLayers)
    ]
    assert torch.equal(libra, plain)


def test_config():
    """The loss, and what it is divided by, are those of the config."""
    cfg = demo_cfg(MODEL__LIBRA__NORMALIZE_OVER="process", MODEL__LIBRA__BALANCED_L1__ALPHA=0.4)
    predictor = LibraFastRCNNOutputLayers(cfg, ShapeSpec(channels=8))
    assert (predictor.normalize_over, build().normalize_over) == ("process", "batch")
    assert predictor.balanced_l1.arguments["alpha"] == 0.4
    with pytest.raises(ArgumentError, match="^normalize_over is 'image': use one of"):
        build(normalize_over="image")


def proposals(num, num_foreground=0):
    """Proposals whose foreground is 1 pixel off objects of class 1."""
    result = Instances((32, 32), proposal_boxes=Boxes(BOXES[:num]))
    result.gt_classes = torch.full((num,), 2)
    result.gt_classes[:num_foreground] = 1
    if num_foreground:
        result.gt_boxes = Boxes(BOXES[:num] + 1)
    return result


def losses(predictor, *images):
    torch.manual_seed(0)
    predictions = predictor(torch.randn(sum(map(len, images)), 8))
    with EventStorage():
        return predictor.losses(predictions, list(images))


def test_several_processes(monkeypatch):
    """Both losses are divided by the processes' mean number of proposals, and at least by 1."""
    predictor, pair, single = build(), [proposals(3, 2), proposals(1, 1)], [proposals(1, 1)]
    for images, other, factor in ((pair, 10, 4 / 7), (single, 1, 1)):
        alone = losses(predictor, *images)
        with monkeypatch.context() as patch:
            another_process(patch, other)
            together = losses(predictor, *images)
        assert len(alone) == 2
        for name, loss in alone.items():
            torch.testing.assert_close(together[name], loss * factor)
    many = Instances((32, 32), proposal_boxes=Boxes(BOXES[:1].expand(259, 4)))
    many.gt_classes = torch.full((259,), 2)
    predictions = [x.bfloat16() for x in predictor(torch.randn(259, 8))]
    with monkeypatch.context() as patch, EventStorage():  # bfloat16 has no 259
        another_process(patch, 259)
        together = predictor.losses(predictions, [many])
        alone = FastRCNNOutputLayers.losses(predictor, predictions, [many])
    assert torch.equal(together["loss_cls"], alone["loss_cls"])
    another_process(monkeypatch, 0)
    empty = losses(predictor, proposals(0))
    assert [x.item() for x in empty.values()] == [0, 0]
    sum(empty.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in predictor.parameters())
