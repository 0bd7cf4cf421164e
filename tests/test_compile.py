# SPDX-License-Identifier: Apache-2.0
"""torch.compile of training steps."""

import copy

import torch
from conftest import build_model, demo_cfg, random_inputs
from oracle import double_precision

from detectron2.utils.events import EventStorage


def test_training_step():
    """Losses and gradients of an eager step in float64; the sampler is excluded from the graphs."""
    results = []
    torch._dynamo.reset()
    with double_precision():
        model = build_model(demo_cfg())
        inputs = random_inputs(3, 2)
        for run in (model, torch.compile(model, backend="eager")):
            model.zero_grad()
            torch.manual_seed(1)
            with EventStorage():
                losses = run(copy.deepcopy(inputs))
            sum(losses.values()).backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append((losses, gradients))
    for name, loss in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], loss, rtol=1e-9, atol=0)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
