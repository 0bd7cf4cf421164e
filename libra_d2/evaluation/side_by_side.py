# SPDX-License-Identifier: Apache-2.0
"""Pictures of the detections of two models in the same image, with their differences marked."""

from typing import Sequence

import numpy as np
import torch

from detectron2.structures import Instances, pairwise_iou

from .pictures import picture_scale

__all__ = ["draw_side_by_side", "match_detections"]

SAME, OTHER = (0.15, 0.35, 0.75), (1.0, 0.45, 0.0)  # RGB


def match_detections(ours: Instances, theirs: Instances, iou_thresh: float = 0.5) -> torch.Tensor:
    """
    Which of our detections in an image, (len(ours),) bool, are also theirs: boxes of the same class
    with at least ``iou_thresh``, matched one to one, greedily in the order of ours.
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


def _draw(image: np.ndarray, metadata, instances: Instances, same: torch.Tensor) -> np.ndarray:
    from .panel import Panel

    names = metadata.get("thing_classes", None)
    panel = Panel(image, metadata, scale=picture_scale(image, 640))
    classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    labels = [
        "" if is_same else f"{names[c] if names else c} {100 * score:.0f}%"
        for c, score, is_same in zip(classes, scores, same)
    ]
    colors = [SAME if is_same else OTHER for is_same in same]
    panel.overlay_instances(boxes=instances.pred_boxes, labels=labels, assigned_colors=colors)
    return panel.output.get_image()


def draw_side_by_side(image: np.ndarray, metadata, detections: Sequence[Instances]) -> np.ndarray:
    """
    Draw the detections of a plain and a Libra model, on the CPU, next to each other: blue if both
    have found them, orange and labeled otherwise. The captions count them. Images are (H, W, 3)
    uint8 RGB.
    """
    from .panel import join_panels  # it imports OpenCV

    left, right = detections
    panels, captions = [], []
    for title, ours, theirs in (("plain", left, right), ("Libra", right, left)):
        same = match_detections(ours, theirs)
        panels.append(_draw(image, metadata, ours, same))
        captions.append(f"{title}: {len(same)} objects, {int((~same).sum())} only here")
    return join_panels(panels, captions)
