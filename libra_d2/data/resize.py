# SPDX-License-Identifier: Apache-2.0
"""
Resizing with OpenCV, as in mmdetection, besides Detectron2's resizing with Pillow.

Both are bilinear. When an image shrinks, Pillow averages over all pixels that a new one covers,
while OpenCV interpolates between four of them. Weights that were trained with one lose accuracy
with the other: enlarged images differ by one gray level at most, reduced ones by many.
"""

from typing import List, Optional, Tuple, Union

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation as build_detectron2_augmentation

from ..errors import check_choice

__all__ = [
    "INTERPOLATIONS",
    "OpenCVResizeShortestEdge",
    "OpenCVResizeTransform",
    "build_augmentation",
    "with_interpolation",
]

INTERPOLATIONS = ("pillow", "opencv")

Augmentations = List[Union[T.Augmentation, T.Transform]]


class OpenCVResizeTransform(T.ResizeTransform):
    """:class:`ResizeTransform` whose bilinear interpolation is OpenCV's."""

    def apply_image(self, img: np.ndarray, interp: Optional[int] = None) -> np.ndarray:
        """
        Resize (h, w) or (h, w, C), uint8 or floating point; with a method of Pillow's if ``interp``
        is one, as Detectron2 does with segmentation maps (nearest neighbor).
        """
        if interp is not None:
            return super().apply_image(img, interp)
        import cv2

        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])  # cv2 drops a single channel


class OpenCVResizeShortestEdge(T.ResizeShortestEdge):
    """
    :class:`ResizeShortestEdge` with :class:`OpenCVResizeTransform`, and with the output size of
    mmdetection's ``Resize(keep_ratio=True)``. Both scale by the smaller one of ``short_edge_length
    / shorter side`` and ``max_size / longer side``; Detectron2 also rounds intermediate results, so
    that a side may differ by a pixel.
    """

    # As the parent's: get_output_shape can be scripted if this is neither compiled nor annotated.
    @torch.jit.unused
    def get_transform(self, image):
        """See :meth:`ResizeShortestEdge.get_transform`, whose transform cannot be replaced."""
        if self.is_range:
            length = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            length = np.random.choice(self.short_edge_length)
        if length == 0:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        return OpenCVResizeTransform(
            height, width, *self.get_output_shape(height, width, int(length), self.max_size)
        )

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> Tuple[int, int]:
        """The new height and width; see :meth:`ResizeShortestEdge.get_output_shape`."""
        scale = min(max_size / max(oldh, oldw), short_edge_length / min(oldh, oldw))
        return int(oldh * scale + 0.5), int(oldw * scale + 0.5)


def with_interpolation(augmentations: Augmentations, interpolation: str) -> Augmentations:
    """
    The same augmentations, in which each :class:`ResizeShortestEdge` uses ``interpolation``.

    Raises:
        ArgumentError: if it is none of :data:`INTERPOLATIONS`.
    """
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if interpolation == "pillow":
        return augmentations
    return [_with_opencv(x) if type(x) is T.ResizeShortestEdge else x for x in augmentations]


def _with_opencv(resize: T.ResizeShortestEdge) -> OpenCVResizeShortestEdge:
    sampling = "range" if resize.is_range else "choice"
    return OpenCVResizeShortestEdge(resize.short_edge_length, resize.max_size, sampling)


def build_augmentation(cfg: CfgNode, is_train: bool) -> Augmentations:
    """Detectron2's function of this name, with ``MODEL.LIBRA.INPUT.INTERPOLATION``."""
    augmentations = build_detectron2_augmentation(cfg, is_train)
    return with_interpolation(augmentations, cfg.MODEL.LIBRA.INPUT.INTERPOLATION)
