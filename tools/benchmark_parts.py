# SPDX-License-Identifier: Apache-2.0
"""Measurements of the parts of Libra R-CNN and those that they replace; see benchmark.py."""

import os
from functools import partial
from math import ceil
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, Iterator, Tuple

import numpy as np
import torch
from fvcore.nn import smooth_l1_loss
from PIL import Image
from torch import nn
from torch.nn import functional as F

from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage

from libra_d2.data import LibraDatasetMapper
from libra_d2.data.resize import OpenCVResizeShortestEdge
from libra_d2.modeling import (
    BalancedFeaturePyramid,
    BalancedSampler,
    NonLocalBlock,
    balanced_l1_loss,
)
from libra_d2.tools.benchmark_models import OURS, PLAIN, REFERENCE, model_config, random_boxes
from libra_d2.utils.meter import Meter, Result


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
    for name in (OURS, PLAIN):
        heads[name] = build_model(model_config("faster_rcnn", name, meter.device)).roi_heads
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


def write_photograph(path: str) -> None:
    """An image of 640 x 480 that is as smooth as a photograph, with some noise."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((640, 480))
    noisy = np.asarray(smooth) + rng.normal(0, 4, (480, 640, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def mappers(reference: bool, is_mirrored: bool) -> Dict[str, Callable]:
    """From a record in Detectron2's format to the input of a model, resized by 5 / 3."""
    flip = [T.RandomFlip(prob=float(is_mirrored))]
    arguments = {"is_train": True, "image_format": "BGR"}
    resize = OpenCVResizeShortestEdge(800, 1333)
    found = {
        OURS: LibraDatasetMapper(augmentations=[resize, *flip], **arguments),
        PLAIN: DatasetMapper(augmentations=[T.ResizeShortestEdge(800, 1333), *flip], **arguments),
    }
    if reference:
        from mmcv.transforms import Compose, LoadImageFromFile
        from mmdet.datasets import transforms

        theirs = Compose(
            [
                LoadImageFromFile(),
                transforms.LoadAnnotations(with_bbox=True),
                transforms.Resize(scale=(1333, 800), keep_ratio=True),
                transforms.RandomFlip(prob=float(is_mirrored)),
                transforms.PackDetInputs(),
            ]
        )
        found[REFERENCE] = lambda record: theirs(_as_reference(record))
    return found


def _as_reference(record: Dict[str, Any]) -> Dict[str, Any]:
    instances = [
        {"bbox": x["bbox"], "bbox_label": x["category_id"], "ignore_flag": 0}
        for x in record["annotations"]
    ]
    return {"img_path": record["file_name"], "img_id": 1, "instances": instances}


def loading(meter: Meter, reference: bool) -> Iterator[Result]:
    """One photograph with seven boxes, read, resized and perhaps mirrored, by one thread."""
    boxes = [[20.0 * i, 30.0 * i, 20.0 * i + 60, 30.0 * i + 90] for i in range(7)]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
        for box in boxes
    ]
    import cv2

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "photograph.jpg")
        write_photograph(path)
        record = {"file_name": path, "image_id": 1, "height": 480, "width": 640}
        record["annotations"] = annotations
        for is_mirrored in (False, True):
            steps = {
                name: partial(mapper, record)
                for name, mapper in mappers(reference, is_mirrored).items()
            }
            mirrored = ", mirrored" if is_mirrored else ""
            yield meter.times(f"loading, 640 x 480 to 1067 x 800{mirrored}", steps)
    torch.set_num_threads(threads)
    cv2.setNumThreads(-1)


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
        what = f"attention, {height} x {width}, training"
        yield meter.memory(what, steps)
        yield meter.times(what, steps)
