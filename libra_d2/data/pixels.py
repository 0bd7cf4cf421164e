# SPDX-License-Identifier: Apache-2.0
"""Copies of images in another order: by OpenCV, if it is installed, which is some times as fast."""

from functools import cache
from types import ModuleType
from typing import Optional

import numpy as np

__all__ = ["swap_channels", "to_planes"]


@cache
def _opencv() -> Optional[ModuleType]:
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def swap_channels(image: np.ndarray) -> np.ndarray:
    """From RGB, (H, W, 3) uint8, to BGR, or back."""
    cv2 = _opencv()
    return image[:, :, ::-1] if cv2 is None else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def to_planes(image: np.ndarray) -> np.ndarray:
    """From (H, W, C) to (C, H, W), contiguous in memory."""
    cv2 = _opencv()
    if cv2 is None or image.shape[2] != 3 or image.dtype != np.uint8:
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    # A mirrored image is a view, which OpenCV would copy slowly.
    is_mirrored = image.strides[1] < 0
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image[:, ::-1] if is_mirrored else image, list(planes))
    for plane in planes if is_mirrored else ():
        cv2.flip(plane, 1, plane)
    return planes
