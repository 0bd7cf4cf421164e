# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from libra_d2.errors import ArgumentError
from libra_d2.modeling.balanced_sampling import MODES, BalancedSampler, iou_bins, iou_histogram


def proposals(positives_of=(), negative_ious=(), num_ignored=0):
    """
    Proposals in random order: ``positives_of[m]`` positives of instance m, and negatives with the
    given IoUs.

    Returns:
        the first four arguments of a sampler.
    """
    num_positives = sum(positives_of)
    labels = [1] * num_positives + [0] * len(negative_ious) + [-1] * num_ignored
    matched = [m for m, n in enumerate(positives_of) for _ in range(n)]
    matched += [0] * (len(labels) - num_positives)
    ious = [1.0 - 0.4 * (i % 5) / 5 for i in range(num_positives)]
    ious += [*negative_ious, *[0.45] * num_ignored]
    order = torch.randperm(len(labels))
    return (
        torch.tensor(labels, dtype=torch.int8)[order],
        torch.tensor(ious)[order],
        torch.tensor(matched, dtype=torch.int64)[order],
        len(positives_of),
    )


def draw(args, num_samples, fraction=0.25, **kwargs):
    """Draw, and check what always holds."""
    labels, _, _, _ = args
    positive, negative, _, _ = BalancedSampler(**kwargs)(*args, num_samples, fraction)
    assert (labels[positive] == 1).all()
    assert (labels[negative] == 0).all()
    assert len(set(positive.tolist())) == len(positive) <= int(num_samples * fraction)
    assert len(set(negative.tolist())) == len(negative) <= num_samples - len(positive)
    return positive, negative


def linear(num, low=0.0, high=0.5):
    return (low + (high - low) * (torch.arange(num) + 0.5) / num).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("negatives", ["iou_balanced", "random"])
@pytest.mark.parametrize("positives", ["instance_balanced", "random"])
@pytest.mark.parametrize(
    ("args", "num_positives", "num_negatives"),
    [
        ({"negative_ious": [0.0] * 100}, 0, 64),  # no ground truth
        ({"positives_of": (0, 0), "negative_ious": linear(100)}, 0, 64),  # no foreground
        ({"positives_of": (5,), "negative_ious": linear(100)}, 5, 59),
        ({"positives_of": (5, 3), "negative_ious": linear(7)}, 8, 7),  # fewer than asked
        ({"positives_of": (5, 3), "negative_ious": linear(56)}, 8, 56),  # just as many
        ({"positives_of": (10,) * 4}, 16, 0),  # no background
        ({"positives_of": (1,) * 50, "negative_ious": linear(99)}, 16, 48),  # more instances
        ({"positives_of": (3,), "negative_ious": [0.2] * 100}, 3, 61),  # all in one bin
        ({"positives_of": (2,), "negative_ious": [0.0] * 9, "num_ignored": 90}, 2, 9),
        ({"num_ignored": 5}, 0, 0),
        ({}, 0, 0),  # no proposals
    ],
)
def test_counts(mode, negatives, positives, args, num_positives, num_negatives):
    kwargs = {"mode": mode, "negatives": negatives, "positives": positives}
    positive, negative = draw(proposals(**args), 64, **kwargs)
    assert (len(positive), len(negative)) == (num_positives, num_negatives)


@pytest.mark.parametrize("num_bins", [1, 2, 3, 5, 8])
def test_paper_bins_are_equally_filled(num_bins):
    """Equation 2: N / K from each bin, whatever the number of candidates in it."""
    ious = [0.5 * u**3 for u in linear(4000, 0, 1)]
    args = proposals((4,), ious)
    _, negative = draw(args, 4 + 40 * num_bins, mode="paper", num_bins=num_bins)
    assert iou_histogram(args[1][negative].numpy(), num_bins, 0.5).tolist() == [40] * num_bins


def test_paper_bins_follow_the_threshold():
    args = proposals((4,), linear(1000, 0, 0.3))
    _, negative = draw(args, 94, num_bins=3, negative_iou_thresh=0.3)
    assert iou_histogram(args[1][negative].numpy(), 3, 0.3).tolist() == [30, 30, 30]


def test_what_a_bin_lacks_is_filled_from_the_others():
    """10 of 30 in the last bin: the missing 20 come from the others, in proportion to the rest."""
    ious = linear(330, 0, 1 / 6) + linear(130, 1 / 6, 1 / 3) + linear(10, 1 / 3, 0.5)
    counts = []
    for _ in range(300):
        args = proposals((), ious)
        _, negative = draw(args, 90)
        counts.append(iou_histogram(args[1][negative].numpy(), 3, 0.5))
    counts = np.stack(counts)
    assert (counts[:, 2] == 10).all()
    assert (counts.sum(axis=1) == 90).all()
    # 300 and 100 candidates are left: 15 and 5 of the 20, hypergeometric with a standard deviation
    # of 1.9; its mean over 300 draws is within 0.45 but for one seed in 25,000.
    assert counts.mean(axis=0)[:2] == pytest.approx([45, 35], abs=0.45)


def test_uniform_within_a_bin():
    """Every candidate of a bin is drawn equally often (chi-square test at level 1e-4)."""
    args = proposals((), linear(60))
    times = torch.zeros(60)
    for _ in range(2000):
        times[draw(args, 30)[1]] += 1
    # 10 of 20 in each bin: 1000 times each, with variance 2000 / 4, correlated as in a draw
    # without replacement, so that the statistic has 3 * 19 degrees of freedom.
    statistic = ((times - 1000) ** 2 / 500).sum() * 19 / 20
    assert statistic < 105  # 57 degrees of freedom exceed 105 with probability 1e-4


def test_reference_mode_bins():
    """
    With ground truth added the bins end at 1: [0, 1/3), [1/3, 2/3), [2/3, 1). 90 draws take 30
    from the first; of the second 30 are below 0.5, and the last is empty: 30 at random. Zero IoU
    is not touched as long as there are others.
    """
    args = proposals((3,), [0.0] * 500 + linear(400, 0.01, 0.33) + linear(100, 0.34, 0.5))
    labels, max_iou, *_ = args
    upper_half = []
    for _ in range(300):
        _, negative = draw(args, 93, mode="reference")
        assert len(negative) == 90
        assert (max_iou[negative] > 0).all()
        upper_half.append((max_iou[negative] > 1 / 3).sum().item())
    # 30, and of 370 + 70 left in the first two bins 30 at random, 4.77 of them in the second, with
    # a standard deviation of 1.94: the mean over 300 is within 0.45 but for one seed in 16,000.
    assert np.mean(upper_half) == pytest.approx(30 + 30 * 70 / 440, abs=0.45)


def test_reference_mode_draws_zero_iou_last():
    args = proposals((3,), [0.0] * 500 + linear(50, 0.01, 0.5))
    _, negative = draw(args, 93, mode="reference")
    assert (args[1][negative] > 0).sum() == 50
    assert len(negative) == 90


@pytest.mark.parametrize("mode", MODES)
def test_positives_are_balanced(mode):
    """round(20 / 4) + 1 = 6 of each at most before trimming: nobody is left out."""
    args = proposals((100, 20, 8, 6), linear(200))
    matched = args[2]
    total = torch.zeros(4)
    for _ in range(200):
        positive, _ = draw(args, 80, mode=mode)
        count = matched[positive].bincount(minlength=4)
        assert count.max() <= 6
        assert count.min() >= 2
        assert count.sum() == 20
        total += count
    # 5 on average for each; at random it would be 14.9, 3.0, 1.2 and 0.9. A count deviates by less
    # than 1, its mean over 200 by 0.07.
    assert (total / 200 - 5).abs().max() < 0.3


def test_paper_mode_tops_up_positives():
    """Quotas of round(20 / 2) + 1 = 11 yield 3 + 11: 6 more come from the first instance."""
    args = proposals((100, 3), linear(200))
    for _ in range(20):
        positive, negative = draw(args, 80, mode="paper")
        assert args[2][positive].bincount().tolist() == [17, 3]
        assert len(negative) == 60


def oracle(args, num_samples, sampler):
    """What mmdetection's sampler draws for the same candidates."""
    from mmdet.models.task_modules.assigners import AssignResult
    from mmengine.structures import InstanceData

    labels, max_iou, matched, num_instances = args
    gt_inds = torch.where(labels == 1, matched + 1, labels.long())
    assigned = AssignResult(num_instances, gt_inds, max_iou, torch.zeros_like(gt_inds))
    result = sampler.sample(
        assigned,
        InstanceData(priors=torch.zeros(len(labels), 4)),
        InstanceData(
            bboxes=torch.zeros(num_instances, 4), labels=torch.zeros(num_instances).long()
        ),
    )
    return result.pos_inds, result.neg_inds


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("usual", ((40, 25, 9, 3), [0.0] * 300 + [0.5 * u**2 for u in linear(300, 0.02, 1)])),
        ("few positives", ((3, 2), [0.0] * 100 + linear(200, 0.01, 0.5))),
        ("crowded", ((4,) * 30, linear(250, 0.01, 0.5))),
        ("little overlap", ((50, 2), [0.0] * 300 + linear(30, 0.01, 0.4))),
    ],
)
def test_reference_mode_draws_as_reference(mmdet, name, candidates):
    """
    Mean numbers per IoU interval and per instance agree with mmdetection's. Each of up to 42 means
    over 400 draws may differ by 4.5 standard errors, which a fair difference exceeds once in
    150,000 times. The first draw of the reference, which is different by accident, is left out.
    """
    from mmdet.models.task_modules.samplers import CombinedSampler

    num_samples = 96
    sampler = CombinedSampler(
        num=num_samples,
        pos_fraction=0.25,
        add_gt_as_proposals=False,
        pos_sampler={"type": "InstanceBalancedPosSampler"},
        neg_sampler={
            "type": "IoUBalancedNegSampler",
            "floor_thr": -1,
            "floor_fraction": 0,
            "num_bins": 3,
        },
    )
    np.random.seed(0)
    args = proposals(*candidates)
    _, max_iou, matched, num_instances = args
    # A bin for zero IoU, and ten others.
    intervals = torch.where(
        max_iou == 0, 0, torch.from_numpy(iou_bins(max_iou.numpy(), 10, 0.5)) + 1
    )
    oracle(args, num_samples, sampler)
    ours, reference = [], []
    for _ in range(400):
        for counts, (positive, negative) in (
            (ours, draw(args, num_samples, mode="reference")),
            (reference, oracle(args, num_samples, sampler)),
        ):
            per_interval = intervals[negative].bincount(minlength=12)
            per_instance = matched[positive].bincount(minlength=num_instances)
            counts.append(torch.cat([per_interval, per_instance]).double())
    ours, reference = torch.stack(ours), torch.stack(reference)
    error = ((ours.var(dim=0) + reference.var(dim=0)) / 400).sqrt()
    difference = (ours.mean(dim=0) - reference.mean(dim=0)).abs()
    assert (difference <= 4.5 * error + 1e-9).all(), difference / error


@pytest.mark.parametrize("mode", MODES)
def test_no_state(mode):
    """Equal random states give equal draws, from the first call on."""
    args = proposals((9, 90), [0.0] * 100 + linear(300))
    sampler, draws = BalancedSampler(mode=mode), []
    for _ in range(3):
        torch.manual_seed(5)
        draws.append(torch.cat(sampler(*args, 64, 0.25)[:2]))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("negatives", ["iou_balanced", "random"])
def test_statistics(mode, negatives):
    """Counted from what was drawn, in the bins of the negatives' range, whatever the sampler."""
    args = proposals((9, 0, 1, 40), [0.0] * 100 + linear(300))
    drawn = BalancedSampler(mode=mode, negatives=negatives, num_bins=4)(*args, 64, 0.25)
    counts = np.histogram(args[1][drawn.negatives].numpy(), bins=4, range=(0, 0.5))[0]
    assert drawn.negatives_in_bins.tolist() == counts.tolist()
    assert drawn.num_instances == len(args[2][drawn.positives].unique())


def test_iou_histogram():
    ious = np.float32([0.0, 0.1, 0.16, 0.17, 0.33, 0.34, 0.49, 0.5, 1.0])
    assert iou_histogram(ious, 3, 0.5).tolist() == [3, 2, 2]
    assert iou_histogram(ious[:0], 3, 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_bins": 0}, "num_bins is 0: use 1 or more"),
        ({"mode": "fast"}, "mode is 'fast': use one of"),
        ({"negatives": "hard"}, "negatives is 'hard'"),
        ({"positives": ""}, "positives is ''"),
        ({"negative_iou_thresh": 0.0}, r"negative_iou_thresh is 0.0: use a value in \(0, 1\]"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        BalancedSampler(**kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_many_instances(mode):
    """More than a byte can number: one positive of each is drawn, as there is room for."""
    num_instances, num_each = 300, 4
    matched_idxs = torch.arange(num_instances).repeat(num_each)
    labels = torch.ones(len(matched_idxs), dtype=torch.int8)
    sampler = BalancedSampler(mode=mode)
    positive, negative, *_ = sampler(
        labels, torch.full((len(labels),), 0.8), matched_idxs, num_instances, 1200, 0.25
    )
    assert len(positive) == 300
    assert len(negative) == 0
    per_instance = matched_idxs[positive].bincount(minlength=num_instances)
    assert per_instance.max() <= 2  # round(300 / 300) + 1
