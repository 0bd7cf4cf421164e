# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

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


def build(name="build_libra_resnet_fpn_backbone", **overrides):
    return build_backbone(demo_cfg(MODEL__BACKBONE__NAME=name, **overrides)).eval()


def randomized():
    """In evaluation mode, with a refinement that is not the identity."""
    backbone = build()
    for parameter in backbone.bfp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("build_libra_resnet_fpn_backbone", "build_resnet_fpn_backbone"),
        ("build_libra_backbone", "build_resnet_fpn_backbone"),
        ("build_libra_backbone", "build_retinanet_resnet_fpn_backbone"),
        ("build_libra_retinanet_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_is_the_plain_backbone(name, base, enabled):
    """And the balanced pyramid; a seed gives the same weights, and random numbers behind them."""
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
    """For a LazyConfig: by the name of the plain one and its arguments."""
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


@pytest.mark.parametrize("overrides", [{"REFINE_TYPE": "conv"}, {"REFINE_LEVEL": 0}])
def test_config_keys(overrides):
    bfp = build(**{f"MODEL__LIBRA__BFP__{k}": v for k, v in overrides.items()}).bfp
    assert bfp.refine_level == overrides.get("REFINE_LEVEL", 2)
    assert isinstance(bfp.refine, NonLocalBlock) == ("REFINE_TYPE" not in overrides)


def test_trained_norms():
    backbone = build(MODEL__RESNETS__NORM="FrozenBN", MODEL__LIBRA__TRAIN_NORM_AFFINE=True)
    assert isinstance(backbone.bottom_up.stem.conv1.norm, AffineBatchNorm2d)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copy(copied):
    """It balances its features, too, and with weights of its own."""
    backbone, image = randomized(), torch.randn(1, 3, 64, 64)
    other, before = copied(backbone), backbone(image)
    torch.nn.init.zeros_(backbone.bfp.refine.conv_out.weight)
    for name, feature in other(image).items():
        assert torch.equal(feature, before[name])
    assert not torch.equal(backbone(image)["p4"], before["p4"])


def test_any_backbone_with_a_pyramid():
    """No need of a config, or of Detectron2's FPN."""

    class Pyramid(Backbone):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            return {
                f"f{i}": x.repeat(1, c, 1, 1)[:, :, ::s, ::s]
                for i, (c, s) in enumerate(zip(self.channels, (1, 2)))
            }

        def output_shape(self):
            return {
                f"f{i}": ShapeSpec(channels=c, stride=i + 1) for i, c in enumerate(self.channels)
            }

    backbone = add_balanced_feature_pyramid(Pyramid((4, 4)), refine_level=1, refine_type="none")
    assert isinstance(backbone.bfp, BalancedFeaturePyramid)
    assert torch.equal(backbone(torch.ones(1, 1, 4, 4))["f0"], torch.full((1, 4, 4, 4), 2.0))

    with pytest.raises(ValueError, match="differ in their number of channels: {'f0': 4, 'f1': 8}"):
        add_balanced_feature_pyramid(Pyramid((4, 8)), refine_level=1)
    with pytest.raises(ArgumentError, match=r"no level has a stride of 16, but \[1, 2\]") as error:
        add_balanced_feature_pyramid(Pyramid((4, 4)))
    assert str(error.value).startswith("refine_level is None")


def test_compile():
    """One graph, without breaks, the hook that adds the balanced features included."""
    backbone, x = randomized(), torch.randn(1, 3, 96, 128)
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    with torch.no_grad():
        for output, expected in zip(compiled(x).values(), backbone(x).values()):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_twice():
    """A second pyramid would balance what is balanced, in silence."""
    backbone = build_backbone(demo_cfg())
    with pytest.raises(ArgumentError, match="'FPN': it has a balanced feature pyramid already"):
        add_balanced_feature_pyramid(backbone)
