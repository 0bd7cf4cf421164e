# SPDX-License-Identifier: Apache-2.0
"""Low-quality matches of anchors as mmdetection makes them."""

from typing import List, Tuple

import torch

from detectron2.modeling.matcher import Matcher

from ...errors import ArgumentError

__all__ = ["LowQualityMatcher", "build_anchor_matcher"]


class LowQualityMatcher(Matcher):
    """
    Detectron2's matcher with mmdetection's rule for low-quality matches: the anchor with the
    highest IoU with a ground-truth box is matched with that box (the last one if there are several)
    if their IoU is at least ``min_iou``. In Detectron2 it is matched with the box that it overlaps
    most, whatever the IoU.
    """

    def __init__(self, thresholds: List[float], labels: List[int], min_iou: float):
        """
        Args:
            thresholds, labels: see :class:`Matcher`.
            min_iou: in [0, 1].

        Raises:
            ArgumentError: if ``min_iou`` is out of range.
        """
        if not 0 <= min_iou <= 1:
            raise ArgumentError("min_iou", min_iou, "use a value in [0, 1]")
        super().__init__(thresholds, labels, allow_low_quality_matches=False)
        self.min_iou = min_iou

    def __call__(self, match_quality_matrix: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            match_quality_matrix: (M, R) IoUs of ground-truth boxes and anchors.

        Returns:
            (R,) int64 indices of the matched boxes in [0, M), and (R,) int8 labels; see
            :meth:`Matcher.__call__`.
        """
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        highest = match_quality_matrix.amax(dim=1, keepdim=True)
        best = (match_quality_matrix == highest) & (highest >= self.min_iou)
        position = torch.arange(1, len(best) + 1, dtype=torch.int32, device=best.device)
        last = (best * position[:, None]).amax(dim=0).long()  # 0 for none
        return torch.where(last > 0, last - 1, matches), labels.masked_fill(last > 0, 1)


def build_anchor_matcher(matcher: Matcher, low_quality_iou: float) -> Matcher:
    """
    Args:
        matcher: Detectron2's, with low-quality matches.
        low_quality_iou: ``min_iou`` of a :class:`LowQualityMatcher`. Negative for ``matcher``.

    Returns:
        a matcher with the thresholds and labels of ``matcher``.
    """
    if low_quality_iou < 0:
        return matcher
    # Its thresholds have an infinite one at each end.
    return LowQualityMatcher(matcher.thresholds[1:-1], matcher.labels, low_quality_iou)
