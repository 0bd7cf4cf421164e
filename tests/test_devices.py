# SPDX-License-Identifier: Apache-2.0
"""
Models run on one device, with no more host synchronizations than their parents: on a GPU, if there
is one, and on a simulated device.
"""

import copy

import pytest
import torch
from conftest import ROOT, build_model, demo_cfg, random_inputs
from simulated_device import DEVICE, SimulatedDevice

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.config import BASELINE, DETECTRON2_RECIPE
from libra_d2.modeling import balanced_feature_pyramid, roi_align

STANDARD = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
# The keys that give each system its parent's class.
PARENTS = {
    **dict.fromkeys(("faster_rcnn", "fast_rcnn", "mask_rcnn"), STANDARD),
    "cascade_rcnn": ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
    "retinanet": ["MODEL.META_ARCHITECTURE", "RetinaNet"],
}
PLAIN = [*BASELINE, *DETECTRON2_RECIPE]
GPUS = ["cuda"] * torch.cuda.is_available()


def build(system, opts=()):
    cfg = demo_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    return build_model(cfg)


def make_inputs(with_proposals, size=(96, 128)):
    """Two images with objects."""
    torch.manual_seed(1)
    inputs = random_inputs(3, 2, size=size)
    for image in inputs if with_proposals else ():
        corner = torch.rand(40, 2) * size[0] / 2
        proposals = Instances(image["instances"].image_size, objectness_logits=torch.zeros(40))
        boxes = torch.cat([corner, corner + 4 + 30 * torch.rand(40, 2)], dim=1)
        proposals.proposal_boxes = Boxes(boxes)
        image["proposals"] = proposals
    return inputs


def count_waits(system, training, opts):
    """Host synchronizations in a training step or an inference of two images, by operator."""
    device = SimulatedDevice()
    model = build(system, opts).train(training)
    inputs = make_inputs(system == "fast_rcnn")
    for part in model.modules():
        if hasattr(part, "test_score_thresh"):
            part.test_score_thresh = 0.0
    with device, EventStorage():
        device.move(model)
        device.waits.clear()
        if training:
            sum(model(inputs).values()).backward()
        else:
            model(inputs)
    return device.waits


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("system", PARENTS)
def test_host_waits(system, training, monkeypatch):
    """No mixed devices, and at most as many host synchronizations as in Detectron2's model."""
    # The simulation has no mixed precision to ask for.
    monkeypatch.setattr(balanced_feature_pyramid, "_is_autocast_enabled", lambda x: False)
    monkeypatch.setattr(roi_align, "_DEVICES", ("cpu", DEVICE.type))
    ours = count_waits(system, training, [])
    parents = count_waits(system, training, [*PARENTS[system], *PLAIN])
    assert sum(parents.values()) > 0
    assert sum(ours.values()) <= sum(parents.values()), (ours, parents)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("system", PARENTS)
def test_training_step(system, device, amp):
    """The CPU's losses, up to rounding of TF32 or half precision, and finite gradients."""
    results = []
    for place in ("cpu", device):
        model = build(system, ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4000]).to(place)
        torch.manual_seed(2)
        with EventStorage(), torch.autocast(place, enabled=amp and place != "cpu"):
            losses = model(copy.deepcopy(make_inputs(system == "fast_rcnn")))
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        results.append({name: loss.item() for name, loss in losses.items()})
    # The RPN draws its anchors on the device, others than on the CPU.
    for name in results[0] if system in ("retinanet", "fast_rcnn") else ():
        assert results[1][name] == pytest.approx(results[0][name], rel=5e-2 if amp else 5e-3)


@pytest.mark.parametrize("device", ["cpu", *GPUS])
@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_rcnn", "retinanet"])
def test_deterministic_algorithms(system, device):
    """A seed determines the gradients; PyTorch finds no operation without a deterministic form."""
    gradients, model = [], build(system).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(2)
            with EventStorage():
                sum(model(copy.deepcopy(make_inputs(False))).values()).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*gradients):
        assert torch.equal(a, b)
