# SPDX-License-Identifier: Apache-2.0
"""Results of trainings and evaluations as curves and tables."""

import json
import math
import os
from typing import Any, Dict, List, Mapping, Optional

from tabulate import tabulate

from ..utils.atomic_write import atomic_write
from ..utils.display import table_cell

__all__ = [
    "plot_learning_curves",
    "read_metrics",
    "write_results",
]


def read_metrics(path: str) -> List[Dict[str, float]]:
    """
    Read a ``metrics.json`` of Detectron2, one dict for each iteration, in order. If a training was
    resumed and repeated iterations, the last values count; broken lines are skipped.
    """
    by_iteration: Dict[int, Dict[str, float]] = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)
                by_iteration.setdefault(int(entry["iteration"]), {}).update(entry)
            except (ValueError, TypeError, KeyError):
                continue
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def plot_learning_curves(metrics: List[Dict[str, float]], path: str) -> None:
    """Plot losses, AP and the IoU balance of the samples, if there are any, to a PNG."""
    from matplotlib.figure import Figure

    names = sorted({name for entry in metrics for name in entry})
    losses = [name for name in names if "loss" in name]
    precisions = [name for name in names if name.split("/")[-1] in ("AP", "AP50", "AP75")]
    bins = [name for name in names if name.startswith("roi_head/num_bg_iou_bin_")]
    panels = [("loss", losses), ("average precision (%)", precisions), ("negatives drawn", bins)]
    panels = [(label, chosen) for label, chosen in panels if chosen]
    if not panels:
        return
    # Detectron2 logs the final evaluation one iteration too late.
    end = max((e["iteration"] + 1 for e in metrics if "total_loss" in e), default=math.inf)
    # Legends are below the panels, which would not leave room for many names.
    rows = math.ceil(max(len(chosen) for _, chosen in panels) / 2)
    figure = Figure(figsize=(4.5 * len(panels), 3.6 + 0.2 * rows), layout="constrained")
    for axis, (label, chosen) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in chosen:
            points = [(min(e["iteration"] + 1, end), e[name]) for e in metrics if name in e]
            x, y = zip(*points)
            short = name.replace("roi_head/num_bg_iou_", "IoU ").replace("_", " ")
            axis.plot(x, y, marker="o" if len(points) < 30 else None, markersize=3, label=short)
        axis.set(xlabel="iteration", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 2}
        axis.legend(frameon=False, fontsize=8, **place)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as f:
        figure.savefig(f, dpi=120, format="png")


def _table(rows, headers) -> str:
    return tabulate(rows, headers, "github", disable_numparse=True)


def write_results(
    path: str,
    results: Dict[str, Any],
    title: str,
    remark: str = "",
    about: Optional[Mapping[str, Any]] = None,
) -> None:
    """
    Write Markdown tables of average precision (%) by IoU and object size, and by class.

    Args:
        path: of the file, whose directory is created.
        results: those of Detectron2's evaluators for each dataset.
        title, remark: what precedes the tables.
        about: what was evaluated, in words, for a table at the end.
    """
    lines = [f"# {title}", "", *([remark, ""] if remark else [])]
    for dataset, tasks in results.items():
        for task, metrics in (tasks or {}).items():
            cells = {k: "" if math.isnan(v) else f"{v:.1f}" for k, v in metrics.items()}
            classes = [(table_cell(k[3:]), x) for k, x in cells.items() if k.startswith("AP-")]
            numbers = {k: x for k, x in cells.items() if not k.startswith("AP-")}
            lines += [f"## {task} on {dataset}", "", _table([numbers.values()], numbers), ""]
            if classes:
                lines += [_table(classes, ["class", "AP"]), ""]
    if about:
        rows = [(name, table_cell(str(value))) for name, value in about.items()]
        lines += ["## What was evaluated", "", _table(rows, ["", ""]), ""]
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_write(path, "w") as f:
        f.write("\n".join(lines))
