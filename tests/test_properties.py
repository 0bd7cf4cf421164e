# SPDX-License-Identifier: Apache-2.0
"""A property-based test of the sampler; each run searches the same examples."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_d2.modeling.balanced_sampling import (
    MODES,
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    BalancedSampler,
    iou_histogram,
)


@st.composite
def candidates(draw):
    """Any labels, IoUs (0, thresholds and 1 among them) and matches, of 0 to 300 proposals."""
    num_proposals = draw(st.integers(0, 300))
    num_instances = draw(st.integers(0, 30))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lowest = 0 if num_instances == 0 else draw(st.sampled_from([-1, 0, 1]))
    highest = 0 if num_instances == 0 else draw(st.integers(max(lowest, 0), 1))
    labels = torch.randint(lowest, highest + 1, (num_proposals,), generator=rng).to(torch.int8)
    iou = torch.rand(num_proposals, generator=rng)
    special = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1 / 3, 0.5, 1.0]), max_size=20)))
    iou[: len(special)] = special[:num_proposals]
    iou = torch.where(labels == 1, 0.5 + iou / 2, iou / 2)
    if draw(st.booleans()):
        iou = torch.where(labels == 1, iou, torch.zeros(()))
    matched = torch.randint(0, max(num_instances, 1), (num_proposals,), generator=rng)
    if draw(st.booleans()):  # all positives of one object
        matched = torch.zeros_like(matched)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return labels, iou.to(dtype), matched, num_instances


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    candidates(),
    st.integers(0, 400),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    st.sampled_from(MODES),
    st.sampled_from(NEGATIVE_SAMPLERS),
    st.sampled_from(POSITIVE_SAMPLERS),
    st.integers(1, 9),
    st.sampled_from([0.3, 0.5]),
)
def test_sampler(args, num_samples, fraction, mode, negatives, positives, num_bins, threshold):
    """As many as asked for and available, without repetition; right labels and statistics."""
    labels, iou, matched, _ = args
    sampler = BalancedSampler(
        negatives=negatives,
        positives=positives,
        mode=mode,
        num_bins=num_bins,
        negative_iou_thresh=threshold,
    )
    drawn = sampler(*args, num_samples, fraction)
    assert (labels[drawn.positives] == 1).all()
    assert (labels[drawn.negatives] == 0).all()
    assert len(drawn.positives.unique()) == len(drawn.positives)
    assert len(drawn.negatives.unique()) == len(drawn.negatives)
    most = min(int(num_samples * fraction), int((labels == 1).sum()))
    if mode == "paper" or positives == "random":
        assert len(drawn.positives) == most
    else:
        assert min(most, 1) <= len(drawn.positives) <= most
    left = num_samples - len(drawn.positives)
    assert len(drawn.negatives) == min(left, int((labels == 0).sum()))
    assert drawn.num_instances == len(matched[drawn.positives].unique())
    in_bins = iou_histogram(iou[drawn.negatives].float().numpy(), num_bins, threshold)
    assert drawn.negatives_in_bins.tolist() == in_bins.tolist()
