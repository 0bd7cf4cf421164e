# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from conftest import demo_cfg

from detectron2.export.torchscript_patch import patch_nonscriptable_classes
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone

from libra_d2.modeling import BalancedFeaturePyramid, add_balanced_feature_pyramid


def build(name="build_libra_resnet_fpn_backbone", **overrides):
    return build_backbone(demo_cfg(MODEL__BACKBONE__NAME=name, **overrides)).eval()


def randomized():
    backbone = build()
    for parameter in backbone.bfp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def test_is_the_plain_backbone_followed_by_bfp():
    libra, plain = randomized(), build("build_resnet_fpn_backbone")
    incompatible = plain.load_state_dict(libra.state_dict(), strict=False)
    assert not incompatible.missing_keys
    assert incompatible.unexpected_keys
    assert all(key.startswith("bfp.") for key in incompatible.unexpected_keys)

    image = torch.randn(2, 3, 96, 128)
    features, plain_features = libra(image), plain(image)
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]  # the top block's level included
    expected = libra.bfp(list(plain_features.values()))
    for a, b in zip(features.values(), expected):
        torch.testing.assert_close(a, b)


def test_attributes_of_the_plain_backbone():
    libra, plain = build(), build("build_resnet_fpn_backbone")
    assert type(libra) is type(plain)
    assert libra.output_shape() == plain.output_shape()
    assert libra.size_divisibility == plain.size_divisibility


def test_disabled():
    backbone = build(MODEL__LIBRA__BFP__ENABLED=False)
    plain = build("build_resnet_fpn_backbone")
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    backbone.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(backbone(image).values(), plain(image).values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overrides", [{"REFINE_TYPE": "conv"}, {"REFINE_LEVEL": 0}])
def test_config_keys(overrides):
    bfp = build(**{f"MODEL__LIBRA__BFP__{k}": v for k, v in overrides.items()}).bfp
    assert bfp.refine_level == overrides.get("REFINE_LEVEL", 2)
    assert type(bfp.refine).__name__ == (
        "Conv2d" if "REFINE_TYPE" in overrides else "NonLocalBlock"
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copy(copied):
    backbone, image = randomized(), torch.randn(1, 3, 64, 64)
    other = copied(backbone)
    torch.nn.init.zeros_(backbone.bfp.refine.conv_out.weight)  # the copy has its own weights
    assert not torch.equal(other(image)["p4"], backbone(image)["p4"])


@pytest.mark.parametrize("convert", ["script", "trace"])
def test_script_and_trace(convert):
    """Like its parent, for sizes other than the traced one."""
    patch_nonscriptable_classes()  # Detectron2's own preparation of ResNet and FPN
    backbone, image = randomized(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        if convert == "script":
            converted = torch.jit.script(backbone)
        else:
            converted = torch.jit.trace(backbone, torch.randn(1, 3, 96, 96), strict=False)
        expected = backbone(image)
        for name, feature in converted(image).items():
            torch.testing.assert_close(feature, expected[name])


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
            return {f"f{i}": ShapeSpec(channels=c) for i, c in enumerate(self.channels)}

    backbone = add_balanced_feature_pyramid(Pyramid((4, 4)), refine_level=1, refine_type="none")
    assert isinstance(backbone.bfp, BalancedFeaturePyramid)
    assert torch.equal(backbone(torch.ones(1, 1, 4, 4))["f0"], torch.full((1, 4, 4, 4), 2.0))

    with pytest.raises(ValueError, match="differ in their number of channels: {'f0': 4, 'f1': 8}"):
        add_balanced_feature_pyramid(Pyramid((4, 8)), refine_level=1)


def test_registered():
    assert "build_libra_resnet_fpn_backbone" in BACKBONE_REGISTRY


@pytest.mark.parametrize(
    "base", ["build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"]
)
def test_base_backbone_by_name(base):
    libra = build("build_libra_backbone", MODEL__LIBRA__BFP__BASE_BACKBONE=base)
    plain = build(base)
    assert libra.output_shape() == plain.output_shape()
    incompatible = libra.load_state_dict(plain.state_dict(), strict=False)
    assert not incompatible.unexpected_keys
    assert {key.split(".")[0] for key in incompatible.missing_keys} == {"bfp"}


def test_unknown_base_backbone():
    with pytest.raises(KeyError, match="build_none"):
        build("build_libra_backbone", MODEL__LIBRA__BFP__BASE_BACKBONE="build_none")


def regnet_fpn():
    from detectron2.modeling.backbone.fpn import FPN
    from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

    regnet = RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=6,
        w_a=10.0,
        w_0=8,
        w_m=2.0,
        group_width=8,
        norm="BN",
        out_features=["s1", "s2", "s3"],
    )
    return FPN(regnet, ["s1", "s2", "s3"], 16)


def swin_fpn():
    from detectron2.modeling.backbone import SwinTransformer
    from detectron2.modeling.backbone.fpn import FPN

    swin = SwinTransformer(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    return FPN(swin, ["p0", "p1", "p2", "p3"], 16, square_pad=64)


def vit_pyramid():
    from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    vit = ViT(img_size=64, embed_dim=16, depth=2, num_heads=2, use_rel_pos=True)
    return SimpleFeaturePyramid(
        vit, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), square_pad=64
    )


@pytest.mark.parametrize("make", [regnet_fpn, swin_fpn, vit_pyramid], ids=lambda f: f.__name__)
def test_other_pyramids(make):
    """What Detectron2 has besides ResNet; Swin and ViT are in its main branch only."""
    try:
        plain = make().eval()
    except ImportError as e:
        pytest.skip(f"not in this Detectron2: {e}")
    libra = add_balanced_feature_pyramid(copy.deepcopy(plain), refine_level=1)
    assert plain.state_dict().keys() == {k for k in libra.state_dict() if "bfp." not in k}
    assert getattr(libra, "padding_constraints", None) == getattr(
        plain, "padding_constraints", None
    )
    torch.nn.init.normal_(libra.bfp.refine.conv_out.weight, std=0.1)
    image = torch.randn(1, 3, 64, 64)
    features, expected = libra(image), libra.bfp(list(plain(image).values()))
    for a, b in zip(features.values(), expected):
        torch.testing.assert_close(a, b)


def trained_backbone():
    """In evaluation mode, with a refinement that is not the identity."""
    backbone = build_backbone(demo_cfg()).eval()
    torch.nn.init.normal_(backbone.bfp.refine.conv_out.weight, std=0.1)
    return backbone


@pytest.mark.parametrize("size", [(96, 128), (160, 96)])
def test_compile(size):
    """One graph, without breaks, the hook that adds the balanced features included."""
    backbone = trained_backbone()
    x = torch.randn(1, 3, *size)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for output, expected in zip(compiled(x).values(), backbone(x).values()):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_onnx(tmp_path):
    """The backbone exports for one image size; onnxruntime computes the same features."""
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone = trained_backbone()
    names = list(backbone.output_shape())

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, image):
            return tuple(self.backbone(image).values())

    image = torch.randn(1, 3, 96, 128)
    path = str(tmp_path / "backbone.onnx")
    torch.onnx.export(
        Features().eval(), (image,), path, input_names=["image"], output_names=names, dynamo=True
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = backbone(image)
    for name, output in zip(names, session.run(names, {"image": image.numpy()})):
        torch.testing.assert_close(torch.as_tensor(output), expected[name], rtol=1e-4, atol=1e-4)


def test_twice():
    """A second pyramid would balance what is balanced, in silence."""
    backbone = build_backbone(demo_cfg())
    with pytest.raises(ValueError, match="'FPN': it has a balanced feature pyramid already"):
        add_balanced_feature_pyramid(backbone)
