# SPDX-License-Identifier: Apache-2.0
"""The comparison of exported models, with models whose detections are known."""

import pytest
import torch
from conftest import ROOT, build_model, demo_cfg
from torch import nn

from detectron2.export.flatten import flatten_to_tuple
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from libra_d2.errors import InputError
from libra_d2.tools.export_checks import (
    FIELDS,
    check,
    check_detections,
    check_raw,
    detect,
    hooked,
    make_input,
    match,
    raw_outputs,
)

SAMPLE = {"image": torch.zeros(3, 20, 30)}


class Constant(nn.Module):
    """A model with constant detections."""

    def __init__(self, fields):
        super().__init__()
        self.fields = fields

    def forward(self, inputs):
        assert (inputs[0]["height"], inputs[0]["width"]) == inputs[0]["image"].shape[-2:]
        found = dict(zip(FIELDS, self.fields), pred_boxes=Boxes(self.fields[0]))
        return [{"instances": Instances(inputs[0]["image"].shape[-2:], **found)}]


BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 40], [5, 5, 9, 9]])
SCORES = torch.tensor([0.9, 0.5, 0.5, 0.1])
FOUND = (BOXES, torch.tensor([0, 1, 2, 1]), SCORES, torch.ones(4, 1, 2, 2))
TWICE, NOTHING = (tuple(x[index] for x in FOUND) for index in ([0, 1, 1, 3], []))
MORE = tuple(x[[0, 1, 2, 3, 0]] for x in FOUND)


def changed(field, index, difference):
    fields = [x.clone() for x in FOUND]
    fields[field].view(4, -1)[index, -1] += difference
    return tuple(fields)


@pytest.mark.parametrize(
    ("found", "difference", "problem"),
    [
        (FOUND, 0, None),
        (tuple(x[torch.tensor([2, 0, 3, 1])] for x in FOUND), 0, None),
        (changed(0, 0, -0.04), 0, None),
        (changed(0, 0, -0.06), 0, "lacks 1 of 4 detections"),
        (changed(0, 0, -0.14), 3e-5, None),
        (changed(0, 0, -0.16), 3e-5, "lacks 1 of 4 detections"),
        (changed(2, 1, -0.8e-4), 0, None),
        (changed(2, 1, -1.2e-4), 0, "lacks 1 of 4 detections"),
        (changed(3, 0, 2e-4), 0, "lacks 1 of 4 detections"),
        (changed(1, 0, 1), 0, "lacks 1 of 4 detections"),
        (tuple(x[:2] for x in FOUND), 0, "lacks 2 of 4 detections"),
        (TWICE, 0, "lacks 1 of 4 detections"),
        (NOTHING, 0, "lacks 4 of 4 detections"),
        (MORE, 0, "has 1 detections that the model lacks"),
    ],
)
def test_bounds(found, difference, problem):
    """
    Detections may differ in order, boxes by 0.05 pixels, scores and masks by 1e-4; or in proportion
    to a difference before thresholds of more than 1e-5.
    """
    model = Constant(FOUND)
    if problem is None:
        assert check_detections(model, lambda image: found, SAMPLE, difference) == (4, 0)
        return
    with pytest.raises(InputError) as error:
        check_detections(model, lambda image: found, SAMPLE, difference)
    problem = f"in an image of 30 x 20 pixels the exported model {problem}"
    assert str(error.value) == f"{problem}: the model cannot be exported"


def test_no_detections():
    assert check_detections(Constant(NOTHING), lambda image: NOTHING, SAMPLE, 0) == (0, 0)
    with pytest.raises(InputError, match="has 4 detections that the model lacks"):
        check_detections(Constant(NOTHING), lambda image: FOUND, SAMPLE, 0)


def test_near_detections():
    """One that stands for two of the model, 0.08 pixels apart, does not make up for another one."""
    boxes, found = MORE[0].clone(), tuple(x[[0, 1, 2, 3, 3]] for x in changed(0, 0, 0.04))
    boxes[4, 3] += 0.08
    with pytest.raises(InputError, match="has 1 detections that the model lacks"):
        check_detections(Constant((boxes, *MORE[1:])), lambda image: found, SAMPLE, 0)


class Detector(nn.Module):
    """A detector of one class: boxes with given logits, thresholds and non-maximum suppression."""

    def __init__(self, logits, boxes, threshold=0.5, nms=0.5):
        super().__init__()
        self.logits, self.boxes = torch.tensor(logits), torch.tensor(boxes)
        self.threshold, self.nms = threshold, nms
        self.head = nn.Identity()

    def forward(self, inputs):
        scores = self.head(self.logits).sigmoid()
        keep = batched_nms(self.boxes, scores, torch.zeros(len(scores)), self.nms)
        keep = keep[scores[keep] > self.threshold]
        boxes, classes = Boxes(self.boxes[keep]), torch.zeros_like(keep)
        found = Instances((20, 30), pred_boxes=boxes, pred_classes=classes, scores=scores[keep])
        return [{"instances": found}]

    def exported(self, image):
        return detect(self, [{"image": image}])


# Two boxes that overlap by 0.6, and another one.
PAIR = [[0.0, 0, 10, 10], [0, 2.5, 10, 12.5], [20, 20, 30, 30]]
SHIFTED = [[0.0, 0, 10, 10], [0, 2.5, 10, 12.5], [20, 22, 30, 32]]


@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        # Which of two boxes suppresses the other, or exceeds the threshold.
        (Detector([1.000001, 1, 0.5], PAIR), Detector([1, 1.000001, 0.5], PAIR), (2, 1)),
        (Detector([1.1, 1, 0.5], PAIR), Detector([1, 1.1, 0.5], PAIR), "lacks 1 of 2"),
        (Detector([1.1, 1, 1e-6], PAIR), Detector([1.1, 1, -1e-6], PAIR), (2, 1)),
        (Detector([1.1, 1, -1e-6], PAIR), Detector([1.1, 1, 1e-6], PAIR), (1, 0)),
        (Detector([1.1, 1, 1e-2], PAIR), Detector([1.1, 1, -1e-2], PAIR), "lacks 1 of 2"),
        (Detector([1.1, 1, -1e-2], PAIR), Detector([1.1, 1, 1e-2], PAIR), "has 1 detections"),
        # Another threshold of non-maximum suppression.
        (Detector([1.1, 1, 1], PAIR, nms=0.7), Detector([1.1, 1, 1], PAIR), "lacks 1 of 3"),
        (Detector([1.1, 1, 1], PAIR), Detector([1.1, 1, 1], PAIR, nms=0.7), "has 1 detections"),
        # A nearly equal pair explains nothing else.
        (Detector([1.000001, 1, 1], PAIR), Detector([1, 1.000001, 1], SHIFTED), "lacks 1 of 2"),
    ],
)
def test_rounding(ours, theirs, result):
    """Detections on which rounding decides may differ, and others may not."""
    difference = 1e-6
    if isinstance(result, tuple):
        assert check_detections(ours, theirs.exported, SAMPLE, difference) == result
        return
    with pytest.raises(InputError, match=f"the exported model {result}"):
        check_detections(ours, theirs.exported, SAMPLE, difference)
    assert not ours.head._forward_hooks


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        ([3, -4, 0.1], 0),
        ([3, -4.001, 0.1], 0.00025),
        ([3, -4, 0.1015], 0.000375),
        ([3, -4, 0.1025], "differs by 0.0006 of the largest value"),
        ([float("nan"), -4, 0.1], "differs by nan of the largest value"),
        ([3, -4], "has other shapes"),
    ],
)
def test_before_thresholds(found, difference):
    """Relative to the largest magnitude, 4 here, whether or not anything is detected."""
    model = Detector([3, -4, 0.1], PAIR, threshold=2)
    if not isinstance(difference, str):
        seen = check_raw(model, lambda image: (torch.tensor(found),), SAMPLE)
        assert seen == pytest.approx(difference, rel=0.01)
        return
    with pytest.raises(InputError, match=f"30 x 20 pixels what is computed before .*{difference}"):
        check_raw(model, lambda image: (torch.tensor(found),), SAMPLE)


@pytest.mark.parametrize(
    ("logits", "theirs", "text"),
    [
        ([1.1, 1, 1], [1.1, 1, 1], "the same 2, and 2, 2 in images of other sizes"),
        ([-1, -1, -1.0], [-1, -1, -1.0], "none were compared"),
        (
            [1.000001, 1, 1],
            [1, 1.000001, 1],
            "the same 1, and 1, 1 in images of other sizes; rounding decides on 3 more",
        ),
        ([1.000001, 1, -1], [1, 1.000001, -1], "none were compared; rounding decides on 3 more"),
    ],
)
def test_check(logits, theirs, text):
    model = Detector(logits, PAIR)
    raw = (torch.tensor(logits) * (1 + 1e-5),)
    exported = Detector(theirs, PAIR).exported
    lines = check(model, [SAMPLE] * 3, exported, lambda sample: lambda image: raw).splitlines()
    assert lines[0] == "before thresholds: the same to 1e-05 of the largest value"
    assert lines[1] == f"detections: {text}"


@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_rcnn", "fast_rcnn", "retinanet"])
@torch.no_grad()
def test_raw_outputs(system):
    """All that thresholds choose from, at given boxes, even if nothing exceeds the thresholds."""
    cfg = demo_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    model = build_model(cfg).eval()
    sample = make_input(255 * torch.rand(3, 64, 96), with_proposals=system != "retinanet")
    outputs = raw_outputs(model, [sample])
    images = model.preprocess_image([sample])
    features = model.backbone(images.tensor)
    if system == "retinanet":
        expected = model.head([features[x] for x in model.head_in_features])
    else:
        expected = []
        if system != "fast_rcnn":
            rpn = model.proposal_generator
            expected = [*rpn.rpn_head([features[x] for x in rpn.in_features])]
        heads, boxes = model.roi_heads, [Boxes(sample["boxes"])]
        pooled = heads.box_pooler([features[x] for x in heads.box_in_features], boxes)
        if system == "cascade_rcnn":
            expected += heads.box_predictor[0](heads.box_head[0](pooled))
            outputs, later = outputs[:-4], outputs[-4:]
            assert [x.shape for x in later] == [x.shape for x in outputs[-2:]] * 2
        else:
            expected += heads.box_predictor(heads.box_head(pooled))
        if system == "mask_rcnn":
            pooled = heads.mask_pooler([features[x] for x in heads.mask_in_features], boxes)
            expected.append(heads.mask_head.layers(pooled)[:, :1].sigmoid())
    torch.testing.assert_close(outputs, [*flatten_to_tuple(expected)[0]])


def test_hooks_are_removed():
    model = Detector([1, 1, 1.0], PAIR)
    with pytest.raises(ValueError, match="why"), hooked(model, print):
        raise ValueError("why" if len(model.head._forward_hooks) == 1 else "there is none")
    assert not model.head._forward_hooks


def test_match():
    """Among detections of the same class; a score difference of 0.001 counts as a pixel."""
    boxes, classes = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    boxes[1, 2] = 1  # one corner is a pixel to the right
    for score, nearest in ((0.5009, 0), (0.5011, 1)):
        found = (boxes, classes, torch.tensor([score, 0.5]))
        assert match((boxes[:1], classes[:1], torch.tensor([0.5])), found).tolist() == [nearest]
    assert match(TWICE, FOUND).tolist() == [0, 1, 1, 3]
