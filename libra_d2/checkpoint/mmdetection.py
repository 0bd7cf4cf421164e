# SPDX-License-Identifier: Apache-2.0
"""
Weights of mmdetection 2.x and 3.x under Detectron2's names, and back.

They differ in more than names: only mmdetection's batch norms have ``num_batches_tracked``, and the
anchors of RetinaNet's last convolutions are ratio-major in mmdetection, scale-major in Detectron2.
"""

import re
from itertools import product
from typing import Any, Dict, Mapping, Tuple

import numpy as np
import torch

from ..errors import InputError
from .convnext import from_convnext, is_convnext

__all__ = [
    "check_weights",
    "from_mmdetection",
    "is_mmdetection",
    "to_detectron2_checkpoint",
    "to_mmdetection",
    "unwrap_mmdetection",
]

State = Dict[str, torch.Tensor]

COUNTER = "num_batches_tracked"
# RetinaNet's anchors at each location, in the configs of both frameworks.
_NUM_RATIOS, _NUM_SCALES = 3, 3
_OLD_VERSION = (
    "a checkpoint of mmdetection 1.x, which counts pixels and classes in another way; convert it "
    "with tools/model_converters/upgrade_model_version.py of mmdetection 2.x"
)
_MAX_BLOCKS = 64  # per ResNet stage, more than any has


def _module_names(is_retinanet: bool, has_bfp: bool) -> Dict[str, str]:
    """Names of the modules with weights: mmdetection's to Detectron2's."""
    stem = "backbone.bottom_up.stem.conv1"
    names = {"backbone.conv1": stem, "backbone.bn1": f"{stem}.norm"}
    for stage, block in product(range(1, 5), range(_MAX_BLOCKS)):
        theirs = f"backbone.layer{stage}.{block}"
        ours = f"backbone.bottom_up.res{stage + 1}.{block}"
        for i in (1, 2, 3):
            names[f"{theirs}.conv{i}"] = f"{ours}.conv{i}"
            names[f"{theirs}.bn{i}"] = f"{ours}.conv{i}.norm"
        names[f"{theirs}.downsample.0"] = f"{ours}.shortcut"
        names[f"{theirs}.downsample.1"] = f"{ours}.shortcut.norm"

    # With a balanced feature pyramid, the neck is a sequence of two modules.
    fpn = "neck.0" if has_bfp else "neck"
    for i, level in enumerate(range(3 if is_retinanet else 2, 6)):
        names[f"{fpn}.lateral_convs.{i}.conv"] = f"backbone.fpn_lateral{level}"
        names[f"{fpn}.fpn_convs.{i}.conv"] = f"backbone.fpn_output{level}"
    names["neck.1.refine.conv"] = "backbone.bfp.refine"
    for name in ("theta", "phi", "g", "conv_out"):
        names[f"neck.1.refine.{name}.conv"] = f"backbone.bfp.refine.{name}"

    if is_retinanet:
        names[f"{fpn}.fpn_convs.3.conv"] = "backbone.top_block.p6"
        names[f"{fpn}.fpn_convs.4.conv"] = "backbone.top_block.p7"
        for i in range(_MAX_BLOCKS):  # every other module of the subnets is a ReLU
            names[f"bbox_head.cls_convs.{i}.conv"] = f"head.cls_subnet.{2 * i}"
            names[f"bbox_head.reg_convs.{i}.conv"] = f"head.bbox_subnet.{2 * i}"
        names["bbox_head.retina_cls"] = "head.cls_score"
        names["bbox_head.retina_reg"] = "head.bbox_pred"
        return names
    names["rpn_head.rpn_conv"] = "proposal_generator.rpn_head.conv"
    names["rpn_head.rpn_cls"] = "proposal_generator.rpn_head.objectness_logits"
    names["rpn_head.rpn_reg"] = "proposal_generator.rpn_head.anchor_deltas"
    for i in range(_MAX_BLOCKS):
        names[f"roi_head.bbox_head.shared_fcs.{i}"] = f"roi_heads.box_head.fc{i + 1}"
    names["roi_head.bbox_head.fc_cls"] = "roi_heads.box_predictor.cls_score"
    names["roi_head.bbox_head.fc_reg"] = "roi_heads.box_predictor.bbox_pred"
    return names


def _reorder_anchors(weight: torch.Tensor, num_outer: int, num_inner: int) -> torch.Tensor:
    """Swap outer and inner order of the anchors in (num_outer * num_inner * C, ...) channels."""
    channels = len(weight) // (num_outer * num_inner)
    if channels * num_outer * num_inner != len(weight):
        raise InputError(
            f"a RetinaNet with {num_outer * num_inner} anchors per location was expected, but its "
            f"last layer has {len(weight)} channels"
        )
    split = weight.reshape(num_outer, num_inner, channels, *weight.shape[1:])
    return split.transpose(0, 1).reshape(weight.shape)


def is_mmdetection(state: Dict[str, Any]) -> bool:
    """Whether these weights have the names of mmdetection or another OpenMMLab project."""
    return any(key.startswith(("backbone.conv1.", "backbone.layer1.")) for key in state)


def from_mmdetection(state: State) -> State:
    """
    Convert weights of an mmdetection 2.x or 3.x detector to Detectron2's names and layouts. Weights
    of an EMA hook and ``num_batches_tracked`` are dropped; names that Detectron2 lacks are kept.

    Raises:
        InputError: if the weights are from mmdetection 1.x.
    """
    if any(key.startswith(("bbox_head.fc_cls.", "bbox_head.shared_fcs.")) for key in state):
        raise InputError(_OLD_VERSION)
    is_retinanet = any(key.startswith("bbox_head.retina_") for key in state)
    names = _module_names(is_retinanet, any(key.startswith("neck.0.") for key in state))
    converted = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == COUNTER or key.startswith("ema_"):
            continue
        if module in ("bbox_head.retina_cls", "bbox_head.retina_reg"):
            value = _reorder_anchors(value, _NUM_RATIOS, _NUM_SCALES)
        converted[f"{names[module]}.{leaf}" if module in names else key] = value
    return converted


def to_mmdetection(state: State) -> State:
    """
    Convert weights of a plain or Libra R-CNN or RetinaNet of Detectron2, on a ResNet with batch
    norm, to the names and layouts of mmdetection 2.x and 3.x. ``num_batches_tracked`` is 0.

    Raises:
        InputError: if a weight has no name in mmdetection.
    """
    is_retinanet = any(key.startswith("head.cls_score.") for key in state)
    names = _module_names(is_retinanet, any(key.startswith("backbone.bfp.") for key in state))
    names = {ours: theirs for theirs, ours in names.items()}
    converted = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if key in ("pixel_mean", "pixel_std") or "anchor_generator." in key:
            continue  # constants that older versions of Detectron2 saved
        if module not in names:
            raise InputError(f"{key!r} has no counterpart in mmdetection's Libra R-CNN models")
        if module in ("head.cls_score", "head.bbox_pred"):
            value = _reorder_anchors(value, _NUM_SCALES, _NUM_RATIOS)
        converted[f"{names[module]}.{leaf}"] = value
        if leaf == "running_var":
            converted[f"{names[module]}.{COUNTER}"] = torch.zeros((), dtype=torch.int64)
    return converted


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor has all of its content in memory."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def check_weights(weights: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: if something in ``weights`` is no array, or none that a model can compute with;
            it names the first such weight.
    """
    for key, value in weights.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise InputError(f"not a checkpoint: {key!r} in it is a {type(value).__name__}")
        if isinstance(value, torch.Tensor) and not _is_plain(value):
            raise InputError(
                f"{key!r} in it is a sparse, quantized, expanded or empty (meta) tensor; "
                "save the weights as plain tensors"
            )
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "bfiu":
                raise InputError(f"{key!r} in it is an array of {value.dtype}")
            value = torch.from_numpy(value.copy())
        if value.is_complex() or not torch.isfinite(value).all():
            what = "of complex numbers" if value.is_complex() else "not finite"
            raise InputError(
                f"{key!r} in it is {what}: these weights are broken; use an earlier checkpoint"
            )


def unwrap_mmdetection(content: Any) -> Tuple[State, Dict[str, Any]]:
    """
    Args:
        content: an mmdetection checkpoint, or a dict of weights.

    Returns:
        the weights, without the prefix "module." of data parallel training, and ``meta``.

    Raises:
        InputError: if it holds no weights or anything else, or is from mmdetection 1.x; see also
            :func:`check_weights`.
    """
    meta = {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        meta, content = content.get("meta"), content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(f"not a checkpoint: it holds a {type(content).__name__}")
    state = {re.sub(r"^module\.", "", key): value for key, value in content.items()}
    if not state:
        raise InputError("not a checkpoint: there are no weights in it")
    check_weights(state)
    meta = meta if isinstance(meta, dict) else {}
    if str(meta.get("mmdet_version", "2")).startswith(("0.", "1.")):
        raise InputError(_OLD_VERSION)
    return state, meta


def to_detectron2_checkpoint(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """
    Convert mmdetection's checkpoints, and ImageNet weights of torchvision, open-mmlab or ConvNeXt;
    unwrap the weights of others.

    Args:
        checkpoint: with the key "model", as Detectron2 reads any file.

    Raises:
        InputError: see :func:`unwrap_mmdetection`.
    """
    state, _ = unwrap_mmdetection(checkpoint["model"])
    if {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys():  # torchvision's ResNet
        state = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    if is_convnext(state):
        return {"model": from_convnext(state), "matching_heuristics": True}
    if not is_mmdetection(state):
        return {**checkpoint, "model": state}
    return {"model": from_mmdetection(state), "__author__": "mmdetection"}
