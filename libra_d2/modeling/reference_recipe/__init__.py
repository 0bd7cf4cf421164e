# SPDX-License-Identifier: Apache-2.0
"""
What the published models have besides the three ideas: how mmdetection trains the RPN, matches
anchors, pads batches and normalizes losses. Each has a config key that disables it.
"""

from .matcher import LowQualityMatcher, build_anchor_matcher
from .p6p7 import LinearLastLevelP6P7
from .padding import label_without_padding, pad_masks
from .rpn import LibraRPN

__all__ = [
    "LibraRPN",
    "LinearLastLevelP6P7",
    "LowQualityMatcher",
    "build_anchor_matcher",
    "label_without_padding",
    "pad_masks",
]
