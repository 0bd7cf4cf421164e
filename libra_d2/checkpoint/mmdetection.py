# SPDX-License-Identifier: Apache-2.0
"""
Weights of mmdetection 2.x and 3.x under Detectron2's names, and back.

They differ in more than names: only mmdetection's batch norms have ``num_batches_tracked``, and the
anchors of RetinaNet's last convolutions are ratio-major in mmdetection, scale-major in Detectron2.
"""

import re
from itertools import zip_longest
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch

from ..errors import InputError
from .convnext import from_convnext

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


class _Rule(NamedTuple):
    """
    The name of modules with weights in both frameworks. ``#`` is a number, and ``@`` mmdetection's
    name of a norm: "bn" or "gn".
    """

    theirs: str
    ours: str
    #: what is added to mmdetection's numbers, in their order; 0 for the others
    shift: Tuple[int, ...] = ()
    #: what they are multiplied by before
    factor: int = 1

    def to_ours(self, name: str) -> Optional[str]:
        """Detectron2's name; None if the rule is about others."""
        match = re.fullmatch(_pattern(self.theirs), name)
        if not match:
            return None
        numbers = [int(x) * self.factor for x in match.groups()]
        return _fill(self.ours, [x + d for x, d in zip_longest(numbers, self.shift, fillvalue=0)])

    def to_theirs(self, name: str, norm: str) -> Optional[str]:
        """mmdetection's name, with ``norm`` for "@"; None if the rule is about others."""
        match = re.fullmatch(_pattern(self.ours), name)
        if not match:
            return None
        numbers = zip_longest(map(int, match.groups()), self.shift, fillvalue=0)
        numbers = [(x - d) // self.factor for x, d in numbers]
        return _fill(self.theirs, numbers).replace("@", norm)


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\#", r"(\d+)").replace("@", "(?:bn|gn)")


def _fill(name: str, numbers: List[int]) -> str:
    digits = map(str, numbers)
    return re.sub("#", lambda _: next(digits), name)


def _conv(theirs: str, ours: str, *shift: int) -> Tuple[_Rule, _Rule]:
    """A convolution and its norm, if it has one."""
    return _Rule(f"{theirs}.conv", ours, shift), _Rule(f"{theirs}.@", f"{ours}.norm", shift)


_STEM, _BLOCK, _RPN = (
    "backbone.bottom_up.stem.conv1",
    "backbone.bottom_up.res#.#",
    "proposal_generator.rpn_head",
)
_BACKBONE = (
    _Rule("backbone.conv1", _STEM),
    _Rule("backbone.@1", f"{_STEM}.norm"),
    _Rule("backbone.layer#.#.conv#", f"{_BLOCK}.conv#", (1,)),
    _Rule("backbone.layer#.#.@#", f"{_BLOCK}.conv#.norm", (1,)),
    # Of deformable convolutions: horizontal and vertical offsets of the 3x3 positions, and their
    # weights, in the same order.
    _Rule("backbone.layer#.#.conv2.conv_offset", f"{_BLOCK}.conv2_offset", (1,)),
    _Rule("backbone.layer#.#.downsample.0", f"{_BLOCK}.shortcut", (1,)),
    _Rule("backbone.layer#.#.downsample.1", f"{_BLOCK}.shortcut.norm", (1,)),
    _Rule("neck.1.refine.conv", "backbone.bfp.refine"),
    *(
        _Rule(f"neck.1.refine.{name}.conv", f"backbone.bfp.refine.{name}")
        for name in ("theta", "phi", "g", "conv_out")
    ),
)
_RETINANET = (
    # Every other module of the subnets is a ReLU, as there are no norms.
    _Rule("bbox_head.cls_convs.#.conv", "head.cls_subnet.#", factor=2),
    _Rule("bbox_head.reg_convs.#.conv", "head.bbox_subnet.#", factor=2),
    _Rule("bbox_head.retina_cls", "head.cls_score"),
    _Rule("bbox_head.retina_reg", "head.bbox_pred"),
)
_RCNN = (
    _Rule("rpn_head.rpn_conv", f"{_RPN}.conv"),
    _Rule("rpn_head.rpn_cls", f"{_RPN}.objectness_logits"),
    _Rule("rpn_head.rpn_reg", f"{_RPN}.anchor_deltas"),
)


def _of_stage(stage: str, shift: Tuple[int, ...]) -> Tuple[_Rule, ...]:
    """
    Args: stage: "" for the heads of a model without stages, ".#" for those of a cascade; shift: 0
    for the number of the stage, if it has one.
    """
    box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
    return (
        *_conv(f"{box}.shared_convs.#", f"roi_heads.box_head{stage}.conv#", *shift, 1),
        _Rule(f"{box}.shared_fcs.#", f"roi_heads.box_head{stage}.fc#", (*shift, 1)),
        _Rule(f"{box}.fc_cls", f"roi_heads.box_predictor{stage}.cls_score"),
        _Rule(f"{box}.fc_reg", f"roi_heads.box_predictor{stage}.bbox_pred"),
        *_conv(f"{mask}.convs.#", f"roi_heads.mask_head{stage}.mask_fcn#", *shift, 1),
        _Rule(f"{mask}.upsample", f"roi_heads.mask_head{stage}.deconv"),
        _Rule(f"{mask}.conv_logits", f"roi_heads.mask_head{stage}.predictor"),
    )


def _rules(is_retinanet: bool, has_bfp: bool) -> Tuple[_Rule, ...]:
    """The rules for the names of a model, of which the first that fits a name counts."""
    # With a balanced feature pyramid, the neck is a sequence of two modules.
    fpn = "neck.0" if has_bfp else "neck"
    first = 3 if is_retinanet else 2
    top = (
        _Rule(f"{fpn}.fpn_convs.3.conv", "backbone.top_block.p6"),
        _Rule(f"{fpn}.fpn_convs.4.conv", "backbone.top_block.p7"),
    )
    pyramid = (
        *_conv(f"{fpn}.lateral_convs.#", "backbone.fpn_lateral#", first),
        *_conv(f"{fpn}.fpn_convs.#", "backbone.fpn_output#", first),
    )
    if is_retinanet:
        return (*_BACKBONE, *top, *pyramid, *_RETINANET)
    return (*_BACKBONE, *pyramid, *_RCNN, *_of_stage("", ()), *_of_stage(".#", (0,)))


# Parts of mmdetection's models that Detectron2 does not have.
_FOREIGN = (
    (r"neck\.(0\.)?(downsample|pafpn)_convs\.", "PAFPN"),
    (r"roi_head\.semantic_head\.", "the semantic branch of HTC"),
    (r"roi_head\.mask_head\.\d+\.conv_res\.", "the mask information flow of HTC"),
    (r"roi_head\.mask_iou_head\.", "the mask IoU head of Mask Scoring R-CNN"),
    (r"roi_head\.point_head\.", "the point head of PointRend"),
    (r"roi_head\.grid_head\.", "the grid head of Grid R-CNN"),
    (r"roi_head\.bbox_head\.(\d+\.)?(cls|reg)_(convs|fcs)\.", "a box head with two branches"),
    (r"bbox_head\.(cls|reg)_convs\.\d+\.[bg]n\.", "a RetinaNet whose head has norms"),
    (r"backbone\.stem\.", "a stem of three convolutions (ResNetV1d)"),
    (r"backbone\.layer\d\.\d+\.(context_block|gen_attention|plugin)", "a plugin of the backbone"),
)


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
    Convert weights of an mmdetection 2.x or 3.x detector to Detectron2's names and layouts.
    ``num_batches_tracked`` and the second set of weights of an EMA hook are dropped; other names
    that Detectron2 lacks are kept.

    Raises:
        InputError: if the weights are from mmdetection 1.x, or belong to a part of a model that
            Detectron2 does not have, which it names.
    """
    if any(key.startswith(("bbox_head.fc_cls.", "bbox_head.shared_fcs.")) for key in state):
        raise InputError(_OLD_VERSION)
    for pattern, part in _FOREIGN:
        foreign = next((key for key in state if re.match(pattern, key)), None)
        if foreign:
            raise InputError(f"{foreign!r} in it is a weight of {part}, which is not supported")
    is_retinanet = any(key.startswith("bbox_head.retina_") for key in state)
    rules = _rules(is_retinanet, any(key.startswith("neck.0.") for key in state))
    converted = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == COUNTER or key.startswith("ema_"):
            continue
        if module in ("bbox_head.retina_cls", "bbox_head.retina_reg"):
            value = _reorder_anchors(value, _NUM_RATIOS, _NUM_SCALES)
        name = next(filter(None, (rule.to_ours(module) for rule in rules)), module)
        converted[f"{name}.{leaf}".lstrip(".")] = value
    return converted


def to_mmdetection(state: State) -> State:
    """
    Convert weights of a plain or Libra R-CNN, Mask R-CNN, Cascade R-CNN or RetinaNet of Detectron2,
    on a ResNet, to the names and layouts of mmdetection 2.x and 3.x. ``num_batches_tracked`` is 0.

    Raises:
        InputError: if a weight has no name in mmdetection.
    """
    is_retinanet = any(key.startswith("head.cls_score.") for key in state)
    rules = _rules(is_retinanet, any(key.startswith("backbone.bfp.") for key in state))
    converted = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if key in ("pixel_mean", "pixel_std") or "anchor_generator." in key:
            continue  # constants that older versions of Detectron2 saved
        norm = "bn" if f"{module}.running_var" in state else "gn"
        name = next(filter(None, (rule.to_theirs(module, norm) for rule in rules)), None)
        if name is None:
            raise InputError(f"{key!r} has no counterpart in mmdetection's Libra R-CNN models")
        if module in ("head.cls_score", "head.bbox_pred"):
            value = _reorder_anchors(value, _NUM_SCALES, _NUM_RATIOS)
        converted[f"{name}.{leaf}"] = value
        if leaf == "running_var":
            converted[f"{name}.{COUNTER}"] = torch.zeros((), dtype=torch.int64)
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
    if "downsample_layers.0.0.weight" in state:  # of ConvNeXt's authors
        return {"model": from_convnext(state), "matching_heuristics": True}
    if not is_mmdetection(state):
        return {**checkpoint, "model": state}
    return {"model": from_mmdetection(state), "__author__": "mmdetection"}
