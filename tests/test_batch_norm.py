# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import ROOT, calibrate_norms, load_cfg
from torch import nn

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.solver import build_optimizer

from libra_d2.errors import ArgumentError
from libra_d2.modeling import AffineBatchNorm2d, train_norm_affine

pytestmark = pytest.mark.rounding

CONFIG = ROOT / "configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml"


def build(*overrides):
    cfg = load_cfg(CONFIG)
    small = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    cfg.merge_from_list([*small, *overrides])
    return cfg, build_backbone(cfg)


def test_is_batch_norm_with_fixed_statistics():
    """Output and gradients are those of torch's batch norm in eval mode, in training mode too."""
    frozen = FrozenBatchNorm2d(8, eps=0.1)
    frozen.load_state_dict({k: torch.rand(8) + 0.5 for k in frozen.state_dict()})
    assert not AffineBatchNorm2d.from_frozen(frozen.eval()).training
    affine, expected = AffineBatchNorm2d.from_frozen(frozen), nn.BatchNorm2d(8, eps=0.1)
    assert AffineBatchNorm2d(8).eps == FrozenBatchNorm2d(8).eps
    expected.load_state_dict(frozen.state_dict(), strict=False)
    affine.train(), expected.eval()
    x = torch.randn(2, 8, 5, 4)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    (affine(a) * x).sum().backward()
    (expected(b) * x).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(affine.weight.grad, expected.weight.grad)
    torch.testing.assert_close(affine.bias.grad, expected.bias.grad)
    torch.testing.assert_close(affine(x), frozen(x))
    assert torch.equal(affine.running_mean, frozen.running_mean)
    assert affine.state_dict().keys() == frozen.state_dict().keys()
    assert AffineBatchNorm2d.from_frozen(frozen.to("meta")).bias.is_meta  # on its device


def test_trained_stages_only():
    """Stem and res2 stay frozen; a training step changes scale and shift, not the statistics."""
    cfg, backbone = build()
    calibrate_norms(backbone, torch.rand(1, 3, 64, 64))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = build_optimizer(cfg, backbone)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    sum(x.square().mean() for x in backbone(torch.rand(1, 3, 64, 64)).values()).backward()
    optimizer.step()
    norms = {key: value for key, value in backbone.state_dict().items() if ".norm." in key}
    for key, value in norms.items():
        changes = key.split(".")[1] in ("res3", "res4", "res5") and "running" not in key
        assert torch.equal(value, before[key]) != changes, key
    assert len(norms) == 20 * 4


def test_nothing_to_train():
    for overrides in (("MODEL.RESNETS.NORM", "BN"), ("MODEL.BACKBONE.FREEZE_AT", 5)):
        with pytest.raises(ArgumentError, match="module is 'FPN': it has no FrozenBatchNorm2d"):
            build(*overrides)
    _, backbone = build()
    with pytest.raises(ArgumentError, match="it has no FrozenBatchNorm2d"):
        train_norm_affine(backbone)  # a second time
    with pytest.raises(ArgumentError, match="it has no FrozenBatchNorm2d"):  # of a convolution
        train_norm_affine(nn.Sequential(nn.Conv2d(2, 2, 1), FrozenBatchNorm2d(2)))
    conv = Conv2d(2, 2, 1, norm=FrozenBatchNorm2d(2))
    assert train_norm_affine(conv) is conv
