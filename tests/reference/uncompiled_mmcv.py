# SPDX-License-Identifier: Apache-2.0
"""
mmdetection with mmcv-lite, which needs no compiler: the Python side of mmcv's operators is there,
and the few that Libra R-CNN's models call are torchvision's.
"""

import sys
import types

import torch
import torchvision

__all__ = ["import_mmdet"]


def import_mmdet():
    """
    Import mmdetection, ready to build and run Libra R-CNN's models, with whichever mmcv there is.

    Returns:
        the module ``mmdet``.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import mmcv._ext  # noqa: F401
    except ImportError:
        _stand_in_for_operators()
    import mmdet

    return mmdet


def _stand_in_for_operators() -> None:
    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*args, **kwargs):
            raise NotImplementedError(f"mmcv._ext.{name}")

        return operator

    ext = types.ModuleType("mmcv._ext")
    ext.__getattr__ = missing
    ext.nms = lambda boxes, scores, iou_threshold, offset: torchvision.ops.nms(
        boxes, scores, iou_threshold
    )
    sys.modules["mmcv._ext"] = ext
    import mmcv.ops  # noqa: F401

    # The package re-exports a function of the module's name.
    module = sys.modules["mmcv.ops.roi_align"]
    module.RoIAlign.forward = lambda self, input, rois: torchvision.ops.roi_align(
        input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
    )
    # mmdetection crops the targets of masks with the function.
    module.roi_align = lambda input, rois, size, scale, ratio, mode, aligned: (
        torchvision.ops.roi_align(input, rois, size, scale, ratio, aligned)
    )
    sys.modules["mmcv.ops.deform_conv"].deform_conv2d = (
        lambda input, offset, weight, stride, padding, dilation, *_: torchvision.ops.deform_conv2d(
            input, offset, weight, None, stride, padding, dilation
        )
    )
    from mmdet.models.losses import focal_loss

    # On GPUs mmdetection calls the operator; on CPUs it computes the loss in PyTorch.
    focal_loss._sigmoid_focal_loss = _sigmoid_focal_loss


def _sigmoid_focal_loss(pred, target, gamma, alpha, weight, reduction):
    targets = torch.nn.functional.one_hot(target, pred.shape[1] + 1)[:, :-1].to(pred)
    return torchvision.ops.sigmoid_focal_loss(pred, targets, alpha, gamma)
