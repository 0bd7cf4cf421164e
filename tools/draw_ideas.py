#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Draw a schematic of each of the three ideas of Libra R-CNN, computed by its code:

    python tools/draw_ideas.py docs/images

writes balanced_sampling.png, balanced_feature_pyramid.png and balanced_l1_loss.png. No model and no
data are needed.
"""

import argparse
import os
from functools import partial
from typing import Callable, Dict, List

import matplotlib
import numpy as np
import torch
from fvcore.nn import smooth_l1_loss
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import nn

from libra_d2.analysis.objective_level import loss_and_gradient
from libra_d2.engine import argument_parser, report_errors
from libra_d2.modeling import BalancedFeaturePyramid, BalancedSampler, balanced_l1_loss
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.output_path import output_paths

#: legible when a figure of 8 inches is shown with a width of 800 pixels
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "hatch.linewidth": 0.6}
WIDTH = 8  # inches
DRAWN, LEFT = "#1f3a5f", "#8a949e"

NUM_BINS, NEGATIVES_END = 3, 0.5
#: negatives in each bin, and how many of them are drawn in total
IN_BINS, NUM_DRAWN = (60, 14, 6), 12
GAMMA = 1.5


def draw_negatives(iou: torch.Tensor, negatives: str) -> torch.Tensor:
    """
    Args: iou: (n,); negatives: see :class:`BalancedSampler`.
    Returns: (n,) bool, which of n negatives are drawn.
    """
    torch.manual_seed(5)  # with which the random draw has the numbers that are expected
    sampler = BalancedSampler(negatives=negatives, num_bins=NUM_BINS)
    nothing = torch.zeros(len(iou), dtype=torch.int64)
    indices = sampler(nothing, iou, nothing, 1, NUM_DRAWN, 0.25).negatives
    return nothing.bool().index_fill(0, indices, True)


def plot_sampling() -> Figure:
    """The same candidates, drawn at random and from each IoU bin alike."""
    random = np.random.default_rng(0)
    borders = np.linspace(0, NEGATIVES_END, NUM_BINS + 1)
    # Within a bin, small IoUs are the most frequent.
    iou = np.concatenate(
        [
            low + (NEGATIVES_END / NUM_BINS) * (0.02 + 0.94 * random.random(n) ** 1.5)
            for low, n in zip(borders, IN_BINS)
        ]
    )
    height = random.uniform(-0.26, 0.26, len(iou))
    rows = {
        "all": np.zeros(len(iou), bool),
        "at random": draw_negatives(torch.tensor(iou), "random").numpy(),
        "equally from\neach bin": draw_negatives(torch.tensor(iou), "iou_balanced").numpy(),
    }
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axis = figure.subplots()
    for y, (name, drawn) in enumerate(rows.items()):
        axis.scatter(iou[~drawn], y + height[~drawn], 16, "none", edgecolors=LEFT, linewidths=0.8)
        axis.scatter(iou[drawn], y + height[drawn], 34, DRAWN, label=name)
        shown = drawn if drawn.any() else ~drawn
        for low, high in zip(borders, borders[1:]):
            count = int((shown & (iou >= low) & (iou < high)).sum())
            text = f"{count} drawn" if drawn.any() else f"{count} negatives"
            axis.text((low + high) / 2, y - 0.36, text, ha="center", va="center")
    for border in borders:
        axis.axvline(border, color="black", linestyle="--", linewidth=1)
    axis.set(xlim=(-0.004, NEGATIVES_END + 0.004), ylim=(2.45, -0.55))
    axis.set_xticks(borders, ["0", "1/6", "1/3", "1/2"])
    axis.set_yticks(range(3), [*rows])
    axis.tick_params(length=0)
    axis.set_xlabel("IoU of a negative with the nearest object")
    axis.set_title(f"{NUM_DRAWN} of {len(iou)} negatives are drawn (filled circles)")
    axis.spines[:].set_visible(False)
    return figure


def pyramid_stages() -> Dict[str, List[np.ndarray]]:
    """
    What a balanced feature pyramid of one channel computes from four levels with an object each:
    the arrays of each stage, (H, W), from high to low resolution.
    """
    levels = [torch.zeros(1, 1, size, size) for size in (16, 8, 4, 2)]
    levels[0][..., 2:5, 10:13] = 1
    levels[1][..., 4:7, 1:3] = 1
    levels[2][..., 2, 2:4] = 1
    levels[3][..., 1, 0] = 1
    pyramid = BalancedFeaturePyramid(1, len(levels), refine_level=1)
    for layer in pyramid.refine.children():
        nn.init.ones_(layer.weight)
    seen = {}
    pyramid.refine.register_forward_hook(lambda _, inputs, output: seen.update(a=inputs, r=output))
    with torch.no_grad():
        outputs = pyramid(levels)
        # Only the level that is left contributes to the average: it is that level, resized, by 4.
        resized = []
        for i in range(len(levels)):
            pyramid([x if i == j else 0 * x for j, x in enumerate(levels)])
            resized.append(seen["a"][0] * len(levels))
        pyramid(levels)
    stages = {
        "levels": levels,
        "resized": resized,
        "average": [seen["a"][0]],
        "refined": [seen["r"]],
        "resized back": [after - before for after, before in zip(outputs, levels)],
        "added": outputs,
    }
    return {name: [x[0, 0].numpy() for x in arrays] for name, arrays in stages.items()}


def _arrow(figure: Figure, source: Axes, target: Axes) -> None:
    ends = {"xyA": (1.04, 0.5), "xyB": (-0.04, 0.5), "coordsA": "axes fraction"}
    figure.add_artist(
        ConnectionPatch(
            **ends,
            coordsB="axes fraction",
            axesA=source,
            axesB=target,
            arrowstyle="-|>",
            mutation_scale=10,
            linewidth=0.9,
        )  # fmt: skip
    )


def plot_pyramid() -> Figure:
    """The stages of a balanced feature pyramid, as arrays."""
    stages = pyramid_stages()
    largest = max(x.max() for arrays in stages.values() for x in arrays)
    titles = [
        "levels $C_l$",
        "resized to\none size",
        "average",
        "refined\n(non-local)",
        "resized\nback",
        "added: $P_l$",
    ]
    count = len(stages["levels"])
    figure = Figure(figsize=(WIDTH, 5.3))
    grid = figure.add_gridspec(
        count, len(stages), left=0.07, right=0.985, top=0.88, bottom=0.03, wspace=0.4, hspace=0.14
    )
    columns = []
    for j, (title, arrays) in enumerate(zip(titles, stages.values())):
        middle = slice(1, 3) if len(arrays) == 1 else None
        column = []
        for i, array in enumerate(arrays):
            axis = figure.add_subplot(grid[middle or i, j])
            axis.imshow(array, cmap="Greys", vmin=0, vmax=largest)
            size = len(array)
            axis.set_xticks(np.arange(1, size) - 0.5, [])
            axis.set_yticks(np.arange(1, size) - 0.5, [])
            axis.grid(color="#bbbbbb", linewidth=0.5)
            axis.tick_params(length=0)
            column.append(axis)
        x = grid[0, j].get_position(figure)
        figure.text((x.x0 + x.x1) / 2, 0.9, title, ha="center", va="bottom", linespacing=1.1)
        columns.append(column)
    for i, axis in enumerate(columns[0]):
        axis.set_ylabel(f"$l = {i + 2}$", rotation=0, ha="right", va="center")
    for sources, targets in zip(columns[:4], columns[1:5]):
        n = max(len(sources), len(targets))
        for source, target in zip(sources * (n // len(sources)), targets * (n // len(targets))):
            _arrow(figure, source, target)
    for axis in columns[4]:
        axis.text(1.2, 0.5, "$+C_l$", transform=axis.transAxes, ha="center", va="center")
    return figure


def plot_loss() -> Figure:
    """The gradients of smooth L1 and balanced L1 loss, and what alpha and gamma are in them."""
    x = torch.linspace(0, 2, 201)[1:]
    smooth = partial(smooth_l1_loss, beta=1.0, reduction="none")
    curves = {
        "balanced L1, alpha 0.5": (partial(balanced_l1_loss, alpha=0.5, gamma=GAMMA), "-", 2.5),
        "balanced L1, alpha 0.2": (partial(balanced_l1_loss, alpha=0.2, gamma=GAMMA), "-.", 1.5),
        "smooth L1": (smooth, "--", 2),
    }
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axis = figure.subplots()
    gradients = {}
    for name, (loss, style, width) in curves.items():
        gradients[name] = loss_and_gradient(loss, x)[1]
        color = LEFT if loss is smooth else DRAWN
        axis.plot(x, gradients[name], style, color=color, linewidth=width, label=name)
    balanced, _, plain = gradients.values()
    axis.fill_between(
        x, plain, balanced, where=(x <= 1).numpy(), facecolor="none", edgecolor=LEFT, hatch="///",
        linewidth=0, label="what inliers gain",
    )  # fmt: skip
    axis.axvline(1, color="black", linewidth=1)
    axis.text(0.5, 1.78, "inliers", ha="center", weight="bold")
    axis.text(1.5, 1.78, "outliers", ha="center", weight="bold")
    axis.text(1.5, GAMMA + 0.03, f"gamma = {GAMMA}, the gradient of all outliers", ha="center")
    arrow = {"arrowstyle": "-|>", "linewidth": 1}
    label = "a smaller alpha\nraises it further"
    axis.annotate(label, (0.2, 1.16), (0.03, 1.55), va="center", arrowprops=arrow)
    axis.set(xlim=(0, 2), ylim=(0, 1.95), xlabel="error of a box delta", ylabel="gradient")
    axis.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "0.5", "beta = 1", "1.5", "2"])
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES: Dict[str, Callable[[], Figure]] = {
    "balanced_sampling": plot_sampling,
    "balanced_feature_pyramid": plot_pyramid,
    "balanced_l1_loss": plot_loss,
}


def run(args: argparse.Namespace) -> None:
    """Write the figures."""
    paths = [os.path.join(args.folder, f"{name}.png") for name in FIGURES]
    output_paths("folder", paths, {})
    for path, plot in zip(paths, FIGURES.values()):
        with matplotlib.rc_context(STYLE), atomic_write(path) as f:
            plot().savefig(f, dpi=150, format="png")


def main(argv=None) -> None:
    """Command line entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("folder", help="where the three PNG files are written")
    report_errors(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
