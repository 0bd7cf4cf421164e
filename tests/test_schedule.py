# SPDX-License-Identifier: Apache-2.0
"""Optimizer and schedule of the published recipe, beside mmengine's."""

import pytest
import torch
from conftest import ROOT, load_cfg, reference_config
from oracle import PUBLISHED, SPREADS, SYSTEMS, Pair, double_precision

from detectron2.engine import SimpleTrainer, hooks

from libra_d2.checkpoint import to_mmdetection
from libra_d2.engine import Trainer

# Float64 on both sides, with the rounding of ten steps.
RELATIVE = 1e-9
TEN_STEPS = ("libra_faster_rcnn_R_50", "libra_retinanet_R_50")
DEEP = ("libra_faster_rcnn_R_101", "libra_faster_rcnn_X_101_64x4d")


def their_schedulers(reference, optimizer):
    from mmengine.registry import PARAM_SCHEDULERS

    arguments = {"optimizer": optimizer}
    return [PARAM_SCHEDULERS.build(x, default_args=arguments) for x in reference.param_scheduler]


def test_same_schedule(mmdet):
    """Of all Faster and Fast R-CNNs, here as there."""
    found = []
    for name in (name for name in PUBLISHED if "retinanet" not in name):
        cfg = load_cfg(ROOT / "configs" / PUBLISHED[name].config)
        reference = reference_config(mmdet, PUBLISHED[name].reference)
        found.append((cfg.SOLVER, reference.param_scheduler, reference.optim_wrapper))
    assert len(found) == 4
    assert all(x == found[0] for x in found)


@pytest.mark.parametrize("name", ["libra_faster_rcnn_R_50", "libra_retinanet_R_50"])
def test_learning_rate(mmdet, name):
    """The rate of every iteration of the training, warm-up and both drops included."""
    system = PUBLISHED[name]
    cfg = load_cfg(ROOT / "configs" / system.config)
    reference = reference_config(mmdet, system.reference)
    layer = torch.nn.Linear(1, 1)
    ours = Trainer.build_optimizer(cfg, layer)
    theirs = torch.optim.SGD(layer.parameters(), lr=reference.optim_wrapper.optimizer.lr)
    schedule = Trainer.build_lr_scheduler(cfg, ours)
    warmup, drops = their_schedulers(reference, theirs)
    images_per_epoch, batch = 117266, reference.auto_scale_lr.base_batch_size
    epoch = -(-images_per_epoch // batch)
    assert epoch * reference.train_cfg.max_epochs == cfg.SOLVER.MAX_ITER
    ours.step(), theirs.step()  # else the first step of a schedule warns
    rates = []
    for iteration in range(cfg.SOLVER.MAX_ITER):
        rates.append([x.param_groups[0]["lr"] for x in (ours, theirs)])
        schedule.step()
        if iteration < warmup.end:
            warmup.step()
        if (iteration + 1) % epoch == 0:
            drops.step()
    a, b = torch.tensor(rates, dtype=torch.float64).unbind(1)
    # In the warm-up mmengine multiplies the last rate by a factor.
    torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
    assert len(a.unique()) == 500 + 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.rounding) if name == "libra_retinanet_R_50" else name
        for name in SYSTEMS
    ],
)
def test_training(mmdet, name, pytestconfig):
    """
    Ten steps of the warm-up have the same losses and lead to the same weights, which includes
    momentum, decay of norms and biases, and frozen layers. Without --slow, models are small, those
    that differ in their heads alone take three steps, and other backbones are left to the
    comparison of gradients.
    """
    from mmengine.optim import build_optim_wrapper

    is_slow, sizes = pytestconfig.getoption("slow"), [(48, 64), (64, 40), (56, 64), (40, 48)]
    if name in DEEP and not is_slow:
        pytest.skip("with --slow")
    num_steps = 10 if is_slow or name in TEN_STEPS else 3
    # Small features and outputs as at the beginning of a training; larger ones diverge.
    spreads = {**{layer: 0.02 * spread for layer, spread in SPREADS.items()}, "others": 0.1}
    few = {"num_tested_proposals": 50, "num_detections": 10}
    seed = 5 + pytestconfig.getoption("seed")
    with double_precision():
        pair = Pair(mmdet, name, seed, sizes, spreads, num_proposals=30, small=not is_slow, **few)
        start = {k: v.clone() for k, v in pair.theirs.state_dict().items()}
        batches = [[pair.inputs[i % 4], pair.inputs[(3 * i + 1) % 4]] for i in range(num_steps)]
        optimizer = Trainer.build_optimizer(pair.cfg, pair.ours)
        schedule = Trainer.build_lr_scheduler(pair.cfg, optimizer)
        trainer = SimpleTrainer(pair.ours, batches, optimizer)
        trainer.register_hooks([hooks.LRScheduler(optimizer, schedule)])
        trainer.train(0, num_steps)
        ours = [x for x, _ in trainer.storage.history("total_loss").values()]

        wrapper = build_optim_wrapper(pair.theirs, pair.reference_cfg.optim_wrapper)
        warmup, _ = their_schedulers(pair.reference_cfg, wrapper)
        pair.theirs.train()
        theirs = []
        for batch in batches:
            theirs.append(pair.theirs.train_step(pair.data(batch), wrapper)["loss"].item())
            warmup.step()
    assert ours == pytest.approx(theirs, rel=RELATIVE)
    assert max(theirs) > 1.0001 * min(theirs)
    weights = to_mmdetection(pair.ours.state_dict())
    changed = 0
    for key, value in pair.theirs.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        assert weights[key].dtype == torch.float64
        # The softmax ignores the bias of phi, whose gradient is rounding.
        assert (weights[key] - value).norm() <= RELATIVE * value.norm() + 1e-15, key
        changed += not torch.equal(value, start[key])
    trained = sum(p.requires_grad for p in pair.ours.parameters())
    assert changed == trained
