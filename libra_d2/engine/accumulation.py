# SPDX-License-Identifier: Apache-2.0
"""Batches that are computed in parts, one after the other, for want of memory."""

import time
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage

from ..data.random_state import get_random_state, set_random_state
from ..modeling.reference_recipe.normalizer import Normalizers

__all__ = ["AMPAccumulationTrainer", "AccumulationTrainer"]

Losses = Dict[str, torch.Tensor]


class AccumulationTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` that computes each batch in parts, and makes one optimizer step of their
    gradients. They are those of the whole batch: what the losses of libra_d2 are divided by is
    counted over all parts (and processes) first, without gradients, which costs a forward pass.
    Losses of other classes are means over the parts. Batch norm that is not frozen normalizes over
    one part.
    """

    num_parts: int = 1

    def run_step(self) -> None:
        """See :meth:`SimpleTrainer.run_step`."""
        assert self.model.training, "the model is in evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size = len(batch) // self.num_parts
        parts = [batch[i * size : (i + 1) * size] for i in range(self.num_parts)]
        # Both passes must draw the same samples.
        states, normalizers = [], Normalizers()
        before = get_random_state()
        for part in parts:
            states.append(get_random_state())
            with normalizers.count(), EventStorage(), _statistics_kept(self.model):
                self._count(part)
        normalizers.finish()
        set_random_state(before)

        self.optimizer.zero_grad()
        losses: List[Losses] = []
        scalars: List[Dict[str, float]] = []
        for i, (part, state) in enumerate(zip(parts, states)):
            set_random_state(state)
            last = i == len(parts) - 1
            with normalizers.use(), EventStorage() as storage, self._synchronized(last):
                losses.append(self._forward(part))
                self._backward(sum(losses[-1].values()) / self.num_parts)
            scalars.append({name: value for name, (value, _) in storage.latest().items()})
        for name in scalars[0]:
            values = [found[name] for found in scalars if name in found]
            get_event_storage().put_scalar(name, np.mean(values))
        mean = {name: sum(x[name].detach() for x in losses) / len(parts) for name in losses[0]}
        self._write_metrics(mean, data_time)
        self._step()

    def _count(self, part: List[Dict[str, Any]]) -> None:
        """Compute the losses for what is counted on the way."""
        model = self.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        with torch.no_grad(), self._precision():
            model(part)

    def _synchronized(self, last: bool) -> ContextManager:
        """Gradients are averaged over the processes once, with those of the last part."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _forward(self, part: List[Dict[str, Any]]) -> Losses:
        with self._precision():
            return self.model(part)

    def _precision(self) -> ContextManager:
        return nullcontext()

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _step(self) -> None:
        self.optimizer.step()


class AMPAccumulationTrainer(AccumulationTrainer, AMPTrainer):
    """The same with mixed precision."""

    def _precision(self) -> ContextManager:
        return torch.autocast("cuda")

    def _backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _step(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


class _statistics_kept:
    """Batch norm does not take account of what is computed inside."""

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]

    def __enter__(self) -> None:
        self.settings = [(m.momentum, m.num_batches_tracked) for m in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(self, *error) -> None:
        for norm, (momentum, counter) in zip(self.norms, self.settings):
            norm.momentum, norm.num_batches_tracked = momentum, counter
