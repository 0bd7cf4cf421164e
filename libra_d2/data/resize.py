# SPDX-License-Identifier: Apache-2.0
"""
Resizing of images with OpenCV, as mmdetection does it, next to Detectron2's, which uses Pillow.

Both are bilinear. Pillow averages over all pixels that a pixel of a smaller image covers; OpenCV
reads four of them, however much the image shrinks. Weights that were trained with one lose accuracy
with the other: where images grow they differ by a gray level at most, where they shrink by many.
"""

import importlib.util
from typing import List, Optional, Tuple, Union

import numpy as np
from omegaconf import OmegaConf

from detectron2.config import CfgNode, instantiate
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation as build_detectron2_augmentation

from ..errors import InputError
from ..lazy import LazyView

__all__ = [
    "INTERPOLATIONS",
    "OpenCVResizeShortestEdge",
    "OpenCVResizeTransform",
    "build_augmentation",
    "check_interpolation",
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


def check_interpolation(interpolation: str) -> None:
    """
    Raises:
        InputError: if ``MODEL.LIBRA.INPUT.INTERPOLATION`` has no such value, or OpenCV is missing.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(
            f"MODEL.LIBRA.INPUT.INTERPOLATION is {interpolation!r}: use one of {INTERPOLATIONS}"
        )
    if interpolation == "opencv" and importlib.util.find_spec("cv2") is None:
        raise InputError(
            "MODEL.LIBRA.INPUT.INTERPOLATION is 'opencv', as mmdetection resizes: "
            "`pip install opencv-python-headless`"
        )


def with_interpolation(augmentations: Augmentations, interpolation: str) -> Augmentations:
    """
    Args:
        augmentations: Detectron2's.
        interpolation: "pillow" or "opencv".

    Returns:
        the same, in which ``interpolation`` does the work of :class:`ResizeShortestEdge`.

    Raises:
        InputError: see :func:`check_interpolation`.
    """
    check_interpolation(interpolation)
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
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`, or a view of a LazyConfig.
        is_train: whether for training.

    Raises:
        InputError: if a LazyConfig has none; see also :func:`check_interpolation`.
    """
    if isinstance(cfg, LazyView):
        place = f"dataloader.{'train' if is_train else 'test'}.mapper.augmentations"
        augmentations = OmegaConf.select(cfg.current(), place)
        if augmentations is None:
            raise InputError(f"{place}: the LazyConfig lacks it")
        return list(instantiate(augmentations))
    augmentations = build_detectron2_augmentation(cfg, is_train)
    return with_interpolation(augmentations, cfg.MODEL.LIBRA.INPUT.INTERPOLATION)
