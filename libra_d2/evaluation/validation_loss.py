# SPDX-License-Identifier: Apache-2.0
"""Losses of a model in training on the images that it is validated on."""

from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..modeling.normalizer import Normalizers
from ..utils.random_state import seeded

__all__ = ["validation_losses"]


@contextmanager
def _computing_losses(model: nn.Module) -> Iterator[None]:
    """The model is in training mode, apart from what would change it or is random."""
    modes = {module: module.training for module in model.modules()}
    # Moving averages of what losses are divided by, which Detectron2 keeps as attributes.
    dense = [module for module in modes if isinstance(module, DenseDetector)]
    averages = [{k: v for k, v in vars(m).items() if k == "loss_normalizer"} for m in dense]
    model.train()
    model.backbone.eval()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, average in zip(dense, averages):
            vars(module).pop("loss_normalizer", None)
            vars(module).update(average)


@torch.no_grad()
def validation_losses(
    model: nn.Module, batches: Iterable[List[Dict[str, Any]]]
) -> Dict[str, float]:
    """
    Args:
        model: not in a ``DistributedDataParallel``. Its state does not change; samples are drawn
            from a seed, the same ones each time.
        batches: inputs of the model with annotations, those of this process.

    Returns:
        the means over the images of all processes, of each loss, of their sum, "total_loss", and of
        the balance of the samples ("roi_head/..."). Empty in other processes than the main one.
    """
    sums: Dict[str, float] = {}
    number = 0
    # Each batch is divided by its own numbers: other processes may have more batches, or fewer.
    with _computing_losses(model), seeded(0), Normalizers().active():
        for batch in batches:
            with EventStorage() as storage:
                losses = {name: loss.item() for name, loss in model(batch).items()}
            values = {"total_loss": sum(losses.values()), **losses}
            for name, (value, _) in storage.latest().items():
                if name.startswith("roi_head/"):
                    values[name] = value
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(batch)
            number += len(batch)
    gathered = comm.gather((sums, number))
    total = sum(n for _, n in gathered)
    names = {name for found, _ in gathered for name in found}
    return {name: sum(found.get(name, 0.0) for found, _ in gathered) / total for name in names}
