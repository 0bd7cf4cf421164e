# SPDX-License-Identifier: Apache-2.0
"""Evaluators of registered datasets, and what they report."""

import importlib.util
import logging
from typing import Callable, List, Optional, Sequence

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from ..data import class_names
from ..errors import InputError
from .coco_evaluator import COCO_MAX_DETS, LibraCOCOEvaluator
from .lvis_evaluator import LVIS_AP_OF_FREQUENCIES, LibraLVISEvaluator, has_lvis_metrics

__all__ = [
    "TASKS",
    "build_evaluator",
    "check_evaluator_type",
    "reported_metrics",
]

logger = logging.getLogger(__name__)

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LVIS_AP = (*_AP, *LVIS_AP_OF_FREQUENCIES.values())
_AR = tuple(f"AR{area}@{limit}" for limit in (100, 1000) for area in ("", "s", "m", "l"))
# By the type of a dataset and what a model is evaluated in. COCO's has AP of each class, too.
_METRICS = {
    "coco": {
        **{"bbox": _AP, "segm": _AP, "keypoints": ("AP", "AP50", "AP75", "APm", "APl")},
        "box_proposals": _AR,
    },
    "lvis": {"bbox": _LVIS_AP, "segm": _LVIS_AP, "box_proposals": _AR},
    "pascal_voc": {"bbox": _AP[:3]},
}
EVALUATOR_TYPES = tuple(_METRICS)
#: what Detectron2's models can be evaluated in
TASKS = tuple(_METRICS["coco"])


def check_evaluator_type(dataset_name: str) -> str:
    """
    The evaluator type of a registered dataset, "coco" by default.

    Raises:
        InputError: if it is none of :data:`EVALUATOR_TYPES`.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type not in EVALUATOR_TYPES:
        raise InputError(
            f"dataset {dataset_name!r}: no evaluator for its type {evaluator_type!r}; "
            f"supported are {', '.join(EVALUATOR_TYPES)}"
        )
    return evaluator_type


def _lvis_evaluator() -> Optional[Callable]:
    """The best evaluator of LVIS' metrics that works, if any."""
    if has_lvis_metrics():
        return LibraLVISEvaluator
    # The last release of the package uses np.float, which NumPy 1.24 removed.
    works = importlib.util.find_spec("lvis") is not None and hasattr(np, "float")
    return LVISEvaluator if works else None


def reported_metrics(dataset_name: str, tasks: Sequence[str] = TASKS) -> List[str]:
    """
    The metrics, such as "bbox/AP", that the evaluator of :func:`build_evaluator` reports.

    Args:
        dataset_name: a registered dataset.
        tasks: those of :data:`TASKS` that the model is made for.

    Raises:
        InputError: see :func:`check_evaluator_type`.
    """
    evaluator_type = check_evaluator_type(dataset_name)
    if evaluator_type == "lvis" and _lvis_evaluator() is None:
        evaluator_type = "coco"
    by_task = {k: v for k, v in _METRICS[evaluator_type].items() if k in tasks}
    names = [f"{task}/{metric}" for task, metrics in by_task.items() for metric in metrics]
    classes = class_names(dataset_name) if evaluator_type == "coco" else ()
    for task in by_task if len(classes) > 1 else ():
        names += [f"{task}/AP-{name}" for name in classes if task != "box_proposals"]
    return names


def build_evaluator(
    dataset_name: str, output_dir: str, max_dets_per_image: int = COCO_MAX_DETS
) -> DatasetEvaluator:
    """
    The evaluator for a registered dataset: COCO's metrics for COCO, LVIS' for LVIS if
    faster-coco-eval or the package lvis can compute them (else COCO's), the VOC devkit's for Pascal
    VOC.

    Args:
        dataset_name: a registered dataset.
        output_dir: directory for the predictions, as JSON in COCO's result format.
        max_dets_per_image: limit of the model. COCO's metrics count that many or 100, LVIS'
            count 300.

    Raises:
        InputError: see :func:`check_evaluator_type` and :class:`LibraLVISEvaluator`.
    """
    evaluator_type = check_evaluator_type(dataset_name)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if evaluator_type == "lvis":
        lvis_evaluator = _lvis_evaluator()
        if lvis_evaluator is not None:
            return lvis_evaluator(dataset_name, output_dir=output_dir)
        logger.warning(
            f"{dataset_name}: evaluated with COCO's metrics, which count objects of classes that "
            "LVIS has not annotated in an image as false. `pip install faster-coco-eval` for those "
            "of LVIS"
        )
    limit = max(max_dets_per_image, COCO_MAX_DETS)
    return LibraCOCOEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=limit)
