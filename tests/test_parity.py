# SPDX-License-Identifier: Apache-2.0
"""
Whole models give the same detections, losses and gradients as mmdetection's with the same weights
and pixels. They are compared in float64, where rounding is far below the tolerance.
"""

import re
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
from oracle import (
    FLOAT32,
    SLOW,
    SPREADS,
    SYSTEMS,
    Pair,
    double_precision,
    in_mmdetection,
    smooth_image,
)
from PIL import Image
from scipy.optimize import linear_sum_assignment

from detectron2.layers import paste_masks_in_image
from detectron2.utils.events import EventStorage

from libra_d2.checkpoint import to_mmdetection
from libra_d2.data import LibraDatasetMapper

# Float64 has 16 digits. A deep network loses up to five of them.
RELATIVE = 1e-9
PIXELS = 1e-7
# Deep backbones, mask heads and cascades are slow: they get fewer pixels and boxes.
_SOME = {"num_proposals": 100, "num_tested_proposals": 300}
_FEWER = {
    "sizes": [(90, 75), (60, 96)],  # padded to (96, 96) together
    **{"num_proposals": 60, "num_tested_proposals": 100, "num_detections": 25},
    # mmdetection sorts proposals by probability: for logits above 36, all are 1.
    "spreads": {**SPREADS, "objectness_logits": 0.3},
}
# Systems that have nothing of their own in these tests, by a pattern.
_AS_OTHERS = {"test_float32": "101|fast_rcnn|mask", "test_detections_from_a_file": "101"}


def pytest_generate_tests(metafunc):
    """With --slow, the systems that are left out otherwise."""
    if "pair" in metafunc.fixturenames:
        left_out, systems = _AS_OTHERS.get(metafunc.definition.name, "$^"), SYSTEMS
        if metafunc.config.getoption("slow"):
            left_out, systems = "$^", SLOW
        systems = [name for name in systems if not re.search(left_out, name)]
        metafunc.parametrize("pair", systems, indirect=True, scope="module")


@pytest.fixture(scope="module")
def pair(request, mmdet, pytestconfig):
    name, seed = request.param, 11 + pytestconfig.getoption("seed")
    limits = _FEWER if re.search("mask|cascade|101", name) else _SOME
    small = "cascade" in name and not pytestconfig.getoption("slow")
    with double_precision():
        return Pair(mmdet, name, seed, small=small, **limits)


def assert_same_detections(result, sample):
    """Each detection has a counterpart; equal scores leave the order open."""
    ours, theirs = result["instances"], sample.pred_instances
    boxes = ours.pred_boxes.tensor
    for values in (boxes, ours.scores, theirs.bboxes, theirs.scores):
        assert values.dtype == torch.float64
    assert len(ours) == len(theirs) > 20
    assert len(ours.pred_classes.unique()) > 3
    box_error = (boxes[:, None] - theirs.bboxes).abs().amax(dim=2)
    score_error = (ours.scores[:, None] - theirs.scores).abs()
    same = ours.pred_classes[:, None] == theirs.labels
    cost = torch.where(same, box_error + 100 * score_error, 1e6)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert same[rows, columns].all()
    assert box_error[rows, columns].max() < PIXELS
    assert score_error[rows, columns].max() < RELATIVE
    if ours.has("pred_masks"):
        masks, their_masks = ours.pred_masks[rows], theirs.masks[columns]
        assert masks.shape == their_masks.shape
        assert masks.dtype == their_masks.dtype == torch.bool
        assert torch.equal(masks, their_masks)
        assert 0.1 < masks.sum() / (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum() < 0.9
    return rows, columns


@contextmanager
def outputs_of(model, name):
    """Collect what the layers of that name return."""
    found = []
    layers = [layer for path, layer in model.named_modules() if path.endswith(f".{name}")]
    hooks = [x.register_forward_hook(lambda _, __, output: found.append(output)) for x in layers]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.usefixtures("float64")
def test_detections(pair):
    """
    Of a batch of different sizes; the logits of masks, before they are pasted into the image, of
    each stage of a cascade.
    """
    inputs = pair.inputs
    with torch.no_grad(), outputs_of(pair.ours, "predictor") as logits:
        results = pair.ours.eval()([{k: x[k] for k in ("image", "proposals")} for x in inputs])
    with torch.no_grad(), outputs_of(pair.theirs, "conv_logits") as their_logits:
        samples = pair.theirs.eval().test_step(pair.data(inputs))
    assert len(logits) == len(their_logits) == pair.num_mask_heads
    start = 0
    for result, sample in zip(results, samples):
        rows, columns = assert_same_detections(result, sample)
        for a, b in zip(logits, their_logits):
            torch.testing.assert_close(a[start + rows], b[start + columns], rtol=0, atol=PIXELS)
        start += len(rows)
    assert all(len(x) == start for x in logits)


@torch.no_grad()
@pytest.mark.usefixtures("float64")
def test_detections_from_a_file(pair, tmp_path):
    """Each side reads and resizes the file on its own; boxes are in the file's coordinates."""
    from mmdet.registry import TRANSFORMS
    from mmengine.structures import InstanceData

    path, size = str(tmp_path / "image.png"), (420, 300)
    height, width = size
    pixels = smooth_image(pair.generator, size)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    cfg = pair.cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 150, 250
    record = {"file_name": path, "image_id": 1, "height": height, "width": width}
    boxes = pair.inputs[0]["proposals"].proposal_boxes.tensor.clamp(min=1)
    boxes = boxes * torch.tensor([width, height]).repeat(2) / boxes.amax()
    if pair.loads_proposals:
        record["proposal_boxes"] = boxes.numpy()
        record["proposal_objectness_logits"] = np.zeros(len(boxes))
        record["proposal_bbox_mode"] = 0
    result = pair.ours.eval()([LibraDatasetMapper(cfg, is_train=False)(record)])

    steps = {step.type: step for step in pair.reference_cfg.test_pipeline}
    resize = {"type": "Resize", "scale": (250, 150), "keep_ratio": True}
    pipeline = [steps["LoadImageFromFile"], resize, steps["PackDetInputs"]]
    data = {"img_path": path, "img_id": 1}
    for transform in pipeline:
        data = TRANSFORMS.build(transform)(data)
    sample = data["data_samples"]
    if pair.loads_proposals:
        scaled = boxes * torch.tensor(sample.scale_factor).repeat(2)
        sample.proposals = InstanceData(bboxes=scaled, scores=torch.zeros(len(boxes)))
    (sample,) = pair.theirs.eval().test_step({"inputs": [data["inputs"]], "data_samples": [sample]})
    assert_same_detections(result[0], sample)


def test_pasting(mmdet):
    """In float32, the same masks in the same boxes become the same pixels."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    size, number = (90, 110), 20
    corner = torch.rand(number, 2) * torch.tensor([70, 60])
    boxes = torch.cat([corner, corner + 3 + 30 * torch.rand(number, 2)], dim=1)
    masks = torch.nn.functional.interpolate(torch.rand(number, 1, 6, 6), 28, mode="bilinear")
    theirs = torch.zeros(number, *size)
    for i in range(number):
        pasted, place = _do_paste_mask(masks[i : i + 1], boxes[i : i + 1], *size, skip_empty=True)
        theirs[(slice(i, i + 1), *place)] = pasted
    ours = paste_masks_in_image(masks[:, 0], boxes, size, threshold=0.5)
    assert ours.sum() > 1000
    # Where a probability is 0.5 up to rounding, either may be right.
    is_clear = (theirs - 0.5).abs() > 1e-5
    assert is_clear.float().mean() > 0.999
    assert torch.equal(ours[is_clear], theirs[is_clear] > 0.5)


@pytest.mark.rounding
@torch.no_grad()
def test_float32(pair):
    """
    In float32 the features are as exact as the reference's, measured against float64. Rounding
    differs by processor and order of sums, but not tenfold.
    """

    def features(pair):
        images = pair.ours.preprocess_image(pair.inputs).tensor
        data = pair.theirs.data_preprocessor(pair.data(pair.inputs), training=True)
        return pair.ours.backbone(images), pair.theirs.extract_feat(data["inputs"])

    pair.ours.eval(), pair.theirs.eval()
    with double_precision():
        exact, _ = features(pair)
    single = deepcopy(pair)
    single.ours.to(FLOAT32), single.theirs.to(FLOAT32)
    ours, theirs = features(single)
    for a, b, truth in zip(ours.values(), theirs, exact.values()):
        assert a.dtype == b.dtype == FLOAT32
        ours_error, their_error = ((x.double() - truth).norm() / truth.norm() for x in (a, b))
        assert ours_error < 10 * max(their_error, torch.finfo(FLOAT32).eps)


def without_objects(inputs):
    """The same images, the first of them without objects."""
    inputs = deepcopy(inputs)
    inputs[0]["instances"] = inputs[0]["instances"][:0]
    return inputs


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("change", [list, without_objects])
def test_losses_and_gradients(pair, change, request):
    """Every loss, and gradients from the heads down to the first trained batch norm."""
    if change is without_objects and re.search("101|fast", request.node.name):
        pytest.skip("the heads are those of Mask R-CNN, or of the models with ResNet-50")
    inputs = change(pair.inputs)
    pair.ours.train(), pair.theirs.train()
    pair.ours.zero_grad(), pair.theirs.zero_grad()
    with EventStorage():
        ours = pair.ours(inputs)
    data = pair.theirs.data_preprocessor(pair.data(inputs), training=True)
    theirs = {
        name: sum(loss) if isinstance(loss, list) else loss.sum()  # that of masks has shape (1,)
        for name, loss in pair.theirs.loss(data["inputs"], data["data_samples"]).items()
        if "loss" in name
    }
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    ours = {in_mmdetection(name): loss for name, loss in ours.items()}
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, theirs[name], rtol=RELATIVE, atol=1e-12)
    grads = {k: p.grad for k, p in pair.ours.named_parameters() if p.requires_grad}
    their_grads = {k: p.grad for k, p in pair.theirs.named_parameters() if p.requires_grad}
    assert len(grads) == len(their_grads)
    # Norms without running statistics would get the name of group norm.
    grads = to_mmdetection({**pair.ours.state_dict(), **grads})
    grads = {name: grads[name] for name in their_grads}
    # The softmax ignores the bias of phi, whose gradient is rounding.
    del grads["neck.1.refine.phi.conv.bias"]
    for name, grad in grads.items():
        # Both are 0 in a box loss without foreground.
        error, scale = (grad - their_grads[name]).norm(), their_grads[name].norm()
        assert error <= RELATIVE * scale, name
