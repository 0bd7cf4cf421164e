# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation (``TEST.AUG``) of R-CNNs and RetinaNets."""

from typing import Any, Dict, List, Optional

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNN, GeneralizedRCNNWithTTA, RetinaNet
from detectron2.structures import Instances

from ..data.resize import OpenCVResizeTransform
from ..errors import InputError

__all__ = ["LibraDatasetMapperTTA", "RetinaNetWithTTA", "add_test_time_augmentation"]


class LibraDatasetMapperTTA(DatasetMapperTTA):
    """:class:`DatasetMapperTTA` with ``MODEL.LIBRA.INPUT.INTERPOLATION``."""

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.opencv = cfg.MODEL.LIBRA.INPUT.INTERPOLATION == "opencv"

    def __call__(self, dataset_dict: Dict[str, Any]) -> List[Dict[str, Any]]:
        augmented = super().__call__(dataset_dict)
        if not self.opencv:
            return augmented
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        for one in augmented:
            # The first transform has led from the file to this image. Detectron2's class of the
            # others cannot be replaced, so that the image is resized once more.
            done, *transforms = one["transforms"].transforms
            transforms = T.TransformList([_with_opencv(x) for x in transforms])
            resized = np.ascontiguousarray(transforms.apply_image(image).transpose(2, 0, 1))
            one["image"] = torch.from_numpy(resized)
            one["transforms"] = T.TransformList([done, *transforms.transforms])
        return augmented


def _with_opencv(transform: T.Transform) -> T.Transform:
    if type(transform) is not T.ResizeTransform:
        return transform
    return OpenCVResizeTransform(transform.h, transform.w, transform.new_h, transform.new_w)


class RetinaNetWithTTA(GeneralizedRCNNWithTTA):
    """
    :class:`GeneralizedRCNNWithTTA` for a RetinaNet: detections in all augmented images are merged
    by NMS with ``MODEL.RETINANET.NMS_THRESH_TEST``.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, tta_mapper: Optional[DatasetMapperTTA] = None
    ):
        """See :class:`GeneralizedRCNNWithTTA`, whose constructor only takes R-CNNs."""
        nn.Module.__init__(self)
        self.cfg = cfg.clone()
        self.cfg.defrost()
        # The parent merges with these.
        self.cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES
        self.cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = cfg.MODEL.RETINANET.NMS_THRESH_TEST
        self.model = model
        self.tta_mapper = tta_mapper or DatasetMapperTTA(cfg)
        self.batch_size = 3  # the parent's

    def _inference_one_image(self, input: Dict[str, Any]) -> Dict[str, Instances]:
        """See the parent, which also handles heads that a RetinaNet lacks."""
        inputs, transforms = self._get_augmented_inputs(input)
        boxes, scores, classes = self._get_augmented_boxes(inputs, transforms)
        size = (input["height"], input["width"])
        return {"instances": self._merge_detections(boxes, scores, classes, size)}

    def _batch_inference(
        self, batched_inputs: List[Dict[str, Any]], detected_instances: None = None
    ) -> List[Instances]:
        """Detections in the coordinates of the augmented images."""
        images = [{"image": x["image"]} for x in batched_inputs]
        starts = range(0, len(images), self.batch_size)
        batches = [self.model(images[i : i + self.batch_size]) for i in starts]
        return [output["instances"] for batch in batches for output in batch]


def add_test_time_augmentation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """
    A model with test-time augmentation as in ``cfg.TEST.AUG``, which shares the weights of an R-CNN
    (masks and cascade included) or a RetinaNet, possibly in a ``DistributedDataParallel``.

    Raises:
        InputError: for any other model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    mapper = LibraDatasetMapperTTA(cfg)
    if isinstance(model, RetinaNet):
        return RetinaNetWithTTA(cfg, model, mapper)
    if isinstance(model, GeneralizedRCNN):
        return GeneralizedRCNNWithTTA(cfg, model, mapper)
    raise InputError(f"there is no test-time augmentation of a {type(model).__name__}")
