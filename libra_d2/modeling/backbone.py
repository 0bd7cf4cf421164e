# SPDX-License-Identifier: Apache-2.0
"""Detectron2 backbones with a balanced feature pyramid."""

from typing import Dict, Optional, Tuple

import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.utils.registry import locate

from ..errors import ArgumentError
from .balanced_feature_pyramid import BalancedFeaturePyramid
from .batch_norm import train_norm_affine

__all__ = [
    "add_balanced_feature_pyramid",
    "build_balanced_backbone",
    "build_libra_backbone",
    "build_libra_resnet_fpn_backbone",
]


def _balance_outputs(
    self, input: Tuple[torch.Tensor], output: Dict[str, torch.Tensor]
) -> Dict[str, torch.Tensor]:
    """Forward hook, with the signature that torch.jit.script requires."""
    balanced = self.bfp(list(output.values()))
    return dict(zip(output.keys(), balanced))


_P4_STRIDE = 16


def add_balanced_feature_pyramid(
    backbone: Backbone, *, refine_level: Optional[int] = None, refine_type: str = "non_local"
) -> Backbone:
    """
    Let ``backbone`` return balanced features. It is modified in place.

    The balanced feature pyramid becomes the child ``bfp`` of the backbone, and a forward hook
    applies it to the outputs. Unlike a wrapper this keeps class, attributes (``bottom_up``,
    ``size_divisibility``, ...) and checkpoint keys of the backbone.

    Args:
        backbone: returns a dict of features from high to low resolution, such as
            :class:`detectron2.modeling.FPN`, with the same number of channels at each level.
        refine_level: see :class:`BalancedFeaturePyramid`. None for P4, the level with a stride of
            16, as in the paper.
        refine_type: see :class:`BalancedFeaturePyramid`.

    Returns: ``backbone``.

    Raises:
        ArgumentError: if the levels differ in their number of channels, the backbone is balanced
            already, or an argument is out of range.
    """
    name = type(backbone).__name__
    if isinstance(getattr(backbone, "bfp", None), BalancedFeaturePyramid):
        rule = "it has a balanced feature pyramid already; a second one would change its features "
        raise ArgumentError("backbone", name, rule + "once more")
    shapes = backbone.output_shape()
    channels = {level: shape.channels for level, shape in shapes.items()}
    if len(set(channels.values())) != 1:
        rule = (
            "use a pyramid. What is averaged must have as many channels at each level, but its "
            f"features differ in their number of channels: {channels}"
        )
        raise ArgumentError("backbone", name, rule)
    if refine_level is None:
        strides = [shape.stride for shape in shapes.values()]
        if _P4_STRIDE not in strides:
            rule = f"no level has a stride of {_P4_STRIDE}, but {strides}: name one by its index"
            raise ArgumentError("refine_level", None, rule)
        refine_level = strides.index(_P4_STRIDE)
    # Leaves the random state alone: the rest of a model has the same initial weights either way.
    with torch.random.fork_rng(devices=[]):
        backbone.bfp = BalancedFeaturePyramid(
            next(iter(channels.values())),
            num_levels=len(channels),
            refine_level=refine_level,
            refine_type=refine_type,
        )
    backbone.register_forward_hook(_balance_outputs)
    return backbone


def build_balanced_backbone(
    *,
    plain_backbone: str,
    balanced: bool = True,
    refine_level: Optional[int] = None,
    refine_type: str = "non_local",
    train_affine: bool = False,
    **kwargs,
) -> Backbone:
    """
    Build a backbone and balance it: a ``_target_`` for LazyConfigs in place of the plain
    backbone's, next to the same arguments.

    Args:
        plain_backbone: name of a class or function that returns a backbone, such as
            "detectron2.modeling.backbone.fpn.FPN".
        balanced: whether it gets a balanced feature pyramid.
        refine_level, refine_type: see :func:`add_balanced_feature_pyramid`.
        train_affine: whether to :func:`train_norm_affine`.
        kwargs: arguments of ``plain_backbone``.

    Raises:
        ArgumentError: see :func:`add_balanced_feature_pyramid`.
    """
    backbone = locate(plain_backbone)(**kwargs)
    if train_affine:
        train_norm_affine(backbone)
    if balanced:
        add_balanced_feature_pyramid(backbone, refine_level=refine_level, refine_type=refine_type)
    return backbone


def configure_backbone(cfg, backbone: Backbone) -> Backbone:
    """Apply ``MODEL.LIBRA.TRAIN_NORM_AFFINE`` and ``MODEL.LIBRA.BFP`` to ``backbone``, in place."""
    if cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE:
        train_norm_affine(backbone)
    bfp = cfg.MODEL.LIBRA.BFP
    if bfp.ENABLED:
        add_balanced_feature_pyramid(
            backbone, refine_level=bfp.REFINE_LEVEL, refine_type=bfp.REFINE_TYPE
        )
    return backbone


@BACKBONE_REGISTRY.register()
def build_libra_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """
    Build Detectron2's ResNet-FPN, with a balanced feature pyramid over all of its levels (the top
    block's included) unless ``MODEL.LIBRA.BFP.ENABLED`` is False. Its checkpoint keys are those of
    ``build_resnet_fpn_backbone`` and ``bfp.*``.
    """
    return configure_backbone(cfg, build_resnet_fpn_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_libra_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """
    Build the backbone that ``MODEL.LIBRA.BFP.BASE_BACKBONE`` names, any registered one with a
    pyramid, and add a balanced feature pyramid unless ``MODEL.LIBRA.BFP.ENABLED`` is False. Its
    checkpoint keys are those of the named one and ``bfp.*``.

    Raises:
        KeyError: if there is no backbone of that name.
        ArgumentError: see :func:`add_balanced_feature_pyramid`.
    """
    base = BACKBONE_REGISTRY.get(cfg.MODEL.LIBRA.BFP.BASE_BACKBONE)(cfg, input_shape)
    return configure_backbone(cfg, base)
