# SPDX-License-Identifier: Apache-2.0
"""
Libra R-CNN as components of Detectron2.

The paper's three ideas are in ``balanced_sampling``, ``balanced_feature_pyramid`` and
``balanced_l1_loss``; ``backbone``, ``roi_heads``, ``fast_rcnn`` and ``retinanet`` put them into
Detectron2's models. What else mmdetection's recipe has is in ``reference_recipe``.
"""

from .backbone import (
    add_balanced_feature_pyramid,
    build_balanced_backbone,
    build_libra_backbone,
    build_libra_resnet_fpn_backbone,
)
from .balanced_feature_pyramid import REFINEMENT_REGISTRY, BalancedFeaturePyramid, NonLocalBlock
from .balanced_l1_loss import BalancedL1Loss, balanced_l1_loss
from .balanced_sampling import PROPOSAL_SAMPLER_REGISTRY, BalancedSampler, SamplingResult
from .batch_norm import AffineBatchNorm2d, train_norm_affine
from .cascade import LibraCascadeROIHeads, MaskHeadPerStage, build_mask_head_per_stage
from .fast_rcnn import LibraFastRCNNOutputLayers
from .reference_recipe import LibraRPN, LinearLastLevelP6P7, LowQualityMatcher
from .retinanet import LibraRetinaNet, build_libra_retinanet_resnet_fpn_backbone
from .roi_heads import BalancedSamplingMixin, LibraRes5ROIHeads, LibraROIHeads
from .timm_backbone import TimmBackbone

__all__ = [
    "PROPOSAL_SAMPLER_REGISTRY",
    "REFINEMENT_REGISTRY",
    "AffineBatchNorm2d",
    "BalancedFeaturePyramid",
    "BalancedL1Loss",
    "BalancedSampler",
    "BalancedSamplingMixin",
    "LibraCascadeROIHeads",
    "LibraFastRCNNOutputLayers",
    "LibraROIHeads",
    "LibraRPN",
    "LibraRes5ROIHeads",
    "LibraRetinaNet",
    "LinearLastLevelP6P7",
    "LowQualityMatcher",
    "MaskHeadPerStage",
    "NonLocalBlock",
    "SamplingResult",
    "TimmBackbone",
    "add_balanced_feature_pyramid",
    "balanced_l1_loss",
    "build_balanced_backbone",
    "build_libra_backbone",
    "build_libra_resnet_fpn_backbone",
    "build_libra_retinanet_resnet_fpn_backbone",
    "build_mask_head_per_stage",
    "train_norm_affine",
]
