# SPDX-License-Identifier: Apache-2.0
"""
Whole models beside mmdetection's: the same weights and pixels give the same proposals, detections,
losses and gradients.

The weights are random, scaled for activations and scores like those of a trained model: otherwise
all scores are equal or saturated, and their order a matter of rounding.
"""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, calibrate_norms, load_cfg
from scipy.optimize import linear_sum_assignment

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.mmdetection_weights import to_mmdetection

SYSTEMS = {
    "libra_faster_rcnn_R_50": "libra-faster-rcnn_r50",
    "libra_faster_rcnn_R_101": "libra-faster-rcnn_r101",
    "libra_faster_rcnn_X_101_64x4d": "libra-faster-rcnn_x101-64x4d",
    "libra_fast_rcnn_R_50": "libra-fast-rcnn_r50",
    "libra_retinanet_R_50": "libra-retinanet_r50",
}
SIZES = [(150, 211), (187, 130)]  # height, width: padded to (192, 224) together
ALL = 10**6  # more than there are to sample

# Standard deviation of the outputs of layers with random weights.
SPREADS = {
    "conv_out": 0.3,
    "theta": 0.7,
    "phi": 0.7,
    "objectness_logits": 1.0,
    "anchor_deltas": 0.3,
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
def randomize(model, inputs):
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
            spreads[module] = SPREADS.get(name.split(".")[-1], 1.0)
            hooks.append(module.register_forward_hook(standardize))
    model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    if hasattr(model, "head"):  # few anchors of RetinaNet are foreground
        model.head.cls_score.bias.fill_(-6)


class Pair:
    """The same model twice, and the same images."""

    def __init__(self, mmdet, name, seed):
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
        from mmengine.config import Config

        register_all_modules()
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        cfg = load_cfg(ROOT / f"configs/COCO-Detection/{name}_FPN_1x.yaml")
        cfg.MODEL.DEVICE = "cpu"
        # Sampling that leaves nothing out.
        cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = -1
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = ALL
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = ALL
        self.loads_proposals = cfg.MODEL.LOAD_PROPOSALS
        self.ours = build_model(cfg)
        self.inputs = []
        for size, num_objects in zip(SIZES, (7, 3)):
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
        randomize(self.ours, self.inputs)

        (path,) = (ROOT / mmdet_configs(mmdet)).glob(f"*/{SYSTEMS[name]}_fpn_1x_coco.py")
        reference = Config.fromfile(path).model
        reference.backbone.init_cfg = None
        samplers = reference.train_cfg
        if "rpn" in samplers:
            samplers.rpn.sampler.update(num=ALL, neg_pos_ub=-1)
        if "rcnn" in samplers:
            samplers.rcnn.sampler.num = ALL
        self.theirs = MODELS.build(reference)
        self.theirs.load_state_dict(to_mmdetection(self.ours.state_dict()), strict=True)

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


def mmdet_configs(mmdet):
    from pathlib import Path

    return Path(mmdet.__file__).parent / ".mim/configs"


@pytest.fixture(scope="module", params=SYSTEMS)
def pair(request, mmdet):
    return Pair(mmdet, request.param, seed=11)


def assert_same_boxes(ours, theirs, atol_box, atol_score):
    """
    Each box has a counterpart: (boxes, scores, classes) on either side, in any order, because equal
    scores have none.
    """
    assert len(ours[0]) == len(theirs[0])
    (boxes, scores, classes), others = ours, theirs
    box_error = (boxes[:, None] - others[0]).abs().amax(dim=2)
    score_error = (scores[:, None] - others[1]).abs()
    same = classes[:, None] == others[2]
    cost = torch.where(same, box_error + 100 * score_error, 1e6)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert same[rows, columns].all()
    assert box_error[rows, columns].max() < atol_box
    assert score_error[rows, columns].max() < atol_score


@pytest.mark.parametrize("images", [(0,), (1,), (0, 1)])
def test_detections(pair, images):
    """Of single images and of a batch of different sizes."""
    inputs = [pair.inputs[i] for i in images]
    with torch.no_grad():
        results = pair.ours.eval()([{k: x[k] for k in ("image", "proposals")} for x in inputs])
        samples = pair.theirs.eval().test_step(pair.data(inputs))
    for result, sample in zip(results, samples):
        a, b = result["instances"], sample.pred_instances
        assert len(a) > 20
        assert len(a.pred_classes.unique()) > 5
        assert_same_boxes(
            (a.pred_boxes.tensor, a.scores, a.pred_classes),
            (b.bboxes, b.scores, b.labels),
            atol_box=0.002,
            atol_score=1e-5,
        )


def features_of(pair):
    """Of all images, on both sides."""
    images = pair.ours.preprocess_image(pair.inputs)
    data = pair.theirs.data_preprocessor(pair.data(pair.inputs), training=True)
    ours, theirs = pair.ours.backbone(images.tensor), pair.theirs.extract_feat(data["inputs"])
    return images, ours, theirs, data["data_samples"]


@torch.no_grad()
def test_proposals(pair):
    """The RPN's, for inference."""
    if getattr(pair.ours, "proposal_generator", None) is None:
        pytest.skip("there is no RPN")
    pair.ours.eval(), pair.theirs.eval()
    images, features, their_features, samples = features_of(pair)
    for a, b in zip(features.values(), their_features):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    proposals, _ = pair.ours.proposal_generator(images, features, None)
    theirs = pair.theirs.rpn_head.predict(their_features, samples, rescale=False)
    for a, b in zip(proposals, theirs):
        classes = torch.zeros(len(a))
        scores = a.objectness_logits.sigmoid()
        ours = (a.proposal_boxes.tensor, scores, classes)
        assert_same_boxes(ours, (b.bboxes, b.scores, classes), 0.002, 1e-5)


def without_objects(inputs):
    """The same images, the first of them without objects."""
    inputs = deepcopy(inputs)
    inputs[0]["instances"] = inputs[0]["instances"][:0]
    return inputs


@pytest.mark.parametrize("change", [list, without_objects])
def test_losses_and_gradients(pair, change):
    """Every loss, and gradients from the heads down to the first trained batch norm."""
    inputs = change(pair.inputs)
    pair.ours.train(), pair.theirs.train()
    pair.ours.zero_grad(), pair.theirs.zero_grad()
    with EventStorage():
        ours = pair.ours(inputs)
    data = pair.theirs.data_preprocessor(pair.data(inputs), training=True)
    theirs = {
        name: sum(loss) if isinstance(loss, list) else loss
        for name, loss in pair.theirs.loss(data["inputs"], data["data_samples"]).items()
        if "loss" in name
    }
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    names = {"loss_rpn_loc": "loss_rpn_bbox", "loss_box_reg": "loss_bbox"}
    assert {names.get(name, name) for name in ours} == theirs.keys()
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[names.get(name, name)], rtol=1e-4, atol=1e-7)
    grads = {k: p.grad for k, p in pair.ours.named_parameters() if p.requires_grad}
    their_grads = {k: p.grad for k, p in pair.theirs.named_parameters() if p.requires_grad}
    grads = to_mmdetection(grads)
    assert grads.keys() == their_grads.keys()
    # It adds the same to all positions, which the softmax ignores: its gradient is rounding.
    del grads["neck.1.refine.phi.conv.bias"]
    for name, grad in grads.items():
        # Float32 on both sides; the proposals that the losses start from differ by 1e-5 pixels.
        error = (grad - their_grads[name]).norm() / their_grads[name].norm()
        assert error < 1e-3, name
