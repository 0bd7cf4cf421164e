# SPDX-License-Identifier: Apache-2.0
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, load_cfg
from test_checkpoint import net, save, values

from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.checkpoint.mmdetection import (
    from_mmdetection,
    is_mmdetection,
    to_detectron2_checkpoint,
    to_mmdetection,
    unwrap_mmdetection,
)
from libra_d2.errors import InputError

BOTTOM_UP, RPN = "backbone.bottom_up", "proposal_generator.rpn_head"
# Names of modules in mmdetection and Detectron2; test_parity compares whole models.
RCNN = {
    "backbone.conv1": f"{BOTTOM_UP}.stem.conv1",
    "backbone.bn1": f"{BOTTOM_UP}.stem.conv1.norm",
    "backbone.layer2.0.downsample.1": f"{BOTTOM_UP}.res3.0.shortcut.norm",
    "backbone.layer3.22.conv2": f"{BOTTOM_UP}.res4.22.conv2",
    "neck.lateral_convs.0.conv": "backbone.fpn_lateral2",
    "rpn_head.rpn_cls": f"{RPN}.objectness_logits",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc2",
    "neck.fpn_convs.1.conv": "backbone.fpn_output3",
    "roi_head.bbox_head.shared_convs.0.gn": "roi_heads.box_head.conv1.norm",
    "roi_head.bbox_head.2.shared_fcs.0": "roi_heads.box_head.2.fc1",
    "roi_head.mask_head.1.convs.3.conv": "roi_heads.mask_head.1.mask_fcn4",
}
RETINANET = {
    "backbone.layer4.2.bn3": f"{BOTTOM_UP}.res5.2.conv3.norm",
    "neck.0.lateral_convs.0.conv": "backbone.fpn_lateral3",
    "neck.0.fpn_convs.4.conv": "backbone.top_block.p7",
    "neck.1.refine.conv": "backbone.bfp.refine",
    "bbox_head.cls_convs.3.conv": "head.cls_subnet.6",
    "bbox_head.reg_convs.1.conv": "head.bbox_subnet.2",
    "bbox_head.retina_cls": "head.cls_score",
}


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


@pytest.mark.parametrize("names", [RCNN, RETINANET], ids=["R-CNN", "RetinaNet"])
def test_names(names):
    """Both directions; num_batches_tracked is dropped, and 0 on the way back."""
    theirs, ours = {}, {}
    for i, (name, other) in enumerate(names.items()):
        norm = "bn" in name or "downsample.1" in name
        for leaf in ("weight", "running_var") if norm else ("weight", "bias"):
            theirs[f"{name}.{leaf}"] = ours[f"{other}.{leaf}"] = torch.full((36,), float(i))
        if norm:
            theirs[f"{name}.num_batches_tracked"] = torch.tensor(0)
    assert equal(from_mmdetection(theirs), ours)
    assert equal(to_mmdetection(ours), theirs)
    assert not is_mmdetection(ours)
    assert is_mmdetection({"backbone.layer1.0.conv1.weight": 1})  # of a ResNetV1d
    extra = {"pixel_mean": 1, "pixel_std": 1, "anchor_generator.cell_anchors.0": 1}
    assert equal(to_mmdetection({**extra, **ours}), theirs)
    found = from_mmdetection({**theirs, "ema_backbone_conv1_weight": 1, "mask.weight": theirs})
    assert found.pop("mask.weight") is theirs
    assert equal(found, ours)
    for name in ("mask.weight", "pixel_mean.weight"):
        with pytest.raises(InputError, match=f"^'{name}' has no counterpart in mmdetection's"):
            to_mmdetection({**ours, name: 1})


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("neck.0.downsample_convs.0.conv.weight", "PAFPN"),
        ("neck.pafpn_convs.1.conv.bias", "PAFPN"),
        ("roi_head.semantic_head.conv_logits.weight", "the semantic branch of HTC"),
        ("roi_head.mask_head.1.conv_res.conv.weight", "the mask information flow of HTC"),
        ("roi_head.mask_iou_head.fc_mask_iou.bias", "the mask IoU head of Mask Scoring R-CNN"),
        ("roi_head.bbox_head.2.reg_fcs.0.weight", "a box head with two branches"),
        ("bbox_head.cls_convs.0.gn.weight", "a RetinaNet whose head has norms"),
        ("roi_head.point_head.fcs.0.conv.weight", "the point head of PointRend"),
        ("roi_head.grid_head.a.weight", "the grid head of Grid R-CNN"),
        ("backbone.layer3.0.context_block.conv_mask.weight", "a plugin of the backbone"),
        ("backbone.stem.0.weight", r"a stem of three convolutions \(ResNetV1d\)"),
    ],
)
def test_foreign_parts(key, part, tmp_path):
    """The part is named, in the program and by the checkpointer."""
    path = save(tmp_path / "a.pth", {"state_dict": {**STATE, key: torch.ones(1)}})
    message = f"a.pth: '{key}' in it is a weight of {part}, which is not supported$"
    with pytest.raises(InputError, match=message):
        LibraCheckpointer(net(OURS)).load(str(path))


def test_deformable(mmdet):
    """A deformable bottleneck computes the same with converted weights."""
    from mmdet.models.backbones.resnet import Bottleneck

    block = Bottleneck(16, 4, dcn={"type": "DCN", "deform_groups": 1}).double().eval()
    for value in block.state_dict().values():
        if value.is_floating_point():
            value.normal_(std=0.3).abs_() if value.dim() == 1 else value.normal_(std=0.3)
    state = {f"backbone.layer2.0.{name}": x for name, x in block.state_dict().items()}
    state = from_mmdetection(state)
    ours = DeformBottleneckBlock(16, 16, bottleneck_channels=4, norm="FrozenBN").double().eval()
    prefix = "backbone.bottom_up.res3.0."
    assert all(name.startswith(prefix) for name in state)
    ours.load_state_dict({name[len(prefix) :]: x for name, x in state.items()})
    x = torch.rand(1, 16, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        plain = BottleneckBlock(16, 16, bottleneck_channels=4, norm="FrozenBN").double().eval()
        plain.load_state_dict(ours.state_dict(), strict=False)
        assert not torch.allclose(ours(x), plain(x), atol=1e-3)
        torch.testing.assert_close(ours(x), block(x), rtol=1e-12, atol=1e-12)


def test_anchors():
    """Ratio-major in mmdetection, scale-major in Detectron2; the order of channels is kept."""
    for name, other, channels in (("cls", "cls_score", 2), ("reg", "bbox_pred", 4)):
        places = [3 * ratio + scale for scale in range(3) for ratio in range(3)]
        channel = torch.tensor([channels * p + c for p in places for c in range(channels)])
        weight = torch.rand(9 * channels, 2, 1, 1)
        theirs = {f"bbox_head.retina_{name}.{k}": x for k, x in (("a", weight), ("b", channel))}
        ours = {f"head.{other}.a": weight[channel], f"head.{other}.b": channel[channel]}
        assert equal(from_mmdetection(theirs), ours)
        back = to_mmdetection({"head.cls_score.c": torch.zeros(9), **ours})
        assert all(torch.equal(back[key], value) for key, value in theirs.items())
    message = "a RetinaNet with 9 anchors per location was expected, but its last layer has 20 chan"
    with pytest.raises(InputError, match=message):
        from_mmdetection({"bbox_head.retina_cls.bias": torch.zeros(20)})


STATE = {"backbone.conv1.weight": torch.full((2,), 3.0), "rpn_head.rpn_cls.bias": torch.ones(1)}
OURS = {f"{BOTTOM_UP}.stem.conv1.weight": (2,), f"{RPN}.objectness_logits.bias": (1,)}


def wrappings():
    """The same weights in all kinds of mmdetection's checkpoints."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance("test_checkpoint")
    hub.update_scalar("train/loss", 1.0)
    hub.update_info("iter", 3)
    meta = {"mmdet_version": "2.25.0", "CLASSES": ("a", "b"), "time": "today"}
    optimizer = {"state": {0: torch.zeros(1)}, "param_groups": []}
    # Hooks save the averaged weights under the names of the model, and the others besides.
    doubled = {f"ema_{k.replace('.', '_')}": v + 1 for k, v in STATE.items()}
    others = {f"module.{k}": v + 1 for k, v in STATE.items()}
    return {
        "version 2": {"meta": meta, "state_dict": STATE, "optimizer": optimizer},
        "version 3": {
            "meta": {"mmengine_version": "0.10.0"},
            "state_dict": STATE,
            "message_hub": hub.state_dict(),
            "ema_state_dict": {"steps": torch.tensor(3), **others},
            "optimizer": optimizer,
        },
        "ema": {"meta": None, "state_dict": {**STATE, **doubled}},
        "half precision": {"meta": meta, "state_dict": {k: v.half() for k, v in STATE.items()}},
    }


@pytest.mark.parametrize("wrapping", [*wrappings(), "NumPy 1"])
def test_loading(wrapping, tmp_path, caplog):
    """All weights are loaded, and nothing else is returned."""
    contents = wrappings()
    path = save(tmp_path / "a.pth", contents.get(wrapping, contents["version 3"]))
    if wrapping == "NumPy 1":  # the pickle refers to a module that NumPy 2 has renamed
        with zipfile.ZipFile(path) as file:
            content = {name: file.read(name) for name in file.namelist()}
        assert b"numpy._core.multiarray" in content["a/data.pkl"]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            for name, data in content.items():
                file.writestr(name, data.replace(b"numpy._core.multi", b"numpy.core.multi"))
    model = net(OURS)
    extra = LibraCheckpointer(model, complete=True).load(str(path))
    assert extra == {"__author__": "mmdetection"}
    assert "Weights that were not loaded" not in caplog.text
    assert list(values(model).values()) == [3, 1]


def test_unwrapping():
    """One prefix "module." is removed; ``meta`` and what is beside the model are kept."""
    state = {"module.a": np.ones(1), "b.module.c": np.ones(1), "module.module.d": np.ones(1)}
    meta = {"mmdet_version": "3.1.0"}
    found = unwrap_mmdetection({"state_dict": state, "meta": meta})
    assert list(found[0]) == ["a", "b.module.c", "module.d"]
    assert found[1] is meta
    assert unwrap_mmdetection({"state_dict": state, "meta": [1]})[1] == {}
    checkpoint = {"model": {"module.a": state["module.a"]}, "iteration": 3, "__author__": "b"}
    found = to_detectron2_checkpoint(checkpoint)
    assert found == {"model": {"a": state["module.a"]}, "iteration": 3, "__author__": "b"}
    stem = dict.fromkeys(("conv1.weight", "layer1.0.conv1.weight"), ONE)
    found = to_detectron2_checkpoint({"model": {**stem, "fc.bias": ONE}})["model"]
    assert list(found) == [f"{BOTTOM_UP}.{x}.weight" for x in ("stem.conv1", "res2.0.conv1")]
    assert to_detectron2_checkpoint({"model": stem})["model"] == found


OLD = "a checkpoint of mmdetection 1.x"
NOT_PLAIN = r"'b' in it is a sparse, quantized, expanded or empty \(meta\) tensor; save"
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(({"meta": {"mmdet_version": x}, "state_dict": STATE}, OLD) for x in ("1.2.0", "0.6.0")),
        ({**STATE, "bbox_head.fc_cls.weight": ONE}, OLD),
        ({**STATE, "bbox_head.shared_fcs.0.weight": ONE}, OLD),
        ({}, "not a checkpoint: there are no weights in it"),
        ([], "not a checkpoint: it holds a list"),
        ({"a": ONE, "b": "text"}, "not a checkpoint: 'b' in it is a str"),
        ({"a": ONE, "b": torch.eye(3).to_sparse()}, NOT_PLAIN),
        ({"a": ONE, "b": ONE.to("meta")}, NOT_PLAIN),
        ({"a": ONE, "b": ONE.expand(2)}, NOT_PLAIN),
        ({"a": ONE, "b": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8)}, NOT_PLAIN),
        ({"a": ONE, "b": torch.tensor([1, torch.nan])}, "'b' in it is not finite: these weights"),
        ({"a": ONE, "b": ONE.to(torch.complex64)}, "'b' in it is of complex numbers: these w"),
        ({"a": np.ones(1), "b": np.array([1, -np.inf])}, "'b' in it is not finite: these weights"),
        ({"b": np.array(["x"])}, "'b' in it is an array of <U1$"),
        ({"b": np.array([1j])}, "'b' in it is an array of complex128$"),
    ],
)
def test_refused(content, message, tmp_path):
    """The checkpointer puts the path in front of the reason."""
    with pytest.raises(InputError, match=f"^{message}"):
        from_mmdetection(unwrap_mmdetection(content)[0])
    path = save(tmp_path / "a.pth", {"model": content})
    with pytest.raises(InputError, match=f"a.pth: ({message}|.*cut short)"):
        LibraCheckpointer(net(OURS)).load(str(path))


def test_imagenet(tmp_path, caplog):
    """A backbone with torchvision's weights computes the same features."""
    resnet = torchvision.models.resnext101_64x4d(weights=None)
    path = save(tmp_path / "resnet.pth", resnet.state_dict())
    model = torch.nn.Module()
    config = "configs/COCO-Detection/libra_faster_rcnn_X_101_64x4d_FPN_1x.yaml"
    model.backbone = build_backbone(load_cfg(ROOT / config))
    LibraCheckpointer(model).load(str(path))
    assert "bottom_up" not in caplog.text
    assert "fc" not in caplog.text
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        expected = torch.nn.Sequential(*list(resnet.eval().children())[:-2])(x)
        torch.testing.assert_close(model.backbone.bottom_up(x)["res5"], expected)


def test_convnext():
    """The names of its authors become timm's; the classifier is left out."""
    names = {
        "downsample_layers.0.0.weight": "stem.0.weight",
        "downsample_layers.0.1.bias": "stem.1.bias",
        "downsample_layers.2.1.weight": "stages.2.downsample.1.weight",
        "stages.3.11.dwconv.weight": "stages.3.blocks.11.conv_dw.weight",
        "stages.0.1.pwconv1.bias": "stages.0.blocks.1.mlp.fc1.bias",
        "stages.0.1.pwconv2.weight": "stages.0.blocks.1.mlp.fc2.weight",
        "stages.0.1.norm.weight": "stages.0.blocks.1.norm.weight",
        "stages.0.1.gamma": "stages.0.blocks.1.gamma",
    }
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    classifier = {"norm.weight": torch.ones(1), "head.bias": torch.ones(1)}
    found = to_detectron2_checkpoint({"model": {**classifier, **state}, "other": 1})
    assert found.keys() == {"model", "matching_heuristics"}
    assert found["matching_heuristics"] is True
    assert {k: v.item() for k, v in found["model"].items()} == {
        name: i for i, name in enumerate(names.values())
    }
