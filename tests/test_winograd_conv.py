# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as of_all_modules
from torch.utils.flop_counter import FlopCounterMode

from detectron2.layers import Conv2d, FrozenBatchNorm2d

from libra_d2.modeling import winograd_conv
from libra_d2.modeling.folded_conv import FoldedConv2d
from libra_d2.modeling.replacement import has_hooks
from libra_d2.modeling.winograd_conv import WinogradConv2d
from libra_d2.modeling.winograd_gradient import weight_gradient

pytestmark = pytest.mark.rounding


@pytest.fixture
def calls(monkeypatch):
    """Shapes of what NNPACK convolves, on CPUs with AVX-512, too."""
    if not torch._nnpack_available():
        pytest.skip("PyTorch has no NNPACK for this machine")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    winograd_conv.is_available.cache_clear()
    shapes, convolve = [], torch._nnpack_spatial_convolution

    def convolve_and_note(x, *args):
        shapes.append(tuple(x.shape))
        return convolve(x, *args)

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", convolve_and_note)
    yield shapes
    winograd_conv.is_available.cache_clear()


def make_conv(in_channels=128, out_channels=144, kind=Conv2d, **kwargs):
    torch.manual_seed(0)
    conv = kind(in_channels, out_channels, 3, **{"padding": 1, **kwargs})
    WinogradConv2d.replace_in(conv)
    return conv


@pytest.fixture
def gradients(monkeypatch):
    """Shapes of what weights' gradients are made of by Winograd's algorithm."""
    shapes = []

    def note_and_compute(x, grad):
        shapes.append((tuple(x.shape), tuple(grad.shape)))
        return weight_gradient(x, grad)

    monkeypatch.setattr(winograd_conv, "weight_gradient", note_and_compute)
    return shapes


def outputs(conv, x):
    """The result and all gradients."""
    x = x.clone().requires_grad_()
    y = conv(x)
    gradient = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad for p in conv.parameters())]


@pytest.mark.parametrize("shape", [(1, 128, 50, 45), (3, 128, 31, 27)], ids=str)
@pytest.mark.parametrize(
    ("kind", "kwargs"), [(nn.Conv2d, {}), (Conv2d, {"bias": False, "activation": nn.ReLU()})]
)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(shape, kind, kwargs, format, calls, gradients):
    """Those of the convolution in float64."""
    conv = make_conv(kind=kind, **kwargs)
    x = torch.randn(shape).contiguous(memory_format=format)
    results = outputs(conv, x)
    assert calls == [shape, (shape[0], 144, *shape[2:])]  # the second is a gradient
    assert gradients == [tuple(calls)]
    expected = outputs(make_conv(kind=kind, **kwargs).double(), x.double())
    assert len(calls) == 2
    for found, value in zip(results, expected):
        # NNPACK's errors are about 1e-5 of the largest value.
        bound = 1e-4 * value.abs().max().item()
        torch.testing.assert_close(found.double(), value, rtol=0, atol=bound)


LAST = torch.channels_last


def frozen(channels):
    norm = FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 2), norm.bias.normal_(), norm.running_mean.normal_()
    return norm


@pytest.mark.parametrize(
    ("channels", "make_norm", "is_folded"),
    [
        *((128, norm, x) for norm in (frozen, lambda n: nn.GroupNorm(2, n)) for x in (True, False)),
        (64, lambda n: None, False),
    ],
)
@pytest.mark.parametrize("format", [torch.contiguous_format, LAST])
def test_gradient_of_weights(channels, make_norm, is_folded, format, calls, gradients):
    """With a norm or few channels, only that of the weights uses Winograd's algorithm."""
    results = []
    x = torch.randn(1, channels, 66, 64).contiguous(memory_format=format)
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        norm = make_norm(channels)
        conv = Conv2d(channels, channels, 3, padding=1, norm=norm, activation=nn.Tanh())
        if is_folded:
            FoldedConv2d.replace_in(conv)
        WinogradConv2d.replace_in(conv)
        assert isinstance(conv, FoldedConv2d) == (is_folded and norm is not None)
        results.append(outputs(conv.to(dtype), x.to(dtype)))
    assert (calls, gradients) == ([], [(x.shape, x.shape)])
    for found, value in zip(*results):
        bound = 1e-4 * value.abs().max().item()
        torch.testing.assert_close(found.double(), value, rtol=0, atol=bound)
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(copied) is type(conv)
        assert torch.equal(copied(x.double()), conv(x.double()))
    scripted = torch.jit.script(conv.eval())
    torch.testing.assert_close(scripted(x.double()), results[1][0], rtol=0, atol=1e-12)
    for is_trained in (True, False):
        conv.float().requires_grad_(is_trained)(x.requires_grad_()).sum().backward()
    assert len(gradients) == 2  # not of frozen weights, whose convolution is the parent's
    (grad,) = torch.autograd.grad(conv(x).sum(), x, create_graph=True)
    grad.sum().backward()


@pytest.mark.parametrize(
    ("format", "max_pixels", "rows"),
    [
        *((LAST, 2160, [49, 3]), (LAST, 225, [7, *[8] * 7, 3]), (LAST, 2250, [50])),
        (torch.contiguous_format, 540, [50]),
    ],
)
def test_strips(format, max_pixels, rows, calls, monkeypatch):
    """Large images in strips of multiples of 6 rows, and one more at each seam: the same values."""
    conv = make_conv()
    x = torch.randn(2, 128, 50, 45).contiguous(memory_format=format)
    expected = outputs(make_conv().double(), x.double())
    monkeypatch.setattr(winograd_conv, "_MAX_PIXELS_OF_STRIP", max_pixels)
    results = outputs(conv, x)
    assert calls[: 2 * len(rows)] == 2 * [(1, 128, n, 45) for n in rows]
    assert calls[2 * len(rows) :] == 2 * [(1, 144, 50, 45)]  # the gradient has channels first
    assert results[0].is_contiguous(memory_format=LAST) == (len(rows) > 1)
    for found, value in zip(results, expected):
        bound = 1e-4 * value.abs().max().item()
        torch.testing.assert_close(found.double(), value, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(((1, 32, 64), [1]), ((2, 32, 64), [1, 1]), ((2, 45, 45), [2])),
        *(((66, 32, 32), [64, 2]), ((1, 100, 200), [1])),
    ],
)
def test_batches(size, expected, calls):
    """Large images are convolved one by one, RoIs in batches that are not too large."""
    conv = make_conv(128, 128).requires_grad_(False)
    x = torch.randn(size[0], 128, *size[1:]).contiguous(memory_format=LAST)
    y = conv(x)
    assert calls == [(number, *x.shape[1:]) for number in expected]
    value = conv.double()(x[-1:].double())
    torch.testing.assert_close(y[-1:].double(), value, rtol=0, atol=1e-4 * value.abs().max().item())


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_has_hooks(kind, of_all):
    """Hooks of this module or of all."""
    linear = nn.Linear(1, 1)
    owner, prefix = (of_all_modules, "register_module_") if of_all else (linear, "register_")
    assert not has_hooks(linear)
    with getattr(owner, f"{prefix}{kind}_hook")(lambda *args: None):
        assert has_hooks(linear)
    assert not has_hooks(linear)


@pytest.mark.parametrize("hook", [None, "forward", "forward_pre"])
@pytest.mark.parametrize("norm", [None, nn.Identity()])
def test_activation_in_place(norm, hook, calls, monkeypatch):
    """Unless somebody may have seen what it is applied to."""
    conv = make_conv(activation=nn.ReLU(), norm=norm)
    results, seen = [], []
    apply = winograd_conv._WinogradFunction.apply
    monkeypatch.setattr(
        winograd_conv._WinogradFunction,
        "apply",
        lambda *args: results.append(apply(*args)) or results[-1],
    )
    if hook is not None:
        hook = getattr(conv.activation, f"register_{hook}_hook")
        hook(lambda module, args, *output: seen.append(args[0].clone()))
    x = torch.randn(1, 128, 50, 45)
    y = conv(x)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(y, expected.relu(), rtol=0, atol=1e-4)
    assert calls or norm is not None
    assert all(torch.equal(x, results[0]) and (x < 0).any() for x in seen)
    assert len(seen) == (hook is not None)
    is_in_place = y.data_ptr() == results[0].data_ptr()
    assert is_in_place == (norm is None and hook is None)


def test_few_pixels(calls, gradients):
    """With many channels, transforms of the weights take longer than they save."""
    for pixels, expected in ((16 * 16, 0), (16 * 32, 1)):
        make_conv(1024, 128)(torch.zeros(1, 1024, 16, pixels // 16)).sum().backward()
        assert len(calls) == len(gradients) == expected


def test_gradients(calls):
    """Nothing is computed that needs none; a second one is refused, rather than wrong."""
    conv = make_conv().requires_grad_(False)
    x = torch.randn(1, 128, 50, 45, requires_grad=True)
    (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert conv.weight.grad is None
    conv.requires_grad_()
    conv(x.detach()).sum().backward()
    assert len(calls) == 3
    assert conv.weight.grad is not None
    assert conv.bias.grad is not None


def make_folded_conv():
    conv = Conv2d(128, 144, 3, padding=1, norm=frozen(144))
    FoldedConv2d.replace_in(conv)
    WinogradConv2d.replace_in(conv)
    return conv


@pytest.mark.parametrize("make", [make_conv, make_folded_conv])
def test_autocast_around_backward(make, calls, gradients):
    """What was computed in float32 has gradients of float32."""
    conv, x = make(), LARGE.clone().requires_grad_()
    tensors = [x, *conv.parameters()]
    expected = torch.autograd.grad(conv(x).sum(), tensors)
    loss = conv(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, tensors)
    assert all(map(torch.equal, found, expected))
    assert len(gradients) == 2


def test_gradients_of_gradients(calls, gradients):
    """Folded convolutions have them."""
    conv, second = make_folded_conv(), []
    for module in (conv, copy.deepcopy(conv).double()):
        x = LARGE.to(module.weight.dtype, copy=True).requires_grad_()
        first = torch.autograd.grad(module(x).square().mean(), module.weight, create_graph=True)
        second.append(torch.autograd.grad(first[0].square().sum(), (x, module.weight)))
    assert len(gradients) == 2  # the second one on the way of the second derivative
    for found, expected in zip(*second):
        bound = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


SMALL, LARGE = (
    torch.linspace(-1, 1, 128 * h * w).sin().view(1, 128, h, w) for h, w in ((23, 89), (40, 52))
)


@pytest.mark.parametrize(
    "other",
    [
        *({"in_channels": 63}, {"out_channels": 63}, {"stride": 2}, {"padding": 0}),
        *({"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}),
    ],
    ids=str,
)
def test_other_convolutions(other):
    assert type(make_conv(**other)) is Conv2d
    assert type(make_conv()) is type(make_conv(kind=nn.Conv2d)) is WinogradConv2d
    assert list(make_conv(kind=nn.Conv2d).state_dict()) == ["weight", "bias"]
    conv = nn.Conv2d(128, 128, 1)
    WinogradConv2d.replace_in(conv)
    assert type(conv) is nn.Conv2d


def test_other_inputs(calls, monkeypatch):
    """Few pixels, none, another type, mixed precision, exports: the parent's numbers."""
    conv = make_conv()
    plain = copy.deepcopy(conv)
    plain.__class__ = Conv2d
    for x in (SMALL, LARGE[:0], LARGE.double()):
        assert torch.equal(conv.to(x.dtype)(x), plain.to(x.dtype)(x))
    conv.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(LARGE).dtype == torch.bfloat16
    traced = torch.jit.trace(conv, LARGE, check_trace=False)
    assert "nnpack" not in str(traced.inlined_graph)
    scripted = torch.jit.script(conv)
    assert torch.equal(scripted(LARGE), traced(LARGE))
    torch._dynamo.reset()
    torch.compile(conv, backend="eager", fullgraph=True)(LARGE)
    assert not calls
    conv(LARGE)
    assert len(calls) == 1
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    winograd_conv.is_available.cache_clear()
    assert torch.equal(conv(LARGE), plain.float()(LARGE))
    assert len(calls) == 1


ZEN4 = {"sse4a": True, "avx512_vp2intersect": False}


@pytest.mark.parametrize(
    ("capability", "has", "gains"),
    [
        ("AVX2", {"sse4a": False, "avx512_vp2intersect": False}, True),
        ("AVX512", ZEN4, True),
        ("AVX512", {**ZEN4, "sse4a": False}, False),  # Intel
        ("AVX512", {**ZEN4, "avx512_vp2intersect": True}, False),  # Zen 5
        ("AVX512", {}, False),
        ("AVX512", None, False),
        ("DEFAULT", ZEN4, False),
    ],
)
def test_processors(capability, has, gains, calls, monkeypatch):
    """NNPACK gains where oneDNN has no instructions of 512 bits that are twice as fast."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    if has is None:  # older versions of PyTorch
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    winograd_conv.is_available.cache_clear()
    assert winograd_conv.is_available() == gains


@pytest.mark.parametrize(
    "change", [{"stride": (2, 2)}, {"padding": (0, 0)}, {"norm": FrozenBatchNorm2d(144)}], ids=str
)
def test_changed_convolution(change, calls):
    """What is changed later counts, whatever the size of the image."""
    conv = make_conv()
    for name, value in change.items():
        setattr(conv, name, value)
    plain = copy.deepcopy(conv)
    plain.__class__ = Conv2d
    assert torch.equal(conv(LARGE), plain(LARGE))
    assert not calls


def test_transforms(calls):
    """Those of functorch, dispatch modes and fake tensors see an ordinary convolution."""
    conv = make_conv().requires_grad_(False)
    torch.func.grad(lambda x: conv(x).sum())(LARGE)
    with FlopCounterMode(display=False) as counter:
        conv(LARGE)
    assert counter.get_total_flops() == 2 * 9 * 128 * 144 * 2080
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert conv(mode.from_tensor(LARGE)).shape == (1, 144, 40, 52)
    assert conv(LARGE[0]).shape == (144, 40, 52)
    elsewhere = copy.deepcopy(conv).to("meta")
    assert elsewhere(LARGE.to("meta")).shape == (1, 144, 40, 52)
    assert not calls
