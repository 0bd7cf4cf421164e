#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Measure what balanced learning costs: the parts of Libra R-CNN and whole models, beside plain
Detectron2 and, where it is installed, mmdetection.

    python tools/benchmark.py --output benchmark.json --plot benchmark.png

With mmcv-lite, which lacks compiled operators, tests/reference has to be on PYTHONPATH.

What is compared runs in turn in the same process, call after call, so that a machine that changes
its speed does so for all. Times are medians; the spread is the distance of the quartiles. Memory is
the peak that one call adds. Ratios are of the medians.
"""

import argparse
import ctypes
import gc
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch
from fvcore.nn import smooth_l1_loss
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from detectron2.modeling import build_model
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from libra_d2 import model_zoo
from libra_d2.checkpoint.mmdetection import to_mmdetection
from libra_d2.config import BASELINE, DISABLED
from libra_d2.modeling import (
    BalancedFeaturePyramid,
    BalancedSampler,
    NonLocalBlock,
    balanced_l1_loss,
)

OURS, PLAIN, REFERENCE = "libra_d2", "Detectron2", "mmdetection"
PARTS = ("attention", "non-local", "pyramid", "sampling", "loss", "models")
ATTENTION = "attention"
# What a profile of CUDA calls when the host waits.
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Result:
    """What was measured of one thing: a value and a spread for each that was compared."""

    what: str
    unit: str
    values: Dict[str, float]
    spreads: Dict[str, float] = field(default_factory=dict)
    # What the ratio to Detectron2 is expected to be, from the operations that are added.
    expected: Optional[float] = None


class Meter:
    """Measures functions on one device."""

    def __init__(self, device: str, seconds: float):
        """
        Args:
            device: "cpu" or "cuda".
            seconds: how long to measure each thing.
        """
        self.device = device
        self.seconds = seconds

    def _time(self, step: Callable[[], None]) -> float:
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def times(self, what: str, steps: Dict[str, Callable], expected=None) -> Result:
        """Measure the time of ``steps`` in turn, in ms."""
        once = 0.0
        for step in steps.values():
            self._time(step)  # warm-up
            once += self._time(step)
        samples: Dict[str, List[float]] = {name: [] for name in steps}
        for _ in range(min(max(int(self.seconds / once), 5), 2000)):
            # In another order each time: what runs after a large step finds the caches cold.
            for name in random.sample(list(steps), len(steps)):
                samples[name].append(self._time(steps[name]) * 1000)
        quartiles = {name: statistics.quantiles(x, n=4) for name, x in samples.items()}
        return Result(
            what,
            "ms",
            {name: q[1] for name, q in quartiles.items()},
            {name: q[2] - q[0] for name, q in quartiles.items()},
            expected,
        )

    def memory(self, what: str, steps: Dict[str, Callable]) -> Result:
        """Measure the peak memory that ``steps`` add, in MB."""
        values = {}
        for name, step in steps.items():
            step()  # what stays allocated, such as gradients, is there from now on
            values[name] = self._peak(step) / 1e6
        return Result(what, "MB", values)

    def _peak(self, step: Callable[[], None]) -> float:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        # Give back to the system what was freed before, then reset its record of the peak.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = _process_memory("VmRSS")
        step()
        return max(_process_memory("VmHWM") - before, 0)


def _process_memory(name: str) -> float:
    """A line of Linux' account of this process, in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


def forward_backward(module: Callable, *inputs: torch.Tensor) -> Callable[[], None]:
    """Function that runs both passes, as in training."""

    def step():
        outputs = module(*inputs)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        sum(x.sum() for x in outputs).backward()

    return step


def grid(size: Tuple[int, int], device: str, channels: int = 256) -> torch.Tensor:
    return torch.randn(1, channels, *size, device=device, requires_grad=True)


def reference_non_local(device: str) -> nn.Module:
    from mmcv.cnn.bricks import NonLocal2d

    return NonLocal2d(256, reduction=1, use_scale=False).to(device)


def non_local(meter: Meter, reference: bool, sizes) -> Iterator[Result]:
    """The refinement at several sizes of P4: memory and time."""
    blocks = {OURS: NonLocalBlock(256).to(meter.device)}
    if reference:
        blocks[REFERENCE] = reference_non_local(meter.device)
    for size in sizes:
        x = grid(size, meter.device)
        steps = {name: forward_backward(block, x) for name, block in blocks.items()}
        what = f"non-local block, {size[0]} x {size[1]}, training"
        yield meter.memory(what, steps)
        yield meter.times(what, steps)


def pyramid(meter: Meter, reference: bool, sizes) -> Iterator[Result]:
    """Gather, refine and scatter, P2 to P6."""
    modules = {OURS: BalancedFeaturePyramid(256, 5).to(meter.device)}
    if reference:
        from mmdet.models.necks import BFP

        bfp = BFP(256, 5, refine_level=2, refine_type="non_local").to(meter.device)
        modules[REFERENCE] = lambda *levels: bfp(levels)
    modules[OURS], ours = lambda *levels: ours(list(levels)), modules[OURS]
    for height, width in sizes:
        scales = [2.0 ** (2 - i) for i in range(5)]
        levels = [grid((ceil(height * s), ceil(width * s)), meter.device) for s in scales]
        steps = {name: forward_backward(f, *levels) for name, f in modules.items()}
        what = f"balanced feature pyramid, P4 of {height} x {width}, training"
        yield meter.times(what, steps)
        yield meter.memory(what, steps)


def random_boxes(num: int, device: str) -> torch.Tensor:
    corner = torch.rand(num, 2, device=device) * 700
    return torch.cat([corner, corner + 16 + torch.rand(num, 2, device=device) * 300], dim=1)


def proposals_near(gt: torch.Tensor, num: int) -> torch.Tensor:
    """A quarter of them around the ground truth, as an RPN proposes."""
    near = gt[torch.randint(len(gt), (num // 4,), device=gt.device)]
    near = near + torch.randn_like(near) * 12
    return torch.cat([near, random_boxes(num - len(near), gt.device)])


def sampling(meter: Meter, reference: bool) -> Iterator[Result]:
    """512 of 2000 proposals of one image with 12 objects."""
    from detectron2.modeling.matcher import Matcher
    from detectron2.structures import pairwise_iou

    gt = random_boxes(12, meter.device)
    boxes = torch.cat([proposals_near(gt, 1988), gt])
    ious = pairwise_iou(Boxes(gt), Boxes(boxes))
    matched_idxs, labels = Matcher([0.5], [0, 1])(ious)
    max_iou = ious.amax(dim=0)
    classes = torch.where(labels == 1, matched_idxs, 80)
    steps = {PLAIN: lambda: subsample_labels(classes, 512, 0.25, 80)}
    if reference:
        from mmdet.models.task_modules.assigners import AssignResult
        from mmdet.models.task_modules.samplers import CombinedSampler
        from mmengine.structures import InstanceData

        combined = CombinedSampler(
            {"type": "InstanceBalancedPosSampler"},
            {"type": "IoUBalancedNegSampler", "floor_thr": -1, "floor_fraction": 0, "num_bins": 3},
            num=512,
            pos_fraction=0.25,
            add_gt_as_proposals=False,
        )
        gt_inds = torch.where(labels == 1, matched_idxs + 1, 0)
        assigned = AssignResult(12, gt_inds, max_iou, gt_inds)
        priors = InstanceData(priors=boxes)
        truth = InstanceData(bboxes=gt, labels=torch.zeros(12, dtype=torch.long))
        steps[REFERENCE] = lambda: combined.sample(assigned, priors, truth)
    for mode in ("paper", "reference"):
        sampler = BalancedSampler(mode=mode)
        steps[OURS] = lambda sampler=sampler: sampler(labels, max_iou, matched_idxs, 12, 512, 0.25)
        yield meter.times(f'sampling, 512 of 2000, mode "{mode}"', steps)

    heads = {}
    for name, config in ((OURS, "LibraROIHeads"), (PLAIN, "StandardROIHeads")):
        cfg = faster_rcnn_config(OURS, meter.device)
        cfg.MODEL.ROI_HEADS.NAME = config
        cfg.merge_from_list(DISABLED["balanced_l1"])
        heads[name] = build_model(cfg).roi_heads
    size = (1000, 1000)
    targets = [Instances(size, gt_boxes=Boxes(gt), gt_classes=torch.arange(12, device=gt.device))]
    proposals = Instances(size, proposal_boxes=Boxes(boxes[:-12]))
    proposals.objectness_logits = torch.zeros(1988, device=gt.device)
    with EventStorage():
        steps = {
            name: lambda h=h: h.label_and_sample_proposals([proposals] * 2, targets * 2)
            for name, h in heads.items()
        }
        yield meter.times("label_and_sample_proposals, 2 images", steps)


def box_loss(meter: Meter, reference: bool) -> Iterator[Result]:
    """The loss alone, of 512 and of 100k boxes."""
    for num in (512, 100_000):
        pred = torch.randn(num, 4, device=meter.device, requires_grad=True)
        target = torch.randn(num, 4, device=meter.device)
        losses = {
            OURS: lambda p, t: balanced_l1_loss(p, t, reduction="sum"),
            PLAIN: lambda p, t: smooth_l1_loss(p, t, 1.0, reduction="sum"),
        }
        if reference:
            from mmdet.models.losses import BalancedL1Loss

            balanced = BalancedL1Loss(alpha=0.5, gamma=1.5, beta=1.0)
            losses[REFERENCE] = lambda p, t, f=balanced: f(p, t, reduction_override="sum")
        steps = {n: forward_backward(f, pred, target) for n, f in losses.items()}
        yield meter.times(f"box loss, {num} x 4, both passes", steps)


def faster_rcnn_config(name: str, device: str):
    cfg = model_zoo.get_config("COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = device
    if name == PLAIN:
        cfg.merge_from_list(BASELINE)
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    return cfg


def retinanet_config(name: str, device: str):
    cfg = model_zoo.get_config("COCO-Detection/libra_retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = device
    if name == PLAIN:
        cfg.merge_from_list(BASELINE)
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    return cfg


def count_flops(model: nn.Module, inputs: List[Dict]) -> float:
    """Multiplications with an addition each, of one inference."""

    def attention(inputs, outputs):
        batch, heads, positions, channels = inputs[0].type().sizes()
        return 2 * batch * heads * positions**2 * channels

    counter = FlopCountAnalysis(model.eval(), inputs)
    counter.set_op_handle("aten::scaled_dot_product_attention", attention)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def attention(meter: Meter, sizes) -> Iterator[Result]:
    """Attention at several sizes of P4: fused kernels, or explicit products."""

    def fused(dtype):
        def run(query, key, value):
            query, key, value = (x.to(dtype) for x in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value, scale=1.0)

        return run

    def explicit(query, key, value):
        return (query @ key.transpose(2, 3)).softmax(dim=3) @ value

    kinds = {"fused, float32": fused(torch.float32), "fused, bfloat16": fused(torch.bfloat16)}
    kinds["explicit products, float32"] = explicit
    for height, width in sizes:
        shape = (1, 1, height * width, 256)
        qkv = [torch.randn(shape, device=meter.device, requires_grad=True) for _ in range(3)]
        steps = {name: forward_backward(f, *qkv) for name, f in kinds.items()}
        what = f"{ATTENTION}, {height} x {width}, training"
        yield meter.memory(what, steps)
        yield meter.times(what, steps)


def reference_model(system: str, ours: nn.Module, device: str) -> nn.Module:
    """mmdetection's model with the weights of ``ours``."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    name = {"Faster R-CNN": "faster-rcnn", "RetinaNet": "retinanet"}[system]
    folder = Path(mmdet.__file__).parent / ".mim/configs/libra_rcnn"
    config = Config.fromfile(folder / f"libra-{name}_r50_fpn_1x_coco.py").model
    config.backbone.init_cfg = None
    model = MODELS.build(config)
    model.load_state_dict(to_mmdetection(ours.state_dict()))
    return model.to(device)


def reference_data(image: torch.Tensor, instances: Instances) -> Dict:
    """The same pixels and objects for mmdetection."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = tuple(image.shape[1:])
    sample = DetDataSample(
        metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
    )
    sample.gt_instances = InstanceData(
        bboxes=instances.gt_boxes.tensor.clone(), labels=instances.gt_classes.clone()
    )
    return {"inputs": [image.flip(0)], "data_samples": [sample]}


def build_models(system: str, device: str, reference: bool) -> Dict[str, nn.Module]:
    """R-50 models with the same weights, as far as they have the same parts."""
    config = {"Faster R-CNN": faster_rcnn_config, "RetinaNet": retinanet_config}[system]
    models = {}
    for name in (OURS, PLAIN):
        torch.manual_seed(0)
        models[name] = build_model(config(name, device))
    if reference:
        models[REFERENCE] = reference_model(system, models[OURS], device)
    return models


def whole_models(
    meter: Meter, size: Tuple[int, int], reference: bool, amp: bool
) -> Iterator[Result]:
    """R-50 at one image size: inference, and a training step without optimizer."""
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    instances = Instances(size, gt_classes=torch.arange(8))
    instances.gt_boxes = Boxes(random_boxes(8, "cpu") / 1000 * min(size))

    def infer(model, is_reference):
        with torch.no_grad(), torch.autocast(meter.device, enabled=amp):
            if is_reference:
                model.eval().test_step(reference_data(image, instances))
            else:
                model.eval()([{"image": image}])

    def train(model, is_reference):
        with torch.autocast(meter.device, enabled=amp):
            if is_reference:
                data = model.train().data_preprocessor(reference_data(image, instances), True)
                losses = model.parse_losses(model(**data, mode="loss"))[0]
            else:
                losses = sum(model.train()([{"image": image, "instances": instances}]).values())
        losses.backward()

    for system in ("Faster R-CNN", "RetinaNet"):
        models = build_models(system, meter.device, reference)
        flops = {n: count_flops(models[n], [{"image": image}]) for n in (OURS, PLAIN)}
        with EventStorage():
            for what, step in (("inference", infer), ("training step", train)):
                steps = {
                    name: partial(step, model, name == REFERENCE) for name, model in models.items()
                }
                title = f"{system} R-50, {size[0]} x {size[1]}, {what}{', AMP' if amp else ''}"
                yield meter.times(title, steps, expected=flops[OURS] / flops[PLAIN])
                yield meter.memory(title, steps)


def profile(device: str, size: Tuple[int, int]) -> str:
    """Where the time of a training step goes, and how often the host waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    instances = Instances(size, gt_classes=torch.arange(8))
    instances.gt_boxes = Boxes(random_boxes(8, "cpu") / 1000 * min(size))
    text = []
    for system in ("Faster R-CNN", "RetinaNet"):
        for name, model in build_models(system, device, reference=False).items():

            def step(model=model):
                with EventStorage():
                    losses = model([{"image": image, "instances": instances}] * 2)
                sum(losses.values()).backward()

            step()
            with torch.profiler.profile(activities=activities) as profiler:
                step()
            averages = profiler.key_averages()
            waits = {x.key: x.count for x in averages if x.key in WAITING}
            order = f"self_{device}_time_total"
            text += [f"{system} R-50, {name}, training step of 2 images; host waits: {waits}"]
            text += [averages.table(sort_by=order, row_limit=15, max_name_column_width=50)]
    return "\n".join(text)


def ratio(result: Result, other: str) -> str:
    if other not in result.values:
        return ""
    return f"{result.values[OURS] / max(result.values[other], 1e-9):.2f}"


def attention_table(results: List[Result]) -> str:
    """Results of :func:`attention` in Markdown."""
    chosen = [r for r in results if r.what.startswith(ATTENTION)]
    if not chosen:
        return ""
    names = list(chosen[0].values)
    rows = [[r.what, r.unit, *(f"{r.values[n]:.3g}" for n in names)] for r in chosen]
    return tabulate(rows, ["what", "unit", *names], "github", disable_numparse=True)


def table(results: List[Result]) -> str:
    """The other results in Markdown."""
    rows = []
    for r in results:
        if r.what.startswith(ATTENTION):
            continue
        cells = [
            f"{r.values[n]:.3g}" + (f" ± {r.spreads[n] / 2:.2g}" if n in r.spreads else "")
            if n in r.values
            else ""
            for n in (OURS, PLAIN, REFERENCE)
        ]
        plain = ratio(r, PLAIN) + (f" ({r.expected:.2f})" if r.expected else "")
        rows.append([r.what, r.unit, *cells, plain, ratio(r, REFERENCE)])
    headers = ["what", "unit", OURS, PLAIN, REFERENCE, f"ratio to {PLAIN}", f"to {REFERENCE}"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def plot(results: List[Result], path: str) -> None:
    """Time and memory of the non-local block against the number of positions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, unit, label in zip(axes, ("ms", "MB"), ("time (ms)", "peak memory added (MB)")):
        chosen = [r for r in results if r.what.startswith("non-local") and r.unit == unit]
        positions = [int(r.what.split()[2]) * int(r.what.split()[4].strip(",")) for r in chosen]
        for name in chosen[0].values if chosen else ():
            axis.loglog(positions, [r.values[name] for r in chosen], "o-", label=name)
        axis.set(xlabel="positions of the refined level", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle("Non-local refinement, forward and backward")
    figure.savefig(path, dpi=150)


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument(
        "--p4-size",
        type=int,
        nargs=2,
        default=(50, 84),
        metavar=("HEIGHT", "WIDTH"),
        help="of level P4; measured at half, once and twice that. 50 84 is an image of 800 x 1344",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="for whole models; default 256 320 on CPUs, 800 1344 on GPUs",
    )
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--amp", action="store_true", help="whole models in mixed precision")
    parser.add_argument(
        "--profile", metavar="FILE", help="write where the time of a training step goes"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the sweep over sizes")
    return parser


def has_mmdetection() -> bool:
    """Import mmdetection, or say that it cannot be."""
    try:
        try:
            from uncompiled_mmcv import import_mmdet
        except ImportError:
            import mmcv.ops  # noqa: F401
            import mmdet  # noqa: F401
        else:
            import_mmdet()
    except ImportError:
        return False
    return True


def main(argv=None) -> int:
    """Command line entry point; returns the exit status."""
    args = build_argument_parser().parse_args(argv)
    reference = has_mmdetection()
    if not reference:
        print("mmdetection is not installed: nothing is compared with it.", file=sys.stderr)
    torch.manual_seed(0)
    meter = Meter(args.device, args.seconds)
    height, width = args.p4_size
    sizes = [(height // 2, width // 2), (height, width), (height * 2, width * 2)]
    image_size = tuple(args.image_size or ((256, 320) if args.device == "cpu" else (800, 1344)))
    parts: Dict[str, Iterator[Result]] = {
        "non-local": non_local(meter, reference, sizes),
        "pyramid": pyramid(meter, reference, sizes[:2]),
        "sampling": sampling(meter, reference),
        "loss": box_loss(meter, reference),
        "attention": attention(meter, sizes),
        "models": whole_models(meter, image_size, reference, args.amp),
    }
    results = []
    with tqdm(unit="result") as progress:
        for name in args.only:
            for result in parts[name]:
                results.append(result)
                progress.update()
                progress.set_description(result.what)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"\n{machine or platform.machine()}{threads}, PyTorch {torch.__version__}\n")
    for text in (table(results), attention_table(results)):
        print(f"{text}\n")
    if args.profile:
        with open(args.profile, "w", encoding="utf-8") as f:
            f.write(profile(args.device, image_size))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump([asdict(r) for r in results], f, indent=1)
    if args.plot:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
