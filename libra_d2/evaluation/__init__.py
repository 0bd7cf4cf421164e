# SPDX-License-Identifier: Apache-2.0
from .build import build_evaluator, check_evaluator_type
from .prediction_pictures import PredictionPictures

__all__ = ["PredictionPictures", "build_evaluator", "check_evaluator_type"]
