# SPDX-License-Identifier: Apache-2.0
"""Weights: reading, writing and converting."""

from .checkpointer import LibraCheckpointer, PyramidMissing, WeightsMismatch, find_checkpoint
from .download import fetch
from .mmdetection import from_mmdetection, to_mmdetection

__all__ = [
    "LibraCheckpointer",
    "PyramidMissing",
    "WeightsMismatch",
    "fetch",
    "find_checkpoint",
    "from_mmdetection",
    "to_mmdetection",
]
