# SPDX-License-Identifier: Apache-2.0
"""
What Libra R-CNN is compared with, in config keys: the only place that says so.

The baseline is the detector of the same config without the three ideas. Its box loss is the one
that Detectron2 has by default: plain L1 in R-CNN (``ROI_BOX_HEAD.SMOOTH_L1_BETA`` 0.0), smooth L1
with a beta of 0.1 in RetinaNet (``RETINANET.SMOOTH_L1_LOSS_BETA``). What mmdetection's recipe has
besides the ideas (training of the RPN, matching, normalizers) is the same on both sides.
"""

from typing import Any, Dict, List

__all__ = ["BASELINE", "DETECTRON2_RECIPE", "VARIANTS", "box_loss_name", "without"]

# What turns each idea off.
_OFF: Dict[str, List[Any]] = {
    "sampling": [
        *("MODEL.LIBRA.SAMPLER.NEGATIVES", "random"),
        *("MODEL.LIBRA.SAMPLER.POSITIVES", "random"),
    ],
    "feature_pyramid": ["MODEL.LIBRA.BFP.ENABLED", False],
    "balanced_l1": [
        *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"),
        *("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1"),
    ],
}


def without(*ideas: str) -> List[Any]:
    """
    Args:
        ideas: of "sampling", "feature_pyramid" and "balanced_l1".

    Returns:
        keys and values for ``cfg.merge_from_list`` that turn them off.
    """
    return [x for idea in ideas for x in _OFF[idea]]


#: the detector without any of the ideas
BASELINE = without(*_OFF)

#: what can be compared: the baseline, each idea alone, and all of them
VARIANTS: Dict[str, List[Any]] = {
    "baseline": BASELINE,
    "sampling": without("feature_pyramid", "balanced_l1"),
    "feature_pyramid": without("sampling", "balanced_l1"),
    "balanced_l1": without("feature_pyramid", "sampling"),
    "all": [],
    "all_reference": ["MODEL.LIBRA.SAMPLER.MODE", "reference"],
}

#: in place of mmdetection's recipe, Detectron2's: with BASELINE, the models of Detectron2
DETECTRON2_RECIPE: List[Any] = [
    *("MODEL.LIBRA.RPN.MAX_NEG_PER_POS", -1, "MODEL.LIBRA.RPN.NORMALIZER", "batch_size"),
    *("MODEL.LIBRA.RPN.LOW_QUALITY_IOU", -1.0, "MODEL.LIBRA.RPN.PADDING_ANCHORS", True),
    *("MODEL.LIBRA.RETINANET.NORMALIZER", "moving_average"),
    *("MODEL.LIBRA.RETINANET.LOW_QUALITY_IOU", -1.0),
    *("MODEL.LIBRA.RETINANET.PADDING_ANCHORS", True, "MODEL.LIBRA.RETINANET.P7_RELU", True),
    *("MODEL.LIBRA.RETINANET.CLIP_BOXES", False),
]


def box_loss_name(beta: float) -> str:
    """What a smooth L1 loss with this beta is, such as "L1" or "smooth L1 (beta 0.1)"."""
    return f"smooth L1 (beta {beta:g})" if beta > 0 else "L1"
