# SPDX-License-Identifier: Apache-2.0
"""Weights: reading, writing and converting."""

from .checkpointer import LibraCheckpointer, PyramidMissing, WeightsMismatch, find_checkpoint
from .mmdetection import to_mmdetection

__all__ = [
    "LibraCheckpointer",
    "PyramidMissing",
    "WeightsMismatch",
    "find_checkpoint",
    "to_mmdetection",
]
