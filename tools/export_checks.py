# SPDX-License-Identifier: Apache-2.0
"""
Check that an exported model gives the same results as the original; see export_model.py.

Two graphs are compared: the whole detector, and what it computes before thresholds and non-maximum
suppression. The second one can be compared even if nothing is detected, and its rounding errors are
small. Thresholds turn small differences into large ones, but only if scores or overlaps are nearly
equal.
"""

from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import nn

from detectron2.export import TracingAdapter
from detectron2.export.flatten import flatten_to_tuple
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances

from libra_d2.errors import InputError

Sample = Dict[str, torch.Tensor]
Exported = Callable[..., Tuple]

DENSE_HEADS = ("head", "proposal_generator.rpn_head")
FIELDS = ("pred_boxes", "pred_classes", "scores", "pred_masks")
# Rounding changes what a ResNet-50 computes before thresholds by less than this, relative to the
# largest value. Fifty times as much is allowed, for other processors and deeper networks.
TYPICAL_DIFFERENCE = 1e-5
RAW_BOUND = 50 * TYPICAL_DIFFERENCE
# By how much the fields of the same detection may then differ, in pixels and of probabilities.
BOUNDS = (0.05, 0, 1e-4, 1e-4)
NUM_RUNS = 8  # with noise


def model_inputs(inputs: List[Sample]) -> List[Dict[str, Any]]:
    """Samples as a data loader gives them to a model; detections are in the pixels of "image"."""
    full = []
    for x in inputs:
        height, width = x["image"].shape[-2:]
        full.append({"image": x["image"], "height": height, "width": width})
        if "boxes" in x:
            full[-1]["proposals"] = Instances((height, width), proposal_boxes=Boxes(x["boxes"]))
    return full


def detect(model: nn.Module, inputs: List[Sample]) -> Tuple:
    """
    Detect objects in one image.

    Args:
        model: in eval mode.
        inputs: one dict with "image" (3, H, W), and "boxes" (R, 4) if the model needs proposals.

    Returns:
        tensors of n detections each: those of :data:`FIELDS` that the model has.
    """
    inputs = model_inputs(inputs)
    if isinstance(model, GeneralizedRCNN):
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    values = (instances.get(name) for name in FIELDS if instances.has(name))
    return tuple(getattr(value, "tensor", value) for value in values)


def make_input(image: torch.Tensor, with_proposals: bool) -> Sample:
    """The input of :func:`detect`, with random proposals if the model needs them."""
    if not with_proposals:
        return {"image": image}
    height, width = image.shape[1:]
    corners = torch.rand(200, 2, 2) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    return {"boxes": boxes.to(image.device), "image": image}  # the order of exported inputs


@contextmanager
def hooked(model: nn.Module, hook: Callable) -> Iterator[None]:
    """
    Call ``hook(module, args, output)`` after each module whose outputs thresholds and non-maximum
    suppression choose from: the RPN's head, the box predictors, a dense detector's head.
    """
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, FastRCNNOutputLayers) or name in DENSE_HEADS:
                hooks.enter_context(module.register_forward_hook(hook))
        yield


def raw_outputs(model: nn.Module, inputs: List[Sample]) -> List[torch.Tensor]:
    """
    What a model computes before it chooses: the outputs of the modules of :func:`hooked`, and mask
    probabilities of the first class. The arguments are those of :func:`detect`, with "boxes" for
    any R-CNN, so that the second stage does not depend on the RPN's choice.
    """
    outputs: List[torch.Tensor] = []

    def keep(module: nn.Module, args: Tuple, output: Any) -> None:
        outputs.extend(x.clone() for x in flatten_to_tuple(output)[0])  # may be changed in place

    with hooked(model, keep):
        if not isinstance(model, GeneralizedRCNN):
            model(model_inputs(inputs))
            return outputs
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        if hasattr(model.proposal_generator, "rpn_head"):
            rpn = model.proposal_generator
            rpn.rpn_head([features[name] for name in rpn.in_features])
        boxes, size = Boxes(inputs[0]["boxes"]), inputs[0]["image"].shape[-2:]
        model.roi_heads(images, features, [Instances(size, proposal_boxes=boxes)])
    if getattr(model.roi_heads, "mask_on", False):
        classes = torch.zeros_like(boxes.tensor[:, 0], dtype=torch.int64)
        given = [Instances(size, pred_boxes=boxes, pred_classes=classes)]
        outputs.append(model.roi_heads.forward_with_given_boxes(features, given)[0].pred_masks)
    return outputs


def adapt(model: nn.Module, sample: Sample, what: Callable) -> TracingAdapter:
    """``what``, which is :func:`detect` or :func:`raw_outputs`, as a module of tensors."""
    return TracingAdapter(model, [sample], inference_func=what).eval()


def match(expected: Tuple, found: Tuple) -> torch.Tensor:
    """
    (n,): index of the nearest found detection of the same class for each expected one, as rounding
    may change the order of nearly equal scores. See :func:`detect`.
    """
    (boxes, classes, scores), (other_boxes, other_classes, other_scores) = expected[:3], found[:3]
    distance = (boxes[:, None] - other_boxes).abs().amax(dim=2)
    distance += 1000 * (scores[:, None] - other_scores).abs()
    distance[classes[:, None] != other_classes] = torch.inf
    return distance.argmin(dim=1) if len(boxes) else classes


def find_again(expected: Tuple, found: Tuple, tolerance: float = 1) -> Tuple[torch.Tensor, int]:
    """
    Compare detections, see :func:`detect`.

    Args:
        tolerance: how many times :data:`BOUNDS` they may differ.

    Returns:
        (n,) bool, which of the expected detections were found, and how many others were.
    """
    if not len(expected[0]) or not len(found[0]):
        return torch.zeros_like(expected[1], dtype=torch.bool), len(found[0])
    index = match(expected, found)
    again = torch.ones_like(index, dtype=torch.bool)
    for bound, ours, theirs in zip(BOUNDS, expected, found):
        is_near = (ours.float() - theirs[index].float()).abs() <= tolerance * bound
        again &= is_near.view(len(again), -1).all(dim=1)
    return again, len(found[0]) - len(index[again].unique())


def largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in a tensor, 0 in an empty one."""
    return torch.cat([x.flatten().abs(), x.new_zeros(1)]).max()


def refuse(sample: Sample, problem: str) -> None:
    """Raise the InputError of an exported model that differs."""
    size = "{1} x {0}".format(*sample["image"].shape[1:])
    raise InputError(f"in an image of {size} pixels {problem}: the model cannot be exported")


@torch.no_grad()
def check_raw(model: nn.Module, exported: Exported, sample: Sample) -> float:
    """
    Compare :func:`raw_outputs`, which there are whether or not anything is detected.

    Returns:
        the largest difference, relative to the largest magnitude in its tensor: rounding errors of
        a sum are relative to what is summed up, and not to a result that may be near 0.

    Raises:
        InputError: if it is more than :data:`RAW_BOUND`.
    """
    tensors = list(sample.values())
    expected, found = adapt(model, sample, raw_outputs)(*tensors), exported(*tensors)
    if [x.shape for x in expected] != [x.shape for x in found]:
        refuse(sample, "what is computed before thresholds has other shapes")
    differences = [largest(a - b) / largest(a).clamp(min=1e-30) for a, b in zip(expected, found)]
    difference = torch.stack(differences).max().item()
    if not difference <= RAW_BOUND:  # nor may it be no number
        much = f"{difference:.1g} of the largest value"
        refuse(sample, f"what is computed before thresholds differs by {much}")
    return difference


@torch.no_grad()
def check_detections(
    model: nn.Module, exported: Exported, sample: Sample, difference: float
) -> Tuple[int, int]:
    """
    Compare detections. Those that differ must be those that rounding decides on: where scores or
    overlaps are nearly equal, noise in what thresholds and non-maximum suppression choose from
    changes the model's own detections as much.

    Args:
        difference: what :func:`check_raw` has returned.

    Returns:
        the number of detections of the model, and how many of them the exported model lacks.

    Raises:
        InputError: if it lacks or adds more than noise explains.
    """
    # More than the largest error that there was, and than that of a single operation.
    noise = 3 * max(difference, 1e-6)
    tolerance = max(difference / TYPICAL_DIFFERENCE, 1)

    def disturb(module: nn.Module, args: Tuple, output: Any) -> Any:
        tensors, schema = flatten_to_tuple(output)
        return schema([x + noise * largest(x) * (2 * torch.rand_like(x) - 1) for x in tensors])

    expected = detect(model, [sample])
    again, others = find_again(expected, exported(*sample.values()), tolerance)
    if not again.all() or others:
        with hooked(model, disturb):
            noisy = [detect(model, [sample]) for _ in range(NUM_RUNS)]
        runs = [find_again(expected, x, tolerance) for x in noisy]
        # The exported model may be one more of these runs. It stands out if it lacks what all of
        # them have, more than one of them lacks what all others have.
        count = torch.stack([x for x, _ in runs]).sum(dim=0)
        lost = int((~again & (count == NUM_RUNS)).sum())
        if lost > 2 * max(int((~x & (count == NUM_RUNS - 1)).sum()) for x, _ in runs):
            refuse(sample, f"the exported model lacks {lost} of {len(again)} detections")
        if others > 2 * max(number for _, number in runs):
            refuse(sample, f"the exported model has {others} detections that the model lacks")
    return len(again), int((~again).sum())


def check(
    model: nn.Module,
    samples: List[Sample],
    exported: Exported,
    export_raw: Callable[[Sample], Exported],
) -> str:
    """
    Compare an exported model with the model.

    Args:
        samples: inputs of :func:`detect`, that of ``--sample-image`` first.
        exported: does what :func:`detect` does, for tensors.
        export_raw: exports :func:`raw_outputs` for an input of it.

    Returns:
        what was compared, in two lines.

    Raises:
        InputError: see :func:`check_raw` and :func:`check_detections`.
    """
    is_rcnn = isinstance(model, GeneralizedRCNN)
    raw_samples = [x if "boxes" in x else make_input(x["image"], is_rcnn) for x in samples]
    with torch.no_grad():
        has_raw = bool(raw_outputs(model, raw_samples[:1]))
    differences = [0.0] * len(samples)
    text = "before thresholds: nothing was compared: this model has no known head\n"
    if has_raw:
        raw = export_raw(raw_samples[0])
        differences = [check_raw(model, raw, x) for x in raw_samples]
        text = f"before thresholds: the same to {max(differences):.1g} of the largest value\n"
    counts = [check_detections(model, exported, *x) for x in zip(samples, differences)]
    same = [number - lost for number, lost in counts]
    lost = sum(lost for _, lost in counts)
    if sum(same):
        in_others = ", ".join(map(str, same[1:]))
        text += f"detections: the same {same[0]}, and {in_others} in images of other sizes"
    else:
        text += "detections: none were compared"
    return text + (f"; rounding decides on {lost} more" if lost else "")
