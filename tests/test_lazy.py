# SPDX-License-Identifier: Apache-2.0
"""libra_d2.lazy: balancing LazyConfigs from anywhere, and what the programs see of them."""

import copy

import pytest
import torch
from conftest import demo_cfg, random_inputs
from omegaconf import OmegaConf

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import StandardROIHeads
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage

from libra_d2.checkpoint import build_model
from libra_d2.engine import read_config
from libra_d2.engine.lazy_config import read_lazy_config
from libra_d2.errors import InputError
from libra_d2.lazy import balance, is_lazy_config, lazy_names, turn_off, view
from libra_d2.modeling import (
    BalancedSamplingMixin,
    LibraCascadeROIHeads,
    LibraFastRCNNOutputLayers,
    LibraRes5ROIHeads,
    LibraRetinaNet,
    LibraROIHeads,
)

FPN_MODELS = ("mask_rcnn_fpn", "cascade_rcnn", "keypoint_rcnn_fpn", "panoptic_fpn", "retinanet")
C4 = "mask_rcnn_c4"


def zoo_model(name):
    """Detectron2's LazyConfig of that model, with ResNet-18 and batch norm to be trained."""
    model = model_zoo.get_config(f"common/models/{name}.py").model
    if name != C4:
        bottom_up = model.backbone.bottom_up
        bottom_up.stages.depth = 18
        bottom_up.stages.pop("stride_in_1x1")
        bottom_up.stages.norm = bottom_up.stem.norm = model.backbone.norm = "BN"
        if name == "retinanet":
            model.backbone.top_block.in_channels = 512
    return model


def balanced(name, **kwargs):
    """The same, balanced as far as it has what can be."""
    kwargs = {"feature_pyramid": False, **kwargs} if name == C4 else kwargs
    return balance(zoo_model(name), **kwargs)


def inputs_for(name):
    inputs = random_inputs(3, 0)
    for image in inputs:
        size = image["image"].shape[1:]
        image["sem_seg"] = torch.randint(0, 54, size)
        if name.startswith("keypoint"):
            number = len(image["instances"])
            image["instances"].gt_keypoints = Keypoints(torch.rand(number, 17, 3) * 60)
            image["instances"].gt_classes *= 0
    return inputs


@pytest.mark.parametrize("name", [*FPN_MODELS, C4])
def test_balance(name):
    """All ideas are there, at their places, and the model trains on them."""
    model = instantiate(balanced(name))
    if name == "retinanet":
        assert type(model) is LibraRetinaNet
        losses = [model]
        assert model.balanced_l1.arguments["beta"] == 0.11
        assert (model.normalizer, model.clip_boxes) == ("moving_average", False)
    else:
        kinds = {"cascade_rcnn": LibraCascadeROIHeads, C4: LibraRes5ROIHeads}
        assert type(model.roi_heads) is kinds.get(name, LibraROIHeads)
        losses = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
        assert {type(m) for m in losses} == {LibraFastRCNNOutputLayers}
        assert len(losses) == (3 if name == "cascade_rcnn" else 1)
        assert model.roi_heads.proposal_sampler.negative_iou_thresh == 0.5
        assert model.roi_heads.proposal_sampler.mode == "paper"
    assert {m.box_reg_loss_type for m in losses} == {"balanced_l1"}
    if name != C4:
        shapes = list(model.backbone.output_shape().values())
        assert shapes[model.backbone.bfp.refine_level].stride == 16
        with EventStorage():
            total = sum(model(inputs_for(name)).values())
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(model.backbone.bfp.refine.conv_out.weight.grad).all()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", [*FPN_MODELS, C4])
def test_balance_twice_and_saved(name, reference, tmp_path):
    """Nothing changes; and nothing is lost in a file."""
    model = balanced(name, reference=reference)
    before = copy.deepcopy(model)
    balance(model, feature_pyramid=name != C4, reference=reference)
    assert model == before
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(OmegaConf.create({"model": model}, flags={"allow_objects": True}), path)
    loaded = LazyConfig.load(path).model
    balance(loaded, feature_pyramid=name != C4, reference=reference)
    built = [instantiate(config) for config in (model, loaded)]
    assert str(built[0]) == str(built[1])


@pytest.mark.parametrize("name", FPN_MODELS)
def test_keys_and_references_stay(name):
    """Overrides of what is in the backbone, and values that refer to it, keep their meaning."""
    plain, model = zoo_model(name), balanced(name)

    def keys(node, prefix=""):
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and OmegaConf.is_dict(node._get_node(key)):
                yield from keys(node[key], f"{prefix}{key}.")
            yield f"{prefix}{key}"

    assert set(keys(plain)) <= set(keys(model))
    config = OmegaConf.create({"model": model}, flags={"allow_objects": True})
    LazyConfig.apply_overrides(config, ["model.backbone.bottom_up.stages.depth=34"])
    weights = instantiate(config.model).state_dict()
    plain.backbone.bottom_up.stages.depth = 34
    assert instantiate(plain).state_dict().keys() == {k for k in weights if "bfp." not in k}


@pytest.mark.parametrize("name", FPN_MODELS)
@pytest.mark.parametrize("idea", ["sampling", "feature_pyramid", "balanced_l1"])
def test_each_idea_alone(name, idea):
    """By the argument of balance(), and by what turn_off() returns."""
    ideas = ("sampling", "feature_pyramid", "balanced_l1")
    by_argument = instantiate(balanced(name, **{x: x == idea for x in ideas}))
    config = OmegaConf.create({"model": balanced(name)}, flags={"allow_objects": True})
    off = turn_off(config.model, *(x for x in ideas if x != idea))
    by_override = instantiate(LazyConfig.apply_overrides(config, off).model)
    for model in (by_argument, by_override):
        assert hasattr(model.backbone, "bfp") == (idea == "feature_pyramid")
        losses = {
            m.box_reg_loss_type
            for m in model.modules()
            if isinstance(m, (FastRCNNOutputLayers, LibraRetinaNet))
        }
        if name != "retinanet" or idea == "balanced_l1":
            assert losses == {"balanced_l1" if idea == "balanced_l1" else "smooth_l1"}
        heads = getattr(model, "roi_heads", None)
        samples = isinstance(heads, BalancedSamplingMixin)
        assert samples == (name != "retinanet" and (idea == "sampling" or model is by_override))
        if samples:
            drawn = heads.proposal_sampler.negatives
            assert drawn == ("iou_balanced" if idea == "sampling" else "random")


def test_nothing_on_is_the_plain_model():
    plain = zoo_model("mask_rcnn_fpn")
    off = balance(copy.deepcopy(plain), sampling=False, feature_pyramid=False, balanced_l1=False)
    assert off == plain


def test_sampler_follows_the_matcher():
    """Also when its threshold is changed afterwards."""
    model = balanced("cascade_rcnn")
    model.roi_heads.proposal_matchers[0].thresholds = [0.4]
    assert instantiate(model).roi_heads.proposal_sampler.negative_iou_thresh == 0.4


def test_what_is_set_already_stays():
    model = balanced("mask_rcnn_fpn")
    model.backbone.refine_type = "conv"
    model.roi_heads.proposal_sampler.num_bins = 5
    model.roi_heads.box_predictor.balanced_l1.alpha = 0.3
    before = copy.deepcopy(model)
    assert balance(model) == before


def test_forgotten_loss_type():
    """A predictor that knows balanced L1 loss, and was not told to use it."""
    model = zoo_model("mask_rcnn_fpn")
    model.roi_heads.box_predictor._target_ = LibraFastRCNNOutputLayers
    assert instantiate(balance(model)).roi_heads.box_predictor.box_reg_loss_type == "balanced_l1"


class OwnROIHeads(StandardROIHeads):
    pass


class OwnLibraROIHeads(BalancedSamplingMixin, StandardROIHeads):
    pass


def test_own_classes():
    """One that nothing takes the place of is named; one with the mixin is balanced."""
    model = zoo_model("mask_rcnn_fpn")
    model.roi_heads._target_ = OwnROIHeads
    with pytest.raises(
        InputError, match="roi_heads._target_ is OwnROIHeads.*BalancedSamplingMixin"
    ):
        balance(model)
    model = zoo_model("mask_rcnn_fpn")
    model.roi_heads._target_ = OwnLibraROIHeads
    assert type(instantiate(balance(model)).roi_heads) is OwnLibraROIHeads


def test_what_cannot_be_balanced():
    with pytest.raises(InputError, match="pass its .model"):
        balance(OmegaConf.create({"model": {"backbone": {}}}))
    fcos = model_zoo.get_config("common/models/fcos.py").model
    with pytest.raises(InputError, match="FCOS has neither"):
        balance(fcos)
    balance(fcos, sampling=False, balanced_l1=False)
    assert hasattr(instantiate(fcos.backbone), "bfp")


def test_no_level_of_stride_16():
    model = balanced("mask_rcnn_fpn")
    model.backbone.in_features = ["res5"]
    model.backbone.top_block = None
    with pytest.raises(ValueError, match="no level has a stride of 16"):
        instantiate(model)


# The view.


def lazy_config(name="mask_rcnn_fpn"):
    config = OmegaConf.create({}, flags={"allow_objects": True})
    config.model = balanced(name)
    config.dataloader = model_zoo.get_config("common/data/coco.py").dataloader
    config.train = model_zoo.get_config("common/train.py").train
    return config


@pytest.mark.parametrize("name", FPN_MODELS)
def test_class_counts(name):
    """In every head that counts things, and nowhere else."""
    cfg = view(lazy_config(name))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.DEVICE = "cpu"
    weights = build_model(cfg).state_dict()
    counts = {
        key: value.shape[0] for key, value in weights.items() if key.endswith("cls_score.bias")
    }
    assert set(counts.values()) == ({27} if name == "retinanet" else {4})
    if "roi_heads.mask_head.predictor.bias" in weights:
        assert len(weights["roi_heads.mask_head.predictor.bias"]) == 3
    if name == "panoptic_fpn":
        assert len(weights["sem_seg_head.predictor.bias"]) == 54
    assert lazy_config(name) == cfg.lazy  # which is what was given


def test_changes_go_back():
    cfg = view(lazy_config("cascade_rcnn"))
    cfg.OUTPUT_DIR, cfg.SEED, cfg.DATASETS.TRAIN = "elsewhere", 7, ("a", "b")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.4
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.4  # as the demo does, whatever the model
    lazy = cfg.clone().current()
    assert (lazy.train.output_dir, lazy.train.seed) == ("elsewhere", 7)
    assert lazy.dataloader.train.dataset.names == ["a", "b"]
    assert [p.test_score_thresh for p in lazy.model.roi_heads.box_predictors] == [0.4] * 3
    assert "test_score_thresh" not in lazy.model


def test_plain_view():
    """What both systems say about Detectron2's plain models."""
    names = {"mask_rcnn_R_50_FPN_1x": "COCO-InstanceSegmentation"}
    names["retinanet_R_50_FPN_1x"] = "COCO-Detection"
    for name, folder in names.items():
        lazy = view(model_zoo.get_config(f"{folder}/{name}.py"))
        cfg = read_config(f"{folder}/{name}.yaml", [], output=False)
        assert lazy.INPUT.FORMAT == cfg.INPUT.FORMAT
        assert lazy.MODEL.META_ARCHITECTURE == cfg.MODEL.META_ARCHITECTURE
        assert lazy.MODEL.MASK_ON == cfg.MODEL.MASK_ON
        assert lazy.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        assert lazy.SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER


def test_is_lazy_config(tmp_path):
    path = tmp_path / "config.yaml"
    LazyConfig.save(lazy_config(), str(path))
    assert is_lazy_config(str(path))
    path.write_text("MODEL:\n  MASK_ON: True\n")
    assert not is_lazy_config(str(path))
    path.write_text("model: [broken")
    assert not is_lazy_config(str(path))
    assert is_lazy_config("anything.py")
    assert not is_lazy_config("http://host/config.yaml")


def test_names_in_messages():
    assert lazy_names("MODEL.WEIGHTS: name them") == "train.init_checkpoint: name them"
    assert lazy_names("SOLVER.MAX_ITER is 0") == "train.max_iter is 0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iter", "write what is set in a LazyConfig as key=value"),
        ("model.backbone.botom_up.freeze_at=2", "no such key"),
        ("dataloder.train.num_workers=0", "no such key"),
        ("train.max_iter=[1", "command line:"),
    ],
)
def test_bad_override(override, message, tmp_path):
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(lazy_config(), path)
    with pytest.raises(InputError, match=message):
        read_lazy_config(path, [override])


def test_own_target_is_kept_in_the_backbone():
    """balance() takes any function that returns a pyramid."""
    config = demo_cfg()
    model = zoo_model("mask_rcnn_fpn")
    model.backbone = L(_own_pyramid)(channels=config.MODEL.FPN.OUT_CHANNELS)
    backbone = instantiate(balance(model).backbone)
    assert backbone.bfp.refine.theta.in_channels == config.MODEL.FPN.OUT_CHANNELS


def _own_pyramid(channels):
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    cfg = demo_cfg(MODEL__LIBRA__BFP__ENABLED=False, MODEL__FPN__OUT_CHANNELS=channels)
    return build_backbone(cfg, ShapeSpec(channels=3))
