# SPDX-License-Identifier: Apache-2.0
"""Detectron2 backbones with a balanced feature pyramid."""

from typing import Dict, Tuple

import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

from .balanced_feature_pyramid import BalancedFeaturePyramid
from .reference_recipe.batch_norm import train_norm_affine

__all__ = [
    "add_balanced_feature_pyramid",
    "build_libra_backbone",
    "build_libra_resnet_fpn_backbone",
]


def _balance_outputs(
    self, input: Tuple[torch.Tensor], output: Dict[str, torch.Tensor]
) -> Dict[str, torch.Tensor]:
    """Forward hook; its signature and annotations are those that torch.jit.script asks for."""
    balanced = self.bfp(list(output.values()))
    return dict(zip(output.keys(), balanced))


def add_balanced_feature_pyramid(
    backbone: Backbone, *, refine_level: int = 2, refine_type: str = "non_local"
) -> Backbone:
    """
    Let ``backbone`` return balanced features. It is modified in place.

    The balanced feature pyramid becomes the child ``bfp`` of the backbone and is applied to its
    outputs by a forward hook, rather than by a module around it: class, attributes
    (``bottom_up``, ``size_divisibility``, ...) and checkpoint keys of the backbone stay what they
    are, for any pyramid that Detectron2 or a user can build.

    Args:
        backbone: returns a dict of features from high to low resolution, such as
            :class:`detectron2.modeling.FPN`, with the same number of channels at each level.
        refine_level, refine_type: see :class:`BalancedFeaturePyramid`.

    Returns:
        ``backbone``.

    Raises:
        ValueError: if the levels differ in their number of channels, the backbone is balanced
            already, or an argument is out of range.
    """
    if isinstance(getattr(backbone, "bfp", None), BalancedFeaturePyramid):
        raise ValueError(
            f"{type(backbone).__name__} has a balanced feature pyramid already; a second one would "
            "change its features once more"
        )
    channels = {name: shape.channels for name, shape in backbone.output_shape().items()}
    if len(set(channels.values())) != 1:
        raise ValueError(
            "A balanced feature pyramid averages the levels of a pyramid, but the features of "
            f"{type(backbone).__name__} differ in their number of channels: {channels}"
        )
    backbone.bfp = BalancedFeaturePyramid(
        next(iter(channels.values())),
        num_levels=len(channels),
        refine_level=refine_level,
        refine_type=refine_type,
    )
    backbone.register_forward_hook(_balance_outputs)
    return backbone


def configure_backbone(cfg, backbone: Backbone) -> Backbone:
    """
    Make ``backbone`` what ``cfg.MODEL.LIBRA`` says, in place: :func:`train_norm_affine` if
    ``TRAIN_NORM_AFFINE``, and :func:`add_balanced_feature_pyramid` unless disabled.
    """
    if cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE:
        backbone = train_norm_affine(backbone)
    bfp = cfg.MODEL.LIBRA.BFP
    if not bfp.ENABLED:
        return backbone
    return add_balanced_feature_pyramid(
        backbone, refine_level=bfp.REFINE_LEVEL, refine_type=bfp.REFINE_TYPE
    )


@BACKBONE_REGISTRY.register()
def build_libra_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """
    Build Detectron2's ResNet-FPN, with a balanced feature pyramid over all of its levels (the top
    block's included) unless ``MODEL.LIBRA.BFP.ENABLED`` is False.

    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`.
        input_shape: shape of the input image.

    Returns:
        the backbone; its checkpoint keys are those of ``build_resnet_fpn_backbone`` and ``bfp.*``.
    """
    return configure_backbone(cfg, build_resnet_fpn_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_libra_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """
    Build the backbone that ``MODEL.LIBRA.BFP.BASE_BACKBONE`` names, any registered one with a
    pyramid, and add a balanced feature pyramid unless ``MODEL.LIBRA.BFP.ENABLED`` is False.

    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`.
        input_shape: shape of the input image.

    Returns:
        the backbone; its checkpoint keys are those of the named one and ``bfp.*``.

    Raises:
        KeyError: if there is no backbone of that name.
        ValueError: see :func:`add_balanced_feature_pyramid`.
    """
    base = BACKBONE_REGISTRY.get(cfg.MODEL.LIBRA.BFP.BASE_BACKBONE)(cfg, input_shape)
    return configure_backbone(cfg, base)
