# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from libra_d2.errors import ArgumentError
from libra_d2.modeling import LowQualityMatcher
from libra_d2.modeling.reference_recipe.matcher import build_anchor_matcher

pytestmark = pytest.mark.rounding


def random_boxes(num, grid=None):
    """Boxes in an image of 100 pixels; on a grid, many IoUs are equal."""
    boxes = torch.rand(num, 4) * 60
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] * 0.6 + 4
    return (boxes / grid).round() * grid if grid else boxes


@pytest.mark.parametrize("grid", [None, 4, 12])
@pytest.mark.parametrize("num_gt", [0, 1, 40])
@pytest.mark.parametrize(("low", "high", "min_iou"), [(0.3, 0.7, 0.3), (0.4, 0.5, 0.0)])
def test_matches_reference(mmdet, grid, num_gt, low, high, min_iou):
    """Same labels, and same boxes of positive anchors, with the settings of RPN and RetinaNet."""
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
    """Three boxes and five anchors, worked out by hand."""
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
    for min_iou in (0.0, float(ious[2, 3])):
        matches, labels = LowQualityMatcher([0.3, 0.7], [0, -1, 1], min_iou)(ious)
        assert labels.tolist() == [1, 1, -1, 1, 0]
        assert matches[3] == 2
    matches, labels = LowQualityMatcher([0.3, 0.7], [0, -1, 1], 0.3)(ious[:, :0])
    assert labels.tolist() == matches.tolist() == []


def test_build_anchor_matcher():
    """A negative IoU keeps Detectron2's matcher; thresholds and labels stay in either case."""
    parent = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    assert build_anchor_matcher(parent, -1.0) is parent
    matcher = build_anchor_matcher(parent, 0.0)
    assert type(matcher) is LowQualityMatcher
    assert (matcher.thresholds, matcher.labels) == (parent.thresholds, parent.labels)
    assert LowQualityMatcher([0.5], [0, 1], 1.0).min_iou == 1
    with pytest.raises(ArgumentError, match="^min_iou is 1.5: use a value in"):
        build_anchor_matcher(parent, 1.5)
    with pytest.raises(ArgumentError, match="^min_iou is -0.1"):
        LowQualityMatcher([0.5], [0, 1], -0.1)
