# SPDX-License-Identifier: Apache-2.0
"""Models of a config, with or without trained weights."""

from typing import Optional

import torch
from torch import nn

from detectron2 import modeling
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from ..errors import ArgumentError, InputError, one_line
from ..lazy import LazyView
from .checkpointer import LibraCheckpointer
from .unread_settings import check_box_losses, warn_of_unread_keys

__all__ = ["build_model", "build_trained_model"]


def _check_names(cfg: CfgNode) -> None:
    """Raise InputError if the config names a component that nobody has registered."""
    model = cfg.MODEL
    names = [("META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY)]
    names.append(("BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY))
    if model.BACKBONE.NAME == "build_libra_backbone":
        base = model.LIBRA.BFP.BASE_BACKBONE
        names.append(("LIBRA.BFP.BASE_BACKBONE", base, BACKBONE_REGISTRY))
    if "RCNN" in model.META_ARCHITECTURE or model.META_ARCHITECTURE == "ProposalNetwork":
        if not model.LOAD_PROPOSALS:
            name = model.PROPOSAL_GENERATOR.NAME
            names.append(("PROPOSAL_GENERATOR.NAME", name, PROPOSAL_GENERATOR_REGISTRY))
        names.append(("ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY))
    for key, name, registry in names:
        if name not in registry:
            known = ", ".join(sorted(name for name, _ in registry))
            raise InputError(f"MODEL.{key} is {name!r}: nothing has that name; there are {known}")


def build_model(cfg: CfgNode) -> nn.Module:
    """
    Detectron2's function of this name, for YAML and for LazyConfigs, whose errors name the key of
    the config. Keys of ``MODEL.LIBRA`` that no part of the model reads are warned of.

    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`.

    Returns:
        the model, in training mode.

    Raises:
        InputError: if a name is not registered, a value is out of its range, or parts of the model
            do not go together.
    """
    try:
        if isinstance(cfg, LazyView):
            model = _build_lazy_model(cfg)
        else:
            _check_names(cfg)
            model = modeling.build_model(cfg)
    except ArgumentError as e:
        raise InputError(str(e) if isinstance(cfg, LazyView) else e.in_config) from e
    except KeyError as e:
        raise _missing_level(cfg, e) or e from None
    check_box_losses(model)
    if not isinstance(cfg, LazyView):
        warn_of_unread_keys(cfg, model)
    return model


def _build_lazy_model(cfg: LazyView) -> nn.Module:
    """The model of a LazyConfig, or its region proposal network alone."""
    config = cfg.current().model
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" and "roi_heads" in config:
        names = ("backbone", "proposal_generator", "pixel_mean", "pixel_std")
        parts = {name: config[name] for name in names}
        config = L(modeling.ProposalNetwork)(**parts)
    try:
        model = instantiate(config)
    except ArgumentError:
        raise
    except (AssertionError, AttributeError, TypeError, ValueError) as e:
        # What is wrong with an argument of a class is known to that class alone.
        raise InputError(f"model: it cannot be built: {one_line(e)}") from e
    return model.to(torch.device(cfg.MODEL.DEVICE))


def _missing_level(cfg: CfgNode, error: KeyError) -> Optional[InputError]:
    """What to say if a part of the model wants features that its backbone does not have."""
    if isinstance(cfg, LazyView):
        return InputError(f"model: it cannot be built: there is no {error}")
    model, level = cfg.MODEL, error.args[0] if error.args else None
    for key, section in (
        ("RETINANET.IN_FEATURES", model.RETINANET),
        ("RPN.IN_FEATURES", model.RPN),
        ("ROI_HEADS.IN_FEATURES", model.ROI_HEADS),
        ("FPN.IN_FEATURES", model.FPN),
    ):
        if level in section.IN_FEATURES:
            hint = (
                "; the backbone of a RetinaNet is build_libra_retinanet_resnet_fpn_backbone"
                if level in ("p6", "p7")
                else ""
            )
            return InputError(
                f"MODEL.{key} names {level!r}, which MODEL.BACKBONE.NAME {model.BACKBONE.NAME!r} "
                f"does not return{hint}"
            )
    return None


def build_trained_model(cfg: CfgNode, *, save_dir: str = "", resume: bool = False) -> nn.Module:
    """
    Build the model of a config and load its weights, all of which must be there.

    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`; ``MODEL.WEIGHTS`` names a
            file in any format that :class:`LibraCheckpointer` reads.
        save_dir: where checkpoints are, for ``resume``.
        resume: whether to load the last checkpoint in ``save_dir``, if there is one, in place of
            ``MODEL.WEIGHTS``.

    Returns:
        the model, in evaluation mode.

    Raises:
        InputError: if no weights are named, they are those of another model or cannot be read; see
            also :func:`build_model`.
    """
    model = build_model(cfg)
    checkpointer = LibraCheckpointer(model, save_dir, complete=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise InputError("MODEL.WEIGHTS: name the weights of a trained model")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model.eval()
