# SPDX-License-Identifier: Apache-2.0
"""Losses on the validation images during training."""

from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..modeling.normalizer import Normalizers
from ..utils.random_state import seeded

__all__ = ["validation_losses"]


@contextmanager
def _computing_losses(model: nn.Module) -> Iterator[None]:
    """Training mode, without random layers and without lasting changes of the model."""
    # The moving average that losses of Detectron2's dense detectors are divided by is an attribute.
    names = ("training", "loss_normalizer")
    before = [(m, {k: v for k, v in vars(m).items() if k in names}) for m in model.modules()]
    model.train()
    model.backbone.eval()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).pop("loss_normalizer", None)
            vars(module).update(attributes)


@torch.no_grad()
def validation_losses(
    model: nn.Module, batches: Iterable[List[Dict[str, Any]]]
) -> Dict[str, float]:
    """
    Args:
        model: not in a ``DistributedDataParallel``. It does not change, and samples the same
            proposals each time.
        batches: inputs of the model with annotations, those of this process.

    Returns:
        means over the images of all processes: each loss, their sum, "total_loss", and the
        statistics of the samples, "roi_head/...". Empty in other processes than the main one.
    """
    sums: Dict[str, float] = {}
    number = 0
    # Losses are normalized without other processes, which may have another number of batches.
    with _computing_losses(model), seeded(0), Normalizers().active():
        for batch in batches:
            with EventStorage(1) as storage:  # at iteration 0, Detectron2 draws predictions
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
    names = dict.fromkeys(name for found, _ in gathered for name in found)
    return {name: sum(found.get(name, 0.0) for found, _ in gathered) / total for name in names}
