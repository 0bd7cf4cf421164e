# SPDX-License-Identifier: Apache-2.0
"""
Every part runs on the device that it is given, and the host waits for it no more often than for the
parent: on the GPUs there are, and without one on a simulated device.
"""

import copy

import pytest
import torch
from conftest import ROOT, build_model, demo_cfg, random_inputs
from simulated_device import DEVICE, SimulatedDevice

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.config import BASELINE, DETECTRON2_RECIPE
from libra_d2.modeling import balanced_feature_pyramid

# The parent of each system, by its keys.
PARENTS = {
    "faster_rcnn": ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
    "fast_rcnn": ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
    "mask_rcnn": ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
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


def make_inputs(system):
    torch.manual_seed(1)
    inputs = random_inputs(3, 2)
    for image in inputs if system == "fast_rcnn" else ():
        corner = torch.rand(40, 2) * 60
        boxes = Boxes(torch.cat([corner, corner + 4 + 30 * torch.rand(40, 2)], dim=1))
        image["proposals"] = Instances(
            tuple(image["image"].shape[1:]),
            proposal_boxes=boxes,
            objectness_logits=torch.zeros(40),
        )
    return inputs


def count_waits(system, training, opts):
    """Host waits in a training step, or an inference, of two images."""
    device = SimulatedDevice()
    model = build(system, opts).train(training)
    inputs = make_inputs(system)
    for part in model.modules():
        if hasattr(part, "test_score_thresh"):
            part.test_score_thresh = 0.0
    with device, EventStorage():
        device.move(model)
        device.waits.clear()
        if training:
            sum(model(inputs).values()).backward()
        else:
            with torch.no_grad():
                model(inputs)
    return device.waits


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("system", PARENTS)
def test_host_waits(system, training, monkeypatch):
    """No mixed devices, and at most as many waits as Detectron2's model has."""
    # The simulation has no mixed precision to ask for.
    monkeypatch.setattr(balanced_feature_pyramid, "_is_autocast_enabled", lambda x: False)
    ours = count_waits(system, training, [])
    parents = count_waits(system, training, [*PARENTS[system], *PLAIN])
    assert sum(parents.values()) > 0
    assert sum(ours.values()) <= sum(parents.values()), (ours, parents)


def test_the_simulation_finds_what_it_is_for():
    device = SimulatedDevice()
    with device:
        there, here = torch.ones(3).to(DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="mixes devices"):
            there + here
        before = sum(device.waits.values())
        assert there.sum().item() == 3
        there[there > 0]
        there.cpu()
        assert sum(device.waits.values()) == before + 3


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("system", PARENTS)
def test_training_step(system, device, amp):
    """The losses and gradients of the CPU, to the rounding of TF32 or half precision."""
    results = []
    for place in ("cpu", device):
        model = build(system, ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4000]).to(place)
        torch.manual_seed(2)
        with EventStorage(), torch.autocast(place, enabled=amp and place != "cpu"):
            losses = model(copy.deepcopy(make_inputs(system)))
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        results.append({name: loss.item() for name, loss in losses.items()})
    # The RPN draws its anchors on the device, others than on the CPU.
    for name in results[0] if system in ("retinanet", "fast_rcnn") else ():
        assert results[1][name] == pytest.approx(results[0][name], rel=5e-2 if amp else 5e-3)


@pytest.mark.parametrize("device", ["cpu", *GPUS])
@pytest.mark.parametrize("system", PARENTS)
def test_deterministic_algorithms(system, device):
    """The same seed gives the same gradients, with nothing that PyTorch knows to be random."""
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = build(system).to(device)
            torch.manual_seed(2)
            with EventStorage():
                sum(model(copy.deepcopy(make_inputs(system))).values()).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*gradients):
        assert torch.equal(a, b)
