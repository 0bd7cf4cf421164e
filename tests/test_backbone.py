# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import demo_cfg

from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone, build_backbone

from libra_d2.errors import ArgumentError
from libra_d2.modeling import (
    AffineBatchNorm2d,
    BalancedFeaturePyramid,
    NonLocalBlock,
    add_balanced_feature_pyramid,
    build_balanced_backbone,
)

pytestmark = pytest.mark.rounding


def build(name="build_libra_resnet_fpn_backbone", **overrides):
    return build_backbone(demo_cfg(MODEL__BACKBONE__NAME=name, **overrides)).eval()


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("build_libra_resnet_fpn_backbone", "build_resnet_fpn_backbone"),
        ("build_libra_backbone", "build_retinanet_resnet_fpn_backbone"),
        ("build_libra_retinanet_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_is_the_plain_backbone(name, base, enabled):
    """
    The plain backbone and the balanced pyramid on top: a seed gives the same weights and leaves the
    random state as the plain one does.
    """
    overrides = {
        "MODEL__LIBRA__BFP__BASE_BACKBONE": base,
        "MODEL__LIBRA__RETINANET__P7_RELU": True,
        "MODEL__LIBRA__BFP__ENABLED": enabled,
    }
    torch.manual_seed(3)
    libra, random = build(name, **overrides), torch.rand(1)
    torch.manual_seed(3)
    plain = build(base)
    assert torch.rand(1) == random
    others = {k: v for k, v in libra.state_dict().items() if not k.startswith("bfp.")}
    assert others.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, others[key]), key
    assert hasattr(libra, "bfp") == enabled
    assert type(libra) is type(plain)
    assert libra.output_shape() == plain.output_shape()
    assert libra.size_divisibility == plain.size_divisibility
    if enabled:
        torch.nn.init.normal_(libra.bfp.refine.conv_out.weight, std=0.1)
    image = torch.randn(2, 3, 96, 128)
    features, expected = libra(image), plain(image)
    assert list(features) == list(expected)  # the top block's levels included
    balanced = libra.bfp(list(expected.values())) if enabled else expected.values()
    for a, b in zip(features.values(), balanced):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("train_affine", [True, False])
def test_in_place_of_the_plain_backbone(balanced, train_affine):
    """In a LazyConfig: made from the name and the arguments of the plain one."""
    bottom_up = build(MODEL__RESNETS__NORM="FrozenBN").bottom_up
    arguments = {"bottom_up": bottom_up, "in_features": ["res3", "res4"], "out_channels": 16}
    arguments["plain_backbone"] = "detectron2.modeling.backbone.fpn.FPN"
    choice = {"balanced": balanced, "train_affine": train_affine}
    default = choice == {"balanced": True, "train_affine": False}
    refinement = {} if default else {"refine_level": 0, "refine_type": "conv"}
    backbone = build_balanced_backbone(**arguments, **({} if default else choice), **refinement)
    assert type(backbone) is FPN
    assert any(isinstance(x, AffineBatchNorm2d) for x in backbone.modules()) == train_affine
    assert hasattr(backbone, "bfp") == balanced
    if balanced:
        assert backbone.bfp.refine_level == (1 if default else 0)  # p3 and p4
        assert isinstance(backbone.bfp.refine, NonLocalBlock) == default


def test_config_keys():
    assert isinstance(build(MODEL__LIBRA__BFP__REFINE_LEVEL=0).bfp.refine, NonLocalBlock)
    keys = {"BFP__REFINE_LEVEL": 1, "BFP__REFINE_TYPE": "conv", "TRAIN_NORM_AFFINE": True}
    keys = {f"MODEL__LIBRA__{name}": value for name, value in keys.items()}
    backbone = build(MODEL__RESNETS__NORM="FrozenBN", **keys)
    assert backbone.bfp.refine_level == 1
    assert not isinstance(backbone.bfp.refine, NonLocalBlock)
    plain = build(MODEL__RESNETS__NORM="FrozenBN", MODEL__LIBRA__BFP__ENABLED=False, **keys)
    for bottom_up in (backbone.bottom_up, plain.bottom_up):
        assert isinstance(bottom_up.stem.conv1.norm, AffineBatchNorm2d)


def test_any_backbone_with_a_pyramid():
    """Neither a config nor Detectron2's FPN is needed; levels must agree in their channels."""

    class Pyramid(Backbone):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            return {"f0": x.repeat(1, 4, 1, 1), "f1": x.repeat(1, 4, 1, 1)[:, :, ::2, ::2]}

        def output_shape(self):
            channels = enumerate(self.channels)
            return {f"f{i}": ShapeSpec(channels=c, stride=i + 1) for i, c in channels}

    backbone = add_balanced_feature_pyramid(Pyramid((4, 4)), refine_level=1, refine_type="none")
    assert isinstance(backbone.bfp, BalancedFeaturePyramid)
    assert torch.equal(backbone(torch.ones(1, 1, 4, 4))["f0"], torch.full((1, 4, 4, 4), 2.0))

    with pytest.raises(ValueError, match="differ in their number of channels: {'f0': 4, 'f1': 8}"):
        add_balanced_feature_pyramid(Pyramid((4, 8)), refine_level=1)
    message = r"^refine_level is None: no level has a stride of 16, but \[1, 2\]"
    with pytest.raises(ArgumentError, match=message):
        add_balanced_feature_pyramid(Pyramid((4, 4)))
    with pytest.raises(ArgumentError, match="'Pyramid': it has a balanced feature pyramid already"):
        add_balanced_feature_pyramid(backbone)
