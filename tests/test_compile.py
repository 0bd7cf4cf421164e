# SPDX-License-Identifier: Apache-2.0
"""torch.compile of training steps."""

import copy

import pytest
import torch
from conftest import ROOT, build_model, demo_cfg, random_inputs

from detectron2.utils.events import EventStorage


@pytest.mark.parametrize("system", ["faster_rcnn", "retinanet"])
def test_training_step(system):
    """The losses and gradients of a step that is not compiled; the sampler is outside of graphs."""
    cfg = demo_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    model = build_model(cfg)
    inputs, results = random_inputs(3, 2), []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        torch.manual_seed(1)
        with EventStorage():
            losses = run(copy.deepcopy(inputs))
        sum(losses.values()).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((losses, gradients))
    for name, loss in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], loss)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
