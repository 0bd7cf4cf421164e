# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from detectron2.layers import Conv2d, FrozenBatchNorm2d

from libra_d2.modeling import AffineBatchNorm2d
from libra_d2.modeling.folded_conv import FoldedConv2d

pytestmark = pytest.mark.rounding


def make_conv(norm, **kwargs):
    """With random statistics, scale and shift."""
    conv = Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=2, norm=norm, **kwargs).double()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return conv


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, AffineBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False, "activation": nn.ReLU(), "dilation": 2}])
def test_values_and_gradients(norm, kwargs, monkeypatch):
    """Those of convolution and norm, without calling the norm."""
    plain = make_conv(norm(6, eps=0.1), **kwargs).eval()
    folded = copy.deepcopy(plain)
    FoldedConv2d.replace_in(folded)
    assert list(folded.state_dict()) == list(plain.state_dict())
    results = []
    inputs = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for conv in (plain, folded):
        x = inputs.clone().requires_grad_()
        out = conv(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in conv.parameters())])
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    monkeypatch.setattr(norm, "__call__", None)
    folded(inputs)


class Activated(nn.BatchNorm2d):
    """Does something else, in evaluation mode, too."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "norm",
    [
        *(nn.BatchNorm2d(6), nn.GroupNorm(2, 6), Activated(6).eval()),
        nn.BatchNorm2d(6, affine=False).eval(),
        nn.BatchNorm2d(6, track_running_stats=False).eval(),
    ],
)
def test_norms_that_are_called(norm):
    """Those that compute statistics, have no weights, or are of other classes."""
    plain = make_conv(norm)
    folded = copy.deepcopy(plain)
    FoldedConv2d.replace_in(folded)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    assert torch.equal(folded(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(folded.state_dict()[name], value), name


CHANGES = {
    "weight": lambda conv: conv.weight.mul_(2),
    "bias": lambda conv: conv.bias.add_(1),
    "statistics": lambda conv: conv.norm.running_mean.add_(1),
    "state": lambda conv: conv.load_state_dict({k: v + 1 for k, v in conv.state_dict().items()}),
    "other norm": lambda conv: setattr(conv, "norm", nn.BatchNorm2d(6).double().eval()),
    "other weight": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight + 1)),
    "data, evaluated anew": lambda conv: (conv.weight.data.add_(1), conv.eval()),
    "precision": lambda conv: conv.float().double(),
    "format": lambda conv: conv.to(memory_format=torch.channels_last),
    "in inference mode": torch.inference_mode()(
        lambda conv: setattr(conv, "norm", FrozenBatchNorm2d(6).double())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_may_change(change):
    """What is kept from one inference for the next follows any change."""
    plain = make_conv(FrozenBatchNorm2d(6)).eval()
    folded = copy.deepcopy(plain)
    FoldedConv2d.replace_in(folded)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = folded(x)
        assert folded(x).equal(before)
        for conv in (plain, folded):
            CHANGES[change](conv)
        after = folded(x)
        torch.testing.assert_close(after, plain(x), rtol=1e-12, atol=1e-12)
        assert after.stride() == plain(x).stride()
    assert not after.equal(before) or after.stride() != before.stride()


def test_folded_once(monkeypatch):
    """Without gradients; with frozen weights in training, too. Copies and pickles leave it out."""
    conv = make_conv(FrozenBatchNorm2d(6))
    conv.bias.requires_grad_(False)  # it is part of the norm's shift
    FoldedConv2d.replace_in(conv)
    x = torch.randn(1, 4, 10, 10, dtype=torch.float64)
    calls = []

    def record(name, function):
        monkeypatch.setattr(
            FoldedConv2d, name, lambda *args: (calls.append(name), function(*args))[1]
        )

    for name in ("_fold", "_fold_norm", "_fold_statistics"):
        record(name, getattr(FoldedConv2d, name))
    with torch.inference_mode():
        conv(x), conv(x)
    assert calls == ["_fold", "_fold_norm", "_fold_statistics"]
    assert "_kept" not in pickle.loads(pickle.dumps(conv)).__dict__
    conv(x).sum().backward()  # nothing that was made in inference mode
    conv(x).sum().backward()
    assert len(calls) == 3
    assert conv.requires_grad_(False).train().training
    conv(x), conv(x)
    assert calls[3:] == ["_fold", "_fold_norm", "_fold_statistics"]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks(kind):
    """A norm is called as long as it is listened to."""
    conv, seen = make_conv(FrozenBatchNorm2d(6)), []
    FoldedConv2d.replace_in(conv)
    handle = getattr(conv.norm, f"register_{kind}_hook")(lambda *args: seen.append(1))
    x = torch.randn(1, 4, 10, 10, dtype=torch.float64)
    conv(x).sum().backward()
    handle.remove()
    conv(x).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize(
    ("size", "folds"), [((1, 6, 6), False), ((1, 4, 10), True), ((2, 4, 5), True)]
)
def test_few_features(size, folds, monkeypatch):
    """
    Of 18 weights for each channel, with 18, 20 and 20 pixels of the result: they are not folded
    where they are learned and not less than the pixels.
    """
    num, height, width = size
    conv, calls = make_conv(FrozenBatchNorm2d(6)), []
    FoldedConv2d.replace_in(conv)
    call = nn.Module.__call__
    monkeypatch.setattr(
        FrozenBatchNorm2d, "__call__", lambda *args: (calls.append(1), call(*args))[1]
    )
    x = torch.randn(num, 4, height, width, dtype=torch.float64)
    learned = conv(x)
    assert len(calls) == (not folds)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), learned, rtol=1e-12, atol=1e-12)
    conv.weight.requires_grad_(False)
    conv(x)
    assert len(calls) == (not folds)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, AffineBatchNorm2d])
def test_memory_of_training(norm):
    """What is kept for the gradients is what was there, and the scale of each channel."""
    conv = make_conv(norm(6))
    FoldedConv2d.replace_in(conv)
    x, kept = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        conv(x).sum().backward()
    known = {t.data_ptr() for t in (x, *conv.parameters(), *conv.buffers())}
    assert {t.shape for t in kept if t.data_ptr() not in known} <= {(6,), (6, 1, 1, 1)}
    assert {t.shape for t in kept} >= {x.shape, conv.weight.shape}


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, AffineBatchNorm2d])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_of_gradients(norm, needs_x):
    """Those of convolution and norm, with and without a gradient of the features."""
    plain, results = make_conv(norm(6)), []
    folded = copy.deepcopy(plain)
    FoldedConv2d.replace_in(folded)
    inputs = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for conv in (plain, folded):
        x = inputs.clone().requires_grad_(needs_x)
        inner = [x] * needs_x + [*conv.parameters()]
        first = torch.autograd.grad(conv(x).square().sum(), inner, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), inner)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["weight", "norm.weight"])
def test_forward_mode(name):
    """Derivatives with respect to what is folded."""
    plain, tangents = make_conv(AffineBatchNorm2d(6)), []
    folded = copy.deepcopy(plain)
    FoldedConv2d.replace_in(folded)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for conv in (plain, folded):
        *path, last = name.split(".")
        module, value = conv.get_submodule(".".join(path)), conv.get_parameter(name).detach()
        del module._parameters[last]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value.requires_grad_(), torch.ones_like(value))
            setattr(module, last, dual)
            tangents.append(forward_ad.unpack_dual(conv(x)).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-11, atol=1e-11)


def test_padding_by_name():
    plain = Conv2d(4, 6, 3, norm=FrozenBatchNorm2d(6), padding="same").double()
    folded = copy.deepcopy(plain)
    FoldedConv2d.replace_in(folded)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for conv in (plain, folded):
        conv(x).square().sum().backward()
    torch.testing.assert_close(folded.weight.grad, plain.weight.grad, rtol=1e-11, atol=1e-11)


def test_script():
    """Scripts have the parts of the parent."""
    conv = make_conv(FrozenBatchNorm2d(6))
    FoldedConv2d.replace_in(conv)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    scripted = torch.jit.script(conv)
    torch.testing.assert_close(scripted(x), conv(x), rtol=1e-12, atol=1e-12)
    assert "batch_norm" in str(scripted.inlined_graph)
    assert type(conv) is FoldedConv2d


@pytest.mark.parametrize("has_run", [True, False])
def test_trace(has_run):
    """With the check of traces; weights can be exchanged afterwards, or the norm removed."""
    conv, other = (make_conv(FrozenBatchNorm2d(6)).eval() for _ in range(2))
    FoldedConv2d.replace_in(conv)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        if has_run:
            conv(x)
        traced = torch.jit.trace(conv, x)
        torch.testing.assert_close(traced(x), conv(x))
        traced.load_state_dict(other.state_dict())
        torch.testing.assert_close(traced(x), other(x))
    conv.norm = other.norm = None
    torch.testing.assert_close(conv(x), other(x))


def test_what_is_folded():
    """Detectron2's own convolutions with a norm; others may do something else."""

    class Other(Conv2d):
        pass

    module = nn.ModuleList([Conv2d(1, 1, 1, norm=nn.BatchNorm2d(1)), Conv2d(1, 1, 1)])
    module.append(Other(1, 1, 1, norm=nn.BatchNorm2d(1)))
    module.append(nn.Conv2d(1, 1, 1))
    module.append(Conv2d(1, 1, 1, norm=nn.BatchNorm2d(1), padding_mode="reflect"))
    FoldedConv2d.replace_in(module)
    assert [type(x) for x in module] == [FoldedConv2d, Conv2d, Other, nn.Conv2d, Conv2d]
