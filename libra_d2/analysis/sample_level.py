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
        ``interval_ends``, the upper IoUs of equal intervals from 0; ``num_bins``; and for
        "candidates" and each sampler: ``negatives``, their share in each interval; ``mean_iou`` of
        the negatives; ``instances``, the share of ground-truth instances with a positive; and
        ``largest_share``, the largest share of an image's positives that belong to one instance,
        averaged over the images.
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
    statistics: Dict[str, Any] = {"interval_ends": ends.tolist(), "num_bins": num_bins}
    for name in names:
        statistics[name] = {
            "negatives": (counts[name] / max(counts[name].sum(), 1)).tolist(),
            "mean_iou": _mean(np.concatenate(ious[name])),
            "instances": _mean(np.concatenate(covered[name])),
            "largest_share": _mean(np.array(largest[name])),
        }
    return statistics


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def plot_sampling(statistics: Dict[str, Any]) -> Figure:
    """Draw what :func:`sample_statistics` returns."""
    names = [name for name in statistics if isinstance(statistics[name], dict)]
    ends = np.array(statistics["interval_ends"])
    width = ends[0]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True)
    bin_ends = np.linspace(0, ends[-1], statistics["num_bins"] + 1)[1:-1]
    for axis, name in zip(axes, names):
        numbers = statistics[name]
        color = "#9aa5b1" if name == "candidates" else "#3b6fb6"
        shares = 100 * np.array(numbers["negatives"])
        axis.bar(ends - width / 2, shares, width=0.9 * width, color=color)
        for end in bin_ends:
            axis.axvline(end, color="#555555", linewidth=0.8, linestyle=":")
        covered = 100 * numbers["instances"]
        numbers_line = f"mean IoU {numbers['mean_iou']:.2f}, {covered:.0f}% of the objects covered"
        axis.set_title(name, pad=18)
        axis.text(0.5, 1.02, numbers_line, ha="center", transform=axis.transAxes, fontsize=8)
        axis.set_xlabel("IoU with the nearest object")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the negatives (%)")
    return figure
