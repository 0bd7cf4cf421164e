# SPDX-License-Identifier: Apache-2.0
import io
import logging
import os
from typing import Tuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager

from ..errors import InputError, one_line
from .pixels import swap_channels

__all__ = ["IMAGE_SUFFIXES", "UNREADABLE", "displayed_size", "is_whole", "read_image"]
__all__ += ["why_unreadable"]

logger = logging.getLogger(__name__)

#: of the images in a folder, in lower case
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
#: what Pillow raises for files that are no images, or broken
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_EXIF_ORIENTATION = 0x0112
_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)
_USUAL_END = 16  # bytes
_MAX_TRAILER = 65536  # bytes that end markers are looked for in: cameras and editors append data


def displayed_size(image: Image.Image) -> Tuple[int, int]:
    """(width, height) of an opened image in pixels, after its Exif orientation is applied."""
    is_transposed = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSING_ORIENTATIONS
    return image.size[::-1] if is_transposed else image.size


def is_whole(path: str, format: str) -> bool:
    """
    Whether an image file, in what Pillow calls ``format``, has its end marker. False for formats
    other than JPEG and PNG, which have to be decoded to know.
    """
    if format not in _END_MARKERS:
        return False
    marker = _END_MARKERS[format]
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        for length in (_USUAL_END, _MAX_TRAILER):
            f.seek(max(size - length, 0))
            if marker in f.read():
                return True
    return False


def read_image(file_name: str, format: str = "BGR") -> np.ndarray:
    """
    Read an image as :func:`detectron2.data.detection_utils.read_image` does, Exif orientation
    included. 16 bit grayscale is scaled to 8 bits (65535 becomes 255), where Detectron2 would clip
    it. The missing part of a truncated JPEG file is gray, as with OpenCV, and a warning names it.

    Args:
        file_name: of an image file.
        format: "BGR", "RGB" or another that Detectron2 knows.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: if there is no such image, it is broken, it may be a decompression bomb, or its
            pixels are floating point numbers, whose range is unknown.
    """
    try:
        with PathManager.open(file_name, "rb") as f:
            content = f.read()
        try:
            return _decode(file_name, content, format)
        except OSError:
            if not content.startswith(b"\xff\xd8"):
                raise
            image = _decode(file_name, content + _END_MARKERS["JPEG"], format)
            logger.warning(f"{file_name}: the file is cut short; what is missing is gray")
            return image
    except UNREADABLE as e:
        raise InputError(f"{file_name}: the image cannot be used: {why_unreadable(e)}") from e


def why_unreadable(error: Exception) -> str:
    """What an error of Pillow says, in one line."""
    # Of an unknown format, Pillow says no more than the path, or the Python object that it read.
    is_unknown = isinstance(error, UnidentifiedImageError)
    return "it has no known image format" if is_unknown else one_line(error)


def _decode(file_name: str, content: bytes, format: str) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    if image.mode == "F":
        raise InputError(f"{file_name}: floating point pixels: save it with 8 bits per channel")
    if image.mode.startswith("I"):
        gray = np.asarray(ImageOps.exif_transpose(image))
        scaled = (gray.astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return convert_PIL_to_numpy(Image.fromarray(scaled), format)
    image = _apply_exif_orientation(image)
    if format not in ("BGR", "RGB"):
        return convert_PIL_to_numpy(image, format)
    rgb = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return rgb if format == "RGB" else swap_channels(rgb)
