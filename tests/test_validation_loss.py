# SPDX-License-Identifier: Apache-2.0
import pickle
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, demo_cfg, random_inputs
from torch import nn

from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from libra_d2.evaluation.validation_loss import validation_losses
from libra_d2.utils.random_state import seeded


class Detector(nn.Module):
    """Has modules that change or draw in training mode; the inputs are its losses."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout2d()) for _ in "bh"
        )
        self.modes, self.drawn = [], []

    def forward(self, batch):
        self.modes.append({name for name, module in self.named_modules() if module.training})
        self.drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        assert not self.head(self.backbone(torch.rand(2, 2, 3, 3))).requires_grad
        a, b = (torch.tensor([x[i] for x in batch], dtype=torch.float64) for i in (0, 1))
        assert get_event_storage().iter % 20 != 0  # or pictures would be drawn
        get_event_storage().put_scalars(**{"roi_head/max": a.max().item(), "other": 1.0})
        if b.max() > 0:
            get_event_storage().put_scalar("roi_head/b", 8.0)
            return {"loss_a": a.mean(), "loss_b": b.mean()}
        return {"loss_a": a.mean()}


def states():
    """The states of all random number generators."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


def test_mean_over_images(monkeypatch):
    """The mean is over the images of all processes, not over batches; only the main one gets it."""
    batches = [[(1.0, 4.0), (2.0, 4.0), (6.0, 4.0)], [(7.0, 0.0)]]
    expected = {"loss_a": (3 * 3.0 + 7.0) / 4, "loss_b": 3 * 4.0 / 4}
    expected["total_loss"] = (3 * (3.0 + 4.0) + 7.0) / 4
    expected.update({"roi_head/max": (3 * 6.0 + 7.0) / 4, "roi_head/b": 3 * 8.0 / 4})
    assert validation_losses(Detector(), batches) == expected
    sent = []
    monkeypatch.setattr(comm, "gather", lambda x: sent.append(x) or [])
    assert validation_losses(Detector(), batches[:1]) == validation_losses(Detector(), []) == {}
    monkeypatch.setattr(comm, "gather", lambda x: [x, *sent])
    assert validation_losses(Detector(), batches[1:]) == expected


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("last", [[(1.0, 0.0)], [()]])
def test_restores_the_model(trains, last):
    """
    Training mode except for backbone, batch norm and dropout, with the same draws each time. Modes,
    weights, buffers and RNG states are restored, also after an error.
    """
    model = Detector().train(trains)
    model.head[0].train(not trains)
    modes = [module.training for module in model.modules()]
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    for seed in (1, 2):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(seed)
        before = states()
        try:
            validation_losses(model, [[(1.0, 0.0)], last])
        except IndexError:
            assert last == [()]
        assert states() == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert model.modes == 4 * [{"", "head", "head.0"}]
    assert model.drawn[:2] == model.drawn[2:]
    with seeded(0):
        assert model.drawn[0] == (torch.rand(()).item(), np.random.rand(), random.random())
    assert all(a != b for a, b in zip(*model.drawn[:2]))


@pytest.mark.parametrize(
    ("system", "average"), [("faster_rcnn", None), ("retinanet", None), ("retinanet", 50.0)]
)
def test_detectors(system, average, monkeypatch):
    """
    Losses are reproducible and do not wait for other processes, which may have fewer batches. The
    moving average of the normalizer is kept.
    """
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    model = build_model(demo_cfg(config, MODEL__LIBRA__RETINANET__NORMALIZER="moving_average"))
    vars(model).update({"loss_normalizer": average} if average else {})
    batches, before = [random_inputs(3, 1), random_inputs(7)], states()
    expected = validation_losses(model, batches)
    assert states() == before
    assert getattr(model, "loss_normalizer", None) == average
    losses = [x for name, x in expected.items() if name.startswith("loss")]
    assert len(losses) == (4 if system == "faster_rcnn" else 2)
    assert expected["total_loss"] == pytest.approx(sum(losses), rel=1e-12)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "gather", lambda x: [x])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: pytest.fail("waits for others"))
    assert validation_losses(model, batches) == expected
