# SPDX-License-Identifier: Apache-2.0
import inspect

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.modeling import PROPOSAL_SAMPLER_REGISTRY, LibraROIHeads, SamplingResult

pytestmark = pytest.mark.rounding


def build(config="faster", **overrides):
    """The demo's model of that name, with smaller heads."""
    path = ROOT / f"configs/Demo/libra_{config}_rcnn_R_18_FPN.yaml"
    return build_model(demo_cfg(path, **{f"MODEL__{k}": v for k, v in overrides.items()}))


@pytest.mark.parametrize("config", ["faster", "cascade"])
@pytest.mark.parametrize("negatives", ["iou_balanced", "random"])
def test_label_and_sample_proposals(config, negatives):
    """64 proposals: 9 positives and the object itself, 18 negatives from each of three bins."""
    heads = build(config, LIBRA__SAMPLER__NEGATIVES=negatives).roi_heads
    right = [1.0] * 200 + [20.0] * 60 + [40.0] * 30 + [70.0] * 9  # edges; the object's is 100
    boxes = torch.tensor([[0, 0, x, 10] for x in right])
    proposals = Instances((128, 128), proposal_boxes=Boxes(boxes))
    proposals.objectness_logits = torch.zeros(len(boxes))
    targets = Instances((128, 128), gt_boxes=Boxes(torch.tensor([[0.0, 0, 100, 10]])))
    targets.gt_classes = torch.tensor([2])
    with EventStorage() as storage:
        (sampled,) = heads.label_and_sample_proposals([proposals], [targets])
        scalars = {name: value for name, (value, _) in storage.latest().items()}
    assert len(sampled) == 64
    foreground = sampled[sampled.gt_classes == 2]
    assert len(foreground) == 10
    assert (foreground.proposal_boxes.tensor[:, 2] >= 70).all()
    background = sampled[sampled.gt_classes == 4]
    assert (background.proposal_boxes.tensor[:, 2] <= 40).all()
    in_bins = [(background.proposal_boxes.tensor[:, 2] == x).sum().item() for x in (1, 20, 40)]
    assert sum(in_bins) == 54
    assert (in_bins == [18, 18, 18]) == (negatives == "iou_balanced")
    assert [scalars[f"roi_head/num_bg_iou_bin_{k}"] for k in range(3)] == in_bins
    assert scalars["roi_head/num_fg_instances"] == 1
    assert scalars["roi_head/num_fg_samples"] == 10


def test_low_quality_matches_and_padded_masks():
    """An object is matched with its best proposal, at an IoU of 0.25; it does not count itself."""
    parameters = inspect.signature(LibraROIHeads.__init__).parameters
    assert [parameters[x].default for x in ("low_quality_iou", "pad_masks")] == [-1, False]
    keys = {"LIBRA__ROI_HEADS__LOW_QUALITY_IOU": 0.25, "LIBRA__ROI_HEADS__PAD_MASKS": True}
    heads = build(**keys).roi_heads
    assert (heads.low_quality_iou, heads.pad_masks) == (0.25, True)
    boxes = Boxes(torch.tensor([[0.0, 0, 25, 10], [0, 0, 10, 10]]))
    proposals = Instances((100, 128), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
    none = torch.zeros(2, dtype=torch.bool)  # another image
    targets = Instances((100, 128), gt_boxes=Boxes(torch.tensor([[0.0, 0, 100, 10]])))
    targets.gt_classes = torch.tensor([2])
    targets.gt_masks = BitMasks(torch.ones(1, 100, 128, dtype=torch.bool))
    for min_iou, best, pad in ((0.25, 2, True), (0.3, 4, False), (0.0, 2, False)):
        heads.low_quality_iou, heads.pad_masks = min_iou, pad
        with EventStorage():
            images = [proposals[none], proposals], [targets, targets]
            _, found = heads.label_and_sample_proposals(*images)
        edges = found.proposal_boxes.tensor[:, 2].tolist()
        assert dict(zip(edges, found.gt_classes.tolist())) == {25: best, 10: 4, 100: 2}
        assert found.gt_masks.image_size == (128 if pad else 100, 128)


class OwnSampler(torch.nn.Module):
    """Records its arguments and returns preset draws."""

    def __init__(self, cfg):
        super().__init__()
        self.given, self.draws = [], []

    def forward(self, *args, **kwargs):
        self.given.append([x.tolist() if torch.is_tensor(x) else x for x in args])
        self.given[-1].append(kwargs.pop("objectness").tolist())
        assert not kwargs
        positives, negatives, *statistics = self.draws[len(self.given) - 1]
        return SamplingResult(torch.tensor(positives).long(), torch.tensor(negatives), *statistics)


def test_sampler_interface():
    """
    Two steps with two images, in either order, one with objects at y = 0 and 50, and a step that
    fails. Ground truth has Detectron2's objectness, whose probability is 1 - 1e-10.
    """
    PROPOSAL_SAMPLER_REGISTRY._do_register("OwnSampler", OwnSampler)
    try:
        keys = {"BATCH_SIZE_PER_IMAGE": 7, "POSITIVE_FRACTION": 0.4}
        keys = {f"ROI_HEADS__{name}": value for name, value in keys.items()}
        heads = build(LIBRA__SAMPLER__NAME="OwnSampler", **keys).roi_heads
    finally:
        del PROPOSAL_SAMPLER_REGISTRY._obj_map["OwnSampler"]
    sampler, matcher = heads.proposal_sampler, heads.proposal_matcher
    gt_boxes = torch.tensor([[0.0, 0, 100, 10], [0, 50, 100, 60]])
    boxes = torch.tensor([[0.0, 0, 25, 10], [0, 0, 75, 10], [0, 50, 62.5, 60]])
    targets = [
        Instances((128, 128), gt_boxes=Boxes(gt_boxes[:n]), gt_classes=torch.tensor([2, 1])[:n])
        for n in (2, 0)
    ]
    proposals = [
        Instances((128, 128), proposal_boxes=Boxes(x), objectness_logits=torch.tensor(logits))
        for x, logits in ((boxes, [1.0, 2.0, 3.0]), (boxes[:2], [4.0, 5.0]))
    ]
    draws = [([2, 1], [0], 2, np.array([1, 0, 2])), ([], [1, 0], 0, np.array([0, 0, 1]))]
    sampler.draws = draws + draws[::-1]
    for order in (1, -1):
        with EventStorage() as storage:
            images = proposals[::order], targets[::order]
            first, second = heads.label_and_sample_proposals(*images)[::order]
        assert torch.equal(first.proposal_boxes.tensor, boxes[[2, 1, 0]])
        assert torch.equal(first.gt_boxes.tensor[:2], gt_boxes[[1, 0]])
        assert first.gt_classes.tolist() == [1, 2, 4]
        assert torch.equal(second.proposal_boxes.tensor, boxes[[1, 0]])
        assert second.gt_classes.tolist() == [4, 4]
        scalars = {name.split("/")[1]: value for name, (value, _) in storage.latest().items()}
        assert [scalars[f"num_bg_iou_bin_{k}"] for k in range(3)] == [0.5, 0, 1.5]
        assert scalars["num_fg_instances"] == scalars["num_fg_samples"] == 1
        assert heads.proposal_matcher is matcher
    # Labels, IoUs, matches, number of objects, what to draw at most, objectness.
    truth = pytest.approx(np.log(1e10), abs=1e-4)
    given = [
        [0, 1, 1, 1, 1],
        *([0.25, 0.75, 0.625, 1, 1], [0, 0, 1, 0, 1], 2, 7, 0.4, [1, 2, 3, truth, truth]),
    ]
    without = [[0, 0], [0, 0], [0, 0], 0, 7, 0.4, [4, 5]]
    assert sampler.given == [given, without, without, given]
    with EventStorage(), pytest.raises(IndexError):  # nothing is left to draw
        heads.label_and_sample_proposals(proposals, targets)
    assert heads.proposal_matcher is matcher


@pytest.mark.parametrize("config", ["faster", "mask", "cascade"])
def test_without_objects(config):
    """All parameters have finite gradients."""
    model = build(config, LIBRA__SAMPLER__MODE="reference")
    with EventStorage():
        sum(model(random_inputs(0, 0)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", ["", "Cascade"])
def test_initial_weights(kind):
    """A seed gives the same weights with and without the ideas, apart from the pyramid's."""
    libra = {"ROI_HEADS__NAME": f"Libra{kind}ROIHeads", "ROI_HEADS__IN_FEATURES": ["p2"]}
    parent = {
        **libra,
        "ROI_HEADS__NAME": f"{kind or 'Standard'}ROIHeads",
        "ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BACKBONE__NAME": "build_resnet_fpn_backbone",
    }
    results = []
    for overrides in (libra, parent):
        torch.manual_seed(3)
        weights = build("cascade", **overrides).state_dict()
        results.append({**weights, "random number behind them": torch.rand(1)})
    libra = {k: v for k, v in results[0].items() if not k.startswith("backbone.bfp.")}
    assert libra.keys() == results[1].keys()
    for name, value in libra.items():
        assert torch.equal(value, results[1][name]), name
