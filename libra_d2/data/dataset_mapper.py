# SPDX-License-Identifier: Apache-2.0
from unittest.mock import patch

from PIL import Image

from detectron2.data import DatasetMapper, detection_utils
from detectron2.data.detection_utils import SizeMismatchError

from ..errors import InputError, one_line
from .image_reading import read_image

__all__ = ["LibraDatasetMapper"]


class LibraDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` that reads images with :func:`read_image`, and whose error names the
    image that cannot be used.
    """

    def __call__(self, dataset_dict):
        """See :meth:`DatasetMapper.__call__`. Raises: InputError if the image is unreadable."""
        try:
            # Detectron2's mapper finds its reader under this name only.
            with patch.object(detection_utils, "read_image", read_image):
                return super().__call__(dataset_dict)
        except (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError) as e:
            raise InputError(
                f"{dataset_dict['file_name']}: the image cannot be used: {one_line(e)}"
            ) from e
