#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Trace a trained model for deployment: a TorchScript file that needs neither this project nor
Detectron2's Python code, only PyTorch and torchvision's operators, in Python or C++.

    python tools/export_model.py --config-file config.yaml --sample-image image.jpg \
        --output model.ts MODEL.WEIGHTS model_final.pth

The traced model takes an image as (3, H, W) float32 tensor, 0 to 255, with the channels in the
order of INPUT.FORMAT, resized as INPUT.MIN_SIZE_TEST says; any H and W. It returns boxes (n, 4),
absolute XYXY in that image, classes (n,) and scores (n,), and with a mask head masks
(n, 1, 28, 28), probabilities within the boxes. All of this is in OUTPUT.json, too. Before it is
written it has to detect what the model detects, in the sample image and in one of another size.
"""

import argparse
import json
import os
from typing import Dict, List, Tuple

import torch

from detectron2.config import CfgNode
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN

from libra_d2.atomic_write import atomic_write
from libra_d2.checkpoint import build_trained_model
from libra_d2.data import build_augmentation, read_image
from libra_d2.engine import (
    config_argument_parser,
    read_config,
    report_errors,
)
from libra_d2.errors import InputError, one_line

FIELDS = ("pred_boxes", "pred_classes", "scores", "pred_masks")


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    parser.add_argument(
        "--sample-image", required=True, metavar="FILE", help="one in which there are objects"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="such as model.ts")
    return parser


def detect(model: torch.nn.Module, inputs: List[Dict[str, torch.Tensor]]) -> Tuple:
    """The fields of one image's detections, those of :data:`FIELDS` that it has, as tensors."""
    if isinstance(model, GeneralizedRCNN):
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    values = (instances.get(name) for name in FIELDS if instances.has(name))
    return tuple(getattr(value, "tensor", value) for value in values)


def trace(model: torch.nn.Module, image: torch.Tensor) -> torch.jit.ScriptModule:
    """
    Args:
        model: in eval mode.
        image: (3, H, W).

    Returns:
        the traced model.
    """
    adapter = TracingAdapter(model, [{"image": image}], inference_func=detect)
    with torch.no_grad():
        return torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)


def match(expected: Tuple, found: Tuple) -> torch.Tensor:
    """
    Args:
        expected, found: fields of n detections each, see :func:`detect`.

    Returns:
        (n,) index of the found detection that is nearest to each expected one, of the same class.
        Equal scores have no order, and rounding may change that of nearly equal ones.
    """
    (boxes, classes, scores), (other_boxes, other_classes, other_scores) = expected[:3], found[:3]
    distance = (boxes[:, None] - other_boxes).abs().amax(dim=2)
    distance += 1000 * (scores[:, None] - other_scores).abs()
    distance[classes[:, None] != other_classes] = torch.inf
    return distance.argmin(dim=1) if len(boxes) else classes


@torch.no_grad()
def check(model: torch.nn.Module, traced: torch.jit.ScriptModule, image: torch.Tensor) -> int:
    """
    Compare the detections in an image.

    Returns:
        how many there are.

    Raises:
        RuntimeError: if they are not the same.
    """
    expected, found = detect(model, [{"image": image}]), traced(image)
    size = "{1} x {0}".format(*image.shape[1:])
    if [x.shape for x in expected] != [x.shape for x in found]:
        raise RuntimeError(
            f"in the image of {size} pixels the model detects {len(expected[0])} objects, its "
            f"trace {len(found[0])}: the model cannot be traced"
        )
    index = match(expected, found)
    if len(index.unique()) != len(index):
        raise RuntimeError(
            f"in the image of {size} pixels the trace detects other objects: the model cannot be "
            "traced"
        )
    for name, a, b in zip(FIELDS, expected, found):
        # The same operations on the same numbers, some of them fused.
        b = b[index].float()
        if not torch.allclose(a.float(), b, rtol=1e-4, atol=1e-3):
            difference = (a.float() - b).abs().max().item()
            raise RuntimeError(
                f"in the image of {size} pixels {name} of the trace differ by up to "
                f"{difference:.3g}: the model cannot be traced"
            )
    return len(expected[0])


def read_sample(cfg: CfgNode, path: str) -> torch.Tensor:
    """The image as the model gets it, (3, H, W) float32, resized as in evaluation."""
    augmented = AugInput(read_image(path, cfg.INPUT.FORMAT))
    AugmentationList(build_augmentation(cfg, is_train=False))(augmented)
    image = torch.from_numpy(augmented.image.copy()).permute(2, 0, 1)
    return image.float().to(cfg.MODEL.DEVICE)


def run(args: argparse.Namespace) -> None:
    """Build, trace, check and write."""
    cfg = read_config(args.config_file, args.opts, output=False)
    if cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        raise InputError("only models that detect objects in images alone can be exported")
    image = read_sample(cfg, args.sample_image)
    model = build_trained_model(cfg)
    traced = trace(model, image)
    height, width = image.shape[1:]
    smaller = torch.nn.functional.interpolate(image[None], (height * 3 // 4, width * 2 // 3))[0]
    counts = [check(model, traced, x) for x in (image, smaller)]
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    try:
        with atomic_write(args.output) as f:
            torch.jit.save(traced, f)
    except RuntimeError as e:  # a part of the model is not PyTorch's
        raise InputError(
            "Detectron2 0.6 cannot save the trace of this model, upstream's main branch may: "
            f"{one_line(e)[:90]}..."
        ) from e
    description = {
        "input": {
            "format": cfg.INPUT.FORMAT,
            "interpolation": cfg.MODEL.LIBRA.INPUT.INTERPOLATION,
            "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
            "longer_side_at_most": cfg.INPUT.MAX_SIZE_TEST,
            "device": cfg.MODEL.DEVICE,
        },
        "output": list(FIELDS[: 4 if cfg.MODEL.MASK_ON else 3]),
        "config": cfg.dump(),
    }
    with atomic_write(f"{args.output}.json", "w") as f:
        json.dump(description, f, indent=1)
    print(f"the same {counts[0]} detections, and {counts[1]} in an image of another size")
    print(args.output)


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
