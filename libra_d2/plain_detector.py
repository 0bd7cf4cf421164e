# SPDX-License-Identifier: Apache-2.0
"""
What Libra R-CNN is compared with, in config keys: the only place that says so.

The baseline is the detector of the same config without the three ideas. Its box loss is the one
that Detectron2 has by default: plain L1 in R-CNN (``ROI_BOX_HEAD.SMOOTH_L1_BETA`` 0.0), smooth L1
with a beta of 0.1 in RetinaNet (``RETINANET.SMOOTH_L1_LOSS_BETA``). What mmdetection's recipe has
besides the ideas (training of the RPN, matching, normalizers) is the same on both sides.
"""

from typing import Any, Dict, List, Tuple

from detectron2.config import CfgNode

from .lazy import LazyView, turn_off

__all__ = [
    "BASELINE",
    "DETECTRON2_RECIPE",
    "VARIANTS",
    "box_loss_name",
    "has_ideas",
    "variant_options",
    "without",
]

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

#: what can be compared: the baseline, each idea alone, all of them; with the ideas that are off
VARIANTS: Dict[str, Tuple[str, ...]] = {
    "baseline": tuple(_OFF),
    "sampling": ("feature_pyramid", "balanced_l1"),
    "feature_pyramid": ("sampling", "balanced_l1"),
    "balanced_l1": ("feature_pyramid", "sampling"),
    "all": (),
    "all_reference": (),
}


def variant_options(cfg: CfgNode, variant: str) -> List[str]:
    """
    Args:
        cfg: the config of a detector with all ideas, or a view of a LazyConfig.
        variant: of :data:`VARIANTS`.

    Returns:
        what the command line adds to that config for it.
    """
    off, reference = VARIANTS[variant], variant == "all_reference"
    if isinstance(cfg, LazyView):
        mode = ["model.roi_heads.proposal_sampler.mode=reference"] if reference else []
        return [*turn_off(cfg.lazy.model, *off), *mode]
    mode = ["MODEL.LIBRA.SAMPLER.MODE", "reference"] if reference else []
    return [str(x) for x in (*without(*off), *mode)]


def has_ideas(cfg: CfgNode) -> bool:
    """Whether a config has anything of Libra R-CNN that can be turned off."""
    if isinstance(cfg, LazyView):
        return bool(turn_off(cfg.lazy.model, *_OFF))
    model = cfg.MODEL
    names = (model.META_ARCHITECTURE, model.BACKBONE.NAME, model.ROI_HEADS.NAME)
    return any("libra" in name.lower() for name in names)


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
