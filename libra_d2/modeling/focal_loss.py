# SPDX-License-Identifier: Apache-2.0
"""Focal loss (arXiv 1708.02002) of dense detectors, whose targets are nearly all background."""

from typing import Any, Optional, Tuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["focal_loss"]

# Elements that are computed at a time on CPUs: they stay in the cache of a core.
_CHUNK_SIZE = 2**17


def _background(
    x: torch.Tensor, weight: torch.Tensor, gamma: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of logits whose target is 0, and its derivative; those of a target of 1 are the same
    functions of ``-x``, with the opposite sign of the derivative.

    Args:
        x: (n, K).
        weight: (n, 1), or a number.
    """
    p = x.sigmoid()
    cross_entropy = F.softplus(x, threshold=40)
    factor = p.pow(gamma).mul_(weight)
    slope = (1 - p).mul_(gamma).mul_(cross_entropy).add_(p).mul_(factor)
    return factor.mul_(cross_entropy), slope


class _FocalLoss(torch.autograd.Function):
    """Computes the gradient together with the loss: nothing but that has to be kept."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, alpha: float, gamma: float
    ) -> torch.Tensor:
        num, num_classes = logits.shape
        of_foreground, of_background = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        weight = of_background * (labels >= 0).to(logits.dtype)[:, None]
        grad = torch.empty_like(logits)
        size = _CHUNK_SIZE // num_classes if logits.device.type == "cpu" else num
        sums = [logits.new_zeros(())]
        for i in range(0, num, max(size, 1)):
            rows = slice(i, i + max(size, 1))
            loss, grad[rows] = _background(logits[rows], weight[rows], gamma)
            sums.append(loss.sum())

        # The one target of each foreground row that is not 0.
        is_foreground = ((labels >= 0) & (labels < num_classes)).to(logits.dtype)[:, None]
        index = labels.clamp(0, num_classes - 1)[:, None]
        target = logits.gather(1, index)
        loss, slope = _background(-target, of_foreground * is_foreground, gamma)
        instead, instead_slope = _background(target, of_background * is_foreground, gamma)
        sums.append((loss - instead).sum())
        grad.scatter_add_(1, index, -slope - instead_slope)
        ctx.save_for_backward(grad)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], None, None, None]:
        return ctx.saved_tensors[0] * grad, None, None, None


def focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """
    The sum of :func:`fvcore.nn.sigmoid_focal_loss` over one-hot targets, without making them and
    without host synchronization.

    Args:
        logits: (n, K) of n anchors and K classes. Half precision is computed in float32.
        labels: (n,) class of each anchor in [0, K), K for the background; -1 is not trained on.
        alpha: weight of foreground in [0, 1], 1 - alpha is that of background. Negative for none.
        gamma: focusing parameter, at least 0.

    Returns:
        the sum, a scalar.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return _FocalLoss.apply(logits, labels, alpha, gamma)
