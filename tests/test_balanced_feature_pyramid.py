# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from libra_d2.errors import ArgumentError
from libra_d2.modeling import REFINEMENT_REGISTRY, BalancedFeaturePyramid, NonLocalBlock
from libra_d2.modeling.balanced_feature_pyramid import _gather_max, _max_along, max_in_windows

pytestmark = pytest.mark.rounding

needs_simulated_gpu = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="PyTorch 2.6 aborts without a GPU"
)
REFINE_TYPES = ("none", "conv", "non_local")

SIZES = {
    "regular": [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)],
    "odd": [(37, 51), (19, 26), (10, 13), (5, 7), (3, 4)],
    "tiny": [(3, 2), (2, 1), (1, 1), (1, 1), (1, 1)],
}


def pyramid(sizes, channels=8, batch=2):
    return [torch.randn(batch, channels, *size, requires_grad=True) for size in sizes]


def randomized(module):
    """Give all parameters random values; a fresh non-local block is the identity."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_initial_weights():
    """mmdetection's distributions: normal and zero in the block, Xavier uniform for "conv"."""
    bfp = BalancedFeaturePyramid(64, 5)
    block = bfp.refine
    assert isinstance(block, NonLocalBlock)
    assert bfp.refine_level == 2
    for layer in (block.theta, block.phi, block.g):
        # Of 4096 weights the standard deviation is known to 1.1%.
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    conv = REFINEMENT_REGISTRY.get("conv")(64)
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    biases = [x.bias for x in (block.theta, block.phi, block.g, block.conv_out, conv)]
    assert not any(x.any() for x in (*biases, block.conv_out.weight))


def test_levels_of_different_types():
    """None of them is rounded to the type of the level that is refined; inputs stay as they are."""
    bfp = BalancedFeaturePyramid(1, 3, refine_level=1, refine_type="none")
    types = (torch.float64, torch.float32, torch.bfloat16)
    features = [torch.full((1, 1, s, s), 3.0, dtype=t) for s, t in zip((4, 2, 1), types)]
    assert [x.dtype for x in bfp(features)] == [torch.float64, torch.float32, torch.float32]
    assert all((x == 3).all() for x in features)


@pytest.mark.parametrize("refine_type", ["none", "conv"])
def test_functorch(refine_type):
    """In its transforms, the memory format is unknown."""
    bfp = BalancedFeaturePyramid(4, 2, refine_level=1, refine_type=refine_type)
    features = [torch.randn(3, 1, 4, s, s) for s in (4, 2)]
    outputs = torch.func.vmap(lambda *x: tuple(bfp(x)))(*features)
    for i in range(3):
        for x, y in zip(outputs, bfp([x[i] for x in features])):
            torch.testing.assert_close(x[i], y)


@pytest.mark.parametrize("num_last", [0, 1, 2, 3])
def test_memory_format(num_last):
    """Each level keeps its own; NNPACK's convolutions change that of all but the largest."""
    bfp = randomized(BalancedFeaturePyramid(4, 3, refine_level=1))
    features = [torch.randn(1, 4, s, s) for s in (16, 8, 4)]
    expected = bfp(features)
    for i in range(num_last):
        features[i] = features[i].contiguous(memory_format=torch.channels_last)
    found = bfp(features)
    for i, (x, y) in enumerate(zip(found, expected)):
        torch.testing.assert_close(x, y)  # sums of the attention may have another order
        assert x.is_contiguous(memory_format=torch.channels_last) == (i < num_last)
        assert x.is_contiguous() == (i >= num_last)


@pytest.mark.parametrize("refine_type", REFINE_TYPES)
@pytest.mark.parametrize("refine_level", [0, 2, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_reference(mmdet, refine_type, refine_level, sizes):
    """Outputs and gradients for the same weights, in float64 for little rounding."""
    from mmdet.models.necks import BFP

    ours = randomized(
        BalancedFeaturePyramid(8, 5, refine_level=refine_level, refine_type=refine_type)
    )
    reference = BFP(
        in_channels=8,
        num_levels=5,
        refine_level=refine_level,
        refine_type=None if refine_type == "none" else refine_type,
    )
    state = ours.state_dict().items()
    state = {re.sub(r"(weight|bias)$", r"conv.\1", name): value for name, value in state}
    reference.load_state_dict(state, strict=True)
    ours, reference = ours.double(), reference.double()
    features = [x.detach().double().requires_grad_() for x in pyramid(sizes)]
    results = []
    for module in (ours, reference):
        outputs = module(features)
        parameters = [x for _, x in sorted(module.named_parameters())]
        weights = [torch.linspace(-1, 1, x.numel()).double().view_as(x) for x in outputs]
        loss = sum((x * w).sum() for x, w in zip(outputs, weights))
        results.append([*outputs, *torch.autograd.grad(loss, [*features, *parameters])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("refine_type", REFINE_TYPES)
@pytest.mark.parametrize("convert", ["script", "trace"])
def test_script_and_trace(refine_type, convert):
    """A converted module works for other sizes than the one it was traced with."""
    bfp = randomized(BalancedFeaturePyramid(8, 5, refine_type=refine_type)).eval()
    first, second = pyramid(SIZES["regular"]), pyramid(SIZES["odd"], batch=1)
    with torch.no_grad():
        converted = torch.jit.script(bfp) if convert == "script" else torch.jit.trace(bfp, (first,))
        for a, b in zip(converted(second), bfp(second)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"refine_level": 5}, "refine_level is 5: the pyramid has 5 levels, use .* 0 to 4"),
        ({"refine_level": -1}, "refine_level is -1: the pyramid has"),
        ({"refine_type": "gaussian"}, "refine_type is 'gaussian': use one of"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        BalancedFeaturePyramid(8, 5, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refine_type", REFINE_TYPES)
@pytest.mark.parametrize("magnitude", [1.0, 30.0, 20000.0])
def test_autocast(dtype, refine_type, magnitude):
    """
    Under autocast the result is that of float32 up to rounding of the outputs, even if the sum of
    the levels and the dot products of the attention exceed the largest float16.
    """
    bfp = BalancedFeaturePyramid(32, 4, refine_level=1, refine_type=refine_type)
    for parameter in bfp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = [
        (torch.randn(1, 32, 16 // 2**i, 24 // 2**i).clamp(-3, 3) * magnitude).to(dtype)
        for i in range(4)
    ]
    expected = bfp([x.float() for x in features])
    inputs = [x.requires_grad_() for x in features]
    with torch.autocast("cpu", dtype=dtype):
        outputs = bfp(inputs)
        if refine_type == "non_local":
            assert bfp.refine(inputs[0]).dtype == torch.float32
    for output, exact, feature in zip(outputs, expected, features):
        assert output.dtype == dtype
        # Neither the sum nor what is added may exceed the largest float16.
        added = exact - feature.float()
        representable = (exact.abs() < 60000) & (added.abs() < 60000)
        assert representable.double().mean() > 0.5
        error = (output.float() - exact).abs()[representable]
        assert error.max() < 1e-2 * exact[representable].abs().max()
    if magnitude < 100:
        sum(x.float().square().mean() for x in outputs).backward()
        assert all(torch.isfinite(x.grad).all() for x in (*inputs, *bfp.parameters()))


@needs_simulated_gpu
def test_autocast_of_gpus():
    """All levels keep their type. GPUs repeat values in another one, as do tensors without data."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            features = [x.half() for x in pyramid(SIZES["odd"])]
            outputs = BalancedFeaturePyramid(8, 5)(features)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, torch.half) for x in features]


@pytest.mark.parametrize("height", [1, 2, 5, 8, 13, 20])
def test_max_in_windows(height):
    """Value and gradient are those of adaptive max pooling, for any input and output size."""
    for size in range(1, 14):
        x = torch.randn(1, 2, height, size + 4, dtype=torch.float64, requires_grad=True)
        expected = F.adaptive_max_pool2d(x, (size, size))
        by_rows = _max_along(x, 2, size, 5)
        on_gpus = _gather_max(x, size, size)
        for found in (_max_along(by_rows, 3, size, 5), max_in_windows(x, size, size, 5), on_gpus):
            assert torch.equal(found, expected)
            weight = torch.randn_like(expected)
            a, b = (torch.autograd.grad(y, x, weight, retain_graph=True) for y in (found, expected))
            torch.testing.assert_close(a, b)


@needs_simulated_gpu
def test_max_in_windows_on_gpus():
    """Of windows that divide the input and of others, whose gradient is that of `gather`."""
    with FakeTensorMode():
        for size in ((7, 11), (14, 22)):
            x = torch.empty(2, 3, *size, device="cuda", requires_grad=True)
            assert max_in_windows(x, 7, 11, 2).shape == (2, 3, 7, 11)
            uneven = max_in_windows(x, 5, 9, 2)
            assert uneven.shape == (2, 3, 5, 9)
            assert uneven.grad_fn.next_functions[0][0].name() == "GatherBackward0"
            assert _max_along(x, 2, 5, 2).shape == (2, 3, 5, size[1])  # in traces


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_memory_of_training(format):
    """Pooled levels are not kept for the gradient, which is that of the pooling, as is its own."""
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64).contiguous(memory_format=format)
    weight, kept, results = torch.randn(2, 3, 2, 4, dtype=torch.float64), [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        pooled = max_in_windows(x.requires_grad_(), 2, 4, 2)
    assert [t.shape for t in kept] == [(2, 3, 2, 4)]
    for y in (pooled, F.max_pool2d(x, (4, 3))):
        (grad,) = torch.autograd.grad((y**3 * weight).sum(), x, create_graph=True)
        assert grad.is_contiguous(memory_format=format)
        results.append((y, grad, *torch.autograd.grad(grad.sin().sum(), x)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(lambda t: max_in_windows(t, 2, 4, 2), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        found = forward_ad.unpack_dual(max_in_windows(dual, 2, 4, 2)).tangent
    assert torch.equal(found, tangent)
    assert (tangent == 1).all()
