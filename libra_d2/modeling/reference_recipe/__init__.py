# SPDX-License-Identifier: Apache-2.0
"""
What the published models have besides the three ideas: how mmdetection trains the RPN, matches
anchors, pads batches and normalizes losses. Each has a config key that disables it.
"""

from .matcher import LowQualityMatcher
from .p6p7 import LinearLastLevelP6P7
from .rpn import LibraRPN

__all__ = ["LibraRPN", "LinearLastLevelP6P7", "LowQualityMatcher"]
