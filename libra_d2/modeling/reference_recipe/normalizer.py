# SPDX-License-Identifier: Apache-2.0
"""What losses are divided by, where a batch is spread over processes, or computed in parts."""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Iterator, List, Optional

import torch
from torch import distributed

from detectron2.utils import comm

__all__ = ["Normalizers", "is_batch_divided", "mean_over_batch"]

_current: ContextVar[Optional["Normalizers"]] = ContextVar("normalizers", default=None)


def _mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    total = value.detach().float().clone()
    distributed.all_reduce(total)
    return total / comm.get_world_size()


class Normalizers:
    """
    The normalizers of a batch that is computed in parts: counted in one pass over the parts, and
    used in a second one.
    """

    def __init__(self):
        self._counted: List[torch.Tensor] = []  # of each part, in the order of the losses
        self._part: Optional[List[torch.Tensor]] = None
        self._means: Optional[torch.Tensor] = None
        self._used = 0

    @contextmanager
    def count(self) -> Iterator[None]:
        """Inside, the losses of one part are computed to be counted."""
        self._part = []
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
        if self._part:
            self._counted.append(torch.stack(self._part))
        self._part = None

    def finish(self) -> None:
        """All parts are counted; take the means over them, and over the processes."""
        if not self._counted:
            return
        self._means = torch.stack(self._counted).mean(dim=0)
        if comm.get_world_size() > 1:
            self._means = _mean_over_processes(self._means)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, the losses of one part are computed."""
        self._used = 0
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def get(self, value: torch.Tensor) -> torch.Tensor:
        """See :func:`mean_over_batch`."""
        if self._part is not None:
            self._part.append(value.detach().float())
            return value
        self._used += 1
        return self._means[self._used - 1]


def is_batch_divided() -> bool:
    """Whether the batch is spread over several processes, or computed in parts."""
    return comm.get_world_size() > 1 or _current.get() is not None


def mean_over_batch(value: torch.Tensor) -> torch.Tensor:
    """
    The mean of a scalar over all processes of a training, and over all parts that their batches are
    computed in; float32, without host synchronization.

    Gradients are averaged over processes and parts. If each divides its loss by this mean of their
    numbers, rather than by a number of its own, that is the gradient of the whole batch: a loss
    does not depend on how the batch is spread. (In mmdetection each process divides by its own
    number. Both are the same where all processes have equally many, which is why there is no key.)

    Args:
        value: scalar without gradient. It is returned as it is if the batch is not divided.
    """
    normalizers = _current.get()
    if normalizers is not None:
        return normalizers.get(value)
    return _mean_over_processes(value) if comm.get_world_size() > 1 else value
