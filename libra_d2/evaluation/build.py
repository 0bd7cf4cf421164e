# SPDX-License-Identifier: Apache-2.0
import importlib.util
import logging

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from ..errors import InputError
from .coco_evaluator import COCO_MAX_DETS, LibraCOCOEvaluator

__all__ = ["build_evaluator", "check_evaluator_type"]

logger = logging.getLogger(__name__)

EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")


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


def build_evaluator(
    dataset_name: str, output_dir: str, max_dets_per_image: int = COCO_MAX_DETS
) -> DatasetEvaluator:
    """
    The evaluator for a registered dataset: COCO's metrics for COCO, LVIS' for LVIS if the package
    lvis is installed and works (else COCO's), the VOC devkit's for Pascal VOC.

    Args:
        dataset_name: a registered dataset.
        output_dir: directory for the predictions, as JSON in COCO's result format.
        max_dets_per_image: limit of the model. COCO's metrics count that many or 100.

    Raises:
        InputError: see :func:`check_evaluator_type`.
    """
    evaluator_type = check_evaluator_type(dataset_name)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if evaluator_type == "lvis":
        # The last release of the package uses np.float, which NumPy 1.24 removed.
        if importlib.util.find_spec("lvis") is not None and hasattr(np, "float"):
            return LVISEvaluator(dataset_name, output_dir=output_dir)  # counts 300 by default
        logger.warning(
            f"{dataset_name}: evaluated with COCO's metrics, which count objects of classes that "
            "LVIS has not annotated in an image as false. `pip install lvis 'numpy<1.24'` for "
            "those of LVIS"
        )
    limit = max(max_dets_per_image, COCO_MAX_DETS)
    return LibraCOCOEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=limit)
