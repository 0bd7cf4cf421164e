# SPDX-License-Identifier: Apache-2.0
"""Pictures of what two detectors find in the same image, with their differences marked."""

from typing import List, Sequence, Tuple

import numpy as np
import torch

from detectron2.structures import Instances, pairwise_iou

from .pictures import picture_scale

__all__ = ["draw_side_by_side", "match_detections"]

SAME, OTHER = (0.15, 0.35, 0.75), (1.0, 0.45, 0.0)  # RGB


def match_detections(ours: Instances, theirs: Instances, iou_thresh: float = 0.5) -> torch.Tensor:
    """
    Args:
        ours, theirs: detections in one image, best score first.
        iou_thresh: from which on boxes of the same class are the same detection.

    Returns:
        (number of ours,) bool: whether a detection is among theirs. Each of theirs is the partner
        of at most one, of the best one first.
    """
    iou = pairwise_iou(ours.pred_boxes, theirs.pred_boxes)
    iou[ours.pred_classes[:, None] != theirs.pred_classes[None]] = 0
    matched = torch.zeros(len(ours), dtype=torch.bool)
    for i in range(len(ours)):
        best, j = iou[i].max(dim=0) if len(theirs) else (0.0, None)
        if best >= iou_thresh:
            matched[i] = True
            iou[:, j] = 0
    return matched


def _draw(image: np.ndarray, metadata, instances: Instances, same: torch.Tensor, title: str):
    from detectron2.utils.visualizer import Visualizer  # it imports OpenCV

    names = metadata.get("thing_classes", None)
    visualizer = Visualizer(image, metadata, scale=picture_scale(image, 640))
    labels: List[str] = [
        f"{names[c] if names else c} {100 * score:.0f}%" if not is_same else ""
        for c, score, is_same in zip(
            instances.pred_classes.tolist(), instances.scores.tolist(), same.tolist()
        )
    ]
    colors = [SAME if is_same else OTHER for is_same in same.tolist()]
    visualizer.overlay_instances(
        boxes=instances.pred_boxes, labels=labels, assigned_colors=colors, alpha=0.9
    )
    visualizer.draw_text(
        f"{title}: {len(same)} objects, {int((~same).sum())} only here",
        (image.shape[1] / 2, 2),
        color="w",
    )
    return visualizer.output.get_image()


def draw_side_by_side(
    image: np.ndarray,
    metadata,
    detections: Sequence[Instances],
    titles: Tuple[str, str] = ("plain", "Libra"),
) -> np.ndarray:
    """
    Draw both detectors' boxes next to each other: blue where both found the same, orange and with
    class and score where only one did.

    Args:
        image: (H, W, 3) uint8 RGB.
        metadata: for the names of the classes.
        detections: of the two, on the CPU.
        titles: their names.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    left, right = detections
    halves = [
        _draw(image, metadata, ours, match_detections(ours, theirs), title)
        for ours, theirs, title in ((left, right, titles[0]), (right, left, titles[1]))
    ]
    return np.hstack(halves)
