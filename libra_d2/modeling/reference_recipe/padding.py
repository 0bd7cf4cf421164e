# SPDX-License-Identifier: Apache-2.0
"""Anchors in what the smaller images of a batch are padded with."""

from typing import Callable, List, Tuple

import torch

from detectron2.structures import Boxes, Instances

__all__ = ["label_without_padding"]

_SIZE_DIVISOR = 32  # mmdetection's pad_size_divisor: an image's own padding counts as image


def label_without_padding(
    label_anchors: Callable, anchors: List[Boxes], gt_instances: List[Instances]
) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """
    Label the anchors of each image as if it were the only one in its batch: anchors centered beyond
    its size, rounded up to a multiple of 32 pixels, are neither matched nor trained on, as in
    mmdetection. In Detectron2 they are background.

    Args:
        label_anchors: the method of the parent class: takes ``anchors`` and ``gt_instances``,
            returns for each image (R,) labels and (R, 4) matched boxes.
        anchors: for each level of the pyramid; R in all.
        gt_instances: for each image.

    Returns:
        what ``label_anchors`` returns, with -1 as label of the anchors in padding.
    """
    sizes = [
        [-(-side // _SIZE_DIVISOR) * _SIZE_DIVISOR for side in x.image_size] for x in gt_instances
    ]
    largest = [max(sides) for sides in zip(*sizes)]
    if all(size == largest for size in sizes):
        return label_anchors(anchors, gt_instances)
    all_anchors = Boxes.cat(anchors)
    centers = all_anchors.get_centers()
    labels, boxes = [], []
    for (height, width), instances in zip(sizes, gt_instances):
        if [height, width] == largest:
            image_labels, image_boxes = label_anchors(anchors, [instances])
            labels += image_labels
            boxes += image_boxes
            continue
        # Half a pixel for rounding; centers are whole numbers.
        inside = (centers < centers.new_tensor([width, height]) - 0.5).all(dim=1)
        (inside_labels,), (inside_boxes,) = label_anchors([all_anchors[inside]], [instances])
        labels.append(
            inside_labels.new_full(inside.shape, -1).masked_scatter_(inside, inside_labels)
        )
        boxes.append(
            torch.zeros_like(all_anchors.tensor).masked_scatter_(inside[:, None], inside_boxes)
        )
    return labels, boxes
