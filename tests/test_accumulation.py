# SPDX-License-Identifier: Apache-2.0
"""A batch in parts has the gradients of the batch."""

import copy

import pytest
import torch
from conftest import ROOT, demo_cfg, load_cfg, random_inputs

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.checkpoint import build_model
from libra_d2.engine.accumulation import AccumulationTrainer
from libra_d2.modeling.reference_recipe.normalizer import Normalizers, mean_over_batch

SYSTEMS = ("faster_rcnn_R_50", "faster_rcnn_R_101", "faster_rcnn_X_101_64x4d", "fast_rcnn_R_50")
SYSTEMS = (*SYSTEMS, "retinanet_R_50")
CASCADE = "Misc/libra_cascade_rcnn_R_50_FPN_1x"


def build(path):
    """A published system whose sampling leaves nothing out, with small activations."""
    cfg = load_cfg(ROOT / f"configs/{path}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = -1
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**6
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    model = build_model(cfg)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim() == 4:
            value.mul_(0.5)
    return model, cfg


def make_batch(cfg):
    """Images of one size and very different numbers of objects and of proposals."""
    batch = random_inputs(6, 0, 1, 3, size=(64, 96))
    for i, image in enumerate(batch):
        corner = torch.rand(5 + 12 * i, 2) * 40
        image["proposals"] = Instances((64, 96))
        image["proposals"].proposal_boxes = Boxes(torch.cat([corner, corner + 25], dim=1))
        image["proposals"].objectness_logits = torch.zeros(len(corner))
    return batch


def step(model, batch, num_parts):
    trainer = AccumulationTrainer(
        model, [copy.deepcopy(batch)], torch.optim.SGD(model.parameters(), lr=0.0)
    )
    trainer.num_parts = num_parts
    torch.manual_seed(1)
    with EventStorage() as storage:
        trainer.run_step()
        scalars = {name: value for name, (value, _) in storage.latest().items()}
        assert all(len(history.values()) == 1 for history in storage.histories().values())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, scalars


@pytest.mark.parametrize("path", [*(f"COCO-Detection/libra_{x}_FPN_1x" for x in SYSTEMS), CASCADE])
def test_gradients(path):
    """Those of one batch in 1, 2 and 4 parts; the parts differ in what their losses count."""
    model, cfg = build(path)
    batch = make_batch(cfg)
    expected, scalars = step(model, batch, 1)
    # What an ordinary step computes.
    model.zero_grad()
    torch.manual_seed(1)
    with EventStorage():
        sum(model(copy.deepcopy(batch)).values()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(expected[name], p.grad, rtol=1e-3, atol=1e-5)
    for num_parts in (2, 4):
        found, found_scalars = step(model, batch, num_parts)
        assert found.keys() == expected.keys()
        total = torch.sqrt(sum(x.square().sum() for x in expected.values()))
        difference = torch.sqrt(sum((found[n] - expected[n]).square().sum() for n in expected))
        # Rounding of float32 sums; a loss divided by its own part's number is off by tenths.
        assert difference < 1e-4 * total
        for name in ("total_loss", *(n for n in scalars if n.startswith("loss"))):
            assert found_scalars[name] == pytest.approx(scalars[name], rel=1e-4)


def test_parts_with_numbers_of_their_own_would_be_wrong():
    """The bound above tells means over parts from the mean over the batch."""
    model, cfg = build("COCO-Detection/libra_retinanet_R_50_FPN_1x")
    batch = make_batch(cfg)
    expected, _ = step(model, batch, 1)
    model.zero_grad()
    for i in (0, 2):
        with EventStorage():
            (sum(model(copy.deepcopy(batch[i : i + 2])).values()) / 2).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    total = torch.sqrt(sum(x.square().sum() for x in expected.values()))
    difference = torch.sqrt(sum((found[n] - expected[n]).square().sum() for n in expected))
    assert difference > 1e-2 * total


def test_batch_norm_counts_once():
    """The pass that counts does not change running statistics."""
    models = [build_model(demo_cfg()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batch = random_inputs(2, 3)
    step(models[0], batch, 2)
    for image in batch:
        with EventStorage():
            models[1](copy.deepcopy([image]))
    # What is behind the sampling depends on it.
    backbones = (model.backbone for model in models)
    for (name, a), (_, b) in zip(*(x.named_buffers() for x in backbones)):
        assert torch.equal(a, b), name


def test_normalizers():
    normalizers = Normalizers()
    for a, b in ((1.0, 10.0), (3.0, 30.0)):
        with normalizers.count():
            assert mean_over_batch(torch.tensor(a)) == a
            assert mean_over_batch(torch.tensor(b)) == b
    normalizers.finish()
    for _ in range(2):
        with normalizers.use():
            assert [mean_over_batch(torch.tensor(9.0)).item() for _ in range(2)] == [2.0, 20.0]
    assert mean_over_batch(torch.tensor(9.0)) == 9.0
