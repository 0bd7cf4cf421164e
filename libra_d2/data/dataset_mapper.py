# SPDX-License-Identifier: Apache-2.0
import copy
from typing import Any, Dict

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, transform_proposals

from ..errors import InputError, one_line
from .image_reading import read_image
from .resize import with_interpolation

__all__ = ["LibraDatasetMapper"]


class LibraDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` that reads images with :func:`read_image`, resizes them as specified by
    ``MODEL.LIBRA.INPUT.INTERPOLATION``, and names the image that cannot be used.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> Dict[str, Any]:
        ret = super().from_config(cfg, is_train)
        interpolation = cfg.MODEL.LIBRA.INPUT.INTERPOLATION
        return {**ret, "augmentations": with_interpolation(ret["augmentations"], interpolation)}

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """
        See :meth:`DatasetMapper.__call__`, whose function for reading images cannot be replaced.

        Raises:
            InputError: if the image is unreadable, or of another size than the dataset says.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        try:
            check_image_size(dataset_dict, image)
        except SizeMismatchError as e:
            path = dataset_dict["file_name"]
            raise InputError(f"{path}: the image cannot be used: {one_line(e)}") from e
        segmentation = dataset_dict.pop("sem_seg_file_name", None)
        if segmentation is not None:
            segmentation = read_image(segmentation, "L").squeeze(2)
        augmented = T.AugInput(image, sem_seg=segmentation)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        chw = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.from_numpy(chw)  # in shared memory between processes
        if segmentation is not None:
            dataset_dict["sem_seg"] = torch.from_numpy(augmented.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            transform_proposals(dataset_dict, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, size)
        return dataset_dict
