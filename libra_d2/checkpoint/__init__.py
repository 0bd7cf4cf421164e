# SPDX-License-Identifier: Apache-2.0
"""Weights: reading, writing and converting."""

from .checkpointer import LibraCheckpointer
from .download import fetch
from .mmdetection import from_mmdetection, to_mmdetection

__all__ = [
    "LibraCheckpointer",
    "fetch",
    "from_mmdetection",
    "to_mmdetection",
]
