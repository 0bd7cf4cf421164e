# SPDX-License-Identifier: Apache-2.0
"""The LazyConfigs of backbones other than ResNet, reduced, from initial weights to AP."""

import json

import pytest
import torch
from conftest import ROOT
from test_train_net import own_data

from detectron2.config import LazyConfig, instantiate

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.engine.main import main
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


def load(name):
    """The config of that name, or a skip if Detectron2 or timm has no such backbone."""
    try:
        return LazyConfig.load(str(ROOT / f"configs/{name}.py"))
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"not in this Detectron2: {e}")


@pytest.mark.parametrize("name", REDUCED)
def test_settings(name):
    """Initial weights are named; the pyramid is refined at P4."""
    config = load(name)
    assert config.train.init_checkpoint.startswith(("https://", "detectron2://"))
    config = LazyConfig.apply_overrides(config, REDUCED[name])
    backbone = instantiate(config.model.backbone)
    assert isinstance(backbone.bfp, BalancedFeaturePyramid)
    assert list(backbone.output_shape().values())[backbone.bfp.refine_level].stride == 16
    assert config.dataloader.train.mapper.image_format == config.model.input_format


@pytest.mark.parametrize("name", REDUCED)
def test_training(name, synthetic, tmp_path):
    """Three iterations and an evaluation, by the program."""
    load(name)
    masks = "InstanceSegmentation" in name
    main(
        [
            *("--config-file", str(ROOT / f"configs/{name}.py")),
            *map(str, own_data(synthetic, "train", "val")),
            *REDUCED[name],
            *(f"train.output_dir={tmp_path}", "train.max_iter=3", "train.amp.enabled=False"),
            *("train.init_checkpoint=''", "train.device=cpu", "train.seed=1"),
            *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
            *("dataloader.train.total_batch_size=2", "optimizer.lr=1e-4"),
            *(
                f"model.roi_heads.box_predictor.test_{x}"
                for x in ("score_thresh=0", "topk_per_image=5")
            ),
            *(["dataloader.train.mapper.instance_mask_format=bitmask"] if masks else []),
            *smaller_images(name),
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    metrics = {key: value for line in lines for key, value in line.items()}
    assert metrics["iteration"] >= 2
    assert "bbox/AP" in metrics
    assert ("segm/AP" in metrics) == masks
    assert "roi_head/num_bg_iou_bin_2" in metrics
    assert 0 < metrics["total_loss"] < 20


def smaller_images(name):
    train, test = "dataloader.train.mapper.augmentations", "dataloader.test.mapper.augmentations"
    test = [f"{test}.0.short_edge_length=96", f"{test}.0.max_size=128"]
    if "vitdet" not in name:
        return [f"{train}.0.short_edge_length=[96]", *test]
    return [
        *(f"{train}.1.target_height=128", f"{train}.1.target_width=128"),
        *(f"{train}.2.crop_size=[128,128]", *test),
    ]


def test_timm_backbone():
    """The levels asked for, in that order, of the stated shapes; what is wrong is said."""
    pytest.importorskip("timm")
    arguments = {"in_chans": 1, "drop_path_rate": 0.5, "out_features": ["res5", "res3"]}
    backbone = TimmBackbone("convnext_atto", **arguments).eval()
    image = torch.randn(1, 1, 64, 96)
    features, levels = backbone(image), backbone.net(image)
    assert list(features) == list(backbone.output_shape()) == ["res5", "res3"]
    assert torch.equal(features["res5"], levels[3])
    assert torch.equal(features["res3"], levels[1])
    for name, shape in backbone.output_shape().items():
        size = (64 // shape.stride, 96 // shape.stride)
        assert features[name].shape == (1, shape.channels, *size)
    assert max(getattr(x, "drop_prob", 0) for x in backbone.modules()) == 0.5
    assert backbone.size_divisibility == 32
    shapes = TimmBackbone("convnext_atto").output_shape()
    assert [(name, x.stride) for name, x in shapes.items()] == [
        *(("res2", 4), ("res3", 8), ("res4", 16), ("res5", 32))
    ]
    with pytest.raises(ArgumentError, match="use a model of timm, such as .*convnext"):
        TimmBackbone("convnext_tinny")
    with pytest.raises(ArgumentError, match="has the levels"):
        TimmBackbone("convnext_atto", out_features=["res9"])


def test_convnext_weights(tmp_path):
    """The file of ConvNeXt's authors gives the weights that timm itself reads from it."""
    timm = pytest.importorskip("timm")
    from timm.models.convnext import checkpoint_filter_fn

    names = {".conv_dw.": ".dwconv.", ".mlp.fc1.": ".pwconv1.", ".mlp.fc2.": ".pwconv2."}
    net = timm.create_model("convnext_atto", conv_mlp=False)
    published = {}
    for key, value in net.state_dict().items():
        for timms, theirs in names.items():
            key = key.replace(timms, theirs)
        key = key.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        if ".downsample." in key:
            stage, _, rest = key[len("stages.") :].partition(".downsample.")
            key = f"downsample_layers.{stage}.{rest}"
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        published[key] = torch.randn_like(value)
    expected = checkpoint_filter_fn({"model": dict(published)}, net)
    torch.save({"model": published}, tmp_path / "convnext.pth")

    model = torch.nn.Module()
    model.bottom_up = TimmBackbone("convnext_atto", conv_mlp=False)
    LibraCheckpointer(model).load(str(tmp_path / "convnext.pth"))
    loaded = model.bottom_up.net.model.state_dict()
    assert len(loaded) > 100
    for key, value in loaded.items():
        assert torch.equal(value, expected[key]), key


def test_matching_heuristics(tmp_path):
    """Names without the model's prefix load with the suffix that upstream has for them."""
    model = torch.nn.Module()
    model.bottom_up = torch.nn.Linear(2, 2)
    weights = {name: torch.randn_like(x) for name, x in model.bottom_up.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "weights.pth")
    LibraCheckpointer(model).load(f"{tmp_path}/weights.pth?matching_heuristics=True")
    assert torch.equal(model.bottom_up.weight, weights["weight"])
