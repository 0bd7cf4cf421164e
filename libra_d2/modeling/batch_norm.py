# SPDX-License-Identifier: Apache-2.0
"""
Batch norm with fixed statistics and trained scale and shift, as mmdetection fine-tunes it, and
running statistics of several processes.
"""

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm

from ..errors import ArgumentError

__all__ = ["AffineBatchNorm2d", "share_statistics", "train_norm_affine"]


class AffineBatchNorm2d(FrozenBatchNorm2d):
    """
    :class:`FrozenBatchNorm2d` with trained scale and shift and the same checkpoint keys. Optimizers
    do not regard it as a norm: ``SOLVER.WEIGHT_DECAY`` applies, as in mmdetection, and not
    ``WEIGHT_DECAY_NORM``.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps)
        for name in ("weight", "bias"):
            value = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value))

    @classmethod
    def from_frozen(cls, frozen: FrozenBatchNorm2d) -> "AffineBatchNorm2d":
        """Return a module with the values of ``frozen``."""
        affine = cls(frozen.num_features, frozen.eps).to(frozen.weight.device)
        affine.load_state_dict(frozen.state_dict())
        return affine.train(frozen.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (N, num_features, H, W). Returns: the same shape."""
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps)


def train_norm_affine(module: nn.Module) -> nn.Module:
    """
    Replace the frozen batch norms of trained convolutions by :class:`AffineBatchNorm2d`.

    Args:
        module: modified in place. Norms are children of their convolutions, as in Detectron2; those
            of convolutions without trained parameters stay.

    Returns: ``module``.

    Raises:
        ArgumentError: if there is none to replace.
    """
    num_replaced = 0
    for parent in list(module.modules()):
        if not any(p.requires_grad for p in parent.parameters(recurse=False)):
            continue
        for name, child in parent.named_children():
            if type(child) is FrozenBatchNorm2d:
                setattr(parent, name, AffineBatchNorm2d.from_frozen(child))
                num_replaced += 1
    if num_replaced == 0:
        rule = (
            "it has no FrozenBatchNorm2d in a trained stage. Norms other than 'FrozenBN' train "
            "their scale and shift anyway"
        )
        raise ArgumentError("module", type(module).__name__, rule)
    return module


def share_statistics(model: nn.Module) -> None:
    """
    Give the batch norms of all processes the running statistics of the main one, so that an
    evaluation is that of its checkpoint. Batch norms that are not synchronized have others in each
    process. All processes must call this.
    """
    if comm.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                distributed.broadcast(buffer, 0)
