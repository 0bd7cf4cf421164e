# SPDX-License-Identifier: Apache-2.0
import copy
from typing import Any, Dict, Tuple

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    SizeMismatchError,
    check_image_size,
    filter_empty_instances,
    transform_proposals,
)
from detectron2.structures import Boxes, BoxMode, Instances

from ..errors import InputError, one_line
from .image_reading import UNREADABLE, read_image, why_unreadable
from .pixels import to_planes
from .resize import with_interpolation

__all__ = ["LibraDatasetMapper"]


def _read_labels(path: str) -> np.ndarray:
    """(H, W) uint8 labels of pixels; those of 16 bits are not scaled, as gray values would be."""
    try:
        return detection_utils.read_image(path, "L").squeeze(2)
    except UNREADABLE as e:
        raise InputError(f"{path}: the image cannot be used: {why_unreadable(e)}") from e


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
            segmentation = _read_labels(segmentation)
        augmented = T.AugInput(image, sem_seg=segmentation)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        # in shared memory between processes
        dataset_dict["image"] = torch.from_numpy(to_planes(augmented.image))
        if segmentation is not None:
            dataset_dict["sem_seg"] = torch.from_numpy(augmented.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            transform_proposals(dataset_dict, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, size)
        return dataset_dict

    def _transform_annotations(
        self, dataset_dict: Dict[str, Any], transforms: T.Transform, image_shape: Tuple[int, int]
    ) -> None:
        """
        See the parent's, which rounds the corners of boxes of integers down to whole pixels when
        they are resized. Boxes without masks and keypoints are transformed together.
        """
        for annotation in dataset_dict["annotations"]:
            annotation["bbox"] = [float(x) for x in annotation["bbox"]]
        objects = [x for x in dataset_dict["annotations"] if not x.get("iscrowd", 0)]
        modes = {x["bbox_mode"] for x in objects}
        if self.use_instance_mask or self.use_keypoint or modes != {BoxMode.XYWH_ABS}:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        del dataset_dict["annotations"]
        boxes = torch.tensor([x["bbox"] for x in objects])
        boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS).double().numpy()
        corner = image_shape[::-1] * 2
        boxes = np.minimum(transforms.apply_box(boxes).clip(min=0), corner)
        instances = Instances(image_shape, gt_boxes=Boxes(torch.from_numpy(boxes)))
        instances.gt_classes = torch.tensor([x["category_id"] for x in objects])
        dataset_dict["instances"] = filter_empty_instances(instances)
