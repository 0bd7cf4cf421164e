# SPDX-License-Identifier: Apache-2.0
"""Objective level: gradients of small and large box errors (paper Figure 5)."""

from functools import partial
from typing import Any, Callable, Dict, Tuple

import numpy as np
import torch
from fvcore.nn import smooth_l1_loss
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..modeling import balanced_l1_loss

__all__ = ["box_loss_name", "objective_statistics", "plot_gradient_shares", "plot_losses"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def box_loss_name(beta: float) -> str:
    """The name of a smooth L1 loss, such as "L1" or "smooth L1 (beta 0.1)"."""
    return f"smooth L1 (beta {beta:g})" if beta > 0 else "L1"


def _smooth_l1(beta: float) -> Loss:
    return partial(smooth_l1_loss, beta=beta, reduction="none")


def loss_and_gradient(loss: Loss, errors: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values and absolute gradients, (n,), of a loss without reduction, for ``errors``, (n,)."""
    with torch.enable_grad():
        input = errors.clone().requires_grad_()
        values = loss(input, torch.zeros_like(input))
        (gradient,) = torch.autograd.grad(values.sum(), input)
    return values.detach(), gradient.abs()


def objective_statistics(
    errors: torch.Tensor,
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    form: str = "scaled",
    smooth_l1_beta: float = 0.0,
) -> Dict[str, Any]:
    """
    Compare the gradient of balanced L1 loss with those of the plain detector's loss and, as in the
    paper, of smooth L1 loss with the same beta.

    Args:
        errors: (n,) absolute differences of predicted and target deltas.
        alpha, gamma, beta, form: see :func:`balanced_l1_loss`.
        smooth_l1_beta: of the plain detector's loss: 0, L1 loss, in Detectron2's R-CNNs; 0.1 in
            its RetinaNet.

    Returns:
        ``beta``; ``smooth_l1_beta``; ``num_errors``; ``inliers``, the share of errors below beta;
        ``percentiles``, the 100 percentiles of the errors; and for each loss, by
        :func:`box_loss_name` or "balanced L1": ``inlier_gradient``, the inliers' share of the
        summed absolute gradient, and ``cumulative``, the share of errors up to each percentile.
    """
    errors = errors.sort().values
    ranks = (torch.arange(1, 101) * len(errors) // 100).clamp(min=1) - 1
    statistics: Dict[str, Any] = {
        "beta": beta,
        "smooth_l1_beta": smooth_l1_beta,
        "num_errors": len(errors),
        "inliers": (errors < beta).float().mean().item(),
        "percentiles": errors[ranks].tolist(),
    }
    losses = {
        box_loss_name(smooth_l1_beta): _smooth_l1(smooth_l1_beta),
        box_loss_name(beta): _smooth_l1(beta),
        "balanced L1": partial(balanced_l1_loss, alpha=alpha, gamma=gamma, beta=beta, form=form),
    }
    for name, loss in losses.items():
        _, gradient = loss_and_gradient(loss, errors)
        total = gradient.double().sum().clamp(min=1e-12)
        statistics[name] = {
            "inlier_gradient": (gradient[errors < beta].double().sum() / total).item(),
            "cumulative": (gradient.double().cumsum(0)[ranks] / total).tolist(),
        }
    return statistics


def plot_losses(
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    form: str = "scaled",
    smooth_l1_beta: float = 0.0,
) -> Figure:
    """
    Draw gradient and value of balanced L1 loss with varied alpha and varied gamma, the losses of
    :func:`objective_statistics` for comparison.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    errors = torch.linspace(0, 2 * beta, 401)[1:]
    varied = {"alpha": (0.2, 0.3, 0.5, 1.0), "gamma": (0.5, 1.0, 1.5, 2.0)}
    for column, (name, values) in zip(axes.T, varied.items()):
        arguments = {"alpha": alpha, "gamma": gamma, "beta": beta, "form": form}
        curves = {
            box_loss_name(beta): (_smooth_l1(beta), "#999999", ":"),
            box_loss_name(smooth_l1_beta): (_smooth_l1(smooth_l1_beta), "#555555", "--"),
        }
        for i, value in enumerate(values):
            color = colormaps["viridis"](0.1 + 0.75 * i / (len(values) - 1))
            loss = partial(balanced_l1_loss, **{**arguments, name: value})
            curves[f"{name} {value}"] = (loss, color, "-")
        for label, (loss, color, style) in curves.items():
            value, gradient = loss_and_gradient(loss, errors)
            for axis, y in zip(column, (gradient, value)):
                axis.plot(errors, y, style, color=color, label=label)
        fixed = f"gamma {gamma}" if name == "alpha" else f"alpha {alpha}"
        column[0].set_title(f"{name} varied, {fixed}")
        column[1].legend(frameon=False, fontsize=9)
    axes[0, 0].set_ylabel("gradient")
    axes[1, 0].set_ylabel("loss")
    for axis in axes.flat:
        axis.axvline(beta, color="#bbbbbb", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("error of a box delta")
    return figure


def plot_gradient_shares(statistics: Dict[str, Any]) -> Figure:
    """Draw what :func:`objective_statistics` returns."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [name for name, value in statistics.items() if isinstance(value, dict)]
    colors = dict(zip(losses, ("#555555", "#9aa5b1", "#3b6fb6")[-len(losses) :]))
    ranks = np.arange(1, 101)
    left.plot(ranks, statistics["percentiles"], color="#e0a030")
    left.axhline(statistics["beta"], color="#555555", linewidth=0.8, linestyle=":")
    left.set(
        title=f"{statistics['num_errors']} box errors, sorted",
        xlabel="smallest errors (%)",
        ylabel="error of a box delta",
        yscale="log",
    )
    left.text(2, statistics["beta"], "beta", va="bottom", fontsize=9)
    for name, color in colors.items():
        numbers = statistics[name]
        share = 100 * numbers["inlier_gradient"]
        label = f"{name}: {share:.0f}% from inliers"
        right.plot(ranks, 100 * np.array(numbers["cumulative"]), color=color, label=label)
    inliers = 100 * statistics["inliers"]
    right.axvline(inliers, color="#555555", linewidth=0.8, linestyle=":")
    right.text(inliers, 2, f"{inliers:.0f}% inliers ", ha="right", fontsize=9)
    right.set(
        title="their share of the gradient",
        xlabel="smallest errors (%)",
        ylabel="share of the gradient (%)",
    )
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
