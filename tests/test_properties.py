# SPDX-License-Identifier: Apache-2.0
"""What holds for any input: searched for counterexamples, with the same ones in each run."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_d2.modeling import BalancedSampler, balanced_l1_loss
from libra_d2.modeling.balanced_sampling import MODES, NEGATIVE_SAMPLERS, POSITIVE_SAMPLERS

search = settings(max_examples=150, deadline=None, derandomize=True, database=None)


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


@search
@given(
    candidates(),
    st.integers(0, 400),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    st.sampled_from(MODES),
    st.sampled_from(NEGATIVE_SAMPLERS),
    st.sampled_from(POSITIVE_SAMPLERS),
    st.integers(1, 9),
)
def test_sampler(args, num_samples, fraction, mode, negatives, positives, num_bins):
    """As many as asked for and there are, each once, and what they are taken for."""
    labels, iou, matched, num_instances = args
    sampler = BalancedSampler(
        negatives=negatives, positives=positives, mode=mode, num_bins=num_bins
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
    assert drawn.negatives_in_bins.sum() <= len(drawn.negatives)


finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@search
@given(
    st.lists(st.tuples(finite, finite), max_size=40),
    st.floats(0.05, 2.0),
    st.floats(0.1, 4.0),
    st.floats(1e-3, 10.0),
    st.sampled_from(["scaled", "reference"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_loss(pairs, alpha, gamma, beta, form, dtype):
    """
    Finite, 0 for perfect predictions, not negative otherwise; its gradient points to the target
    and, in the paper's form, is at most gamma. Errors are up to 2^100: the loss is linear there.
    Of the reference's form this holds for a beta of at most 1.
    """
    values = torch.tensor(pairs, dtype=dtype).reshape(-1, 2)
    input, target = values[:, 0].clone().requires_grad_(), values[:, 1]
    arguments = {"alpha": alpha, "gamma": gamma, "beta": beta, "form": form}
    loss = balanced_l1_loss(input, target, **arguments)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(input.grad).all()
    error = (input - target).detach()
    assert (loss[error == 0] == 0).all()
    if form == "scaled" or beta <= 1:
        # Rounding of terms of the size of alpha * beta, which cancel near 0.
        assert (loss >= -1e-6 * max(alpha * beta, 1.0)).all()
        assert (input.grad * error >= 0).all()
    if form == "scaled":
        assert (input.grad.abs() <= gamma * (1 + 1e-4)).all()
    mean = balanced_l1_loss(input, target, **arguments, reduction="mean")
    assert torch.isfinite(mean)
