# SPDX-License-Identifier: Apache-2.0
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError

from ..errors import InputError, one_line

__all__ = ["LibraDatasetMapper"]


class LibraDatasetMapper(DatasetMapper):
    """:class:`DatasetMapper` whose error names the image that cannot be used."""

    def __call__(self, dataset_dict):
        """See :meth:`DatasetMapper.__call__`. Raises: InputError if the image is unreadable."""
        try:
            return super().__call__(dataset_dict)
        except (OSError, SyntaxError, SizeMismatchError) as e:
            raise InputError(
                f"{dataset_dict['file_name']}: the image cannot be used: {one_line(e)}"
            ) from e
