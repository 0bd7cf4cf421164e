# SPDX-License-Identifier: Apache-2.0
"""Measurements of whole R-50 models, their optimizations and their growth; see benchmark.py."""

import copy
import os
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from libra_d2 import model_zoo
from libra_d2.checkpoint.mmdetection import to_mmdetection
from libra_d2.config import BASELINE
from libra_d2.modeling.acceleration import accelerate, choose_channels_last
from libra_d2.tools.export_checks import detect
from libra_d2.tools.export_model import export_onnx, save_trace, trace
from libra_d2.utils.meter import Meter, Result

OURS, PLAIN, REFERENCE = "libra_d2", "Detectron2", "mmdetection"
SYSTEMS = {"faster_rcnn": "Faster R-CNN", "retinanet": "RetinaNet"}
NO_LEVER = {
    "channels_last": "never",
    "fold_norm": False,
    "parallel_roi_align": False,
    "winograd": False,
    "lean_fpn": False,
    "compile_backbone": False,
}
LEVERS = tuple(NO_LEVER)
# What a profile of CUDA calls when the host waits.
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")

Size = Tuple[int, int]
Inputs = List[Dict[str, Any]]


def model_config(system: str, name: str, device: str) -> CfgNode:
    """The published config, or Detectron2's own parts in place of all that is balanced."""
    cfg = model_zoo.get_config(f"COCO-Detection/libra_{system}_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = device
    if name == PLAIN:
        cfg.merge_from_list(BASELINE)
        cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE = False
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.replace("Libra", "")
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    return cfg


def random_boxes(num: int, device: str) -> torch.Tensor:
    corner = torch.rand(num, 2, device=device) * 700
    return torch.cat([corner, corner + 16 + torch.rand(num, 2, device=device) * 300], dim=1)


def random_inputs(size: Size, number: int = 1) -> Inputs:
    """Images of random pixels with 8 objects each."""
    inputs = []
    for _ in range(number):
        instances = Instances(size, gt_classes=torch.arange(8))
        instances.gt_boxes = Boxes(random_boxes(8, "cpu") / 1000 * min(size))
        pixels = torch.randint(256, (3, *size), dtype=torch.uint8)
        inputs.append({"image": pixels, "instances": instances})
    return inputs


def reference_model(system: str, ours: nn.Module, device: str) -> nn.Module:
    """mmdetection's model with the weights of ``ours``."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    folder = Path(mmdet.__file__).parent / ".mim/configs/libra_rcnn"
    name = system.replace("_", "-")
    config = Config.fromfile(folder / f"libra-{name}_r50_fpn_1x_coco.py").model
    config.backbone.init_cfg = None
    model = MODELS.build(config)
    model.load_state_dict(to_mmdetection(ours.state_dict()))
    return model.to(device)


def reference_data(inputs: Inputs) -> Dict[str, Any]:
    """The same pixels and objects for mmdetection."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    samples = []
    for x in inputs:
        size = tuple(x["image"].shape[1:])
        meta = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        samples.append(DetDataSample(metainfo=meta))
        samples[-1].gt_instances = InstanceData(
            bboxes=x["instances"].gt_boxes.tensor.clone(), labels=x["instances"].gt_classes.clone()
        )
    return {"inputs": [x["image"].flip(0) for x in inputs], "data_samples": samples}


@torch.no_grad()
def infer(model: nn.Module, inputs: Inputs, autocast: Callable = nullcontext) -> None:
    """Inference of the first image."""
    if model.training:
        model.eval()
    with autocast():
        if hasattr(model, "test_step"):
            model.test_step(reference_data(inputs[:1]))
        else:
            model([{"image": inputs[0]["image"]}])


def train(model: nn.Module, inputs: Inputs, autocast: Callable = nullcontext) -> None:
    """A training step, without the optimizer's."""
    if not model.training:
        model.train()
    with EventStorage(), autocast():
        if hasattr(model, "test_step"):
            data = model.data_preprocessor(reference_data(inputs), True)
            loss = model.parse_losses(model(**data, mode="loss"))[0]
        else:
            loss = sum(model(inputs).values())
    loss.backward()


STEPS: Dict[str, Callable] = {"inference": infer, "training step": train}


def make_models(system: str, device: str, reference: bool) -> Dict[str, nn.Module]:
    """Models with the same weights, as far as they have the same parts."""
    models = {}
    for name in (OURS, PLAIN):
        torch.manual_seed(0)
        models[name] = build_model(model_config(system, name, device))
    if reference:
        models[REFERENCE] = reference_model(system, models[OURS], device)
    accelerate_by_default(models[OURS], device)
    return models


def accelerate_by_default(model: nn.Module, device: str, precision: str = "float32") -> None:
    """As the configs do."""
    channels_last = choose_channels_last(model, device, precision != "float32")
    accelerate(model, channels_last=channels_last)


def count_flops(model: nn.Module, inputs: Inputs) -> float:
    """Multiplications with an addition each, of one inference."""

    def attention(inputs, outputs):
        batch, heads, positions, channels = inputs[0].type().sizes()
        return 2 * batch * heads * positions**2 * channels

    counter = FlopCountAnalysis(model.eval(), [{"image": inputs[0]["image"]}])
    counter.set_op_handle("aten::scaled_dot_product_attention", attention)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def described(size: Size, num_images: int, what: str) -> str:
    images = f" of {num_images} images" if num_images > 1 and what != "inference" else ""
    return f"{size[0]} x {size[1]}, {what}{images}"


def measure(meter: Meter, what: str, steps: Dict[str, Callable], expected=None) -> Iterator[Result]:
    yield meter.times(what, steps, expected)
    yield meter.memory(what, steps)


def whole_models(
    meter: Meter,
    systems: Sequence[str],
    size: Size,
    reference: bool,
    precisions: Sequence[str],
    num_images: int = 1,
) -> Iterator[Result]:
    """Ours in each precision, Detectron2's plain model and mmdetection's as they come."""
    inputs = random_inputs(size, num_images)
    for system in systems:
        models = make_models(system, meter.device, reference)
        flops = {name: count_flops(models[name], inputs) for name in (OURS, PLAIN)}
        for what, step in STEPS.items():
            steps = {name: partial(step, model, inputs) for name, model in models.items()}
            for precision in set(precisions) - {"float32"}:
                model = copy.deepcopy(models[OURS])
                accelerate_by_default(model, meter.device, precision)
                autocast = partial(torch.autocast, meter.device, getattr(torch, precision))
                steps[f"{OURS}, {precision}"] = partial(step, model, inputs, autocast)
            title = f"{SYSTEMS[system]} R-50, {described(size, num_images, what)}"
            yield from measure(meter, title, steps, flops[OURS] / flops[PLAIN])


def levers(
    meter: Meter,
    systems: Sequence[str],
    size: Size,
    names: Optional[Sequence[str]] = None,
    num_images: int = 1,
) -> Iterator[Result]:
    """Our models with each lever of :func:`accelerate` alone, with none and with all."""
    inputs = random_inputs(size, num_images)
    for system in systems:
        plain = build_model(model_config(system, OURS, meter.device))
        models = {"no lever": plain}
        for name in names or LEVERS:
            if name == "parallel_roi_align" and system == "retinanet":
                continue
            models[name] = copy.deepcopy(plain)
            value = "always" if name == "channels_last" else True
            accelerate(models[name], **{**NO_LEVER, name: value})
        models["as by default"] = copy.deepcopy(plain)
        accelerate_by_default(models["as by default"], meter.device)
        for what, step in STEPS.items():
            steps = {name: partial(step, model, inputs) for name, model in models.items()}
            title = f"levers, {SYSTEMS[system]} R-50, {described(size, num_images, what)}"
            yield from measure(meter, title, steps)


def exported_files(
    meter: Meter, systems: Sequence[str], size: Size, reference: bool
) -> Iterator[Result]:
    """Inference of the models of `whole_models`, and of the files that ours are exported to."""
    inputs = random_inputs(size)
    image = inputs[0]["image"].float().to(meter.device)
    for system in systems:
        models = make_models(system, meter.device, reference)
        steps = {name: partial(infer, model, inputs) for name, model in models.items()}
        model, sample = models[OURS].eval(), {"image": image}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.ts")
            save_trace(trace(model, sample, detect), path)
            steps[f"{OURS}, TorchScript"] = partial(torch.jit.load(path), image)
            if meter.device == "cpu":
                run = export_onnx(model, sample, detect, os.path.join(folder, "model.onnx"))
                steps[f"{OURS}, ONNX"] = partial(run, image)
            # Not the memory, as onnxruntime keeps what it has once allocated.
            title = f"exported files, {SYSTEMS[system]} R-50, {described(size, 1, 'inference')}"
            yield meter.times(title, steps)


def growth(meter: Meter, systems: Sequence[str], size: Size) -> Iterator[Result]:
    """Inference at several image sizes, and with several numbers of proposals."""
    for system in systems:
        models = make_models(system, meter.device, False)
        for factor in (0.25, 0.5, 1):
            height, width = (max(round(side * factor / 32), 1) * 32 for side in size)
            inputs = random_inputs((height, width))
            steps = {name: partial(infer, model, inputs) for name, model in models.items()}
            yield meter.times(f"pixels, {SYSTEMS[system]}, {height * width}", steps)
    if "faster_rcnn" not in systems:
        return
    models = make_models("faster_rcnn", meter.device, False)
    inputs = random_inputs(size)
    for number in (250, 500, 1000, 2000):
        for model in models.values():
            model.proposal_generator.pre_nms_topk[False] = 4 * number
            model.proposal_generator.post_nms_topk[False] = number
        steps = {name: partial(infer, model, inputs) for name, model in models.items()}
        yield meter.times(f"proposals, Faster R-CNN, {number}", steps)


def profile(device: str, systems: Sequence[str], size: Size) -> str:
    """Where the time of a training step goes, and how often the host waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    inputs, text = random_inputs(size), []
    for system in systems:
        for name, model in make_models(system, device, reference=False).items():
            train(model, inputs)
            with torch.profiler.profile(activities=activities) as profiler:
                train(model, inputs)
            averages = profiler.key_averages()
            waits = {x.key: x.count for x in averages if x.key in WAITING}
            order = f"self_{device}_time_total"
            text += [f"{SYSTEMS[system]} R-50, {name}, training step; host waits: {waits}"]
            text += [averages.table(sort_by=order, row_limit=15, max_name_column_width=50)]
    return "\n".join(text)
