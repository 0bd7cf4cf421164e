# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
from functools import partial

import pytest
import torch
from conftest import calibrate_norms
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock

from libra_d2.modeling.folded_conv import FoldedConv2d
from libra_d2.modeling.fused_bottleneck import FusedBottleneck, FusedStage, _has_onednn

pytestmark = [
    pytest.mark.rounding,
    pytest.mark.skipif(not _has_onednn(), reason="nothing is fused on this processor"),
]


def make_stage(num_blocks=3, stride=2, groups=1, norm="FrozenBN"):
    """As it was, and fused; and features."""
    torch.manual_seed(0)
    channels = {"bottleneck_channels": 8, "out_channels": 24, "num_groups": groups, "norm": norm}
    blocks = [
        BottleneckBlock(in_channels=24 if i else 16, stride=1 if i else stride, **channels)
        for i in range(num_blocks)
    ]
    plain = nn.Sequential(*blocks).eval()
    x = torch.randn(2, 16, 22, 27).contiguous(memory_format=torch.channels_last)
    calibrate_norms(plain, x)
    return plain, fuse(plain), x


def fuse(module):
    fused = copy.deepcopy(module)
    for kind in (FoldedConv2d, FusedBottleneck, FusedStage):
        kind.replace_in(fused)
    return fused


@pytest.fixture
def parents(monkeypatch):
    """The blocks that compute what Detectron2's do."""
    blocks, forward = [], BottleneckBlock.forward

    def note_and_compute(self, x):
        blocks.append(self)
        return forward(self, x)

    monkeypatch.setattr(BottleneckBlock, "forward", note_and_compute)
    return blocks


def assert_equal(found, expected):
    """Up to the rounding errors of sums of 24 numbers, ten times over."""
    atol = 1e-5 * expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "kwargs", [{}, {"stride": 1}, {"groups": 4}, {"num_blocks": 1}, {"norm": "BN"}]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values(kwargs, mode, parents):
    """Of a stage, whose input stays; the names of the weights stay, too."""
    plain, fused, x = make_stage(**kwargs)
    assert [type(module) for module in (fused, fused[0])] == [FusedStage, FusedBottleneck]
    assert list(fused.state_dict()) == list(plain.state_dict())
    before = x.clone()
    with mode():
        expected = plain(x)
        parents.clear()
        found = fused(x)
    assert not parents
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_equal(found, expected)
    assert x.equal(before)
    with mode():
        assert fused(x[:0]).shape == (0, *found.shape[1:])


def test_one_block():
    """Its input stays, also without a convolution in the shortcut, unless it may be overwritten."""
    plain, fused, x = make_stage()
    with torch.no_grad():
        x = plain[0](x)
        before, expected = x.clone(), plain[1](x)
        assert_equal(fused[1](x), expected)
        assert x.equal(before)
        found = fused[1](x, overwrite=True)
    assert_equal(found, expected)
    assert found.data_ptr() == x.data_ptr()
    before, rest = x.clone(), fused[1:]
    assert type(rest) is FusedStage
    with torch.no_grad():
        assert_equal(rest(x), plain[1:](before))
    assert x.equal(before)


@pytest.mark.parametrize("place", ["block", "next block", "block's convolution", "everywhere"])
def test_what_hooks_keep(place):
    """The features that somebody looks at stay as they are."""
    plain, fused, x = make_stage()
    kept = []
    for stage in (plain, fused):
        hooks = {
            "block": lambda: stage[1].register_forward_hook(lambda m, args, out: kept.append(out)),  # noqa: B023
            "next block": lambda: stage[2].register_forward_pre_hook(  # noqa: B023
                lambda m, args: kept.append(args[0])
            ),
            "block's convolution": lambda: stage[1].conv3.register_forward_hook(  # noqa: B023
                lambda m, args, out: kept.append(out)
            ),
            "everywhere": lambda: register_module_forward_hook(
                lambda m, args, out: kept.append(out) if m is stage[1] else None  # noqa: B023
            ),
        }
        hook = hooks[place]()
        with torch.no_grad():
            kept.append(stage(x))
        hook.remove()
    assert_equal(kept[2], kept[0])
    assert_equal(kept[3], kept[1])


ORDINARY = {
    "channels first": lambda stage, x: x.contiguous(),
    "float64": lambda stage, x: stage.double() and x.double(),
    "gradient of the input": lambda stage, x: x.requires_grad_(),
    "gradient of weights": lambda stage, x: stage.requires_grad_() and x,
    "hook": lambda stage, x: stage[0].conv3.register_forward_hook(lambda *args: None) and x,
    "activation": lambda stage, x: setattr(stage[0].conv3, "activation", nn.ReLU()) or x,
    "no norm": lambda stage, x: setattr(stage[0].conv3, "norm", None) or x,
    "statistics of the batch": lambda stage, x: stage.train() and x,
    "other convolution": lambda stage, x: (
        setattr(stage[0], "shortcut", Conv2d(16, 24, 1, 2).requires_grad_(False)) or x
    ),
}


@pytest.mark.parametrize("change", ORDINARY)
def test_parent(change, parents):
    """What the fused block cannot do, the parent does."""
    plain, _, x = make_stage(1, norm="BN" if "batch" in change else "FrozenBN")
    plain.requires_grad_(False)
    torch.manual_seed(0)
    x = ORDINARY[change](plain, x)
    expected, fused = plain(x), fuse(plain)
    parents.clear()
    assert_equal(fused(x), expected)
    assert parents == [fused[0]]


def test_tangents(parents):
    """In forward mode, too, gradients are computed."""
    plain, fused, x = make_stage(1)
    fused.requires_grad_(False)
    with forward_ad.dual_level():
        expected = forward_ad.unpack_dual(plain(forward_ad.make_dual(x, x))).tangent
        found = forward_ad.unpack_dual(fused(forward_ad.make_dual(x, x))).tangent
    assert_equal(found, expected)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        parents.clear()
        fused(x)
    assert parents == [fused[0]]


@pytest.mark.parametrize("is_first", [True, False])
def test_not_a_number(is_first):
    """Models that overflow, or whose statistics are broken, are noticed by their predictions."""
    _, fused, x = make_stage()
    fused[0 if is_first else 2].conv2.norm.running_var[3] = -5.0
    with torch.no_grad():
        assert fused(x).isnan().any()
        assert fused[0](torch.full_like(x, torch.nan)).isnan().all()


def test_other_blocks():
    """Blocks that are put in later get no arguments that they do not know."""
    _, fused, x = make_stage()
    fused.eval().requires_grad_(False)
    expected = fused[2](fused[0](x))
    fused[1] = nn.Identity()
    assert_equal(fused(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant):
    """A block that is computed again gets the features that it got before."""
    plain, fused, x = make_stage(stride=1)
    gradients = []
    for stage in (plain, fused):
        for block in stage:
            block.forward = partial(checkpoint, block.forward, use_reentrant=use_reentrant)
        image = x.clone().requires_grad_()
        stage.train()(image).square().sum().backward()
        gradients.append([image.grad, *(p.grad for p in stage.parameters())])
    for found, expected in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )


@pytest.mark.parametrize("has_bfloat16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype, has_bfloat16, parents, monkeypatch):
    """In bfloat16 where the processor has it; the input stays."""
    if has_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no instructions for bfloat16")
    is_supported = lambda: has_bfloat16  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", is_supported)
    plain, fused, x = make_stage()
    before = x.clone()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = plain(x)
        parents.clear()
        found = fused(x)
        assert fused[1](found.float()).dtype == dtype  # whose shortcut has no convolution
        del parents[len(fused) :]
    is_fused = has_bfloat16 and dtype == torch.bfloat16
    assert parents == ([] if is_fused else [*fused])
    assert found.dtype == expected.dtype == dtype
    # Eight bits of each number are kept, in each of nine convolutions.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert x.equal(before)


def test_frozen_in_training(parents):
    """Stages that are not trained are fused, although gradients are computed of others."""
    plain, fused, x = make_stage()
    expected = plain(x)
    parents.clear()
    assert_equal(fused.requires_grad_(False).train()(x), expected)
    assert not parents


def test_other_modules():
    """Only bottlenecks of Detectron2's class, and sequences of nothing else."""

    class Own(BottleneckBlock):
        pass

    own = Own(8, 8, bottleneck_channels=8)
    stage = nn.Sequential(BottleneckBlock(8, 8, bottleneck_channels=8), own)
    fused = fuse(stage)
    assert [type(x) for x in (fused, *fused)] == [nn.Sequential, FusedBottleneck, Own]
    assert type(fuse(nn.Sequential())) is nn.Sequential


def test_recorded():
    """Traces and scripts have the parent's operations; copies and pickles work."""
    plain, fused, x = make_stage()
    types = [type(module) for module in fused.modules()]
    with torch.no_grad():
        expected = plain(x)
        traced = torch.jit.trace(fused, x)
        assert "mkldnn" not in str(traced.inlined_graph)
        assert torch.jit.script(fused.train()).code
        assert [type(module) for module in fused.modules()] == types
        for found in (traced, pickle.loads(pickle.dumps(fused.eval())), copy.deepcopy(fused)):
            assert_equal(found(x), expected)
