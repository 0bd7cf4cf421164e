# SPDX-License-Identifier: Apache-2.0
"""What is in the padding of the smaller images of a batch: anchors and masks."""

from typing import Callable, List, Tuple

import torch
from torch.nn import functional as F

from detectron2.structures import BitMasks, Boxes, Instances

__all__ = ["label_without_padding", "pad_masks"]

_SIZE_DIVISOR = 32  # mmdetection's pad_size_divisor: an image's own padding counts as image


def _padded(image: Instances) -> List[int]:
    """Height and width of an image with its own padding."""
    return [-(-side // _SIZE_DIVISOR) * _SIZE_DIVISOR for side in image.image_size]


def pad_masks(gt_instances: List[Instances]) -> List[Instances]:
    """
    Pad bitmap masks as their images are padded in the batch, as mmdetection does before it crops
    the targets of the mask head. At the lower and right border of an image, where crops are
    interpolated, those of padded masks fade to the background.

    Args:
        gt_instances: for each image, with :class:`BitMasks` of its size as ``gt_masks``. Without
            masks, or with polygons, they are returned as they are.

    Returns:
        instances with ``gt_masks`` of the size of the batch, if that is larger than the image.
    """
    height, width = (max(sides) for sides in zip(*map(_padded, gt_instances)))
    padded = []
    for instances in gt_instances:
        if instances.has("gt_masks") and isinstance(instances.gt_masks, BitMasks):
            h, w = instances.image_size
            fields = instances.get_fields()
            masks = F.pad(instances.gt_masks.tensor, (0, width - w, 0, height - h))
            instances = Instances((h, w), **{**fields, "gt_masks": BitMasks(masks)})
        padded.append(instances)
    return padded


def label_without_padding(
    label_anchors: Callable, anchors: List[Boxes], gt_instances: List[Instances]
) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """
    Label the anchors of each image as if it were alone in its batch: anchors centered beyond its
    size, rounded up to a multiple of 32 pixels, are ignored as in mmdetection. In Detectron2 they
    are background.

    Args:
        label_anchors: takes ``anchors`` and ``gt_instances``; returns (R,) labels and (R, 4)
            matched boxes of each image.
        anchors: for each level of the pyramid; R in all.
        gt_instances: for each image.

    Returns:
        as ``label_anchors``, with labels of -1 in padding.
    """
    sizes = [_padded(x) for x in gt_instances]
    largest = [max(sides) for sides in zip(*sizes)]
    if all(size == largest for size in sizes):
        return label_anchors(anchors, gt_instances)
    all_anchors = Boxes.cat(anchors)
    centers = all_anchors.get_centers()
    labels, boxes = [], []
    for (height, width), instances in zip(sizes, gt_instances):
        # Half a pixel for rounding; centers are whole numbers.
        inside = (centers < centers.new_tensor([width, height]) - 0.5).all(dim=1)
        inside |= [height, width] == largest
        (inside_labels,), (inside_boxes,) = label_anchors([all_anchors[inside]], [instances])
        ignored = inside_labels.new_full(inside.shape, -1)
        labels.append(ignored.masked_scatter_(inside, inside_labels))
        no_boxes = torch.zeros_like(all_anchors.tensor)
        boxes.append(no_boxes.masked_scatter_(inside[:, None], inside_boxes))
    return labels, boxes
