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

from typing import List, Optional, Tuple, Union

import numpy as np
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


def _indices(mask: torch.Tensor, num: int) -> torch.Tensor:
    """(num,) int64: where ``mask``, (R,) bool, is True, ``num`` times."""
    # Not to wait for a GPU is worth more than the CPU's faster way.
    static = mask.is_cuda
    return (torch.nonzero_static(mask, size=num) if static else mask.nonzero())[:, 0]


def _shuffle(x: torch.Tensor) -> torch.Tensor:
    """(R,) in random order."""
    return x.index_select(0, torch.randperm(len(x), device=x.device))


def _draw(
    candidates: torch.Tensor,
    groups: torch.Tensor,
    num_groups: int,
    quota: int,
    num: int,
    no_quota: Optional[torch.Tensor] = None,
    last_resort: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """
    Draw ``num`` of ``candidates``: first, at random, up to ``quota`` of each group, then at random
    from the rest. More than ``num`` within the quotas are trimmed at random.

    Args:
        candidates: (R,) int64, what is drawn, in random order; more than ``num``.
        groups: (R,) int64, in [0, num_groups).
        num_groups: number of groups.
        quota: number of draws from each group.
        num: number of draws in all.
        no_quota: (R,) bool, candidates whose group has none.
        last_resort: (R,) bool, candidates drawn only after all others.

    Returns:
        (num,) int64, without repetition.
    """
    # (num_groups, R). Being the n-th member of a group in random order is a random rank in it.
    member = groups == torch.arange(num_groups, device=groups.device)[:, None]
    beyond_quota = member.cumsum(dim=1).gather(0, groups[None])[0] > quota
    # Another random order: in the first one, members of large groups exceed their quota earlier.
    priority = torch.rand(groups.shape, device=groups.device)
    if no_quota is not None:
        beyond_quota |= no_quota
    if last_resort is not None:
        priority += last_resort
    priority += beyond_quota
    chosen = priority.topk(num, largest=False, sorted=False).indices
    return candidates.index_select(0, chosen)


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
        counts = matched_idxs.new_zeros(num_instances + 1)  # positives of each, and none at the end
        counts.index_add_(0, matched_idxs, is_positive.to(counts.dtype))
        # The only wait for the device.
        *per_instance, _, num_negative = torch.cat(
            [counts, torch.count_nonzero(is_negative)[None]]
        ).tolist()
        positive = _indices(is_positive, sum(per_instance))
        positive = self._draw_positives(positive, matched_idxs, per_instance, max_positives)
        negative = _indices(is_negative, num_negative)
        return positive, self._draw_negatives(negative, max_iou, num_samples - len(positive))

    def _draw_positives(
        self, positive: torch.Tensor, matched_idxs: torch.Tensor, per_instance: List[int], num: int
    ) -> torch.Tensor:
        """
        Draw ``num`` of ``positive``, indices into ``matched_idxs``; see :meth:`__call__`.
        ``per_instance`` is how many of them each instance has.
        """
        if len(positive) <= num:
            return positive
        positive = _shuffle(positive)
        if self.positives == "random":
            return positive[:num]
        sizes = np.asarray(per_instance)
        quota = round(num / np.count_nonzero(sizes)) + 1
        if self.mode == "reference":
            in_quota = int(np.minimum(sizes, quota).sum())
            if in_quota < num:
                # What is missing is drawn from all positives; those that have been drawn already
                # are not replaced. Let the ones within the quotas come first.
                topped_up = torch.randperm(len(positive))[: num - in_quota]
                num = in_quota + int((topped_up >= in_quota).sum())
        groups = matched_idxs.index_select(0, positive)
        return _draw(positive, groups, len(sizes), quota, num)

    def _draw_negatives(
        self, negative: torch.Tensor, max_iou: torch.Tensor, num: int
    ) -> torch.Tensor:
        """Draw ``num`` of ``negative``, indices into ``max_iou``; see :meth:`__call__`."""
        if len(negative) <= num:
            return negative
        negative = _shuffle(negative)
        if self.negatives == "random":
            return negative[:num]
        iou, num_bins = max_iou.index_select(0, negative), self.num_bins
        quota = num // num_bins
        if self.mode == "paper":
            # All of them are in a bin, if not for rounding.
            bins = (iou * (num_bins / self.negative_iou_thresh)).long().clamp_(max=num_bins - 1)
            return _draw(negative, bins, num_bins, quota, num)
        without_overlap = iou == 0
        # Without ground truth the maximum is 0, too, by which nothing must be divided.
        bins = iou_bins(iou, num_bins, max_iou.max().clamp(min=1e-6))
        bins.masked_fill_(without_overlap, num_bins)
        return _draw(negative, bins, num_bins + 1, quota, num, bins == num_bins, without_overlap)
