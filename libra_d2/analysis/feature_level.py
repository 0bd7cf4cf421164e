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


def _is_repeated(levels: Sequence[torch.Tensor]) -> List[bool]:
    """Whether each level is every second pixel of the one before it, as P6 of an R-CNN is."""
    pairs = zip(levels, levels[1:])
    return [False, *(torch.equal(fine[:, ::2, ::2], coarse) for fine, coarse in pairs)]


def feature_statistics(levels: List[Levels]) -> Dict[str, Any]:
    """
    Args:
        levels: of at least one image.

    Returns:
        for "before" and, with a balanced feature pyramid, "after": ``energy``, the root mean square
        of each level, and ``similarity``, (L, L), the mean cosine similarity of two levels at the
        same location. ``added``: the root mean square of what the balanced feature pyramid adds to
        each level. All are means over the images. ``repeated``, (L,): which levels before it have
        no features of their own.
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
    statistics["repeated"] = _is_repeated(levels[0].before)
    if "after" in statistics:
        statistics["added"] = mean(
            _rms([after - before for after, before in zip(x.after, x.before)]) for x in levels
        )
    return statistics


def plot_levels(statistics: Dict[str, Any], names: Sequence[str]) -> Figure:
    """Draw what :func:`feature_statistics` returns, with names of the levels such as "p2"."""
    stages = [name for name in ("before", "after") if name in statistics]
    figure = Figure(figsize=(4 + 3 * len(stages), 3.4), layout="constrained")
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
    axes[0].legend(
        frameon=False, ncols=len(bars), loc="upper left", columnspacing=1, handlelength=1
    )
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, stage in zip(axes[1:], stages):
        similarity = np.array(statistics[stage]["similarity"])
        image = axis.imshow(similarity, vmin=0, vmax=1, cmap="Blues")
        axis.set_xticks(x, names)
        axis.set_yticks(x, names)
        axis.set_title(f"similarity, {stage}")
        for i, j in np.ndindex(similarity.shape):
            color = "white" if similarity[i, j] > 0.6 else "black"
            axis.text(j, i, f"{similarity[i, j]:.2f}", ha="center", va="center", color=color)
    if "after" in stages:
        axes[-1].set_xlabel("It rises by construction:\none map is added to all levels.")
    figure.colorbar(image, ax=axes[-1], label="cosine similarity")
    return figure


def plot_heat_maps(
    levels: Levels, names: Sequence[str], image: Optional[np.ndarray] = None
) -> Figure:
    """
    Draw heat maps of one image's levels, the root mean square over the channels: before and, with a
    balanced feature pyramid, after, and of the difference of their features. All have the same
    color scale. The ``image``, (H, W, 3) uint8 RGB, is shown to the left.
    """
    rows = {"before": levels.before}
    if levels.after is not None:
        rows["after"] = levels.after
        rows["after - before"] = [
            after - before for after, before in zip(levels.after, levels.before)
        ]
    maps = {
        row: [x.square().mean(dim=0).sqrt().cpu().numpy() for x in features]
        for row, features in rows.items()
    }
    largest = max(float(x.max()) for row in maps.values() for x in row)
    first = int(image is not None)
    height, width = levels.before[0].shape[-2:]
    figure = Figure(figsize=(10, 0.7 + 1.6 * height / width * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), first + len(names))
    if image is not None:
        axis = figure.add_subplot(grid[:, 0], title="image")
        axis.imshow(image)
    for i, (row, heat) in enumerate(maps.items()):
        for j, (name, energy) in enumerate(zip(names, heat)):
            axis = figure.add_subplot(grid[i, first + j])
            shown = axis.imshow(energy, cmap="magma", vmin=0, vmax=largest)
            if i == 0:
                axis.set_title(name)
            if j == 0:
                axis.set_ylabel(row)
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
    label = "root mean square of the features"
    figure.colorbar(shown, ax=figure.axes[first:], label=label, fraction=0.04)
    return figure
