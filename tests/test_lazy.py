# SPDX-License-Identifier: Apache-2.0
"""Balancing of LazyConfigs from Detectron2's model zoo and elsewhere."""

import copy

import pytest
import torch
from conftest import demo_cfg, random_inputs
from omegaconf import OmegaConf

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import RetinaNet, StandardROIHeads, build_backbone
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage

from libra_d2.errors import InputError
from libra_d2.lazy import balance, disable, target_of
from libra_d2.modeling import (
    AffineBatchNorm2d,
    BalancedSamplingMixin,
    LibraCascadeROIHeads,
    LibraFastRCNNOutputLayers,
    LibraRes5ROIHeads,
    LibraRetinaNet,
    LibraROIHeads,
    LibraRPN,
    LinearLastLevelP6P7,
)

FPN_MODELS = ("mask_rcnn_fpn", "cascade_rcnn", "keypoint_rcnn_fpn", "panoptic_fpn", "retinanet")
C4 = "mask_rcnn_c4"


def zoo_model(name):
    """Detectron2's LazyConfig of that model, smaller, and with trained batch norm."""
    model = model_zoo.get_config(f"common/models/{name}.py").model
    heads = model.get("roi_heads", {})
    for head in heads.get("box_heads", [heads.box_head] if "box_head" in heads else []):
        head.fc_dims = [16, 1024]
    for kind in ("mask_head", "keypoint_head"):
        if kind in heads and name != C4:
            heads[kind].conv_dims = [16] * 5
    if name != C4:
        bottom_up = model.backbone.bottom_up
        bottom_up.stages.depth = 18
        bottom_up.stages.pop("stride_in_1x1")
        bottom_up.stages.norm = bottom_up.stem.norm = model.backbone.norm = "BN"
        if name == "retinanet":
            model.backbone.top_block.in_channels = 512
    return model


def build(config):
    """The model, whose weights take neither memory nor time."""
    with torch.device("meta"):
        return instantiate(config)


def balanced(name, **kwargs):
    """The same, balanced; a C4 model has no pyramid."""
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
    """The model has all ideas in the paper's form, Detectron2's recipe, and trains."""
    model = instantiate(balanced(name))
    if name == "retinanet":
        assert type(model) is LibraRetinaNet
        losses = [model]
        recipe = (model.normalizer, model.clip_boxes, model.padding_anchors)
        assert recipe == ("moving_average", False, True)
    else:
        kinds = {"cascade_rcnn": LibraCascadeROIHeads, C4: LibraRes5ROIHeads}
        assert type(model.roi_heads) is kinds.get(name, LibraROIHeads)
        losses = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
        assert {type(m) for m in losses} == {LibraFastRCNNOutputLayers}
        assert len(losses) == (3 if name == "cascade_rcnn" else 1)
        assert model.roi_heads.proposal_sampler.negative_iou_thresh == 0.5
        assert model.roi_heads.proposal_sampler.mode == "paper"
        assert type(model.proposal_generator) is RPN
    assert type(getattr(model, "proposal_generator", model).anchor_matcher) is Matcher
    for module in losses:
        assert module.box_reg_loss_type == "balanced_l1"
        assert module.balanced_l1.arguments["form"] == "scaled"
        assert module.balanced_l1.arguments["beta"] == (0.11 if name == "retinanet" else 1.0)
    if name != C4:
        shapes = list(model.backbone.output_shape().values())
        assert shapes[model.backbone.bfp.refine_level].stride == 16
        if name != "retinanet":
            model.roi_heads.batch_size_per_image = 64
        with EventStorage():
            total = sum(model(inputs_for(name)).values())
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(model.backbone.bfp.refine.conv_out.weight.grad).all()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", [*FPN_MODELS, C4])
def test_balance_twice_and_saved(name, reference, tmp_path):
    """A second call changes nothing, and nothing is lost in a file."""
    model = balanced(name, reference=reference)
    before = copy.deepcopy(model)
    balance(model, feature_pyramid=name != C4, reference=reference)
    assert model == before
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(OmegaConf.create({"model": model}, flags={"allow_objects": True}), path)
    loaded = LazyConfig.load(path).model
    balance(loaded, feature_pyramid=name != C4, reference=reference)
    built = [build(config) for config in (model, loaded)]
    assert str(built[0]) == str(built[1])


@pytest.mark.parametrize("name", FPN_MODELS)
def test_keys_and_references_stay(name):
    """Overrides of the backbone and references to it keep their meaning."""
    plain, model = zoo_model(name), balanced(name)
    config = OmegaConf.create({"model": model}, flags={"allow_objects": True})
    LazyConfig.apply_overrides(config, ["model.backbone.bottom_up.stages.depth=34"])
    weights = build(config.model).state_dict()
    plain.backbone.bottom_up.stages.depth = 34
    assert build(plain).state_dict().keys() == {k for k in weights if "bfp." not in k}


IDEAS = ("sampling", "feature_pyramid", "balanced_l1")


def what_is_on(model):
    """Whether a model has the pyramid, its samplers of negatives and positives, its box losses."""
    kinds = (FastRCNNOutputLayers, RetinaNet)
    losses = {m.box_reg_loss_type for m in model.modules() if isinstance(m, kinds)}
    sampler = getattr(getattr(model, "roi_heads", None), "proposal_sampler", None)
    drawn = sampler and (sampler.negatives, sampler.positives)
    return hasattr(model.backbone, "bfp"), drawn, losses


@pytest.mark.parametrize("name", ["mask_rcnn_fpn", "cascade_rcnn", "retinanet"])
@pytest.mark.parametrize("idea", IDEAS)
def test_each_idea_alone(name, idea):
    """By the argument of balance(), and by what disable() returns."""
    by_argument = build(balanced(name, **{x: x == idea for x in IDEAS}))
    config = OmegaConf.create({"model": balanced(name)}, flags={"allow_objects": True})
    off = disable(config.model, *(x for x in IDEAS if x != idea))
    by_override = build(LazyConfig.apply_overrides(config, off).model)
    pyramid = idea == "feature_pyramid"
    loss = "balanced_l1" if idea == "balanced_l1" else "smooth_l1"
    drawn = ("iou_balanced", "instance_balanced") if idea == "sampling" else ("random", "random")
    has_sampler = name != "retinanet"
    assert what_is_on(by_override) == (pyramid, drawn if has_sampler else None, {loss})
    has_sampler &= idea == "sampling"
    assert what_is_on(by_argument) == (pyramid, drawn if has_sampler else None, {loss})


def test_disable():
    """One override for each place where an idea is enabled."""
    pyramid, heads = "model.backbone.balanced=False", "model.roi_heads"
    sampler = [f"{heads}.proposal_sampler.{x}=random" for x in ("negatives", "positives")]
    losses = [f"{heads}.box_predictors.{i}.box_reg_loss_type=smooth_l1" for i in range(3)]
    assert disable(balanced("cascade_rcnn"), *IDEAS) == [pyramid, *sampler, *losses]
    other = balanced("retinanet")
    other.box_reg_loss_type = "giou"
    assert disable(other, "balanced_l1") == []
    for name in (*FPN_MODELS, C4):
        assert disable(zoo_model(name), *IDEAS) == disable(balanced(name)) == []


class OwnROIHeads(StandardROIHeads):
    pass


class OwnMatcher:
    pass


@pytest.mark.parametrize("name", ["cascade_rcnn", "retinanet"])
def test_recipe_without_ideas(name):
    """mmdetection's recipe without the ideas; test_lazy_configs has it with all of them."""
    config = model_zoo.get_config(f"common/models/{name}.py").model
    model = build(balance(config, reference=True, **dict.fromkeys(IDEAS, False)))
    assert what_is_on(model) == (False, None, {"smooth_l1"})
    assert any(isinstance(m, AffineBatchNorm2d) for m in model.backbone.modules())
    if name == "retinanet":
        recipe = (model.normalizer, model.clip_boxes, model.padding_anchors)
        assert recipe == ("batch", True, False)
        assert type(model.backbone.top_block) is LinearLastLevelP6P7
        assert model.anchor_matcher.min_iou == 0.0
    else:
        assert type(model.proposal_generator) is LibraRPN
        assert model.proposal_generator.anchor_matcher.min_iou == 0.3
    # Trained batch norm is left alone, and backbones that mmdetection's recipe does not know.
    assert "train_affine" not in balanced(name, reference=True).backbone
    config = model_zoo.get_config(f"common/models/{name}.py").model
    config.backbone.bottom_up = L(RegNet)(norm="FrozenBN")
    assert "train_affine" not in balance(config, reference=True).backbone


def test_what_is_left_alone():
    """Everything if no idea is asked for, and settings made before."""
    for name in ("mask_rcnn_fpn", "retinanet"):
        model = zoo_model(name)
        before = copy.deepcopy(model)
        assert balance(model, **dict.fromkeys(IDEAS, False)) == before
    model = balanced("mask_rcnn_fpn")
    model.backbone.refine_type = "conv"
    model.roi_heads.proposal_sampler.num_bins = 5
    model.roi_heads.proposal_matcher.thresholds = [0.4]
    model.roi_heads.box_predictor.balanced_l1.alpha = 0.3
    before = copy.deepcopy(model)
    assert balance(model) == before
    assert build(model).roi_heads.proposal_sampler.negative_iou_thresh == 0.4


class OwnLibraROIHeads(BalancedSamplingMixin, StandardROIHeads):
    pass


def own_pyramid(channels):
    cfg = demo_cfg(MODEL__LIBRA__BFP__ENABLED=False, MODEL__FPN__OUT_CHANNELS=channels)
    return build_backbone(cfg, ShapeSpec(channels=3))


def test_reference_cascade():
    """Each stage has a mask head, and half the loss weight of the one before."""
    heads = balanced("cascade_rcnn", reference=True).roi_heads
    assert heads.mask_head.num_stages == 3
    assert heads.stage_loss_weights == [1, 0.5, 0.25]
    assert (heads.resample, heads.average, heads.pad_masks) == (True, "logits", True)
    assert "low_quality_iou" not in heads
    model = zoo_model("cascade_rcnn")
    for stages in ("box_heads", "box_predictors", "proposal_matchers"):
        model.roi_heads[stages].pop()
    heads = balance(model, reference=True).roi_heads
    assert (heads.mask_head.num_stages, heads.stage_loss_weights) == (2, [1, 0.5])
    for name, expected in (("mask_rcnn_fpn", (0.5, True)), ("keypoint_rcnn_fpn", (None, None))):
        heads = balanced(name, reference=True).roi_heads
        assert (heads.get("low_quality_iou"), heads.get("pad_masks")) == expected


def test_backbone_that_does_not_say():
    """A backbone for a balanced feature pyramid gets one, unless it says that it has none."""
    model = balanced("mask_rcnn_fpn")
    model.backbone.pop("balanced")
    assert balance(model).backbone.balanced is True
    model.backbone.balanced = False
    assert balance(model).backbone.balanced is False


def test_own_classes():
    """ROI heads with the mixin, predictors and RetinaNets that know the loss, any pyramid."""
    model = zoo_model("mask_rcnn_fpn")
    model.roi_heads._target_ = OwnLibraROIHeads
    model.roi_heads.box_predictor._target_ = LibraFastRCNNOutputLayers
    model.backbone = L(own_pyramid)(channels=16)
    assert type(build(balance(model).roi_heads)) is OwnLibraROIHeads
    assert model.roi_heads.box_predictor.box_reg_loss_type == "balanced_l1"
    assert build(model.backbone).bfp.refine.theta.in_channels == 16
    for loss_type, expected in ((None, "balanced_l1"), ("giou", "giou")):
        model = zoo_model("retinanet")
        model._target_ = LibraRetinaNet
        model.update({} if loss_type is None else {"box_reg_loss_type": loss_type})
        assert balance(model).box_reg_loss_type == expected


def test_what_cannot_be_balanced():
    heads, matcher, value, absent = (zoo_model("mask_rcnn_fpn") for _ in range(4))
    heads.roi_heads._target_ = OwnROIHeads
    matcher.roi_heads.proposal_matcher = L(OwnMatcher)()
    value.roi_heads._target_, absent.backbone._target_ = "math.pi", "no.thing"
    cannot = "which cannot be instantiated:"
    fcos = model_zoo.get_config("common/models/fcos.py").model
    for model, message in (
        (OmegaConf.create({"model": {"backbone": {}}}), "pass its .model"),
        (OmegaConf.create({}), "detector, with a backbone$"),
        (heads, "roi_heads._target_ is OwnROIHeads.*BalancedSamplingMixin"),
        (matcher, "roi_heads.proposal_matcher has no thresholds"),
        (fcos, "FCOS has neither"),
        (value, f"^model.roi_heads._target_ is 'math.pi', {cannot} it is not a class or function$"),
        (absent, f"^model.backbone._target_ is 'no.thing', {cannot} .*No module named 'no'"),
    ):
        with pytest.raises(InputError, match=message):
            balance(model)
    for idea in ("sampling", "balanced_l1"):
        with pytest.raises(InputError, match="FCOS has neither"):
            balance(fcos, **{idea: False})
    assert target_of(OmegaConf.create({"_target_": {"name": "a"}})) == {"name": "a"}
    balance(fcos, sampling=False, balanced_l1=False)
    assert hasattr(build(fcos.backbone), "bfp")
    model = balanced("mask_rcnn_fpn")
    model.backbone.update(in_features=["res5"], top_block=None)
    with pytest.raises(ValueError, match="no level has a stride of 16"):
        instantiate(model.backbone)
