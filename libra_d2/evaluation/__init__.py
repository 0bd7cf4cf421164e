# SPDX-License-Identifier: Apache-2.0
from .build import build_evaluator, check_evaluator_type
from .prediction_pictures import PredictionPictures
from .report import plot_learning_curves, read_metrics, write_results

__all__ = [
    "PredictionPictures",
    "build_evaluator",
    "check_evaluator_type",
    "plot_learning_curves",
    "read_metrics",
    "write_results",
]
