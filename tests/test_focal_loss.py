# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn import functional as F

from libra_d2.modeling import focal_loss as module
from libra_d2.modeling.focal_loss import focal_loss

pytestmark = pytest.mark.rounding


def plain_loss(logits, labels, alpha, gamma):
    """As the paper writes it, over one-hot targets."""
    valid = labels >= 0
    target = F.one_hot(labels[valid], logits.shape[1] + 1)[:, :-1].bool()
    log_p = F.logsigmoid(logits[valid].where(target, -logits[valid]))
    weight = 1.0 if alpha < 0 else torch.where(target, alpha, 1 - alpha)
    return (-weight * (1 - log_p.exp()) ** gamma * log_p).sum()


@pytest.mark.parametrize("alpha", [0.25, 0.0, -1.0])
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_values_and_gradients(alpha, gamma, monkeypatch):
    """In chunks of some anchors or of one, also of those that are not trained on; of none."""
    monkeypatch.setattr(module, "_CHUNK_SIZE", 64 if gamma else 4)
    for num in (50, 0):
        logits = (4 * torch.randn(num, 5, dtype=torch.float64)).requires_grad_()
        labels = torch.randint(-1, 6, (num,))
        found, expected = (f(logits, labels, alpha, gamma) for f in (focal_loss, plain_loss))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        (grad,), (right,) = (torch.autograd.grad(3 * x, logits) for x in (found, expected))
        torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-12)
        assert grad[labels == -1].abs().sum() == 0


def test_second_derivative():
    """An error, not 0."""
    logits, weight = torch.randn(3, 2, requires_grad=True), torch.ones((), requires_grad=True)
    loss = weight * focal_loss(logits, torch.tensor([0, 1, 2]), 0.25, 2.0)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_logits(dtype):
    """Finite, where sigmoid has reached 0 or 1; of half precision in float32."""
    logits = torch.tensor([[-200, 200], [200, -200]], dtype=dtype, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 2]), 0.25, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25 * 200 + 2 * 0.75 * 200)
    loss.backward()
    assert logits.grad.tolist() == [[-0.25, 0.75], [0.75, 0.0]]
    exact = focal_loss(torch.tensor([[21.0]], dtype=torch.float64), torch.tensor([1]), -1, 0.0)
    assert exact.item() == pytest.approx(21 + math.exp(-21), rel=1e-13)
