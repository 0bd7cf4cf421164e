# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation computes the gradients of the whole batch."""

import copy
import random
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, load_cfg, random_inputs
from torch import distributed, nn

from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

from libra_d2.engine.accumulation import AccumulationTrainer, AMPAccumulationTrainer
from libra_d2.modeling.normalizer import mean_over_batch

SYSTEMS = ("COCO-Detection/libra_retinanet_R_50", "COCO-Detection/libra_faster_rcnn_R_50")
SYSTEMS += ("Misc/libra_cascade_rcnn_R_50",)


def build(path):
    """A published model, on a ResNet-18, that samples everything, with small activations."""
    cfg = load_cfg(ROOT / f"configs/{path}_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = -1
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**6
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    model = build_model(cfg)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim() == 4:
            value.mul_(0.5)
    return model


def step(model, batch, accumulation_steps):
    trainer = AccumulationTrainer(
        model, [copy.deepcopy(batch)], torch.optim.SGD(model.parameters(), lr=0.0)
    )
    trainer.accumulation_steps = accumulation_steps
    torch.manual_seed(1)
    with EventStorage() as storage:
        trainer.run_step()
        scalars = {name: value for name, (value, _) in storage.latest().items()}
        assert all(len(history.values()) == 1 for history in storage.histories().values())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, scalars


@pytest.mark.parametrize("path", SYSTEMS)
@pytest.mark.usefixtures("float64")
def test_gradients(path):
    """Gradients with 1, 2 and 4 micro-batches, whose normalizers differ, in float64."""
    model, batch = build(path), random_inputs(6, 0, 1, 3, size=(64, 96))
    expected, scalars = step(model, batch, 1)
    # What an ordinary step computes.
    model.zero_grad()
    torch.manual_seed(1)
    with EventStorage():
        sum(model(copy.deepcopy(batch)).values()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(expected[name], p.grad, rtol=1e-9, atol=1e-12)
    for accumulation_steps in (2, 4):
        found, found_scalars = step(model, batch, accumulation_steps)
        assert found.keys() == expected.keys()
        total = torch.sqrt(sum(x.square().sum() for x in expected.values()))
        difference = torch.sqrt(sum((found[n] - expected[n]).square().sum() for n in expected))
        # Rounding of sums; with the normalizer of each micro-batch it is off by tenths.
        assert difference < 1e-11 * total
        for name in ("total_loss", *(n for n in scalars if n.startswith("loss"))):
            assert found_scalars[name] == pytest.approx(scalars[name], rel=1e-11)


def draw(number):
    """Sample some of the images, with all three random number generators."""
    return torch.rand(number).double() + np.random.rand() + random.random() > 1.2


class Sampling(nn.Module):
    """Samples images, whose number is its normalizer; its backward pass draws numbers, too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(1, dtype=torch.float64)
        self.mean = nn.BatchNorm1d(1, momentum=None, dtype=torch.float64)
        self.with_gradient = []

    def forward(self, part):
        x = torch.tensor(part, dtype=torch.float64)
        self.norm(x[:, None]), self.mean(x[:, None])
        self.with_gradient.append(torch.is_grad_enabled())
        used = draw(len(x))
        number = used.sum().double()
        storage = get_event_storage()
        storage.put_scalar("number", number)
        storage.put_scalar("early" if x[0] < 5 else "late", x[0])
        if storage.iter == 40:
            storage.put_image(f"{x[0].item()}", torch.zeros(3, 2, 2, dtype=torch.uint8))
        loss = (self.weight * x * used).sum() / mean_over_batch(number, self)
        loss.requires_grad and loss.register_hook(
            lambda gradient: 0 * torch.rand(5).sum() + gradient
        )
        return {"loss_a": loss, "loss_b": self.weight * x[:1]}


@pytest.mark.parametrize("amp", [False, True])
def test_step(amp):
    """Weights, losses, scalars and batch norm statistics of three micro-batches, by hand."""
    batch, optimizer = [1.0, 2, 4, 8, 16, 32], torch.optim.SGD
    model = Sampling()
    model.weight.grad = torch.tensor(100.0, dtype=torch.float64)  # of an earlier step
    args = (model, [batch], optimizer(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer = (
        AMPAccumulationTrainer(*args, grad_scaler=scaler) if amp else AccumulationTrainer(*args)
    )
    trainer.accumulation_steps = 3
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(4)
    parts = [torch.tensor(x).double() for x in (batch[:2], batch[2:4], batch[4:])]
    used = [draw(2) for _ in parts]
    numbers = [x.sum().item() for x in used]
    assert len(set(numbers)) > 1
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(4)
    with EventStorage(40) as storage:
        trainer.run_step()
    pictures = [(name, iteration) for name, _, iteration in storage._vis_data]
    assert pictures == [("16.0", 40)]
    sums = [(x * u).sum().item() for x, u in zip(parts, used)]
    gradients = [a / (sum(numbers) / 3) + x[0].item() for a, x in zip(sums, parts)]
    assert model.weight.item() == pytest.approx(1.5 - 0.1 * sum(gradients) / 3, rel=1e-6)
    found = {name: history.values() for name, history in storage.histories().items()}
    ((seconds, _),) = found.pop("data_time")
    assert 0 <= seconds < time.perf_counter()
    found.pop("rank_data_time", None)  # of the main branch
    losses = {"loss_a": 1.5 * sum(sums) / sum(numbers), "loss_b": 1.5 * (1 + 4 + 16) / 3}
    expected = {**losses, "total_loss": sum(losses.values()), "number": sum(numbers) / 3}
    expected.update(early=(1 + 4) / 2, late=16)
    assert {name: [value for value, _ in values] for name, values in found.items()} == {
        name: [pytest.approx(value, rel=1e-6)] for name, value in expected.items()
    }
    assert model.with_gradient == [False] * 3 + [True] * 3
    # Running statistics count each part once.
    assert model.norm.running_mean.item() == pytest.approx(0.1 * (0.81 * 1.5 + 0.9 * 6 + 24))
    assert model.mean.running_mean.item() == pytest.approx((1.5 + 6 + 24) / 3)
    assert model.norm.num_batches_tracked == model.mean.num_batches_tracked == 3
    assert (model.norm.momentum, model.mean.momentum) == (0.1, None)


def test_processes_average_once():
    """A process sends its gradients with the last of three micro-batches."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        module, sent = Sampling(), []
        module.norm.requires_grad_(False), module.mean.requires_grad_(False)  # not in the losses
        model = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

        def send(_, bucket):
            sent.append((len(module.with_gradient), bucket.buffer().item()))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, send)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = AccumulationTrainer(model, [[1.0, 2, 4, 8, 16, 32]], optimizer)
        trainer.accumulation_steps = 3
        with EventStorage():
            trainer.run_step()
    finally:
        distributed.destroy_process_group()
    ((when, gradient),) = sent
    assert when == 3 + 3  # the first pass counts
    assert module.weight.item() == pytest.approx(1.5 - 0.1 * gradient)


def test_scale_of_another_precision():
    """A training that had no scaled loss is continued with the initial scale."""
    model = Sampling()
    args = (model, [[1.0, 2]], torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer = AMPAccumulationTrainer(*args, grad_scaler=scaler)
    trainer.load_state_dict(AccumulationTrainer(*args).state_dict())
    assert scaler.get_scale() == 8
    state = trainer.state_dict()
    state["grad_scaler"]["scale"] = 2.0
    trainer.load_state_dict(state)
    assert scaler.get_scale() == 2


class Plain(nn.Module):
    """Its loss is not in a dict."""

    def __init__(self):
        super().__init__()
        self.weight, self.sizes = nn.Parameter(torch.ones(())), []

    def forward(self, part):
        self.sizes.append(len(part))
        return self.weight * sum(part)


@pytest.mark.parametrize(
    ("batch", "sizes", "loss"),
    [([6.0], [1], 6), ([1.0, 2], [1] * 4, 1.5), ([1.0, 2, 4, 5, 8], [1] * 10, 4)],
)
def test_one_loss(batch, sizes, loss):
    """Three micro-batches have at least an image each."""
    model = Plain()
    gradients, scalars = step(model, batch, 3)
    assert (model.sizes, scalars.keys()) == (sizes, {"total_loss", "data_time"})
    assert gradients["weight"].item() == pytest.approx(loss)
    assert scalars["total_loss"] == pytest.approx(loss)


@pytest.mark.parametrize("is_main", [True, False])
def test_numbers_of_processes(monkeypatch, is_main):
    """Means of losses, and the longest time of loading, in the main process."""
    rows = {(0.1, 9.0, 9.0): [[0.5, 1.0, 4.0], [2.0, 3.0, 5.0]]}  # of this one's, in float64
    gather = lambda numbers: rows[tuple(numbers.tolist())]  # noqa: E731
    monkeypatch.setattr("libra_d2.engine.accumulation._gather", gather)
    monkeypatch.setattr(comm, "is_main_process", lambda: is_main)
    losses = {"a": torch.tensor(9.0), "b": torch.tensor(9.0)}
    with EventStorage() as storage:
        AccumulationTrainer._put_metrics(None, losses, 0.1)
    found = {name: value for name, (value, _) in storage.latest().items()}
    assert found == ({"data_time": 2, "a": 2, "b": 4.5, "total_loss": 6.5} if is_main else {})


def test_infinite_gradients():
    """Mixed precision skips the step and halves the scale."""
    model, scaler = Sampling(), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with EventStorage():
        AMPAccumulationTrainer(model, [[1e300, 1e300]], optimizer, grad_scaler=scaler).run_step()
    assert (model.weight.item(), scaler.get_scale()) == (1.5, 2.0**119)
