# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from libra_d2.modeling import winograd_gradient
from libra_d2.modeling.winograd_gradient import weight_gradient

pytestmark = pytest.mark.rounding


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_tiles", [1, 7, 128])
@pytest.mark.parametrize("shape", [(1, 12, 16), (3, 9, 31), (5, 6, 3), (2, 1, 1)], ids=str)
def test_values(shape, num_tiles, format, monkeypatch):
    """
    Those of autograd, for one image and several, in one strip and several, for whole tiles and
    parts of them.
    """
    monkeypatch.setattr(winograd_gradient, "_NUM_TILES", num_tiles)
    torch.manual_seed(0)
    num_images, *size = shape
    x, grad = (
        torch.randn(num_images, channels, *size, dtype=torch.float64).contiguous(
            memory_format=format
        )
        for channels in (2, 3)
    )
    weight = torch.zeros(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.conv2d(x, weight, padding=1).backward(grad)
    found = weight_gradient(x, grad)
    torch.testing.assert_close(found, weight.grad, rtol=0, atol=1e-11)
    assert found.is_contiguous()


def test_chunks(monkeypatch):
    """RoIs go through the products together, a large image in strips: the cache holds as much."""
    shapes, tiles = [], winograd_gradient._tiles

    def note_and_cut(x, size):
        shapes.append(tuple(x.shape))
        return tiles(x, size)

    monkeypatch.setattr(winograd_gradient, "_tiles", note_and_cut)
    weight_gradient(torch.zeros(10, 1, 14, 14), torch.zeros(10, 1, 14, 14))
    assert shapes == [(8, 1, 18, 18), (8, 1, 16, 16), (2, 1, 18, 18), (2, 1, 16, 16)]
    shapes.clear()
    weight_gradient(torch.zeros(1, 1, 21, 126), torch.zeros(1, 1, 21, 126))
    assert shapes[::2] == [(1, 1, 18, 130), (1, 1, 10, 130)]


def test_rounding():
    """In float32, errors are like those of a convolution, also where transforms cancel out."""
    torch.manual_seed(0)
    x, grad = (torch.randn(1, 64, 60, 80, dtype=torch.float64).relu() for _ in range(2))
    errors = []
    weight = torch.zeros(64, 64, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.conv2d(x, weight, padding=1).backward(grad)
    single = weight.detach().float().requires_grad_()
    torch.conv2d(x.float(), single, padding=1).backward(grad.float())
    for found in (weight_gradient(x.float(), grad.float()), single.grad):
        errors.append((found - weight.grad).abs().max() / weight.grad.abs().max())
    # Both are sums of 4800 products. A processor may add in any order.
    assert errors[0] < 4e-6 + 4 * errors[1]
