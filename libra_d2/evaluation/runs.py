# SPDX-License-Identifier: Apache-2.0
"""Models that were trained several times with other seeds: means, deviations and differences."""

import statistics
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from .comparison import compare_images, compare_runs
from .detection_errors import calibration
from .detection_metrics import DetectionMetrics

__all__ = ["compare_models", "describe_runs"]


def _combine(values: List[Any], function: Callable[[List[float]], Any]) -> Any:
    """
    A function of the numbers at each place of nested values of the same form. What is no number,
    such as None without objects, is that of all.
    """
    first = values[0]
    if isinstance(first, dict):
        return {
            k: first[k] if k == "image_id" else _combine([x[k] for x in values], function)
            for k in first
        }
    if isinstance(first, list):
        return [_combine(list(x), function) for x in zip(*values)]
    return function(values) if isinstance(first, (int, float)) else first


def _deviation(values: List[float]) -> Optional[float]:
    return statistics.stdev(values) if len(values) > 1 else None


def describe_runs(runs: Sequence[DetectionMetrics]) -> Dict[str, Any]:
    """
    What :meth:`DetectionMetrics.describe` says of each run, averaged over runs of one model on the
    same images. Counts of errors, too, are means.

    Returns:
        its values as plain numbers for JSON, the number of "runs", and "deviations" and
        "class_deviations", the standard deviations between runs of each of the "metrics" and of the
        AP of each class, None where there is one run only. The calibration is that of the
        detections of all runs.
    """
    each = [x.describe() for x in runs]
    of_classes = [{name: x["AP"] for name, x in run["classes"].items()} for run in each]
    return {
        **_combine([{**x, "calibration": None} for x in each], statistics.fmean),
        "calibration": calibration(*(x.matches for x in runs)),
        "runs": len(runs),
        "deviations": _combine([x["metrics"] for x in each], _deviation),
        "class_deviations": _combine(of_classes, _deviation),
    }


def compare_models(models: Sequence[Mapping[int, DetectionMetrics]]) -> Dict[str, Any]:
    """
    Describe models, and compare each of the others with the first one.

    Args:
        models: the runs of each by their seeds. Runs with the same seed are pairs, of which each
            model has at least one with the first.

    Returns:
        what a page of :func:`write_error_page` shows: "models", see :func:`describe_runs`, and
        "comparisons", for each model but the first the number of "pairs", and "metrics" and
        "images", see :func:`compare_runs` and :func:`compare_images`.

    Raises:
        ArgumentError: if the objects of two models are not the same.
    """
    first = models[0]
    pairs = [[(first[seed], own[seed]) for seed in own if seed in first] for own in models[1:]]
    return {
        "models": [describe_runs(list(runs.values())) for runs in models],
        "comparisons": [
            {"pairs": len(own), "metrics": metrics, "images": compare_images(*own)}
            for own, metrics in zip(pairs, compare_runs(pairs))
        ],
    }
