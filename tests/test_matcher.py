# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import demo_cfg

from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from libra_d2.errors import ArgumentError
from libra_d2.modeling import LowQualityMatcher
from libra_d2.modeling.reference_recipe.matcher import build_anchor_matcher


def random_boxes(num, grid=None):
    """Boxes in an image of 100 pixels; on a grid, many IoUs are equal."""
    boxes = torch.rand(num, 4) * 60
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] * 0.6 + 4
    return (boxes / grid).round() * grid if grid else boxes


@pytest.mark.parametrize("grid", [None, 4, 12])
@pytest.mark.parametrize("num_gt", [0, 1, 40])
@pytest.mark.parametrize(("low", "high", "min_iou"), [(0.3, 0.7, 0.3), (0.4, 0.5, 0.0)])
def test_matches_reference(mmdet, grid, num_gt, low, high, min_iou):
    """Labels of all anchors, and boxes of positive ones: as RPN, and as RetinaNet."""
    from mmdet.models.task_modules.assigners import MaxIoUAssigner
    from mmengine.structures import InstanceData

    assigner = MaxIoUAssigner(pos_iou_thr=high, neg_iou_thr=low, min_pos_iou=min_iou)
    matcher = LowQualityMatcher([low, high], [0, -1, 1], min_iou)
    anchors, gt = random_boxes(800, grid), random_boxes(num_gt, grid)
    theirs = assigner.assign(
        InstanceData(priors=anchors), InstanceData(bboxes=gt, labels=torch.arange(num_gt))
    ).gt_inds
    ious = pairwise_iou(Boxes(gt), Boxes(anchors))
    matches, labels = matcher(ious)
    assert matches.dtype == torch.int64
    assert labels.dtype == torch.int8
    assert torch.equal(torch.where(labels == 1, matches + 1, labels.long()), theirs)


def test_rule():
    """By hand: three boxes, five anchors."""
    ious = torch.tensor(
        [
            [0.8, 0.1, 0.4, 0.0, 0.0],  # its best anchor is the first one
            [0.6, 0.6, 0.0, 0.0, 0.0],  # the first two, of which the second has no better box
            [0.0, 0.0, 0.0, 0.2, 0.1],  # the fourth, at an IoU below 0.3
        ]
    )
    matches, labels = LowQualityMatcher([0.3, 0.7], [0, -1, 1], 0.3)(ious)
    assert labels.tolist() == [1, 1, -1, 0, 0]
    assert matches[:2].tolist() == [1, 1]  # the first one goes to the later box
    parent = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    assert parent(ious)[0][:2].tolist() == [0, 1]  # Detectron2's rule is another one
    for min_iou in (0.0, float(ious[2, 3])):
        matches, labels = LowQualityMatcher([0.3, 0.7], [0, -1, 1], min_iou)(ious)
        assert labels.tolist() == [1, 1, -1, 1, 0]
        assert matches[3] == 2
    assert LowQualityMatcher([0.3, 0.7], [0, -1, 1], 1.0)(ious)[1].tolist() == [1, -1, -1, 0, 0]
    for shape in ((0, 4), (3, 0)):
        matches, labels = LowQualityMatcher([0.3, 0.7], [0, -1, 1], 0.3)(torch.zeros(shape))
        assert labels.tolist() == matches.tolist() == [0] * shape[1]


def test_key():
    """The key chooses between both rules; the matcher's thresholds stay."""
    for key, expected in ((0.3, LowQualityMatcher), (-1.0, Matcher)):
        cfg = demo_cfg(MODEL__LIBRA__RPN__LOW_QUALITY_IOU=key)
        rpn = build_proposal_generator(cfg, build_backbone(cfg).output_shape())
        assert type(rpn.anchor_matcher) is expected
        assert rpn.anchor_matcher.thresholds == [-float("inf"), 0.3, 0.7, float("inf")]
        assert rpn.anchor_matcher.labels == [0, -1, 1]
    parent = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    assert build_anchor_matcher(parent, -1.0) is parent
    matcher = build_anchor_matcher(parent, 0.0)
    assert type(matcher) is LowQualityMatcher
    assert (matcher.thresholds, matcher.labels) == (parent.thresholds, parent.labels)


@pytest.mark.parametrize("min_iou", [-0.1, 1.5])
def test_bad_iou(min_iou):
    with pytest.raises(ArgumentError, match=f"^min_iou is {min_iou}: use a value in"):
        LowQualityMatcher([0.5], [0, 1], min_iou)
    if min_iou > 0:  # a negative one asks for Detectron2's rule
        with pytest.raises(ArgumentError, match="^min_iou is 1.5"):
            build_anchor_matcher(Matcher([0.5], [0, 1]), min_iou)
