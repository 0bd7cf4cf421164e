# SPDX-License-Identifier: Apache-2.0
"""
Balanced L1 loss: the objective level balance of Libra R-CNN (paper Section 3.3).

A smooth L1 loss whose gradient grows faster near zero, so that accurate boxes ("inliers") weigh
more than with smooth L1 loss, where few large errors ("outliers") dominate.
"""

import math
from typing import Any, Dict

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from detectron2.config import configurable

from ..errors import ArgumentError, check_choice

__all__ = ["BALANCED_L1_FORMS", "BalancedL1Loss", "balanced_l1_loss"]

BALANCED_L1_FORMS = ("scaled", "reference")


def balanced_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    beta: float = 1.0,
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
    form: str = "scaled",
    reduction: str = "none",
) -> torch.Tensor:
    """
    Balanced L1 loss, Equations 9 to 11 of the paper. With ``x = |input - target|``,
    ``b = exp(gamma / alpha) - 1`` (the constraint ``alpha * ln(b + 1) = gamma`` that makes the
    gradient continuous, Equation 10) and ``beta = 1``:

    .. code-block:: none

                 | alpha / b * (b x + 1) * ln(b x + 1) - alpha * x     if x < 1
        L_b(x) = |
                 | gamma * x + gamma / b - alpha                       otherwise

    Its gradient is ``alpha * ln(b x + 1)`` below 1 and ``gamma`` above. The paper defines the loss
    for ``beta = 1`` only, for which the two generalizations to other ``beta`` agree:

    * ``"scaled"``: ``beta * L_b(x / beta)``, as smooth L1 loss is scaled. Value and gradient are
      continuous; the gradient is 0 at zero error and ``gamma`` at ``beta``.
    * ``"reference"``: what mmdetection computes. It divides by ``beta`` inside the logarithm only.
      The value is continuous, the gradient is not: with ``beta = 0.11``, the setting of the
      published RetinaNet, it is 4.05 next to zero error and falls from 1.70 to 1.5 at ``beta``.
      Use it to reproduce that model. With ``beta > 1`` small errors have negative values, and the
      gradient enlarges them.

    Args:
        input: predictions, any shape, floating point.
        target: same shape as ``input``.
        beta: error where the loss becomes linear, > 0, in the unit of ``input``.
        alpha: > 0; a smaller one gives inliers more gradient (paper Figure 5).
        gamma: > 0; gradient of outliers, the upper bound of the loss' gradient.
        form: "scaled" or "reference", see above.
        reduction: "none", "sum" or "mean" (0 for empty input, as in fvcore's losses).

    Returns:
        the loss: of the shape of ``input`` if ``reduction`` is "none", else a scalar.

    Raises:
        ValueError: if an argument is out of range (ArgumentError), or the shapes differ.
    """
    _check_arguments(alpha, gamma, beta, form)
    if input.shape != target.shape:
        rule = "input and target must have the same shape"
        shapes = f"{tuple(input.shape)} and {tuple(target.shape)}"
        raise ValueError(f"balanced L1 loss: {rule}, got {shapes}")
    train = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    loss, _ = _BalancedL1.apply(input, target, alpha, gamma, beta, form, train)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if loss.numel() > 0 else 0.0 * loss.sum()
    raise ValueError(
        f"balanced L1 loss: reduction must be 'none', 'sum' or 'mean', got {reduction!r}"
    )


class _BalancedL1(torch.autograd.Function):
    """
    :func:`balanced_l1_loss` with an explicit gradient, which shares the logarithm with the value
    (half the time) and is all that is saved for the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input, target, alpha: float, gamma: float, beta: float, form: str, train: bool):
        b = math.expm1(gamma / alpha)
        # The forms differ in what is added to b x in front of the logarithm.
        one = beta if form == "scaled" else 1.0
        difference = input - target
        x = difference.abs()
        inlier = x.clamp(max=beta)
        log = inlier.mul(b / beta).log1p_()
        # The inliers' loss, at most that at beta, plus a linear part.
        shrunk = alpha * inlier
        loss = shrunk.add(alpha * one / b).mul_(log).sub_(shrunk).add_(x - inlier, alpha=gamma)
        if not train:
            return loss, loss.new_empty(())
        slope = log.mul_(alpha)
        if one != beta:
            # What the derivative of the product has besides the logarithm.
            extra = alpha * (one - beta) / inlier.mul_(b).add_(beta)
            slope = torch.where(x < beta, slope + extra, gamma)
        return loss, slope.mul_(difference.sign_())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtypes = inputs[0].dtype, inputs[1].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad = grad_loss * ctx.saved_tensors[0]
        of_input, of_target = ctx.needs_input_grad[:2]
        input_dtype, target_dtype = ctx.dtypes
        return (
            grad.to(input_dtype) if of_input else None,
            -grad.to(target_dtype) if of_target else None,
            *[None] * 5,
        )


def _check_arguments(alpha: float, gamma: float, beta: float, form: str) -> None:
    """Raise ArgumentError if an argument of :func:`balanced_l1_loss` is out of range."""
    for name, value in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
        if not (math.isfinite(value) and value > 0):
            raise ArgumentError(name, value, "use a positive number")
    if gamma / alpha > 80:
        rule = f"use at most 80 times alpha, {alpha}: b = exp(gamma / alpha) - 1 must fit a float32"
        raise ArgumentError("gamma", gamma, rule)
    check_choice("form", form, BALANCED_L1_FORMS)


class BalancedL1Loss(nn.Module):
    """:func:`balanced_l1_loss` with fixed parameters, which are checked on construction."""

    @configurable
    def __init__(
        self, *, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0, form: str = "scaled"
    ):
        """See :func:`balanced_l1_loss`. Raises ArgumentError if an argument is out of range."""
        super().__init__()
        _check_arguments(alpha, gamma, beta, form)
        self.arguments = {"alpha": alpha, "gamma": gamma, "beta": beta, "form": form}

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        return {name.lower(): value for name, value in cfg.MODEL.LIBRA.BALANCED_L1.items()}

    @torch.jit.unused  # scripted models do not train
    def forward(
        self, input: torch.Tensor, target: torch.Tensor, reduction: str = "none"
    ) -> torch.Tensor:
        """See :func:`balanced_l1_loss`."""
        return balanced_l1_loss(input, target, **self.arguments, reduction=reduction)
