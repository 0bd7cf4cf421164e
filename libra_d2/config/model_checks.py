# SPDX-License-Identifier: Apache-2.0
"""What is judged about a recipe by the model that it makes: settings that no part of it reads."""

import logging
from typing import Any, Iterator, Tuple

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import ProposalNetwork, RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.logger import log_first_n

from ..errors import InputError
from ..modeling import (
    AffineBatchNorm2d,
    BalancedFeaturePyramid,
    BalancedSamplingMixin,
    LibraFastRCNNOutputLayers,
    LibraRetinaNet,
    LibraRPN,
)
from .defaults import add_libra_config

__all__ = ["check_box_losses", "warn_of_unread_keys"]

_DETECTRON2_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# For each part with a box loss: the class that knows balanced L1 loss, the method that computes it,
# the key, and how to get that class.
_BOX_LOSSES = (
    (
        *(FastRCNNOutputLayers, LibraFastRCNNOutputLayers, "box_reg_loss"),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
        "use LibraROIHeads, LibraCascadeROIHeads or LibraRes5ROIHeads as MODEL.ROI_HEADS.NAME",
    ),
    (
        *(RetinaNet, LibraRetinaNet, "losses", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE"),
        "use LibraRetinaNet as MODEL.META_ARCHITECTURE",
    ),
    (
        *(RPN, None, "losses", "MODEL.RPN.BBOX_REG_LOSS_TYPE"),
        "balanced L1 loss is one of the second stage",
    ),
)
# Keys of MODEL.LIBRA, and the parts of a model of which one reads them.
_READERS = {
    "BFP": (BalancedFeaturePyramid,),
    "SAMPLER": (BalancedSamplingMixin,),
    "BALANCED_L1": (LibraFastRCNNOutputLayers, LibraRetinaNet),
    "RPN": (LibraRPN,),
    "RETINANET": (LibraRetinaNet,),
    "TRAIN_NORM_AFFINE": (AffineBatchNorm2d,),
}


def check_box_losses(model: nn.Module) -> None:
    """
    Raises:
        InputError: if a part of ``model`` has a box loss that it does not know.
    """
    for name, module in model.named_modules():
        for parent, libra, method, key, hint in _BOX_LOSSES:
            if not isinstance(module, parent):
                continue
            known = {getattr(x, method) for x in (parent, libra, LibraRPN) if hasattr(x, method)}
            if getattr(type(module), method) not in known:
                continue  # a class of the user's, with losses of its own
            losses = _DETECTRON2_LOSSES
            if libra is not None and isinstance(module, libra):
                losses = (*losses, "balanced_l1")
            if module.box_reg_loss_type not in losses:
                place = f"{name}.box_reg_loss_type".lstrip(".")
                raise InputError(
                    f"{key} ({place} in a LazyConfig) is {module.box_reg_loss_type!r}, but a "
                    f"{type(module).__name__} knows {', '.join(losses)}: {hint}"
                )


def _changed(cfg: CfgNode, defaults: CfgNode, prefix: str) -> Iterator[Tuple[str, Any]]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _changed(value, defaults[name], f"{prefix}{name}.")
        elif value != defaults[name]:
            yield f"{prefix}{name}", value


def warn_of_unread_keys(cfg: CfgNode, model: nn.Module) -> None:
    """
    Log, once, the keys of ``MODEL.LIBRA`` that are set and that no part of ``model`` reads.

    Args:
        cfg: the config that it was built with.
        model: any.
    """
    defaults = CfgNode({"MODEL": CfgNode()})
    add_libra_config(defaults)
    modules = list(model.modules())
    # What the second stage, or the RPN, reads goes with a model that is there for the other.
    without = ["SAMPLER", "BALANCED_L1"] if isinstance(model, ProposalNetwork) else []
    if cfg.MODEL.LOAD_PROPOSALS:
        without.append("RPN")
    if not cfg.MODEL.LIBRA.BFP.ENABLED:
        without.append("BFP")
    unread = [
        f"MODEL.LIBRA.{key}"
        for key, _ in _changed(cfg.MODEL.LIBRA, defaults.MODEL.LIBRA, "")
        if (section := key.split(".")[0]) in _READERS
        and section not in without
        and not any(isinstance(module, _READERS[section]) for module in modules)
    ]
    if unread:
        message = f"No part of this model reads {', '.join(unread)}"
        log_first_n(logging.WARNING, message, name=__name__, key="message")
