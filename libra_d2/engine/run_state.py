# SPDX-License-Identifier: Apache-2.0
"""What a resumed training needs besides weights, optimizer and schedule to be the same one."""

import json
import os
from typing import Dict, List

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage

__all__ = [
    "get_histories",
    "get_normalizers",
    "get_statistics",
    "remove_later_metrics",
    "set_histories",
    "set_normalizers",
]

_WINDOW = 20  # of the medians that Detectron2's writers write


def get_normalizers(model: nn.Module) -> Dict[str, float]:
    """Moving averages of what losses are divided by, of those parts of ``model`` that keep one."""
    return {
        name: float(module.loss_normalizer)
        for name, module in model.named_modules()
        if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
    }


def set_normalizers(model: nn.Module, normalizers: Dict[str, float]) -> None:
    """Args: model, normalizers: see :func:`get_normalizers`."""
    for name, module in model.named_modules():
        if name in normalizers:
            module.loss_normalizer = normalizers[name]


def get_statistics(model: nn.Module) -> Dict[str, torch.Tensor]:
    """The running statistics of batch norm that is not frozen, on the host."""
    return {
        f"{name}.{key}": value.cpu().clone()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key, value in module.named_buffers(recurse=False)
    }


def get_histories(storage: EventStorage) -> Dict[str, List[List[float]]]:
    """The last values, with their iterations, of what is written as a median, except for times."""
    smoothed = storage.smoothing_hints()
    return {
        name: [[float(value), int(iteration)] for value, iteration in history.values()[-_WINDOW:]]
        for name, history in storage.histories().items()
        if smoothed[name] and "time" not in name
    }


def set_histories(storage: EventStorage, histories: Dict[str, List[List[float]]]) -> None:
    """Args: storage: a new one. histories: see :func:`get_histories`."""
    now = storage.iter
    for name, values in histories.items():
        for value, iteration in values:
            storage.iter = iteration
            storage.put_scalar(name, value)
    storage.iter = now


def remove_later_metrics(path: str, iteration: int) -> None:
    """
    Remove from a ``metrics.json`` what a training that is resumed will write again. The file stays
    the same, because it may be open already.

    Args:
        path: of the file; it need not be there.
        iteration: the first one to come.
    """
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as f:
        lines = f.readlines()
    kept = [line for line in lines if _iteration(line) < iteration]
    if len(kept) < len(lines):
        with open(path, "r+", encoding="utf-8") as f:
            f.writelines(kept)
            f.truncate()


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short
