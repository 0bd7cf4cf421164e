# SPDX-License-Identifier: Apache-2.0
from .build import build_evaluator
from .prediction_pictures import PredictionPictures

__all__ = ["PredictionPictures", "build_evaluator"]
