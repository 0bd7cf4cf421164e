# SPDX-License-Identifier: Apache-2.0
"""Loss normalizers of batches that are spread over processes or micro-batches."""

from collections import defaultdict
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Dict, Iterator, List, Optional

import torch
from torch import distributed, nn

from detectron2.utils import comm

__all__ = ["NORMALIZE_OVER", "Normalizers", "is_batch_divided", "mean_over_batch"]

NORMALIZE_OVER = ("batch", "process")

_current: ContextVar[Optional["Normalizers"]] = ContextVar("normalizers", default=None)


def _mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    total = value.detach().float().clone()
    distributed.all_reduce(total)
    return total / comm.get_world_size()


def _is_shared(owner: nn.Module) -> bool:
    """Whether the number of ``owner`` is one of several processes."""
    return comm.get_world_size() > 1 and getattr(owner, "normalize_over", "batch") == "batch"


class Normalizers:
    """
    Loss normalizers of a batch that is computed in micro-batches. A first pass over them collects
    the numbers, a second one uses their means; both run inside :meth:`active`.
    """

    def __init__(self):
        self._counted: Dict[nn.Module, List[torch.Tensor]] = defaultdict(list)
        self._means: Optional[Dict[nn.Module, torch.Tensor]] = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which :func:`mean_over_batch` uses these normalizers."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def finish(self) -> None:
        """End the first pass: take the means over micro-batches and processes."""
        self._means = {owner: torch.stack(x).mean() for owner, x in self._counted.items()}
        shared = list(filter(_is_shared, self._counted))
        if shared:
            means = _mean_over_processes(torch.stack([self._means[owner] for owner in shared]))
            self._means.update(zip(shared, means))

    def get(self, value: torch.Tensor, owner: nn.Module) -> torch.Tensor:
        """See :func:`mean_over_batch`."""
        if self._means is None:
            self._counted[owner].append(value.detach().float())
            return value
        return self._means[owner]


def is_batch_divided() -> bool:
    """Whether the batch is spread over several processes or micro-batches."""
    return comm.get_world_size() > 1 or _current.get() is not None


def mean_over_batch(value: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """
    The mean of a scalar over all processes and micro-batches, in float32 and without host
    synchronization.

    Gradients are averaged over processes and micro-batches. Dividing each loss by this mean, rather
    than by a number of its own, gives the gradient of the whole batch, however it is divided.

    Args:
        value: scalar without gradient. It is returned unchanged if the batch is not divided.
        owner: the module whose loss is divided by it, once in each forward pass. If its
            ``normalize_over`` is "process" rather than "batch", other processes do not count, as in
            mmdetection.
    """
    normalizers = _current.get()
    if normalizers is not None:
        return normalizers.get(value, owner)
    return _mean_over_processes(value) if _is_shared(owner) else value
