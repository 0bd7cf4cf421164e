# SPDX-License-Identifier: Apache-2.0
"""
Whole models of this project and of mmdetection with the same weights, and the same images.

The weights are random, scaled for activations and scores like those of a trained model: otherwise
all scores are equal or saturated, and their order a matter of rounding.
"""

import re
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from typing import Dict, NamedTuple, Tuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, build_model, calibrate_norms, load_cfg, reference_config
from uncompiled_mmcv import import_mmdet

from detectron2.structures import BitMasks, Boxes, Instances

from libra_d2.checkpoint import to_mmdetection

FLOAT32 = torch.float32


class System(NamedTuple):
    """The same model in both frameworks."""

    #: our config, in configs/
    config: str
    #: start of the name of mmdetection's
    reference: str
    #: mmdetection's Libra R-CNN whose parts, backbone included, ``reference`` gets; "" for none
    libra: str = ""
    #: changes of our config: names and values
    options: Tuple = ()
    #: changes of mmdetection's config, by name
    their_options: Dict = {}


_FASTER, _X_101 = "libra-faster-rcnn_r50", "libra-faster-rcnn_x101-64x4d"
_MASK = "COCO-InstanceSegmentation/libra_{}_R_50_FPN_1x.yaml"
_CASCADE = System("Misc/libra_cascade_rcnn_R_50_FPN_1x.yaml", "cascade-rcnn_r50", _FASTER)
#: those whose weights are published
PUBLISHED = {
    name: System(f"COCO-Detection/{name}_FPN_1x.yaml", reference)
    for name, reference in {
        "libra_faster_rcnn_R_50": _FASTER,
        "libra_faster_rcnn_R_101": "libra-faster-rcnn_r101",
        "libra_faster_rcnn_X_101_64x4d": _X_101,
        "libra_fast_rcnn_R_50": "libra-fast-rcnn_r50",
        "libra_retinanet_R_50": "libra-retinanet_r50",
    }.items()
}
SYSTEMS = {
    **PUBLISHED,
    "libra_mask_rcnn_R_50": System(_MASK.format("mask_rcnn"), "mask-rcnn_r50", _FASTER),
    "libra_cascade_mask_rcnn_R_50": System(
        _MASK.format("cascade_mask_rcnn"), "cascade-mask-rcnn_r50", _FASTER
    ),
}
_GN = {"type": "GN", "num_groups": 32, "requires_grad": True}
_BOX_HEAD = {"type": "Shared4Conv1FCBBoxHead", "conv_out_channels": 256, "norm_cfg": _GN}
#: compared with --slow only
SLOW = {
    "libra_mask_rcnn_GN_R_50": SYSTEMS["libra_mask_rcnn_R_50"]._replace(
        options=(
            *("MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NORM", "GN"),
            *("MODEL.FPN.NORM", "GN"),
        ),
        their_options={
            **{f"model.roi_head.bbox_head.{name}": x for name, x in _BOX_HEAD.items()},
            "model.roi_head.mask_head.norm_cfg": _GN,
            "model.neck.0.norm_cfg": _GN,
        },
    ),
    "libra_cascade_rcnn_R_50": _CASCADE,
    **{
        name.replace("R_50", "X_101_64x4d"): system._replace(libra=_X_101)
        for name, system in SYSTEMS.items()
        if system.libra
    },
}

SIZES = [(120, 151), (137, 100)]  # height, width: padded to (160, 160) together
LAYERS = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
ALL = 10**6  # more than there are to sample

_SMALL = [
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
]

# Standard deviation of the outputs of layers with random weights.
SPREADS = {
    "others": 1.0,
    "conv_out": 0.3,
    "theta": 0.7,
    "phi": 0.7,
    "objectness_logits": 1.0,
    "anchor_deltas": 0.1,  # larger ones meet a limit that only one of the frameworks has
    "cls_score": 1.3,
    "bbox_pred": 0.5,
    "predictor": 2.0,  # of masks
}


def smooth_image(generator, size):
    """(3, H, W) uint8: blobs of several sizes, as unlike noise as photographs are."""
    image = sum(
        F.interpolate(
            torch.randn(1, 3, n, n, generator=generator), size, mode="bicubic", align_corners=False
        )[0]
        for n in (3, 8, 20, 60)
    )
    return (128 + 40 * image).clamp(0, 255).to(torch.uint8)


def random_boxes(generator, num, size):
    height, width = size
    corner = torch.rand(num, 2, generator=generator) * torch.tensor([0.7 * width, 0.7 * height])
    side = 6 + torch.rand(num, 2, generator=generator) ** 2 * 0.7 * min(size)
    return torch.cat([corner, (corner + side).clamp(max=torch.tensor([width, height]))], dim=1)


def random_masks(generator, boxes, size):
    """(n, h, w) bool: ellipses that fill the boxes, without a random part of them."""
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in size), indexing="ij")
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    radius = (boxes[:, 2:] - boxes[:, :2]) / 2
    u = (x - center[:, :1, None]) / radius[:, :1, None]
    v = (y - center[:, 1:, None]) / radius[:, 1:, None]
    angle = 6.3 * torch.rand(len(boxes), 1, 1, generator=generator)
    return (u**2 + v**2 <= 1) & (u * angle.cos() + v * angle.sin() < 0.5)


def reference_model(mmdet, system):
    """
    mmdetection's config of a :class:`System`, with Libra R-CNN's parts from mmdetection's own
    config in a plain Mask or Cascade R-CNN.
    """
    config = reference_config(mmdet, system.reference)
    if system.libra:
        model, libra = config.model, reference_config(mmdet, system.libra).model
        model.backbone, model.neck, model.train_cfg.rpn = (
            libra.backbone,
            libra.neck,
            libra.train_cfg.rpn,
        )
        heads, stages = model.roi_head.bbox_head, model.train_cfg.rcnn
        for head in heads if isinstance(heads, list) else [heads]:
            head.loss_bbox = libra.roi_head.bbox_head.loss_bbox
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler = libra.train_cfg.rcnn.sampler
    config.model.backbone.init_cfg = None
    config.merge_from_dict(system.their_options)
    return config


def shrink(model):
    """Apply to mmdetection's config of a model what _SMALL is in ours."""
    model.backbone.depth, model.neck[0].in_channels = 18, [64, 128, 256, 512]
    boxes, masks = (
        [x] if isinstance(x, dict) else x
        for x in (model.get("roi_head", {}).get(name, []) for name in ("bbox_head", "mask_head"))
    )
    for head in boxes:
        head.fc_out_channels = 64
    for head in masks:
        head.conv_out_channels = 32


@torch.no_grad()
def randomize(model, inputs, output_spreads):
    """Give the channels of all layers without norm mean 0 and the same spread over ``inputs``."""

    def standardize(module, _, output):
        if module in standardized:
            return None
        channels = output.transpose(0, 1).flatten(1)  # of all images and positions
        factor = spreads[module] / channels.std(dim=1)
        bias = -channels.mean(dim=1) * factor
        shape = [-1] + [1] * (output.dim() - 2)
        # The channels of a transposed convolution come second.
        outputs = [1, -1] if isinstance(module, torch.nn.ConvTranspose2d) else [-1, 1]
        module.weight *= factor.view(*outputs, *[1] * (module.weight.dim() - 2))
        module.bias.mul_(factor).add_(bias)
        standardized.add(module)
        return output * factor.view(shape) + bias.view(shape)

    images = model.preprocess_image(inputs)
    calibrate_norms(model.backbone, images.tensor)
    torch.nn.init.normal_(model.backbone.bfp.refine.conv_out.weight)
    standardized, spreads, hooks = set(), {}, []
    for name, module in model.named_modules():
        is_layer = isinstance(module, LAYERS)
        if is_layer and getattr(module, "norm", None) is None:
            spreads[module] = output_spreads.get(name.split(".")[-1], output_spreads["others"])
            hooks.append(module.register_forward_hook(standardize))
    predictors = [x for x in model.modules() if hasattr(x, "test_score_thresh")]
    with ExitStack() as stack:
        for predictor in predictors:  # there must be boxes for the mask head
            stack.callback(setattr, predictor, "test_score_thresh", predictor.test_score_thresh)
            predictor.test_score_thresh = 0.0
        model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    if hasattr(model, "head"):  # few anchors of RetinaNet are foreground
        model.head.cls_score.bias.fill_(-6)


@contextmanager
def double_precision():
    """
    Compute everything in float64, on both sides. Both frameworks ask for float32 by name here and
    there (boxes, anchors, deltas); what they ask for by that name is float64 then.
    """
    import_mmdet()  # its functions have default arguments of torch.float32, which must be that
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(FLOAT32)


class Pair:
    """
    The same model twice, with the published configs, and the same images. Sampling is exhaustive:
    nothing that both sides do depends on chance.
    """

    def __init__(
        self, mmdet, name, seed, sizes=SIZES, spreads=SPREADS, num_proposals=300, **limits
    ):
        """
        Args:
            mmdet: the reference.
            name: one of SYSTEMS or SLOW.
            seed: of weights, images and objects.
            sizes: (height, width) of the images.
            spreads: standard deviation of the outputs of layers with random weights.
            num_proposals: of the RPN while training, in each image.
            limits: ``num_tested_proposals`` and ``num_detections`` in inference, in each image;
                ``small`` for a model with a ResNet-18 and small heads.
        """
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules()
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        system = {**SYSTEMS, **SLOW}[name]
        self.cfg = cfg = load_cfg(ROOT / "configs" / system.config)
        if system.libra == _X_101:
            x_101 = load_cfg(ROOT / "configs" / PUBLISHED["libra_faster_rcnn_X_101_64x4d"].config)
            cfg.MODEL.RESNETS = x_101.MODEL.RESNETS
        cfg.MODEL.DEVICE = "cpu"
        cfg.merge_from_list([*system.options])
        small = limits.get("small", False)
        if small:
            cfg.merge_from_list(_SMALL)
        # Sampling that leaves nothing out.
        cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = -1
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = ALL
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = ALL
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = num_proposals
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = limits.get("num_tested_proposals", 1000)
        cfg.TEST.DETECTIONS_PER_IMAGE = limits.get("num_detections", 100)
        self.loads_proposals = cfg.MODEL.LOAD_PROPOSALS
        self.num_mask_heads = 0
        if cfg.MODEL.MASK_ON:
            self.num_mask_heads = 3 if cfg.MODEL.LIBRA.CASCADE.MASK_HEAD_PER_STAGE else 1
        cfg.MODEL.LIBRA.SPEED.CHANNELS_LAST = "always"
        self.ours = build_model(cfg)  # with all that makes it fast
        self.inputs = []
        for size, num_objects in zip(sizes, cycle((7, 3))):
            boxes = random_boxes(self.generator, num_objects, size)
            instances = Instances(size, gt_boxes=Boxes(boxes))
            instances.gt_classes = torch.randint(80, (num_objects,), generator=self.generator)
            instances.gt_masks = BitMasks(random_masks(self.generator, boxes, size))
            proposals = torch.cat(
                [random_boxes(self.generator, 200, size), boxes + torch.randn(num_objects, 4)]
            )
            self.inputs.append(
                {
                    "image": smooth_image(self.generator, size),
                    "instances": instances,
                    "proposals": Instances(size, proposal_boxes=Boxes(proposals)),
                }
            )
            self.inputs[-1]["proposals"].objectness_logits = torch.zeros(len(proposals))
        randomize(self.ours, self.inputs, spreads)

        self.reference_cfg = reference_model(mmdet, system)
        reference = self.reference_cfg.model
        if small:
            shrink(reference)
        tested = reference.test_cfg
        tested.get("rcnn", tested).max_per_img = cfg.TEST.DETECTIONS_PER_IMAGE
        if "rpn" in tested:
            tested.rpn.max_per_img = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
        samplers = reference.train_cfg
        if "rpn_proposal" in samplers:
            samplers.rpn_proposal.max_per_img = num_proposals
        if "rpn" in samplers:
            samplers.rpn.sampler.update(num=ALL, neg_pos_ub=-1)
        stages = samplers.get("rcnn", [])
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = ALL
        self.theirs = MODELS.build(reference)
        self.theirs.load_state_dict(to_mmdetection(self.ours.state_dict()), strict=True)
        heads = [module for module in self.theirs.modules() if hasattr(module, "prior_generator")]
        if heads:
            generator = getattr(self.ours, "proposal_generator", self.ours).anchor_generator
            share_anchors(heads[0].prior_generator, generator)

    def data(self, inputs):
        """``inputs`` for mmdetection: BGR, and with all that its pipeline says of an image."""
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        samples = []
        for x in inputs:
            size = tuple(x["image"].shape[1:])
            sample = DetDataSample(
                metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
            )
            sample.gt_instances = InstanceData(
                bboxes=x["instances"].gt_boxes.tensor.clone(), labels=x["instances"].gt_classes
            )
            if self.cfg.MODEL.MASK_ON:
                masks = x["instances"].gt_masks.tensor.numpy().astype(np.uint8)
                sample.gt_instances.masks = BitmapMasks(masks, *size)
            if self.loads_proposals:
                boxes = x["proposals"].proposal_boxes.tensor.clone()
                sample.proposals = InstanceData(bboxes=boxes, scores=torch.zeros(len(boxes)))
            samples.append(sample)
        return {"inputs": [x["image"].flip(0) for x in inputs], "data_samples": samples}


def share_anchors(theirs, ours):
    """
    Give mmdetection our anchors in its order, which are the same up to rounding. A small object may
    lie within several anchors of one size: then rounding alone says which overlaps it most.
    """
    for level, anchors in enumerate(ours.cell_anchors):
        difference = (theirs.base_anchors[level][:, None] - anchors).abs().amax(dim=2)
        nearest, index = difference.min(dim=1)
        assert nearest.max() < 8 * torch.finfo(anchors.dtype).eps * anchors.abs().max()
        assert len(index.unique()) == len(anchors)
        theirs.base_anchors[level] = anchors[index]
    # The default is float32, from when mmdetection was imported.
    theirs.grid_priors = partial(theirs.grid_priors, dtype=anchors.dtype)


def in_mmdetection(loss):
    """mmdetection's name of a loss, as s0.loss_bbox for loss_box_reg_stage0."""
    loss = re.sub(r"(.*)_stage(\d)", r"s\2.\1", loss)
    return loss.replace("rpn_loc", "rpn_bbox").replace("box_reg", "bbox")
