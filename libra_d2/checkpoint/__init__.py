# SPDX-License-Identifier: Apache-2.0
"""Weights: reading, writing, converting, and models with weights in them."""

from .build import build_model, build_trained_model
from .checkpointer import LibraCheckpointer
from .download import fetch
from .mmdetection import from_mmdetection, to_mmdetection

__all__ = [
    "LibraCheckpointer",
    "build_model",
    "build_trained_model",
    "fetch",
    "from_mmdetection",
    "to_mmdetection",
]
