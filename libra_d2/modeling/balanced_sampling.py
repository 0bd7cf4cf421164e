# SPDX-License-Identifier: Apache-2.0
"""
IoU-balanced sampling of negatives and instance-balanced sampling of positives: the sample level
balance of Libra R-CNN (paper Section 3.1).

Naming and shape shorthand in this module:

    R: number of proposals (RoIs) of one image, ground truth added as proposals included
    M: number of ground-truth instances of that image
    K: number of IoU bins
    label: 1 for positives (foreground), 0 for negatives (background), -1 for ignored proposals
    max_iou: for each proposal, its highest IoU with any ground truth; 0 if there is none
"""

from typing import Optional, Tuple, Union

import torch

__all__ = ["BalancedSampler", "iou_histogram", "NEGATIVE_SAMPLERS", "POSITIVE_SAMPLERS", "MODES"]

NEGATIVE_SAMPLERS = ("iou_balanced", "random")
POSITIVE_SAMPLERS = ("instance_balanced", "random")
MODES = ("paper", "reference")


def iou_bins(
    max_iou: torch.Tensor, num_bins: int, upper: Union[float, torch.Tensor]
) -> torch.Tensor:
    """
    Args:
        max_iou: (R,), in [0, 1].
        num_bins: K.
        upper: scalar in (0, 1], upper end of the last bin, exclusive.

    Returns:
        (R,) int64: index of the bin of equal width in [0, upper) that holds the IoU; K if none.
    """
    return (max_iou * (num_bins / upper)).clamp(max=num_bins).long()


def iou_histogram(max_iou: torch.Tensor, num_bins: int, upper: float) -> torch.Tensor:
    """
    Count IoUs in K bins of equal width in [0, upper), without host synchronization.

    Args:
        max_iou: (R,), in [0, 1].
        num_bins: K.
        upper: in (0, 1].

    Returns:
        (K,) int64. IoUs of ``upper`` or above are not counted.
    """
    bins = iou_bins(max_iou, num_bins, upper)
    return bins.new_zeros(num_bins + 1).scatter_add_(0, bins, torch.ones_like(bins))[:num_bins]


def _shuffled_indices(mask: torch.Tensor, num: int) -> torch.Tensor:
    """(num,) int64: where ``mask``, (R,) bool, is True, ``num`` times, in random order."""
    indices = torch.nonzero_static(mask, size=num).squeeze(1)
    return indices[torch.randperm(num, device=mask.device)]


def _draw(
    candidates: torch.Tensor,
    groups: torch.Tensor,
    num_groups: int,
    quota: Union[int, torch.Tensor],
    num: int,
    last_resort: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """
    Draw ``num`` of ``candidates``: first, at random, up to ``quota`` of each group, then at random
    from the rest. More than ``num`` within the quotas are trimmed at random.

    Args:
        candidates: (R,) int64, what is drawn, in random order.
        groups: (R,) int64. Only values in [0, num_groups) are groups with a quota.
        num_groups: number of groups.
        quota: number of draws from each group.
        num: number of draws in all.
        last_resort: (R,) bool, candidates drawn only after all others.

    Returns:
        (min(num, R),) int64, without repetition.
    """
    if len(candidates) <= num:
        return candidates
    # (num_groups, R). Being the n-th member of a group in random order is a random rank in it.
    member = groups == torch.arange(num_groups, device=groups.device)[:, None]
    in_quota = (member & (member.cumsum(dim=1) <= quota)).any(dim=0)
    # Another random order: in the first one, members of large groups exceed their quota earlier.
    priority = torch.rand(in_quota.shape, device=in_quota.device) - in_quota.float()
    if last_resort is not None:
        priority += last_resort
    return candidates[priority.topk(num, largest=False, sorted=False).indices]


class BalancedSampler:
    """
    Choose the proposals of one image that the second stage is trained on.

    * **Negatives, "iou_balanced"**: the IoU range of the negatives is split into K bins of equal
      width and ``n / K`` of the ``n`` negatives are drawn from each (paper Equation 2). Drawn at
      random, 70% of them would overlap by less than 0.05, which few hard negatives do (Figure 3).
      What a bin lacks is filled at random from the other negatives.
    * **Positives, "instance_balanced"**: the same number is drawn for every ground-truth instance,
      so that objects with many proposals do not dominate. It is ``round(n / instances) + 1``, as
      in the reference; the result is then topped up or trimmed at random to ``n``.

    Two modes:

    * ``"paper"``: the bins span ``[0, negative_iou_thresh)``, the negatives' range. This is the
      default: it is what the paper describes, and all K bins do what they are there for.
    * ``"reference"``: what mmdetection does, to reproduce models trained with it. (1) The bins span
      ``[0, max IoU over all proposals)``, positives and added ground truth included, so that the
      last bins hold no negatives and their share is drawn at random. (2) Negatives with zero IoU
      are in no bin and drawn only once all others are. (3) Topping up draws from all positives, and
      those that had been drawn already are not replaced, so that there are fewer than ``n``.

    The sampler has no state: equal random states give equal draws. (mmdetection's negative sampler
    treats zero IoU differently for the first image it sees; that is not reproduced.)
    """

    def __init__(
        self,
        *,
        negatives: str = "iou_balanced",
        positives: str = "instance_balanced",
        mode: str = "paper",
        num_bins: int = 3,
        negative_iou_thresh: float = 0.5,
    ):
        """
        Args:
            negatives: "iou_balanced" or "random".
            positives: "instance_balanced" or "random".
            mode: "paper" or "reference", see above.
            num_bins: K, at least 1. The paper uses 3 and finds little sensitivity to it.
            negative_iou_thresh: proposals with an IoU below are negatives, in (0, 1]. The upper end
                of the bins in mode "paper".

        Raises:
            ValueError: if an argument is out of range.
        """
        for name, value, allowed in (
            ("NEGATIVES", negatives, NEGATIVE_SAMPLERS),
            ("POSITIVES", positives, POSITIVE_SAMPLERS),
            ("MODE", mode, MODES),
        ):
            if value not in allowed:
                raise ValueError(f"MODEL.LIBRA.SAMPLER.{name} is {value!r}: use one of {allowed}")
        if num_bins < 1:
            raise ValueError(f"MODEL.LIBRA.SAMPLER.NUM_BINS is {num_bins}: use 1 or more")
        if not 0 < negative_iou_thresh <= 1:
            raise ValueError(
                f"the IoU threshold of negatives is {negative_iou_thresh}: use a value in (0, 1]"
            )
        self.negatives = negatives
        self.positives = positives
        self.mode = mode
        self.num_bins = num_bins
        self.negative_iou_thresh = negative_iou_thresh

    @torch.no_grad()
    def __call__(
        self,
        labels: torch.Tensor,
        max_iou: torch.Tensor,
        matched_idxs: torch.Tensor,
        num_instances: int,
        num_samples: int,
        positive_fraction: float,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            labels: (R,) integer, each one of 1, 0 and -1.
            max_iou: (R,) floating point, in [0, 1].
            matched_idxs: (R,) int64, the ground truth that each proposal is matched with, in
                [0, M). Its value matters for positives only.
            num_instances: M.
            num_samples: number of proposals to draw.
            positive_fraction: at most ``int(num_samples * positive_fraction)`` of the drawn ones
                are positives.

        Returns:
            indices in [0, R) of the positives and of the negatives drawn, without repetition, in
            no particular order. There are ``num_samples`` of them unless there are too few
            negatives. The host waits for the device once.
        """
        if labels.numel() == 0:
            return matched_idxs, matched_idxs
        max_positives = int(num_samples * positive_fraction)
        is_positive, is_negative = labels == 1, labels == 0
        counts = [is_positive.sum(), is_negative.sum()]
        quota, num_groups = 0, 0
        if self.positives == "instance_balanced":
            num_groups = num_instances
            per_instance = matched_idxs.new_zeros(max(num_instances, 1))
            per_instance.scatter_add_(0, matched_idxs, is_positive.long())
            covered = (per_instance > 0).sum().clamp(min=1)
            quota = torch.round(max_positives / covered).long() + 1
            counts.append(per_instance.clamp(max=quota).sum())
        # The only wait for the device.
        num_positive, num_negative, *num_in_quota = torch.stack(counts).tolist()

        num_positives = min(num_positive, max_positives)
        if self.mode == "reference" and num_in_quota:
            num_positives = self._num_after_top_up(num_positives, num_positive, *num_in_quota)
        positive = _shuffled_indices(is_positive, num_positive)
        positive = _draw(positive, matched_idxs[positive], num_groups, quota, num_positives)

        negative = _shuffled_indices(is_negative, num_negative)
        return positive, self._draw_negatives(negative, max_iou, num_samples - num_positives)

    def _draw_negatives(
        self, negative: torch.Tensor, max_iou: torch.Tensor, num: int
    ) -> torch.Tensor:
        """Draw ``num`` of ``negative``, shuffled indices into ``max_iou``; see :meth:`__call__`."""
        if self.negatives == "random":
            return negative[:num]
        quota, iou = num // self.num_bins, max_iou[negative]
        if self.mode == "paper":
            bins = iou_bins(iou, self.num_bins, self.negative_iou_thresh)
            return _draw(negative, bins, self.num_bins, quota, num)
        without_overlap = iou == 0
        # Without ground truth the maximum is 0, too, by which nothing must be divided.
        bins = iou_bins(iou, self.num_bins, max_iou.max().clamp(min=1e-6))
        bins = bins.masked_fill(without_overlap, self.num_bins)
        return _draw(negative, bins, self.num_bins, quota, num, last_resort=without_overlap)

    @staticmethod
    def _num_after_top_up(num_wanted: int, num_positive: int, num_in_quota: int) -> int:
        """
        Number of positives in mode "reference" when ``num_wanted`` of ``num_positive`` are to be
        drawn and the instances' quotas yield ``num_in_quota`` of them.
        """
        missing = num_wanted - num_in_quota
        if missing <= 0 or num_wanted == num_positive:
            return num_wanted
        # What is missing is drawn from all positives. Let those within the quotas come first.
        topped_up = torch.randperm(num_positive)[:missing]
        return num_in_quota + int((topped_up >= num_in_quota).sum())
