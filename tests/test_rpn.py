# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import demo_cfg, random_inputs
from test_normalizer import another_process

from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.utils.events import EventStorage

from libra_d2.errors import ArgumentError
from libra_d2.modeling import LibraRPN

pytestmark = pytest.mark.rounding

IMAGE_SIZE = (96, 128)


def build(**overrides):
    cfg = demo_cfg(**{f"MODEL__{k}": v for k, v in overrides.items()})
    return build_proposal_generator(cfg, build_backbone(cfg).output_shape())


@pytest.fixture(scope="module")
def rpn():
    return build()


def labels(num_positive, num_negative, num_ignored=50):
    counts = {1: num_positive, 0: num_negative, -1: num_ignored}
    label = torch.cat([torch.full((n,), v, dtype=torch.int8) for v, n in counts.items()])
    return label[torch.randperm(len(label))]


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "max_neg_per_pos", "sampled"),
    [
        (0, 1000, 5, (0, 5)),  # no positive counts as one
        (10, 1000, 5, (10, 50)),
        (10, 30, 5, (10, 30)),  # fewer than the limit
        (30, 1000, 5, (30, 98)),  # the batch size of 128 is the limit
        (100, 1000, 5, (64, 64)),  # half of it are positives
        (10, 1000, 0, (10, 0)),
        (10, 1000, -1, (10, 118)),  # no limit
        (0, 0, 5, (0, 0)),
    ],
)
def test_cap_of_negatives(rpn, num_positive, num_negative, max_neg_per_pos, sampled, monkeypatch):
    monkeypatch.setattr(rpn, "max_neg_per_pos", max_neg_per_pos)
    before = labels(num_positive, num_negative)
    after = rpn._subsample_labels(before.clone())
    assert ((after == 1).sum(), (after == 0).sum()) == sampled
    kept = after >= 0
    assert torch.equal(after[kept], before[kept])
    assert (after[~kept] == -1).all()


def test_negatives_are_drawn_uniformly(rpn):
    """10 of 40 negatives are drawn, each equally often (chi-square test at level 1e-4)."""
    label = labels(2, 40, 0)
    times = sum((rpn._subsample_labels(label.clone()) == 0).double() for _ in range(2000))
    times = times[label == 0]
    statistic = ((times - 500) ** 2 / (2000 * 0.25 * 0.75)).sum() * 39 / 40
    assert statistic < 81  # 39 degrees of freedom exceed 81 with probability 1e-4


def losses(rpn, gt_instances):
    """Losses of fixed predictions of two images, and labels of the anchors."""
    features = {f"p{i + 2}": torch.zeros(2, 16, 24 // 2**i, 32 // 2**i) for i in range(5)}
    anchors = rpn.anchor_generator([features[f"p{i + 2}"] for i in range(5)])
    torch.manual_seed(1)
    with EventStorage():
        gt_labels, gt_boxes = rpn.label_and_sample_anchors(anchors, gt_instances)
        logits = [torch.randn(2, len(a)) for a in anchors]
        deltas = [torch.randn(2, len(a), 4) * 0.1 for a in anchors]
        return rpn.losses(anchors, logits, gt_labels, deltas, gt_boxes), torch.stack(gt_labels)


def test_normalizer(monkeypatch):
    """
    Losses are divided by the number of sampled anchors, at least 1 + 1 per image and averaged over
    processes, instead of 128 * 2.
    """
    gt_instances = [x["instances"] for x in random_inputs(4, 0, size=IMAGE_SIZE)]
    plain, _ = losses(build(LIBRA__RPN__NORMALIZER="batch_size"), gt_instances)
    libra, gt_labels = losses(build(), gt_instances)
    num_positive = (gt_labels == 1).sum(dim=1)
    assert num_positive[1] == 0
    num_sampled = 6 * num_positive[0] + 1 + 5
    assert (gt_labels >= 0).sum() == num_sampled - 1
    another_process(monkeypatch, float(num_sampled + 10))
    both, _ = losses(build(), gt_instances)
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        torch.testing.assert_close(libra[name], plain[name] * 256 / num_sampled)
        torch.testing.assert_close(both[name], plain[name] * 256 / (num_sampled + 5))


def test_all_off_is_the_parent():
    """With mmdetection's habits disabled, losses are those of Detectron2's RPN, in padding, too."""
    inputs = [*random_inputs(4, size=IMAGE_SIZE), *random_inputs(2, size=(64, 64))]
    gt_instances = [x["instances"] for x in inputs]
    off = build(
        LIBRA__RPN__NORMALIZER="batch_size",
        LIBRA__RPN__MAX_NEG_PER_POS=-1,
        LIBRA__RPN__LOW_QUALITY_IOU=-1.0,
        LIBRA__RPN__PADDING_ANCHORS=True,
    )
    plain = build(PROPOSAL_GENERATOR__NAME="RPN")
    assert losses(off, gt_instances)[0] == losses(plain, gt_instances)[0]


def test_arguments():
    """Defaults of the arguments, and values from a config."""
    cfg = demo_cfg()
    shape = build_backbone(cfg).output_shape()
    names = ("max_neg_per_pos", "normalizer", "padding_anchors")
    rpn = LibraRPN(**RPN.from_config(cfg, shape))
    assert [getattr(rpn, name) for name in names] == [5, "sampled", False]
    assert type(rpn.anchor_matcher) is Matcher
    keys = {"MAX_NEG_PER_POS": 3, "PADDING_ANCHORS": True, "LOW_QUALITY_IOU": 0.1}
    keys = {f"LIBRA__RPN__{k}": v for k, v in {**keys, "NORMALIZER": "batch_size"}.items()}
    rpn = build(LIBRA__NORMALIZE_OVER="process", **keys)
    assert [getattr(rpn, name) for name in names] == [3, "batch_size", True]
    assert rpn.anchor_matcher.min_iou == 0.1
    with pytest.raises(ArgumentError, match="^normalizer is 'images': use one of"):
        build(LIBRA__RPN__NORMALIZER="images")
    assert rpn.normalize_over == "process"
    with pytest.raises(ArgumentError, match="^normalize_over is 'image': use one of"):
        build(LIBRA__NORMALIZE_OVER="image")
