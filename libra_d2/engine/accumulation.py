# SPDX-License-Identifier: Apache-2.0
"""Training steps: gradient accumulation over micro-batches, mixed precision."""

import time
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, ContextManager, Dict, Iterator, List

import numpy as np
import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

from ..modeling.normalizer import Normalizers
from ..utils.random_state import get_random_state, set_random_state

__all__ = ["AccumulationTrainer", "AMPAccumulationTrainer"]

Inputs = List[Dict[str, Any]]
Losses = Dict[str, torch.Tensor]


class _MicroBatchStorage(EventStorage):
    """Holds the scalars of a micro-batch; the pictures of one of them are the training's."""

    def __init__(self, keeps_pictures: bool) -> None:
        self._training, self._keeps_pictures = get_event_storage(), keeps_pictures
        super().__init__(self._training.iter)

    def put_image(self, img_name: str, img_tensor: torch.Tensor) -> None:
        """See :meth:`EventStorage.put_image`."""
        if self._keeps_pictures:
            self._training.put_image(img_name, img_tensor)


class AccumulationTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` that splits each batch into micro-batches and accumulates their gradients
    for one optimizer step. The result is the gradient of the whole batch: a first forward pass,
    without gradients, counts the normalizers of libra_d2's losses over all micro-batches and
    processes. Losses of other classes are averaged over the micro-batches. Batch norms that are not
    frozen normalize over a micro-batch.
    """

    #: number of micro-batches in a batch
    accumulation_steps: int = 1
    #: context of forward passes
    autocast: Callable[[], ContextManager] = nullcontext

    def run_step(self) -> None:
        assert self.model.training, "the model is in evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size = max(len(batch) // self.accumulation_steps, 1)
        micro_batches = [batch[i : i + size] for i in range(0, len(batch), size)]
        self.optimizer.zero_grad()
        if len(micro_batches) == 1:
            losses = self._forward(batch)
            self._backward(sum(losses.values()))
        else:
            losses = self._accumulate(micro_batches)
        losses = {name: loss.detach().reshape(()) for name, loss in losses.items()}
        if len({loss.device for loss in losses.values()}) == 1:
            # One transfer from the device for all of them.
            losses = dict(zip(losses, torch.stack(list(losses.values())).cpu()))
        self._put_metrics(losses, data_time)
        self._step()

    def _put_metrics(self, losses: Losses, data_time: float) -> None:
        """
        Put the means of the losses over all processes into the main process' storage, and the
        longest ``data_time``. As :meth:`SimpleTrainer.write_metrics`, with one message of numbers
        from each process to the main one rather than pickled objects and their sizes among all.

        Raises:
            FloatingPointError: in the main process, if the sum of the losses is not finite.
        """
        numbers = torch.tensor([data_time, *losses.values()], dtype=torch.float64)
        found = _gather(numbers)
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(row[0] for row in found))
        means = {name: np.mean([row[i] for row in found]) for i, name in enumerate(losses, 1)}
        total = sum(means.values())
        if not np.isfinite(total):
            raise FloatingPointError(f"a loss is not finite: {means}")
        storage.put_scalar("total_loss", total)
        if len(means) > 1:
            storage.put_scalars(**means)

    def _accumulate(self, micro_batches: List[Inputs]) -> Losses:
        """Accumulate gradients; returns the mean losses and puts mean scalars into the storage."""
        normalizers = Normalizers()
        states = self._count(micro_batches, normalizers)
        losses: List[Losses] = []
        scalars: List[Dict[str, float]] = []
        for i, (micro_batch, state) in enumerate(zip(micro_batches, states)):
            set_random_state(state)
            is_last = i == len(micro_batches) - 1
            storage = _MicroBatchStorage(is_last)
            with normalizers.active(), storage, self._synchronized(is_last):
                losses.append(self._forward(micro_batch))
                self._backward(sum(losses[-1].values()) / len(micro_batches))
            scalars.append({name: value for name, (value, _) in storage.latest().items()})
        for name in dict.fromkeys(name for found in scalars for name in found):
            values = [found[name] for found in scalars if name in found]
            get_event_storage().put_scalar(name, np.mean(values))
        return {name: sum(x[name].detach() for x in losses) / len(losses) for name in losses[0]}

    @torch.no_grad()
    def _count(self, micro_batches: List[Inputs], normalizers: Normalizers) -> List[Dict[str, Any]]:
        """
        Compute the losses to count their normalizers.

        Returns:
            the RNG state before each micro-batch, so that both passes draw the same samples.
        """
        is_parallel = isinstance(self.model, DistributedDataParallel)
        model = self.model.module if is_parallel else self.model
        states: List[Dict[str, Any]] = []
        # At iteration 0, Detectron2 draws predictions.
        with normalizers.active(), EventStorage(1), _frozen_statistics(model), self.autocast():
            for micro_batch in micro_batches:
                states.append(get_random_state())
                model(micro_batch)
        normalizers.finish()
        return states

    def _synchronized(self, is_last: bool) -> ContextManager:
        """Processes average their gradients once, with the last micro-batch."""
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _forward(self, micro_batch: Inputs) -> Losses:
        with self.autocast():
            losses = self.model(micro_batch)
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _step(self) -> None:
        self.optimizer.step()


class AMPAccumulationTrainer(AccumulationTrainer, AMPTrainer):
    """:class:`AccumulationTrainer` with a scaled loss, whose gradients fit into float16."""

    def _backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _step(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """See :meth:`AMPTrainer.load_state_dict`; a training in another precision has no scale."""
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict(), **state_dict})


def _gather(numbers: torch.Tensor) -> List[List[float]]:
    """Vectors of the same length in all processes; the main process gets them by rank."""
    if comm.get_world_size() == 1:
        return [numbers.tolist()]
    rows = [torch.empty_like(numbers) for _ in range(comm.get_world_size())]
    # On CPUs, as the parent does.
    group = comm._get_global_gloo_group()
    distributed.gather(numbers, rows if comm.is_main_process() else None, group=group)
    return [row.tolist() for row in rows]


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms do not update their running statistics inside."""
    norms = get_bn_modules(model)
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, settings):
            norm.momentum, norm.num_batches_tracked = momentum, counter
