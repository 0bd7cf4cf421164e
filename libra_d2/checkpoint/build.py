# SPDX-License-Identifier: Apache-2.0
"""Models of a config, with or without trained weights."""

from torch import nn

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from ..errors import ArgumentError, InputError
from .checkpointer import LibraCheckpointer

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
    Detectron2's function of this name, whose errors name the key of the config.

    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`.

    Returns:
        the model, in training mode.

    Raises:
        InputError: if a name is not registered, or a value is out of its range.
    """
    _check_names(cfg)
    try:
        return modeling.build_model(cfg)
    except ArgumentError as e:
        raise InputError(e.in_config) from e


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
