# SPDX-License-Identifier: Apache-2.0
from .backbone import (
    add_balanced_feature_pyramid,
    build_libra_backbone,
    build_libra_resnet_fpn_backbone,
)
from .balanced_feature_pyramid import BalancedFeaturePyramid, NonLocalBlock
from .balanced_l1_loss import BalancedL1Loss, balanced_l1_loss
from .balanced_sampling import BalancedSampler
from .batch_norm import AffineBatchNorm2d
from .fast_rcnn import LibraFastRCNNOutputLayers
from .low_quality_matcher import LowQualityMatcher
from .retinanet import LibraRetinaNet, build_libra_retinanet_resnet_fpn_backbone
from .roi_heads import LibraCascadeROIHeads, LibraROIHeads
from .rpn import LibraRPN

__all__ = [
    "AffineBatchNorm2d",
    "BalancedFeaturePyramid",
    "BalancedL1Loss",
    "BalancedSampler",
    "LibraCascadeROIHeads",
    "LibraFastRCNNOutputLayers",
    "LibraROIHeads",
    "LibraRPN",
    "LibraRetinaNet",
    "LowQualityMatcher",
    "NonLocalBlock",
    "add_balanced_feature_pyramid",
    "balanced_l1_loss",
    "build_libra_backbone",
    "build_libra_resnet_fpn_backbone",
    "build_libra_retinanet_resnet_fpn_backbone",
]
