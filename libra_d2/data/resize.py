# SPDX-License-Identifier: Apache-2.0
"""
Resizing of images with OpenCV, as mmdetection does it, next to Detectron2's, which uses Pillow.

Both are bilinear. Pillow averages over all pixels that a pixel of a smaller image covers; OpenCV
reads four of them, however much the image shrinks. Weights that were trained with one lose accuracy
with the other: where images grow they differ by a gray level at most, where they shrink by many.
"""

from typing import List, Optional, Tuple, Union

import numpy as np

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
        Args:
            img: (h, w) or (h, w, C), uint8 or floating point.
            interp: a method of Pillow's, which then does it. Detectron2 asks for one (the nearest
                pixel) for segmentation maps.

        Returns:
            (new_h, new_w) or (new_h, new_w, C), of the same type.
        """
        if interp is not None:
            return super().apply_image(img, interp)
        import cv2

        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])  # it drops a single channel


class OpenCVResizeShortestEdge(T.ResizeShortestEdge):
    """
    :class:`ResizeShortestEdge` with :class:`OpenCVResizeTransform`, and with the sizes of
    mmdetection's ``Resize(keep_ratio=True)``. Both multiply each side by the smaller one of
    ``short_edge_length / shorter side`` and ``max_size / longer side``; Detectron2 rounds on the
    way, so that now and then a side differs by a pixel.
    """

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """See :meth:`ResizeShortestEdge.get_transform`, which names its own class throughout."""
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
        """
        Args:
            oldh, oldw: height and width of the image.
            short_edge_length: of the shorter side, unless the longer one would exceed ``max_size``.
            max_size: of the longer side, at most.

        Returns:
            the new height and width.
        """
        scale = min(max_size / max(oldh, oldw), short_edge_length / min(oldh, oldw))
        return int(oldh * scale + 0.5), int(oldw * scale + 0.5)


def with_interpolation(augmentations: Augmentations, interpolation: str) -> Augmentations:
    """
    Args:
        augmentations: Detectron2's.
        interpolation: "pillow" or "opencv".

    Returns:
        the same, in which ``interpolation`` does the work of :class:`ResizeShortestEdge`.

    Raises:
        ArgumentError: a ValueError, if ``interpolation`` is neither.
    """
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if interpolation == "pillow":
        return augmentations
    return [
        OpenCVResizeShortestEdge(
            x.short_edge_length, x.max_size, "range" if x.is_range else "choice"
        )
        if type(x) is T.ResizeShortestEdge
        else x
        for x in augmentations
    ]


def build_augmentation(cfg: CfgNode, is_train: bool) -> Augmentations:
    """
    Detectron2's function of this name, with the interpolation that ``cfg`` chooses.

    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`.
        is_train: whether for training.
    """
    augmentations = build_detectron2_augmentation(cfg, is_train)
    return with_interpolation(augmentations, cfg.MODEL.LIBRA.INPUT.INTERPOLATION)
