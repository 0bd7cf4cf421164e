# SPDX-License-Identifier: Apache-2.0
"""
Libra R-CNN in LazyConfigs: turns the config of any R-CNN or RetinaNet into a balanced one.

Nodes get another ``_target_`` and keep their keys, so that overrides and interpolations such as
``${..backbone.out_channels}`` keep their meaning.
"""

from typing import Any, Dict, Iterator, List, Tuple, Type

from omegaconf import DictConfig, OmegaConf

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet, RetinaNet, StandardROIHeads
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads
from detectron2.utils.registry import _convert_target_to_string, locate

from .errors import InputError, one_line
from .modeling import (
    BalancedL1Loss,
    BalancedSampler,
    BalancedSamplingMixin,
    LibraCascadeROIHeads,
    LibraFastRCNNOutputLayers,
    LibraRes5ROIHeads,
    LibraRetinaNet,
    LibraROIHeads,
    LibraRPN,
    LinearLastLevelP6P7,
    LowQualityMatcher,
    build_balanced_backbone,
    build_mask_head_per_stage,
)

__all__ = ["balance", "disable", "target_of"]

_ROI_HEADS = {
    StandardROIHeads: LibraROIHeads,
    CascadeROIHeads: LibraCascadeROIHeads,
    Res5ROIHeads: LibraRes5ROIHeads,
}
_RETINANET_BETA = 0.11  # mmdetection's libra_retinanet_r50_fpn_1x
# mmdetection's min_pos_iou
_RPN_LOW_QUALITY_IOU, _RETINANET_LOW_QUALITY_IOU, _MASK_RCNN_LOW_QUALITY_IOU = 0.3, 0.0, 0.5


def target_of(node: Any) -> Any:
    """
    The class or function that a node of a LazyConfig instantiates; None if it has no target.

    Raises:
        InputError: if nothing that can be called has the name of the target.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    found, reason = target, "it is not a class or function"
    if isinstance(target, str):
        try:
            found = locate(target)
        except Exception as e:  # it imports modules, which may raise anything
            found, reason = None, one_line(e)
    # A target may be described by a node of its own.
    if target is None or callable(found) or isinstance(found, DictConfig):
        return found
    place = node._get_full_key("_target_")
    raise InputError(f"{place} is {target!r}, which cannot be instantiated: {reason}")


def _is(node: Any, *classes: Type) -> bool:
    target = target_of(node)
    return isinstance(target, type) and issubclass(target, classes)


def _name(node: Any) -> str:
    return getattr(target_of(node), "__qualname__", repr(node))


def _exchange(node: DictConfig, exchange: Dict[Type, Type], what: str, instead: str) -> bool:
    """
    Replace the class of ``node``. Returns: False if it has been replaced already. Raises InputError
    if its class has no replacement.
    """
    if target_of(node) in exchange:
        node._target_ = exchange[target_of(node)]
        return True
    if _is(node, *exchange.values()):
        return False
    known = ", ".join(x.__name__ for x in exchange)
    raise InputError(f"{what}._target_ is {_name(node)}, and balance() supports {known}: {instead}")


def balance(
    model: DictConfig,
    *,
    sampling: bool = True,
    feature_pyramid: bool = True,
    balanced_l1: bool = True,
    reference: bool = False,
) -> DictConfig:
    """
    Turn the LazyConfig of a detector into one of Libra R-CNN, in place. The call is idempotent.

    Args:
        model: of a GeneralizedRCNN (Faster, Mask, Keypoint and Cascade R-CNN), a PanopticFPN or a
            RetinaNet, such as ``model_zoo.get_config("common/models/mask_rcnn_fpn.py").model``.
        sampling: whether proposals are drawn by a :class:`BalancedSampler`, whose bins span the
            IoUs of the matcher's negatives. A RetinaNet draws none.
        feature_pyramid: whether the backbone gets a balanced feature pyramid, refined at P4, the
            level with a stride of 16.
        balanced_l1: whether boxes have balanced L1 loss.
        reference: whether to use mmdetection's form of the ideas, its RPN, matching, normalizers,
            batch norm (:mod:`libra_d2.modeling.reference_recipe`) and cascade
            (:class:`LibraCascadeROIHeads`) instead of the paper's form and Detectron2's recipe.

    Returns: ``model``.

    Raises:
        InputError: if a part of the model is of a class that has no replacement.
    """
    if not isinstance(model, DictConfig) or "backbone" not in model:
        hint = "; pass its .model" if isinstance(model, DictConfig) and "model" in model else ""
        raise InputError(f"balance() takes the LazyConfig of a detector, with a backbone{hint}")
    is_retinanet = _is(model, RetinaNet)
    if not is_retinanet and model.get("roi_heads") is None and (sampling or balanced_l1):
        raise InputError(
            f"balance(): a {_name(model)} has neither the ROI heads of an R-CNN nor the losses of "
            "a RetinaNet: use sampling=False, balanced_l1=False for the feature pyramid alone"
        )
    _balance_backbone(model.backbone, feature_pyramid, reference)
    if reference and _is(model.get("proposal_generator"), RPN):
        _train_rpn_as_reference(model.proposal_generator)
    if is_retinanet:
        _balance_retinanet(model, balanced_l1, reference)
        return model
    if sampling:
        _balance_sampling(model.roi_heads, reference)
    if balanced_l1:
        _balance_box_loss(model.roi_heads, reference)
    return model


def _balance_backbone(backbone: DictConfig, feature_pyramid: bool, reference: bool) -> None:
    if target_of(backbone) is not build_balanced_backbone:
        is_resnet = _is(backbone.get("bottom_up"), ResNet)
        train_affine = reference and is_resnet and "FrozenBN" in str(backbone.bottom_up)
        if feature_pyramid or train_affine:
            backbone.plain_backbone = _convert_target_to_string(target_of(backbone))
            backbone._target_ = build_balanced_backbone
            backbone.balanced = feature_pyramid
        if train_affine:
            backbone.train_affine = True
    elif feature_pyramid:
        backbone.setdefault("balanced", True)
    if reference and target_of(backbone.get("top_block")) is LastLevelP6P7:
        backbone.top_block._target_ = LinearLastLevelP6P7


def _match_as_reference(node: DictConfig, min_iou: float) -> None:
    if target_of(node.get("anchor_matcher")) is Matcher:
        node.anchor_matcher._target_ = LowQualityMatcher
        node.anchor_matcher.pop("allow_low_quality_matches", None)
        node.anchor_matcher.min_iou = min_iou


def _train_rpn_as_reference(rpn: DictConfig) -> None:
    instead = "derive it from LibraRPN, or leave out the reference's recipe"
    _exchange(rpn, {RPN: LibraRPN}, "proposal_generator", instead)
    _match_as_reference(rpn, _RPN_LOW_QUALITY_IOU)


def _loss(reference: bool, **kwargs) -> DictConfig:
    return L(BalancedL1Loss)(form="reference" if reference else "scaled", **kwargs)


def _balance_retinanet(model: DictConfig, balanced_l1: bool, reference: bool) -> None:
    if not (balanced_l1 or reference):
        return
    instead = "derive it from LibraRetinaNet, or use balanced_l1=False"
    if _exchange(model, {RetinaNet: LibraRetinaNet}, "model", instead):
        if not reference:  # what Detectron2's RetinaNet does
            model.update(normalizer="moving_average", clip_boxes=False, padding_anchors=True)
        if balanced_l1:
            model.update(box_reg_loss_type="balanced_l1")
            model.balanced_l1 = _loss(reference, beta=_RETINANET_BETA)
    elif balanced_l1:
        model.setdefault("box_reg_loss_type", "balanced_l1")
    if reference:
        _match_as_reference(model, _RETINANET_LOW_QUALITY_IOU)


def _balance_sampling(heads: DictConfig, reference: bool) -> None:
    instead = "derive it from BalancedSamplingMixin and from that class, or use sampling=False"
    if not _is(heads, BalancedSamplingMixin):
        _exchange(heads, _ROI_HEADS, "roi_heads", instead)
    if "proposal_sampler" in heads:
        return
    matcher = "proposal_matchers[0]" if "proposal_matchers" in heads else "proposal_matcher"
    if OmegaConf.select(heads, f"{matcher}.thresholds") is None:
        raise InputError(
            f"roi_heads.{matcher} has no thresholds, whose first is the upper end of the sampler's "
            "bins: set roi_heads.proposal_sampler, or use sampling=False"
        )
    heads.proposal_sampler = L(BalancedSampler)(
        mode="reference" if reference else "paper",
        negative_iou_thresh=f"${{..{matcher}.thresholds[0]}}",
    )
    if reference:
        _train_heads_as_reference(heads)


def _train_heads_as_reference(heads: DictConfig) -> None:
    mask_head = heads.get("mask_head")
    if mask_head is not None:
        heads.pad_masks = True
    if not _is(heads, LibraCascadeROIHeads):
        if mask_head is not None:
            heads.low_quality_iou = _MASK_RCNN_LOW_QUALITY_IOU
        return
    num_stages = len(heads.box_heads)
    weights = [0.5**stage for stage in range(num_stages)]
    heads.update(stage_loss_weights=weights, resample=True, average="logits")
    if mask_head is not None:
        mask_head.plain_head = _convert_target_to_string(target_of(mask_head))
        mask_head._target_ = build_mask_head_per_stage
        mask_head.num_stages = num_stages


def _box_predictors(heads: DictConfig) -> Iterator[Tuple[str, DictConfig]]:
    """Keys and nodes of the box predictors of ROI heads."""
    for i, predictor in enumerate(heads.get("box_predictors", ())):
        yield f"box_predictors.{i}", predictor
    if "box_predictor" in heads:
        yield "box_predictor", heads.box_predictor


def _balance_box_loss(heads: DictConfig, reference: bool) -> None:
    instead = "derive it from LibraFastRCNNOutputLayers, or use balanced_l1=False"
    exchange = {FastRCNNOutputLayers: LibraFastRCNNOutputLayers}
    for key, predictor in _box_predictors(heads):
        if _exchange(predictor, exchange, f"roi_heads.{key}", instead):
            predictor.box_reg_loss_type = "balanced_l1"
            predictor.balanced_l1 = _loss(reference)
        else:
            predictor.setdefault("box_reg_loss_type", "balanced_l1")


def disable(model: DictConfig, *ideas: str) -> List[str]:
    """
    Args:
        model: a LazyConfig that is called ``model``.
        ideas: of "sampling", "feature_pyramid" and "balanced_l1".

    Returns:
        overrides for ``LazyConfig.apply_overrides`` that disable the enabled ones among them.
    """
    overrides, heads = [], model.get("roi_heads") or {}
    if "feature_pyramid" in ideas and target_of(model.backbone) is build_balanced_backbone:
        overrides.append("model.backbone.balanced=False")
    if "sampling" in ideas and "proposal_sampler" in heads:
        sampler = "model.roi_heads.proposal_sampler"
        overrides += [f"{sampler}.negatives=random", f"{sampler}.positives=random"]
    if "balanced_l1" in ideas:
        nodes = {f"model.roi_heads.{key}": node for key, node in _box_predictors(heads)}
        nodes["model"] = model
        for key, node in nodes.items():
            is_own = _is(node, LibraRetinaNet, LibraFastRCNNOutputLayers)
            if is_own and node.get("box_reg_loss_type") == "balanced_l1":
                overrides.append(f"{key}.box_reg_loss_type=smooth_l1")
    return overrides
