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
    torch._dynamo.utils.counters.clear()
    with double_precision():
        model = build_model(demo_cfg())
        inputs = random_inputs(3, 1)
        for run in (model, torch.compile(model, backend="eager")):
            model.zero_grad()
            torch.manual_seed(1)
            with EventStorage():
                losses = run(copy.deepcopy(inputs))
            sum(losses.values()).backward()
            named = model.named_parameters()
            gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
            results.append({**losses, **gradients})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12)
