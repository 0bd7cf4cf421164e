# SPDX-License-Identifier: Apache-2.0
from .build import build_evaluator, check_evaluator_type
from .coco_evaluator import LibraCOCOEvaluator
from .pictures import PredictionPictures
from .report import plot_learning_curves, read_metrics, write_results
from .test_time_augmentation import RetinaNetWithTTA, add_test_time_augmentation

__all__ = [
    "LibraCOCOEvaluator",
    "PredictionPictures",
    "RetinaNetWithTTA",
    "add_test_time_augmentation",
    "build_evaluator",
    "check_evaluator_type",
    "plot_learning_curves",
    "read_metrics",
    "write_results",
]
