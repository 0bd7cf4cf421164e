# SPDX-License-Identifier: Apache-2.0
"""
The baseline and the variants with which Libra R-CNN is compared, in keys of YAML configs.

The baseline is the detector of the same config without the three ideas. Its box loss is
Detectron2's default: L1 in R-CNN (``ROI_BOX_HEAD.SMOOTH_L1_BETA`` 0.0), smooth L1 with a beta of
0.1 in RetinaNet (``RETINANET.SMOOTH_L1_LOSS_BETA``). The rest of mmdetection's recipe (training of
the RPN, matching, normalizers) is the same on both sides.
"""

from typing import Any, Dict, List, Tuple

__all__ = ["BASELINE", "DETECTRON2_RECIPE", "DISABLED", "VARIANTS"]

#: the keys and values that disable each idea
DISABLED: Dict[str, List[Any]] = {
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

#: the detector without any of the ideas
BASELINE: List[Any] = [x for options in DISABLED.values() for x in options]

#: the variants (baseline, each idea alone, all ideas) and the ideas that each disables
VARIANTS: Dict[str, Tuple[str, ...]] = {
    "baseline": tuple(DISABLED),
    **{idea: tuple(other for other in DISABLED if other != idea) for idea in DISABLED},
    "all": (),
    "all_reference": (),
}

#: Detectron2's recipe in place of mmdetection's; together with BASELINE, Detectron2's models
DETECTRON2_RECIPE: List[Any] = [
    *("MODEL.LIBRA.RPN.MAX_NEG_PER_POS", -1, "MODEL.LIBRA.RPN.NORMALIZER", "batch_size"),
    *("MODEL.LIBRA.RPN.LOW_QUALITY_IOU", -1.0, "MODEL.LIBRA.RPN.PADDING_ANCHORS", True),
    *("MODEL.LIBRA.RETINANET.NORMALIZER", "moving_average"),
    *("MODEL.LIBRA.RETINANET.LOW_QUALITY_IOU", -1.0),
    *("MODEL.LIBRA.RETINANET.PADDING_ANCHORS", True, "MODEL.LIBRA.RETINANET.P7_RELU", True),
    *("MODEL.LIBRA.RETINANET.CLIP_BOXES", False),
]
