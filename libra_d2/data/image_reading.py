# SPDX-License-Identifier: Apache-2.0
import io
import logging
import os

import numpy as np
from PIL import Image, ImageOps

from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager

from ..errors import InputError, one_line

__all__ = ["is_whole", "read_image"]

logger = logging.getLogger(__name__)

# What a file ends with, and how far from its end it may be: cameras and editors append to it.
_ENDS = {"JPEG": (b"\xff\xd9", 65536), "PNG": (b"IEND", 65536)}


def is_whole(path: str, format: str) -> bool:
    """
    Args:
        path: of an image file.
        format: Pillow's name of its format.

    Returns:
        whether its end is there, as far as that can be seen without reading all of it: False for
        formats other than JPEG and PNG.
    """
    if format not in _ENDS:
        return False
    marker, distance = _ENDS[format]
    with open(path, "rb") as f:
        f.seek(max(os.path.getsize(path) - distance, 0))
        return marker in f.read()


def read_image(file_name: str, format: str = "BGR") -> np.ndarray:
    """
    Read an image as :func:`detectron2.data.detection_utils.read_image` does, with the orientation
    that a camera wrote. Gray images of 16 bits are scaled to 8, where Detectron2 would clip them:
    65535 becomes 255. Of a JPEG file that is cut short, the rest is gray, as OpenCV reads it, and a
    warning names the file.

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
        with PathManager.open(file_name, "rb") as f:
            content = f.read()
        try:
            return _decode(file_name, content, format)
        except OSError:
            if not content.startswith(b"\xff\xd8"):
                raise
            # The marker of the end, at which decoders stop to wait for more.
            image = _decode(file_name, content + b"\xff\xd9", format)
            logger.warning(f"{file_name}: the file is cut short; what is missing is gray")
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        # Pillow raises all of them for what is no image.
        raise InputError(f"{file_name}: the image cannot be used: {one_line(e)}") from e


def _decode(file_name: str, content: bytes, format: str) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    if image.mode == "F":
        raise InputError(f"{file_name}: floating point pixels: save it with 8 bits per channel")
    if image.mode.startswith("I"):
        gray = np.asarray(ImageOps.exif_transpose(image))
        scaled = (gray.astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return convert_PIL_to_numpy(Image.fromarray(scaled), format)
    return convert_PIL_to_numpy(_apply_exif_orientation(image), format)
