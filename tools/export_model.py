#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Export a trained model for deployment, as the suffix of the output says: an ONNX file, or a
TorchScript file that needs neither this project nor Detectron2's Python code.

    python tools/export_model.py --config-file config.yaml --sample-image image.jpg \
        --output model.onnx MODEL.WEIGHTS model_final.pth

The exported model takes an image as (3, H, W) float32 tensor, 0 to 255, with the channels in the
order of INPUT.FORMAT, resized as INPUT.MIN_SIZE_TEST says; any H and W. A model without RPN takes
proposals, too: (R, 4), absolute XYXY in that image. It returns boxes (n, 4), absolute XYXY, classes
(n,) and scores (n,), and with a mask head masks (n, 1, 28, 28), probabilities within the boxes. All
of this is in OUTPUT.json, and in the metadata of an ONNX file. Before it is written it has to
detect what the model detects, in the sample image, in others of other sizes, and where there is
nothing. demo/onnx_demo.py shows how an ONNX file is used.
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from typing import Callable, Dict, List, Optional, Tuple

import torch

from detectron2.data import MetadataCatalog
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from libra_d2.config import Recipe
from libra_d2.data import read_image
from libra_d2.data.coco_json import read_categories
from libra_d2.engine import (
    config_argument_parser,
    read_config,
    report_errors,
)
from libra_d2.errors import InputError, one_line
from libra_d2.utils.atomic_write import atomic_write

Exported = Callable[..., Tuple]
FIELDS = ("pred_boxes", "pred_classes", "scores", "pred_masks")


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    parser.add_argument(
        "--sample-image", required=True, metavar="FILE", help="one in which there are objects"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="such as model.onnx, or model.ts"
    )
    parser.add_argument(
        "--categories", metavar="FILE", help="COCO JSON that names the classes of your own model"
    )
    return parser


def detect(model: torch.nn.Module, inputs: List[Dict[str, torch.Tensor]]) -> Tuple:
    """
    The fields of one image's detections, those of :data:`FIELDS` that it has, as tensors.

    Args:
        model: in eval mode.
        inputs: one with an "image" (3, H, W), and "boxes" (R, 4) if the model wants proposals.
    """
    (x,) = inputs
    if "boxes" in x:
        proposals = Instances(x["image"].shape[-2:], proposal_boxes=Boxes(x["boxes"]))
        inputs = [{"image": x["image"], "proposals": proposals}]
    if isinstance(model, GeneralizedRCNN):
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    values = (instances.get(name) for name in FIELDS if instances.has(name))
    return tuple(getattr(value, "tensor", value) for value in values)


def make_input(image: torch.Tensor, with_proposals: bool) -> Dict[str, torch.Tensor]:
    """The input of :func:`detect`, with random proposals if it needs some."""
    if not with_proposals:
        return {"image": image}
    height, width = image.shape[1:]
    corners = torch.rand(200, 2, 2) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    return {"boxes": boxes.to(image.device), "image": image}  # the order of exported inputs


def trace(model: torch.nn.Module, sample: Dict[str, torch.Tensor]) -> Exported:
    """
    Args:
        model: in eval mode.
        sample: see :func:`detect`.

    Returns:
        the traced model.
    """
    adapter = TracingAdapter(model, [sample], inference_func=detect)
    with torch.no_grad():
        return torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)


def export_onnx(model: torch.nn.Module, sample: Dict[str, torch.Tensor], path: str) -> Exported:
    """
    Write an ONNX file for any image size.

    Args:
        model, sample: see :func:`trace`.
        path: of the file.

    Returns:
        what onnxruntime makes of it, as a function of tensors.

    Raises:
        InputError: if a package is missing, or the model has an operator that ONNX lacks.
    """
    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--output {path}: `pip install onnx onnxruntime`")
    import onnxruntime

    adapter = TracingAdapter(model, [sample], inference_func=detect).eval()
    axes = {"image": {1: "height", 2: "width"}, "boxes": {0: "num_proposals"}}
    outputs = list(FIELDS[: len(detect(model, [sample]))])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about what was checked with other sizes
            torch.onnx.export(
                adapter,
                adapter.flattened_inputs,
                path,
                opset_version=17,
                input_names=list(sample),
                output_names=outputs,
                dynamic_axes={
                    **{name: axes[name] for name in sample},
                    **{name: {0: "num_detections"} for name in outputs},
                },
                dynamo=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as e:
        raise InputError(f"--output {path}: the model cannot be exported: {one_line(e)}") from e
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*tensors: torch.Tensor) -> Tuple:
        arrays = {name: tensor.numpy() for name, tensor in zip(sample, tensors)}
        return tuple(torch.as_tensor(x) for x in session.run(None, arrays))

    return run


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
def check(model: torch.nn.Module, exported: Exported, sample: Dict[str, torch.Tensor]) -> int:
    """
    Compare the detections in an image.

    Returns:
        how many there are.

    Raises:
        InputError: if they are not the same.
    """
    expected, found = detect(model, [sample]), exported(*sample.values())
    size = "{1} x {0}".format(*sample["image"].shape[1:])
    what = f"in an image of {size} pixels"
    if [x.shape for x in expected] != [x.shape for x in found]:
        raise InputError(
            f"{what} the model detects {len(expected[0])} objects, but exported "
            f"{len(found[0])}: the model cannot be exported"
        )
    # Where more was found than a model returns, equal scores decide which the last ones are.
    clear = expected[2] > expected[2].amin(dim=0) + 1e-4 if len(expected[0]) else expected[1]
    expected = tuple(x[clear] for x in expected)
    index = match(expected, found)
    if len(index.unique()) != len(index):
        raise InputError(
            f"{what} the exported model detects other objects: the model cannot be exported"
        )
    for name, a, b in zip(FIELDS, expected, found):
        # The same operations on the same numbers, some of them fused: pixels, and probabilities.
        bound = 0.05 if name == "pred_boxes" else 1e-4
        difference = (a.float() - b[index].float()).abs().max().item() if len(a) else 0
        if difference > bound:
            raise InputError(
                f"{what} {name} of the exported model differ by up to {difference:.3g}: the model "
                "cannot be exported"
            )
    return len(found[0])


def other_images(image: torch.Tensor) -> List[torch.Tensor]:
    """The image in other sizes, portrait and landscape, and one in which there is nothing."""
    height, width = image.shape[1:]
    sizes = ((height * 3 // 4, width * 2 // 3), (height - 1, width + 37), (height + 33, width // 2))
    resized = [torch.nn.functional.interpolate(image[None], size)[0] for size in sizes]
    return [*resized, image.transpose(1, 2).contiguous(), torch.full_like(image, 114)]


def read_sample(recipe: Recipe, path: str) -> torch.Tensor:
    """The image as the model gets it, (3, H, W) float32, resized as in evaluation."""
    augmented = AugInput(read_image(path, recipe.image_format))
    AugmentationList(recipe.build_augmentations(False))(augmented)
    image = torch.from_numpy(augmented.image.copy()).permute(2, 0, 1)
    return image.float().to(recipe.device)


def class_names(recipe: Recipe, path: Optional[str]) -> List[str]:
    """Names of the model's classes: from a COCO JSON, of its dataset, or numbers."""
    number = recipe.num_classes
    if path:
        names = read_categories(path)
    else:
        datasets = recipe.test_datasets or recipe.train_datasets
        names = MetadataCatalog.get(datasets[0]).get("thing_classes") if datasets else None
    if path and len(names) != number:
        raise InputError(f"--categories: {path}: {len(names)} classes, but the model has {number}")
    return list(names) if names and len(names) == number else [str(i) for i in range(number)]


def run(args: argparse.Namespace) -> None:
    """Build, export, check and write."""
    recipe = read_config(args.config_file, args.opts)
    if recipe.is_proposal_network:
        raise InputError("only models that detect objects can be exported")
    to_onnx = args.output.endswith(".onnx")
    if to_onnx:
        recipe.device = "cpu"
    names = class_names(recipe, args.categories)
    image = read_sample(recipe, args.sample_image)
    model = recipe.build_trained_model()
    torch.manual_seed(0)
    sample, *others = (make_input(x, recipe.needs_proposals) for x in (image, *other_images(image)))
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    (shorter, *_), longer = recipe.sizes(False)
    description = {
        "input": {
            "names": list(sample),
            "format": recipe.image_format,
            "interpolation": recipe.interpolation,
            "shorter_side": shorter,
            "longer_side_at_most": longer,
            "device": recipe.device,
        },
        "output": list(FIELDS[: 4 if recipe.has_masks else 3]),
        "classes": names,
        "config": recipe.dump(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        exported = export_onnx(model, sample, path) if to_onnx else trace(model, sample)
        counts = [check(model, exported, x) for x in (sample, *others)]
        if to_onnx:
            add_metadata(path, description)
            with open(path, "rb") as source, atomic_write(args.output) as f:
                shutil.copyfileobj(source, f)
    if not to_onnx:
        save_trace(exported, args.output)
    with atomic_write(f"{args.output}.json", "w") as f:
        json.dump(description, f, indent=1)
    in_others = ", ".join(map(str, counts[1:]))
    print(f"the same {counts[0]} detections, and {in_others} in images of other sizes")
    print(args.output)


def add_metadata(path: str, description: Dict) -> None:
    """Put the description, as JSON by its keys, into an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in description.items()})
    onnx.save(model, path)


def save_trace(traced: torch.jit.ScriptModule, path: str) -> None:
    """
    Raises:
        InputError: if a part of the model is not PyTorch's.
    """
    try:
        with atomic_write(path) as f:
            torch.jit.save(traced, f)
    except RuntimeError as e:
        raise InputError(
            "Detectron2 0.6 cannot save the trace of this model, upstream's main branch may: "
            f"{one_line(e)[:90]}..."
        ) from e


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
