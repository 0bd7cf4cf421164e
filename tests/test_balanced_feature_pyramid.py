# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from libra_d2.errors import ArgumentError
from libra_d2.modeling import REFINEMENT_REGISTRY, BalancedFeaturePyramid, NonLocalBlock
from libra_d2.modeling.balanced_feature_pyramid import _max_along, max_in_windows

REFINE_TYPES = ("none", "conv", "non_local")

SIZES = {
    "regular": [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)],
    "odd": [(37, 51), (19, 26), (10, 13), (5, 7), (3, 4)],
    "tiny": [(3, 2), (2, 1), (1, 1), (1, 1), (1, 1)],
}


def pyramid(sizes, channels=8, batch=2):
    return [torch.randn(batch, channels, *size, requires_grad=True) for size in sizes]


def randomized(module):
    """Give all parameters values that matter; conv_out starts with zeros."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_hand_computed():
    """
    Three levels of one channel, 4 x 4, 2 x 2 and 1 x 1, refined at the second:
      level 0 holds 0..15; the maxima of its 2 x 2 blocks are [[5, 7], [13, 15]]
      level 1 holds [[1, 2], [3, 4]]
      level 2 holds 10, repeated to 2 x 2
    The average is [[16, 19], [26, 29]] / 3. It is repeated to 4 x 4 for level 0, added as it is to
    level 1, and its maximum 29 / 3 is added to level 2.
    """
    features = [
        torch.arange(16.0).reshape(1, 1, 4, 4),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None],
        torch.tensor(10.0).reshape(1, 1, 1, 1),
    ]
    outputs = BalancedFeaturePyramid(1, 3, refine_level=1, refine_type="none")(features)
    balanced = torch.tensor([[16.0, 19.0], [26.0, 29.0]]) / 3
    repeated = balanced.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(outputs[0][0, 0], features[0][0, 0] + repeated)
    torch.testing.assert_close(outputs[1][0, 0], features[1][0, 0] + balanced)
    torch.testing.assert_close(outputs[2].item(), 10 + 29 / 3)


def test_non_local_hand_computed():
    """
    Two positions with the values 0 and ln 3, all embeddings the identity: the dot products of the
    second position with the two are 0 and ln(3)^2, without scaling.
    """
    block = NonLocalBlock(1)
    for conv in (block.theta, block.phi, block.g, block.conv_out):
        torch.nn.init.ones_(conv.weight)
    a = torch.tensor(3.0).log()
    output = block(torch.stack([a * 0, a]).reshape(1, 1, 1, 2)).flatten()
    weight = (a * a).exp() / (1 + (a * a).exp())
    # The first position attends to both equally.
    torch.testing.assert_close(output, torch.stack([a / 2, a + weight * a]))


def test_starts_as_identity():
    """A fresh non-local block changes nothing, so that "non_local" starts as "none"."""
    features = pyramid(SIZES["odd"])
    outputs = BalancedFeaturePyramid(8, 5)(features)
    expected = BalancedFeaturePyramid(8, 5, refine_type="none")(features)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))


@pytest.mark.parametrize("refine_type", REFINE_TYPES)
@pytest.mark.parametrize("refine_level", [0, 1, 2, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_reference(mmdet, refine_type, refine_level, sizes):
    """
    Outputs and gradients, for the same weights: in float64, so that what differs is the formula
    and not the order of summation.
    """
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
    state = ours.state_dict()
    names = {"refine.weight": "refine.conv.weight", "refine.bias": "refine.conv.bias"}
    for layer in ("g", "theta", "phi", "conv_out"):
        for kind in ("weight", "bias"):
            names[f"refine.{layer}.{kind}"] = f"refine.{layer}.conv.{kind}"
    reference.load_state_dict({names[key]: value for key, value in state.items()}, strict=True)

    ours, reference = ours.double(), reference.double()
    features = [x.detach().double().requires_grad_() for x in pyramid(sizes)]
    results = []
    for module in (ours, reference):
        outputs = module(features)
        inputs = [*features, *module.parameters()]
        weights = [torch.linspace(-1, 1, x.numel()).double().view_as(x) for x in outputs]
        loss = sum((x * w).sum() for x, w in zip(outputs, weights))
        grads = torch.autograd.grad(loss, inputs)
        # The order of the parameters differs: compare the norm of their gradients.
        results.append((list(outputs), grads[:5], sum(g.pow(2).sum() for g in grads[5:])))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_levels", [1, 2, 7])
def test_any_number_of_levels(num_levels):
    features = pyramid([(2**i, 2**i + 1) for i in reversed(range(num_levels))])
    for refine_level in range(num_levels):
        bfp = BalancedFeaturePyramid(8, num_levels, refine_level=refine_level)
        assert [x.shape for x in bfp(features)] == [x.shape for x in features]


def test_wrong_number_of_levels():
    with pytest.raises(AssertionError, match="2 levels, not 5"):
        BalancedFeaturePyramid(8, 5)(pyramid(SIZES["odd"][:2]))


@pytest.mark.parametrize("refine_type", REFINE_TYPES)
def test_gradient(refine_type):
    bfp = randomized(BalancedFeaturePyramid(2, 3, refine_level=1, refine_type=refine_type)).double()
    features = [torch.randn(1, 2, s, s, dtype=torch.float64) for s in (4, 2, 1)]
    # gradcheck perturbs by 1e-6; maxima that close to each other do not occur with this seed.
    assert torch.autograd.gradcheck(
        lambda *x: tuple(bfp(list(x))), [x.requires_grad_() for x in features]
    )


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


@pytest.mark.parametrize("refine_type", REFINE_TYPES)
def test_autocast(refine_type):
    bfp = randomized(BalancedFeaturePyramid(8, 5, refine_type=refine_type))
    features = pyramid(SIZES["odd"])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = bfp(features)
    for a, b in zip(outputs, bfp(features)):
        # bfloat16 has 8 significant bits; outputs are of the order of 1.
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"refine_level": 5}, "refine_level is 5: the pyramid has 5 levels, use .* 0 to 4"),
        ({"refine_level": -1}, "refine_level is -1"),
        ({"refine_type": "gaussian"}, "refine_type is 'gaussian': use one of"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        BalancedFeaturePyramid(8, 5, **kwargs)


def test_own_refinement():
    """A registered one is used by its name."""

    @REFINEMENT_REGISTRY.register()
    def test_double(channels):
        layer = torch.nn.Conv2d(channels, channels, 1, bias=False)
        torch.nn.init.dirac_(layer.weight)
        layer.weight.data *= 2
        return layer

    features = pyramid(SIZES["regular"])
    double, none = (
        BalancedFeaturePyramid(8, 5, refine_type=name)(features) for name in ("test_double", "none")
    )
    for feature, a, b in zip(features, double, none):
        torch.testing.assert_close(a - feature, 2 * (b - feature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refine_type", REFINE_TYPES)
@pytest.mark.parametrize("magnitude", [1.0, 30.0, 20000.0])
def test_half_precision(dtype, refine_type, magnitude):
    """
    Under autocast: finite, and float32's result up to the rounding of the outputs, though the sum
    of the levels and the dot products of the attention exceed the largest float16.
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


@pytest.mark.parametrize("height", [1, 2, 5, 8, 13, 20])
def test_max_in_windows(height):
    """Value and gradient of adaptive max pooling at any two sizes, by exportable operators."""
    for size in range(1, 14):
        x = torch.randn(1, 2, height, size + 4, dtype=torch.float64, requires_grad=True)
        expected = F.adaptive_max_pool2d(x, (size, size))
        by_rows = _max_along(x, 2, size, 5)
        for found in (_max_along(by_rows, 3, size, 5), max_in_windows(x, size, size, 5)):
            assert torch.equal(found, expected)
            weight = torch.randn_like(expected)
            a, b = (torch.autograd.grad(y, x, weight, retain_graph=True) for y in (found, expected))
            torch.testing.assert_close(a, b)
