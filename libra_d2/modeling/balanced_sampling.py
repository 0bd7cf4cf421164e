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

from typing import Tuple, Union

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
    return (max_iou * (num_bins / upper)).clamp_(max=num_bins).long()


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


def _smallest(values: np.ndarray, num: int) -> np.ndarray:
    """Indices of the ``num`` smallest of ``values``, in no particular order."""
    if num >= len(values):
        return np.arange(len(values))
    return np.argpartition(values, num)[:num]


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
        # Groups: the instances, the bins, negatives in no bin, those drawn last, and what is not
        # drawn.
        first_bin, in_no_bin = num_instances, num_instances + self.num_bins
        last_resort, ignored = in_no_bin + 1, in_no_bin + 2
        upper = self.negative_iou_thresh
        if self.mode == "reference":
            upper = max_iou.max().clamp(min=1e-6)  # 0 without ground truth
        groups = iou_bins(max_iou, self.num_bins, upper).add_(first_bin)
        if self.mode == "reference":
            groups.masked_fill_(max_iou == 0, last_resort)
        groups = torch.where(labels == 1, matched_idxs, groups).masked_fill_(labels < 0, ignored)
        dtype = torch.uint8 if ignored < 256 else torch.int16
        # The only wait for the device. From here on there is less to do than a GPU takes to start.
        groups = groups.to(dtype).cpu().numpy()
        # Sorting a random order by group gives each proposal a random rank in its group.
        order = torch.randperm(len(groups)).numpy()
        order = order[np.argsort(groups[order], kind="stable")]
        groups = groups[order]
        counts = np.bincount(groups, minlength=ignored + 1)
        starts = counts.cumsum() - counts
        num_positive, end = starts[first_bin], starts[ignored]
        max_positives = min(int(num_samples * positive_fraction), num_positive)
        quotas = np.zeros(ignored + 1, dtype=np.int64)
        num_positives = self._set_instance_quotas(quotas, counts[:first_bin], max_positives)
        num_negatives = num_samples - num_positives
        if self.negatives == "iou_balanced":
            quotas[first_bin:in_no_bin] = num_negatives // self.num_bins

        # Members of a group within its quota come first, at random: the order above would prefer
        # those of small groups.
        priority = torch.rand(len(groups)).numpy()
        priority += np.arange(len(groups)) - starts[groups] >= quotas[groups]
        if self.negatives == "iou_balanced":
            priority[starts[last_resort] : end] += 1
        chosen = np.concatenate(
            [
                _smallest(priority[:num_positive], num_positives),
                _smallest(priority[num_positive:end], num_negatives) + num_positive,
            ]
        )
        chosen = torch.from_numpy(order[chosen]).to(labels.device, non_blocking=True)
        return chosen[:num_positives], chosen[num_positives:]

    def _set_instance_quotas(self, quotas: np.ndarray, counts: np.ndarray, num: int) -> int:
        """
        Args:
            quotas: set to how many positives to draw of each instance, first of all.
            counts: how many positives each instance has.
            num: how many to draw, at most their sum.

        Returns:
            how many are really drawn.
        """
        if self.positives == "random" or num == counts.sum():
            return int(num)
        quota = round(num / np.count_nonzero(counts)) + 1
        quotas[: len(counts)] = quota
        in_quotas = int(np.minimum(counts, quota).sum())
        if self.mode == "paper" or in_quotas >= num:
            return int(num)
        # What is missing is drawn from all positives, and those that have been drawn already are
        # not replaced. Let the ones within the quotas come first.
        topped_up = torch.randperm(int(counts.sum()))[: num - in_quotas]
        return in_quotas + int((topped_up >= in_quotas).sum())
