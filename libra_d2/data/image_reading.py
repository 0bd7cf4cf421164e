# SPDX-License-Identifier: Apache-2.0
import numpy as np
from PIL import Image, ImageOps

from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.detection_utils import read_image as read_eight_bits
from detectron2.utils.file_io import PathManager

from ..errors import InputError, one_line

__all__ = ["read_image"]


def read_image(file_name: str, format: str = "BGR") -> np.ndarray:
    """
    Read an image as :func:`detectron2.data.detection_utils.read_image` does, with the orientation
    that a camera wrote. Gray images of 16 bits are scaled to 8, where Detectron2 would clip them:
    65535 becomes 255.

    Args:
        file_name: of an image file.
        format: "BGR", "RGB" or another that Detectron2 knows.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: if there is no such image, it is broken or so large that it may be an attack, or
            its pixels are floating point numbers, whose range is not known.
    """
    try:
        return _read_image(file_name, format)
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:  # Pillow raises all of them
        raise InputError(f"{file_name}: the image cannot be used: {one_line(e)}") from e


def _read_image(file_name: str, format: str) -> np.ndarray:
    with PathManager.open(file_name, "rb") as f:
        image = Image.open(f)
        if image.mode == "F":
            raise InputError(f"{file_name}: floating point pixels: save it with 8 bits per channel")
        if not image.mode.startswith("I"):
            return read_eight_bits(file_name, format)
        gray = np.asarray(ImageOps.exif_transpose(image))
        scaled = (gray.astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return convert_PIL_to_numpy(Image.fromarray(scaled), format)
