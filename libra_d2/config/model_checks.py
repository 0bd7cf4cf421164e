# SPDX-License-Identifier: Apache-2.0
"""
Checks of a built model: box losses that it does not know, features that it does not have, and keys
that no part of it reads.
"""

import logging
import re

from omegaconf import ListConfig
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
    LibraCascadeROIHeads,
    LibraFastRCNNOutputLayers,
    LibraRetinaNet,
    LibraRPN,
)
from ..utils.leaves import leaves
from .defaults import add_libra_config

__all__ = ["check_box_losses", "check_features", "warn_of_unread_keys"]

_DETECTRON2_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# Parts with a box loss, their subclass with balanced L1 loss, the method that computes the loss,
# the key, and how to get the subclass.
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
# Sections of MODEL.LIBRA, and the parts of a model that read them.
_READERS = {
    "BFP": (BalancedFeaturePyramid,),
    "SAMPLER": (BalancedSamplingMixin,),
    "BALANCED_L1": (LibraFastRCNNOutputLayers, LibraRetinaNet),
    "RPN": (LibraRPN,),
    "RETINANET": (LibraRetinaNet,),
    "CASCADE": (LibraCascadeROIHeads,),
    "ROI_HEADS": (BalancedSamplingMixin,),
    "NORMALIZE_OVER": (LibraRPN, LibraFastRCNNOutputLayers, LibraRetinaNet),
    "TRAIN_NORM_AFFINE": (AffineBatchNorm2d,),
}
_SECOND_STAGE = ["SAMPLER", "BALANCED_L1", "CASCADE", "ROI_HEADS"]


def check_box_losses(model: nn.Module) -> None:
    """
    Raises:
        InputError: if a part of ``model`` is to use a box loss that it does not know.
    """
    for name, module in model.named_modules():
        for parent, libra, method, key, hint in _BOX_LOSSES:
            if not isinstance(module, parent):
                continue
            known = {getattr(x, method) for x in (parent, libra, LibraRPN) if hasattr(x, method)}
            if getattr(type(module), method) not in known:
                continue  # a user's class, with losses of its own
            losses = _DETECTRON2_LOSSES
            if libra is not None and isinstance(module, libra):
                losses = (*losses, "balanced_l1")
            if module.box_reg_loss_type not in losses:
                place = f"{name}.box_reg_loss_type".lstrip(".")
                raise InputError(
                    f"{key} ({place} in a LazyConfig) is {module.box_reg_loss_type!r}, but "
                    f"{type(module).__name__} supports {', '.join(losses)}: {hint}"
                )


def _is_users(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] not in ("detectron2", "libra_d2")


def check_features(model: nn.Module) -> None:
    """
    Raises:
        InputError: if a part of ``model`` reads features that the backbone does not have. Classes
            of a user are not checked, for they may get features from elsewhere.
    """
    try:
        known = model.backbone.output_shape()
    except (AttributeError, NotImplementedError):  # there is no backbone, or it is a user's
        return
    if _is_users(model):
        return
    parts = {"model": model}
    for name in ("proposal_generator", "roi_heads"):
        parts[f"model.{name}"] = getattr(model, name, None)
    for place, part in parts.items():
        if part is None or _is_users(part):
            continue
        names = [x for x in vars(part) if re.fullmatch(r"(\w+_)?in_features", x)]
        for name in names[::-1]:  # the last of several for the same is the most specific one
            features = getattr(part, name)
            for feature in features if isinstance(features, (list, tuple, ListConfig)) else ():
                if feature not in known:
                    raise InputError(
                        f"{place}.{name} has {feature!r}, but the backbone has {', '.join(known)}"
                    )


def warn_of_unread_keys(cfg: CfgNode, model: nn.Module) -> None:
    """
    Log once the keys of ``MODEL.LIBRA`` that are set in ``cfg`` but that no part of ``model``,
    built with it, reads.
    """
    original = CfgNode({"MODEL": CfgNode()})
    add_libra_config(original)
    defaults = dict(leaves(original))
    modules = list(model.modules())
    # A model of one stage may keep the keys of the other.
    without = [*_SECOND_STAGE] if isinstance(model, ProposalNetwork) else []
    if cfg.MODEL.LOAD_PROPOSALS:
        without.append("RPN")
    if not cfg.MODEL.LIBRA.BFP.ENABLED:
        without.append("BFP")
    unread = [
        key
        for key, value in leaves(cfg.MODEL.LIBRA, "MODEL.LIBRA.")
        if value != defaults[key]
        and (section := key.split(".")[2]) in _READERS
        and section not in without
        and not any(isinstance(module, _READERS[section]) for module in modules)
    ]
    if unread:
        message = f"No part of this model reads {', '.join(unread)}"
        log_first_n(logging.WARNING, message, name=__name__, key="message")
