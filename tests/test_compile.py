# SPDX-License-Identifier: Apache-2.0
"""torch.compile of training steps."""

import copy

import torch
from conftest import build_model, demo_cfg, random_inputs

from detectron2.utils.events import EventStorage


def test_training_step():
    """Losses and gradients of an eager step; the sampler is excluded from the graphs."""
    model = build_model(demo_cfg())
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
