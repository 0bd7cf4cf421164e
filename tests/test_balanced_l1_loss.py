# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import pytest
import torch
from conftest import demo_cfg
from fvcore.nn import smooth_l1_loss

from libra_d2.modeling import BalancedL1Loss, balanced_l1_loss

pytestmark = pytest.mark.rounding

FORMS = ("scaled", "reference")


def loss_and_grad(errors, **kwargs):
    pred = torch.as_tensor(errors, dtype=torch.float64).requires_grad_()
    loss = balanced_l1_loss(pred, torch.zeros_like(pred), **kwargs)
    loss.sum().backward()
    return loss.detach(), pred.grad


def test_values_of_the_paper():
    """
    With alpha = 1 and gamma = ln 3, b = 3 - 1 = 2. By Equation 11:
      x = 0.5: 1/2 (2 * 0.5 + 1) ln(2 * 0.5 + 1) - 0.5 = ln 2 - 0.5
      x = 1:   1/2 * 3 * ln 3 - 1, from either side
      x = 3:   3 ln 3 + ln(3) / 2 - 1, and so on
    """
    loss, grad = loss_and_grad([0.0, 0.5, -0.5, 1.0, 3.0, 1e300], alpha=1.0, gamma=math.log(3))
    ln2, ln3 = math.log(2), math.log(3)
    expected = [0, ln2 - 0.5, ln2 - 0.5, 1.5 * ln3 - 1, 3.5 * ln3 - 1, 1e300 * ln3]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    # Equation 9: alpha ln(b x + 1) below 1, gamma above.
    assert grad.tolist() == pytest.approx([0, ln2, -ln2, ln3, ln3, ln3], rel=1e-12)


def test_gradient_at_beta():
    """That of an outlier, in the form whose gradient is not continuous there; of either type."""
    _, grad = loss_and_grad([0.25, -0.25], beta=0.25, form="reference")
    assert grad.tolist() == [1.5, -1.5]
    exact = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    rounded = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    balanced_l1_loss(rounded, exact).sum().backward()
    assert exact.grad == loss_and_grad([0.3])[1]
    assert rounded.grad == -exact.grad.half()


@pytest.mark.parametrize("beta", [0.11, 2.0])
def test_scaled_form_is_the_paper_scaled(beta):
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    expected = beta * balanced_l1_loss(x / beta, torch.zeros_like(x))
    torch.testing.assert_close(balanced_l1_loss(x, torch.zeros_like(x), beta), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("alpha", "gamma", "beta"),
    [(0.5, 1.5, 0.11), (0.2, 1.0, 1.0), (0.3, 2.0, 2.5), (0.0125, 1.0, 1.0)],
)
@pytest.mark.parametrize("variables", [(True, True), (True, False), (False, True)])
def test_gradient(form, alpha, gamma, beta, variables):
    """With respect to input, target, or both; up to the largest gamma / alpha allowed."""
    errors = torch.tensor([-3.0, -0.9, -0.05, 0.04, 0.3, 2.7], dtype=torch.float64)
    inputs = (errors + 1, torch.ones_like(errors))
    inputs = [x.requires_grad_(on) for x, on in zip(inputs, variables)]
    loss = partial(balanced_l1_loss, beta=beta, alpha=alpha, gamma=gamma, form=form)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(("form", "beta"), [("reference", 0.11), ("reference", 1), ("scaled", 1)])
def test_equals_reference(mmdet, form, beta):
    """The reference's form, and at a beta of 1 the scaled one, too."""
    from mmdet.models.losses.balanced_l1_loss import balanced_l1_loss as reference

    pred, target = torch.randn(2, 300, 4) * torch.tensor([0.05, 0.3, 1, 3])
    results = []
    for function, kwargs in ((balanced_l1_loss, {"form": form}), (reference, {})):
        x = pred.clone().requires_grad_()
        loss = function(x, target, beta=beta, reduction="none", **kwargs)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    # In float32, as the order of operations differs.
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 4)])
def test_reduction(reduction, shape):
    """As in fvcore's losses, empty input included."""
    pred = torch.randn(shape, requires_grad=True)
    loss = balanced_l1_loss(pred, torch.zeros(shape), reduction=reduction)
    each = balanced_l1_loss(pred, torch.zeros(shape))
    assert loss.shape == smooth_l1_loss(pred, torch.zeros(shape), 1.0, reduction).shape
    count = max(each.numel(), 1) if reduction == "mean" else 1
    torch.testing.assert_close(loss, each.sum() / count)
    loss.backward()
    assert torch.isfinite(pred.grad).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0: use a positive number"),
        ({"gamma": -1.0}, "gamma is -1.0: use a positive number"),
        ({"beta": float("nan")}, "beta is nan: use a positive number"),
        ({"beta": float("inf")}, "beta is inf: use a positive number"),
        ({"gamma": 1.0, "alpha": 0.0124}, "gamma is 1.0: use at most 80 times alpha, 0.0124"),
        ({"form": "paper"}, "form is 'paper': use one of"),
        ({"reduction": "max"}, "reduction must be"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        balanced_l1_loss(torch.zeros(2), torch.zeros(2), **kwargs)
    with pytest.raises(ValueError, match="same shape, got .2, 4. and .4,."):
        balanced_l1_loss(torch.zeros(2, 4), torch.zeros(4))
    if "reduction" not in kwargs:  # the module checks the others when it is made
        with pytest.raises(ValueError, match=message):
            BalancedL1Loss(**kwargs)


def test_fixed_parameters():
    """Parameters are given, read from a config, or those of the paper; scripts leave it out."""
    x, zero = torch.randn(20), torch.zeros(20)
    kwargs = {"alpha": 0.2, "gamma": 1.0, "beta": 0.3, "form": "reference"}
    cfg = demo_cfg(**{f"MODEL__LIBRA__BALANCED_L1__{k.upper()}": v for k, v in kwargs.items()})
    paper = {"alpha": 0.5, "gamma": 1.5, "beta": 1.0, "form": "scaled"}
    assert BalancedL1Loss().arguments == paper
    torch.jit.script(BalancedL1Loss())
    expected = balanced_l1_loss(x, zero, **kwargs, reduction="sum")
    for loss in (BalancedL1Loss(**kwargs), BalancedL1Loss(cfg)):
        assert torch.equal(loss(x, zero, "sum"), expected)
    assert torch.equal(BalancedL1Loss()(x, zero), balanced_l1_loss(x, zero, **paper))
    assert torch.equal(balanced_l1_loss(x, zero), balanced_l1_loss(x, zero, **paper))


def test_function_transforms():
    """Gradients by torch.func, also of each sample; a second derivative is an error."""
    x, target = torch.randn(2, 9, dtype=torch.float64)
    variable = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        balanced_l1_loss(variable, target, reduction="sum"), variable, create_graph=True
    )
    whole = torch.func.grad(lambda a: balanced_l1_loss(a, target, reduction="sum"))(x)
    each = torch.func.vmap(torch.func.grad(lambda a, b: balanced_l1_loss(a, b)))(x, target)
    assert torch.equal(whole, gradient)
    assert torch.equal(each, gradient)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
