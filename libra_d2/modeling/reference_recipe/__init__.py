# SPDX-License-Identifier: Apache-2.0
"""
What the recipe of the published models has besides the three ideas of the paper: how mmdetection
trains the RPN, matches anchors, pads batches, normalizes losses and fine-tunes batch norm. Each has
a config key that turns it off.
"""

from .batch_norm import AffineBatchNorm2d, train_norm_affine
from .matcher import LowQualityMatcher, build_anchor_matcher
from .normalizer import mean_over_batch
from .p6p7 import LinearLastLevelP6P7
from .padding import label_without_padding
from .rpn import LibraRPN

__all__ = [
    "AffineBatchNorm2d",
    "LibraRPN",
    "LinearLastLevelP6P7",
    "LowQualityMatcher",
    "build_anchor_matcher",
    "label_without_padding",
    "mean_over_batch",
    "train_norm_affine",
]
