# SPDX-License-Identifier: Apache-2.0
import torch
from torch import distributed

from detectron2.utils import comm

__all__ = ["mean_over_processes"]


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """
    The mean of a scalar over all processes of a training, float32, without host synchronization.

    Gradients are averaged over the processes. If each divides its loss by this mean of their
    numbers, rather than by a number of its own, that is the gradient of the whole batch: a loss
    does not depend on how the batch is spread. (In mmdetection each process divides by its own
    number. Both are the same where all processes have equally many, which is why there is no key.)

    Args:
        value: scalar without gradient. With one process it is returned as it is.
    """
    world_size = comm.get_world_size()
    if world_size == 1:
        return value
    total = value.detach().float().clone()
    distributed.all_reduce(total)
    return total / world_size
