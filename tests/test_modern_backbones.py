# SPDX-License-Identifier: Apache-2.0
"""The LazyConfigs of backbones other than ResNet."""

import re
import sys

import pytest
import torch
from conftest import ROOT, random_inputs

from detectron2.config import LazyConfig
from detectron2.utils.events import EventStorage

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.config import make_recipe
from libra_d2.errors import ArgumentError
from libra_d2.modeling import BalancedFeaturePyramid, TimmBackbone

BOTTOM_UP = "model.backbone.bottom_up"
# Overrides that make each of them small.
REDUCED = {
    "COCO-InstanceSegmentation/libra_mask_rcnn_vitdet_b_100ep": [
        *(f"model.backbone.net.{x}" for x in ("img_size=128", "embed_dim=32", "depth=2")),
        *(f"model.backbone.net.{x}" for x in ("num_heads=2", "window_block_indexes=[0]")),
        "model.backbone.square_pad=128",
        "model.roi_heads.box_head.conv_dims=[256]",
    ],
    "COCO-InstanceSegmentation/libra_mask_rcnn_swin_t_3x": [
        *(f"{BOTTOM_UP}.{x}" for x in ("embed_dim=12", "depths=[1,1,1,1]", "num_heads=[1,1,2,2]")),
    ],
    "COCO-InstanceSegmentation/libra_mask_rcnn_regnetx_4gf_1x": [
        *(f"{BOTTOM_UP}.{x}" for x in ("depth=13", "w_0=24", "w_a=36.44", "w_m=2.49")),
        *(f"{BOTTOM_UP}.{x}" for x in ("group_width=8", "norm=BN", "freeze_at=0")),
    ],
    "COCO-Detection/libra_faster_rcnn_convnext_t_3x": [f"{BOTTOM_UP}.name=convnext_atto"],
}


@pytest.mark.parametrize("name", REDUCED)
def test_config(name):
    """Initial weights are named, the pyramid is refined at P4, and a reduced model trains."""
    try:
        config = LazyConfig.load(str(ROOT / f"configs/{name}.py"))
    except (ImportError, RuntimeError) as e:
        if not re.search("vitdet|swin", name):
            raise
        pytest.skip(f"not in this Detectron2: {e}")
    assert config.train.init_checkpoint.startswith(("https://", "detectron2://"))
    assert config.dataloader.train.mapper.image_format == config.model.input_format
    recipe = make_recipe(LazyConfig.apply_overrides(config, REDUCED[name]))
    recipe.device, recipe.learning_rate = "cpu", 1e-4
    model = recipe.build_model()
    backbone = model.backbone
    assert isinstance(backbone.bfp, BalancedFeaturePyramid)
    assert list(backbone.output_shape().values())[backbone.bfp.refine_level].stride == 16
    heads = model.roi_heads
    heads.batch_size_per_image, heads.box_predictor.test_topk_per_image = 64, 10
    optimizer, inputs = recipe.build_optimizer(model), random_inputs(3, 2)
    with EventStorage() as storage:
        losses = [sum(model(inputs).values())]
        losses[0].backward()
        optimizer.step()
        losses.append(sum(model(inputs).values()))
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
    assert all(0 < loss < 20 for loss in losses)
    heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    assert len(found) == 10
    assert found.has("pred_masks") == ("InstanceSegmentation" in name)


def test_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArgumentError, match="^name is 'convnext_atto': the package timm is miss"):
        TimmBackbone("convnext_atto")


def test_timm_backbone(tmp_path):
    """The requested levels in their order, with the stated shapes; timm's weights can be loaded."""
    timm = pytest.importorskip("timm")
    arguments = {"in_chans": 1, "drop_path_rate": 0.5, "out_features": ["res4", "res3"]}
    backbone = TimmBackbone("convnext_atto", **arguments).eval()
    image = torch.randn(1, 1, 64, 96)
    features, levels = backbone(image), backbone.net(image)
    assert list(features) == list(backbone.output_shape()) == ["res4", "res3"]
    assert torch.equal(features["res4"], levels[2])
    assert torch.equal(features["res3"], levels[1])
    for name, shape in backbone.output_shape().items():
        assert features[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert max(getattr(x, "drop_prob", 0) for x in backbone.modules()) == 0.5
    assert backbone.size_divisibility == 32  # of all that is computed
    shapes = TimmBackbone("convnext_atto.d2_in1k").output_shape()
    strides = {name: shape.stride for name, shape in shapes.items()}
    assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    model, path = torch.nn.Module(), tmp_path / "timm.pth"
    model.bottom_up, weights = backbone, timm.create_model("convnext_atto", in_chans=1).state_dict()
    torch.save({"model": weights}, path)
    LibraCheckpointer(model).load(f"{path}?matching_heuristics=True")
    for key, value in backbone.net.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    with pytest.raises(ArgumentError, match=r"a model of timm, such as .('\w*convn\w+',? ?){5}.$"):
        TimmBackbone("convnxt_tiny")
    with pytest.raises(
        ArgumentError, match="^name is 'convnext_atto.none': Invalid pretrained tag"
    ):
        TimmBackbone("convnext_atto.none")
    with pytest.raises(ArgumentError, match=r"^out_features is \['res9'\]: \w+ has the levels"):
        TimmBackbone("convnext_atto", out_features=["res2", "res9"])
