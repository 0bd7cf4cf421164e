# SPDX-License-Identifier: Apache-2.0
"""
Whole models of this project and of mmdetection with the same weights, and the same images.

The weights are random, scaled for activations and scores like those of a trained model: otherwise
all scores are equal or saturated, and their order a matter of rounding.
"""

from contextlib import contextmanager
from functools import partial
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, build_model, calibrate_norms, load_cfg, reference_config
from uncompiled_mmcv import import_mmdet

from detectron2.structures import Boxes, Instances

from libra_d2.checkpoint import to_mmdetection

FLOAT32 = torch.float32
SYSTEMS = {
    "libra_faster_rcnn_R_50": "libra-faster-rcnn_r50",
    "libra_faster_rcnn_R_101": "libra-faster-rcnn_r101",
    "libra_faster_rcnn_X_101_64x4d": "libra-faster-rcnn_x101-64x4d",
    "libra_fast_rcnn_R_50": "libra-fast-rcnn_r50",
    "libra_retinanet_R_50": "libra-retinanet_r50",
}
SIZES = [(120, 151), (137, 100)]  # height, width: padded to (160, 160) together
ALL = 10**6  # more than there are to sample

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
        module.weight *= factor.view(-1, *[1] * (module.weight.dim() - 1))
        module.bias.mul_(factor).add_(bias)
        standardized.add(module)
        return output * factor.view(shape) + bias.view(shape)

    images = model.preprocess_image(inputs)
    calibrate_norms(model.backbone, images.tensor)
    torch.nn.init.normal_(model.backbone.bfp.refine.conv_out.weight)
    standardized, spreads, hooks = set(), {}, []
    for name, module in model.named_modules():
        is_layer = isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
        if is_layer and getattr(module, "norm", None) is None:
            spreads[module] = output_spreads.get(name.split(".")[-1], output_spreads["others"])
            hooks.append(module.register_forward_hook(standardize))
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

    def __init__(self, mmdet, name, seed, sizes=SIZES, num_proposals=300, spreads=SPREADS):
        """
        Args:
            mmdet: the reference.
            name: one of SYSTEMS.
            seed: of weights, images and objects.
            sizes: (height, width) of the images.
            num_proposals: of the RPN while training, in each image.
            spreads: standard deviation of the outputs of layers with random weights.
        """
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules()
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.cfg = cfg = load_cfg(ROOT / f"configs/COCO-Detection/{name}_FPN_1x.yaml")
        cfg.MODEL.DEVICE = "cpu"
        # Sampling that leaves nothing out.
        cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = -1
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = ALL
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = ALL
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = num_proposals
        self.loads_proposals = cfg.MODEL.LOAD_PROPOSALS
        cfg.MODEL.LIBRA.SPEED.CHANNELS_LAST = "always"
        self.ours = build_model(cfg)  # with all that makes it fast
        self.inputs = []
        for size, num_objects in zip(sizes, cycle((7, 3))):
            boxes = random_boxes(self.generator, num_objects, size)
            instances = Instances(size, gt_boxes=Boxes(boxes))
            instances.gt_classes = torch.randint(80, (num_objects,), generator=self.generator)
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

        self.reference_cfg = reference_config(mmdet, SYSTEMS[name])
        reference = self.reference_cfg.model
        reference.backbone.init_cfg = None
        samplers = reference.train_cfg
        if "rpn_proposal" in samplers:
            samplers.rpn_proposal.max_per_img = num_proposals
        if "rpn" in samplers:
            samplers.rpn.sampler.update(num=ALL, neg_pos_ub=-1)
        if "rcnn" in samplers:
            samplers.rcnn.sampler.num = ALL
        self.theirs = MODELS.build(reference)
        self.theirs.load_state_dict(to_mmdetection(self.ours.state_dict()), strict=True)
        heads = [module for module in self.theirs.modules() if hasattr(module, "prior_generator")]
        if heads:
            generator = getattr(self.ours, "proposal_generator", self.ours).anchor_generator
            share_anchors(heads[0].prior_generator, generator)

    def data(self, inputs):
        """``inputs`` for mmdetection: BGR, and with all that its pipeline says of an image."""
        from mmdet.structures import DetDataSample
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
