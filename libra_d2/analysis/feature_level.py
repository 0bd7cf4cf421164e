# SPDX-License-Identifier: Apache-2.0
"""Feature level: what each pyramid level holds before and after the balanced feature pyramid."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .recording import Levels

__all__ = ["feature_statistics", "plot_heat_maps", "plot_levels"]


def _energy(feature: torch.Tensor) -> torch.Tensor:
    """(C, H, W) -> (H, W): root mean square over the channels."""
    return feature.square().mean(dim=0).sqrt()


def _similarities(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    (L, L): cosine similarity of the features of two levels at the same place, averaged over the
    places. Both are seen at the size of the coarser one.
    """
    result = torch.ones(len(levels), len(levels))
    for coarse in range(len(levels)):
        for fine in range(coarse):
            pooled = F.adaptive_avg_pool2d(levels[fine], levels[coarse].shape[-2:])
            similarity = F.cosine_similarity(pooled, levels[coarse], dim=0).mean()
            result[fine, coarse] = result[coarse, fine] = similarity
    return result


def feature_statistics(levels: List[Levels]) -> Dict[str, Any]:
    """
    Args:
        levels: of at least one image.

    Returns:
        for "before" and, with a balanced feature pyramid, "after": ``energy``, the root mean square
        of each level's features, and ``similarity``, (L, L), how alike two levels are: the cosine
        of their features at the same place. ``added``: root mean square of what the balanced
        feature pyramid adds to each level. Means over the images.
    """

    def mean(values) -> List:
        return torch.stack(list(values)).mean(dim=0).cpu().tolist()

    statistics: Dict[str, Any] = {}
    for name in ("before", "after"):
        seen = [x for x in (getattr(image, name) for image in levels) if x is not None]
        if seen:
            statistics[name] = {
                "energy": mean(
                    torch.stack([x.square().mean().sqrt() for x in image]) for image in seen
                ),
                "similarity": mean(_similarities(image) for image in seen),
            }
    if "after" in statistics:
        statistics["added"] = mean(
            torch.stack([(a - b).square().mean().sqrt() for a, b in zip(x.after, x.before)])
            for x in levels
        )
    return statistics


def plot_levels(statistics: Dict[str, Any], names: Sequence[str]):
    """
    Draw what :func:`feature_statistics` returns.

    Args:
        statistics: see there.
        names: of the levels, such as "p2".

    Returns:
        the matplotlib figure.
    """
    from matplotlib.figure import Figure

    stages = [name for name in ("before", "after") if name in statistics]
    figure = Figure(figsize=(4 * (1 + len(stages)), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(stages))
    bars = {"before": statistics["before"]["energy"]}
    if "added" in statistics:
        bars.update(added=statistics["added"], after=statistics["after"]["energy"])
    colors = {"before": "#9aa5b1", "added": "#e0a030", "after": "#3b6fb6"}
    x, width = np.arange(len(names)), 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        offset = (i - (len(bars) - 1) / 2) * width
        axes[0].bar(x + offset, values, width, label=label, color=colors[label])
    axes[0].set_xticks(x, names)
    axes[0].set(title="energy of the levels", ylabel="root mean square of the features")
    axes[0].margins(y=0.2)
    axes[0].legend(frameon=False, ncols=len(bars), loc="upper left")
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, stage in zip(axes[1:], stages):
        similarity = np.array(statistics[stage]["similarity"])
        image = axis.imshow(similarity, vmin=0, vmax=1, cmap="Blues")
        axis.set_xticks(x, names)
        axis.set_yticks(x, names)
        axis.set_title(f"similarity of the levels, {stage}")
        for i, j in np.ndindex(similarity.shape):
            color = "white" if similarity[i, j] > 0.6 else "black"
            axis.text(j, i, f"{similarity[i, j]:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes[-1], label="cosine similarity")
    return figure


def plot_heat_maps(levels: Levels, names: Sequence[str], image: Optional[np.ndarray] = None):
    """
    Draw the energy of one image's levels, each in the range of its own.

    Args:
        levels: of the image.
        names: of the levels.
        image: (H, W, 3) uint8 RGB, shown in front of them.

    Returns:
        the matplotlib figure.
    """
    from matplotlib.figure import Figure

    stages = {"before": levels.before, "after": levels.after}
    stages = {name: seen for name, seen in stages.items() if seen is not None}
    columns = len(names) + (image is not None)
    height, width = levels.before[0].shape[-2:]
    row_height = 0.4 + 1.7 * height / width
    figure = Figure(figsize=(2.2 * columns, row_height * len(stages)), layout="constrained")
    axes = figure.subplots(len(stages), columns, squeeze=False)
    for row, (stage, seen) in zip(axes, stages.items()):
        if image is not None:
            row[0].imshow(image)
            row[0].set_title("image")
        for axis, name, feature in zip(row[columns - len(names) :], names, seen):
            shown = axis.imshow(_energy(feature).cpu().numpy(), cmap="magma")
            axis.set_title(f"{name}, {stage}")
            figure.colorbar(shown, ax=axis, fraction=0.035)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    return figure
