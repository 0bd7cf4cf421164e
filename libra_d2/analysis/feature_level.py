# SPDX-License-Identifier: Apache-2.0
"""Feature level: the pyramid levels before and after the balanced feature pyramid."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from .recording import Levels

__all__ = ["feature_statistics", "plot_heat_maps", "plot_levels"]


def _rms(features: List[torch.Tensor]) -> torch.Tensor:
    """(L,): root mean square of each level."""
    return torch.stack([x.square().mean().sqrt() for x in features])


def _similarities(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    (L, L): mean cosine similarity of the features of two levels at the same location. The finer
    level is pooled to the size of the coarser one.
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
        of each level, and ``similarity``, (L, L), the mean cosine similarity of two levels at the
        same location. ``added``: the root mean square of what the balanced feature pyramid adds to
        each level. All are means over the images.
    """

    def mean(values) -> List:
        return torch.stack(list(values)).mean(dim=0).cpu().tolist()

    statistics: Dict[str, Any] = {}
    for name in ("before", "after"):
        seen = [x for x in (getattr(image, name) for image in levels) if x is not None]
        if seen:
            statistics[name] = {
                "energy": mean(_rms(image) for image in seen),
                "similarity": mean(_similarities(image) for image in seen),
            }
    if "after" in statistics:
        statistics["added"] = mean(
            _rms([after - before for after, before in zip(x.after, x.before)]) for x in levels
        )
    return statistics


def plot_levels(statistics: Dict[str, Any], names: Sequence[str]) -> Figure:
    """Draw what :func:`feature_statistics` returns, with names of the levels such as "p2"."""
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


def plot_heat_maps(
    levels: Levels, names: Sequence[str], image: Optional[np.ndarray] = None
) -> Figure:
    """
    Draw heat maps of one image's levels, the root mean square over the channels, each on its own
    color scale. The ``image``, (H, W, 3) uint8 RGB, is shown to the left.
    """
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
            energy = feature.square().mean(dim=0).sqrt()
            shown = axis.imshow(energy.cpu().numpy(), cmap="magma")
            axis.set_title(f"{name}, {stage}")
            figure.colorbar(shown, ax=axis, fraction=0.035)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    return figure
