#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Export a trained model. The suffix of the output selects the format: ONNX for .onnx, TorchScript for
any other. Neither needs this project or Detectron2's Python code to run; TorchScript needs the
operators of torchvision.

    python tools/export_model.py --config-file config.yaml --sample-image image.jpg \
        --output model.onnx MODEL.WEIGHTS model_final.pth

The input of the exported model is an image of any size: a (3, H, W) float32 tensor in [0, 255],
with the channels in the order of INPUT.FORMAT, resized according to INPUT.MIN_SIZE_TEST. A model
without an RPN also takes proposals, (R, 4) absolute XYXY. The outputs are boxes, (n, 4) absolute
XYXY, classes (n,), scores (n,) and, with a mask head, mask probabilities within the boxes,
(n, 1, 28, 28). OUTPUT.json and the metadata of an ONNX file describe this. In them, shorter_side is
null if the test augmentations of a LazyConfig do not include ResizeShortestEdge.

The export fails unless the exported model gives the same detections as the original in the sample
image, in images of other sizes and in an empty one. demo/onnx_demo.py shows how to use ONNX files.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import warnings
from functools import partial
from typing import Callable, Dict, List, Optional, Tuple

import torch

from detectron2.data import MetadataCatalog
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling import PanopticFPN
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead

from libra_d2.config import Recipe
from libra_d2.data import read_image
from libra_d2.data.coco_json import read_categories
from libra_d2.engine import config_argument_parser, read_config, report_errors
from libra_d2.errors import InputError, one_line
from libra_d2.tools.export_checks import (
    FIELDS,
    Exported,
    Sample,
    adapt,
    check,
    detect,
    make_input,
    raw_outputs,
)
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.output_path import output_path

_NOT_EXPORTED = {PanopticFPN: "panoptic segmentation", BaseKeypointRCNNHead: "keypoints"}


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = config_argument_parser(__doc__)
    add = partial(parser.add_argument, metavar="FILE")
    add("--sample-image", required=True, help="image that contains objects")
    add("--output", required=True, help="file to write, such as model.onnx or model.ts")
    add("--categories", help="COCO JSON with the names of the model's classes")
    return parser


def trace(model: torch.nn.Module, sample: Sample, what: Callable) -> Exported:
    """Trace what a model in eval mode does; ``sample`` is an input of ``what``, see `adapt`."""
    adapter = adapt(model, sample, what)
    with torch.no_grad():
        return torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)


def export_onnx(model: torch.nn.Module, sample: Sample, what: Callable, path: str) -> Exported:
    """
    Write an ONNX file for any image size; see :func:`trace`.

    Returns:
        a function of tensors that runs it with onnxruntime.

    Raises:
        InputError: if a package is missing, or the model has an operator that ONNX lacks.
    """
    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise InputError("--output: for ONNX files, `pip install onnx onnxruntime`")
    import onnxruntime

    adapter = adapt(model, sample, what)
    outputs = {f"{what.__name__}_{i}": x for i, x in enumerate(adapter(*adapter.flattened_inputs))}
    axes = {name: {i: f"{name}_{i}" for i in range(x.dim())} for name, x in outputs.items()}
    if what is detect:
        outputs = FIELDS[: len(outputs)]
        axes = {name: {0: "num_detections"} for name in outputs}
    axes["image"] = {1: "height", 2: "width"}
    if "boxes" in sample:
        axes["boxes"] = {0: "num_proposals"}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about constants; check() uses other image sizes
            torch.onnx.export(
                adapter,
                adapter.flattened_inputs,
                path,
                opset_version=17,
                input_names=list(sample),
                output_names=list(outputs),
                dynamic_axes=axes,
                dynamo=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as e:
        raise InputError(f"the model cannot be exported to ONNX: {one_line(e)}") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(*tensors: torch.Tensor) -> Tuple:
        arrays = {name: tensor.numpy() for name, tensor in zip(sample, tensors)}
        return tuple(torch.as_tensor(x) for x in session.run(None, arrays))

    return run


def other_images(image: torch.Tensor) -> List[torch.Tensor]:
    """The image in other sizes, portrait and landscape, and a uniformly gray one."""
    height, width = image.shape[1:]
    sizes = ((height * 3 // 4, width * 2 // 3), (height - 1, width + 37), (height + 33, width // 2))
    resized = [torch.nn.functional.interpolate(image[None], size)[0] for size in sizes]
    return [*resized, image.transpose(1, 2).contiguous(), torch.full_like(image, 114)]


def read_sample(recipe: Recipe, path: str) -> torch.Tensor:
    """Read an image as the model's input, (3, H, W) float32, resized as in evaluation."""
    augmented = AugInput(read_image(path, recipe.image_format))
    AugmentationList(recipe.build_augmentations(False))(augmented)
    image = torch.from_numpy(augmented.image.copy()).permute(2, 0, 1)
    return image.float().to(recipe.device)


def class_names(recipe: Recipe, path: Optional[str], learned: List[str]) -> List[str]:
    """
    Class names from a COCO JSON, else those that the model has learned, else those of the dataset
    if they fit, else numbers.
    """
    number, names = recipe.num_classes, learned
    datasets = recipe.test_datasets or recipe.train_datasets
    if path:
        names = read_categories(path)
        if len(names) != number:
            what = f"{len(names)} classes, but the model has {number}"
            raise InputError(f"--categories: {path}: {what}")
    elif datasets and not names:
        names = MetadataCatalog.get(datasets[0]).get("thing_classes")
    return list(names) if names and len(names) == number else [str(i) for i in range(number)]


def check_parts(model: torch.nn.Module) -> None:
    """Raises: InputError: if the model has results that an exported model does not return."""
    for kind, name in _NOT_EXPORTED.items():
        if any(isinstance(module, kind) for module in model.modules()):
            raise InputError(f"this model has {name}, which cannot be exported")


def run(args: argparse.Namespace) -> None:
    """Build the model; export, check and write it."""
    recipe = read_config(args.config_file, args.opts)
    if recipe.is_proposal_network:
        raise InputError("only models that detect objects can be exported")
    others = {
        "--sample-image": args.sample_image,
        "--categories": args.categories,
        "--config-file": args.config_file,
        recipe.name_of("weights"): recipe.weights,
    }
    for path in (args.output, f"{args.output}.json"):
        output_path("--output", path, others)
    to_onnx = args.output.endswith(".onnx")
    if to_onnx:
        recipe.device = "cpu"
    image = read_sample(recipe, args.sample_image)
    model, learned = recipe.load_trained_model()
    check_parts(model)
    names = class_names(recipe, args.categories, learned)
    torch.manual_seed(0)
    images = (image, *other_images(image))
    samples = [make_input(x, recipe.needs_proposals) for x in images]
    shorter, longer = recipe.sizes(False)
    description = {
        "input": {
            "names": list(samples[0]),
            "format": recipe.image_format,
            "interpolation": recipe.interpolation,
            "shorter_side": shorter[0] if shorter else None,
            "longer_side_at_most": longer if shorter else None,
            "device": recipe.device,
        },
        "output": list(FIELDS[: 4 if recipe.has_masks else 3]),
        "classes": names,
        "config": recipe.dump(),
    }
    with tempfile.TemporaryDirectory() as folder:

        def export(sample: Sample, what: Callable) -> Exported:
            if not to_onnx:
                return trace(model, sample, what)
            return export_onnx(model, sample, what, os.path.join(folder, what.__name__))

        exported = export(samples[0], detect)
        print(check(model, samples, exported, partial(export, what=raw_outputs)))
        if to_onnx:
            write_onnx(os.path.join(folder, detect.__name__), description, args.output)
    if not to_onnx:
        save_trace(exported, args.output)
    with atomic_write(f"{args.output}.json", "w") as f:
        json.dump(description, f, indent=1)
    print(args.output)


def write_onnx(source: str, description: Dict, path: str) -> None:
    """Copy an ONNX file, with the values of ``description`` as JSON in its metadata."""
    import onnx

    model = onnx.load(source)
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in description.items()})
    with atomic_write(path) as f:
        onnx.save(model, f)


def save_trace(traced: torch.jit.ScriptModule, path: str) -> None:
    """Write a TorchScript file. Raises: InputError: if a part of the model is not PyTorch's."""
    trained = [x for x in traced.parameters() if x.requires_grad]
    try:
        # Programs that do not disable gradients would keep all features for them.
        for parameter in trained:
            parameter.requires_grad_(False)
        with atomic_write(path) as f:
            torch.jit.save(traced, f)
    except RuntimeError as e:
        raise InputError(
            "Detectron2 0.6 cannot save the trace of this model; its main branch may: "
            f"{one_line(e)[:90]}..."
        ) from e
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
