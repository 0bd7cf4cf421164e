# SPDX-License-Identifier: Apache-2.0
from .build import TASKS, build_evaluator, check_evaluator_type, reported_metrics
from .coco_evaluator import LibraCOCOEvaluator
from .finite_predictions import finite_predictions
from .lvis_evaluator import LibraLVISEvaluator
from .pictures import PredictionPictures
from .report import plot_learning_curves, read_metrics, write_results
from .test_time_augmentation import RetinaNetWithTTA, add_test_time_augmentation

__all__ = [
    "LibraCOCOEvaluator",
    "LibraLVISEvaluator",
    "PredictionPictures",
    "RetinaNetWithTTA",
    "TASKS",
    "add_test_time_augmentation",
    "build_evaluator",
    "check_evaluator_type",
    "finite_predictions",
    "plot_learning_curves",
    "read_metrics",
    "reported_metrics",
    "write_results",
]
