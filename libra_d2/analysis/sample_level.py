# SPDX-License-Identifier: Apache-2.0
"""Sample level: IoU of sampled negatives, and positives per instance (paper Figure 3)."""

from typing import Any, Dict, List

import numpy as np
import torch
from matplotlib.figure import Figure

from ..modeling import BalancedSampler
from ..modeling.balanced_sampling import iou_histogram
from .recording import Candidates

__all__ = ["plot_sampling", "sample_statistics"]

NUM_INTERVALS = 10  # of IoU, in the histograms
_SAMPLERS = {
    "random": {"negatives": "random", "positives": "random"},
    "balanced, paper's bins": {"mode": "paper"},
    "balanced, mmdetection's bins": {"mode": "reference"},
}


def sample_statistics(
    candidates: List[Candidates], *, num_bins: int = 3, negative_iou_thresh: float = 0.5
) -> Dict[str, Any]:
    """
    Sample from the same candidates at random and with both balanced modes.

    Args:
        candidates: of at least one image.
        num_bins, negative_iou_thresh: see :class:`BalancedSampler`.

    Returns:
        ``interval_ends``, the upper IoUs of equal intervals from 0; and for "candidates" and each
        sampler: ``bin_borders``, the IoUs between the bins that it draws negatives from, if any;
        ``negatives``, their share in each interval; ``mean_iou`` of the negatives; ``instances``,
        the share of ground-truth instances with a positive; and ``largest_share``, the largest
        share of an image's positives that belong to one instance, averaged over the images.
    """
    bins = {"num_bins": num_bins, "negative_iou_thresh": negative_iou_thresh}
    samplers = {name: BalancedSampler(**bins, **kwargs) for name, kwargs in _SAMPLERS.items()}
    names = ["candidates", *samplers]
    counts = {name: np.zeros(NUM_INTERVALS) for name in names}
    ious, covered, largest = ({name: [] for name in names} for _ in range(3))
    for c in candidates:
        chosen = {"candidates": ((c.labels == 1).nonzero()[:, 0], (c.labels == 0).nonzero()[:, 0])}
        for name, sampler in samplers.items():
            chosen[name] = sampler(*c)[:2]
        for name, (positives, negatives) in chosen.items():
            iou = c.max_iou[negatives].float().cpu().numpy()
            counts[name] += iou_histogram(iou, NUM_INTERVALS, negative_iou_thresh)
            ious[name].append(iou)
            of_instance = torch.bincount(c.matched_idxs[positives], minlength=c.num_instances)
            covered[name].append((of_instance > 0).cpu().numpy())
            if len(positives):
                largest[name].append(of_instance.max().item() / len(positives))
    ends = np.linspace(0, negative_iou_thresh, NUM_INTERVALS + 1)[1:]
    statistics: Dict[str, Any] = {"interval_ends": ends.tolist()}
    for name in names:
        statistics[name] = {
            "bin_borders": _bin_borders(samplers[name]) if name in samplers else [],
            "negatives": (counts[name] / max(counts[name].sum(), 1)).tolist(),
            "mean_iou": _mean(np.concatenate(ious[name])),
            "instances": _mean(np.concatenate(covered[name])),
            "largest_share": _mean(np.array(largest[name])),
        }
    return statistics


def _bin_borders(sampler: BalancedSampler) -> List[float]:
    if sampler.negatives == "random":
        return []
    # mmdetection's bins end at the largest IoU of the image, which is that of the ground truth.
    end = sampler.negative_iou_thresh if sampler.mode == "paper" else 1.0
    return np.linspace(0, end, sampler.num_bins + 1)[1:-1].tolist()


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def plot_sampling(statistics: Dict[str, Any]) -> Figure:
    """Draw what :func:`sample_statistics` returns."""
    names = [name for name in statistics if isinstance(statistics[name], dict)]
    ends = np.array(statistics["interval_ends"])
    width = ends[0]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True)
    for axis, name in zip(axes, names):
        numbers = statistics[name]
        color = "#9aa5b1" if name == "candidates" else "#3b6fb6"
        shares = 100 * np.array(numbers["negatives"])
        axis.bar(ends - width / 2, shares, width=0.9 * width, color=color)
        lines = [f"mean IoU {numbers['mean_iou']:.2f}"]
        lines.append(f"{100 * numbers['instances']:.0f}% of objects covered")
        if numbers["bin_borders"]:
            lines.append("bins end at " + ", ".join(f"{x:.2f}" for x in numbers["bin_borders"]))
        for border in numbers["bin_borders"]:
            if border < ends[-1]:  # there are no negatives beyond
                axis.axvline(border, color="#333333", linestyle=":")
        axis.set_title(name.replace(", ", ",\n"), pad=46)
        axis.annotate(
            "\n".join(lines), (0.5, 1), (0, 42), ha="center", va="top", linespacing=1.3,
            xycoords="axes fraction", textcoords="offset points", fontsize=9,
        )  # fmt: skip
        axis.set_xlabel("IoU with the nearest object")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the negatives (%)")
    return figure
