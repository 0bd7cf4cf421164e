# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.ops import roi_align

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

import libra_d2.modeling.roi_align as module
from libra_d2.modeling.roi_align import ParallelROIAlign

pytestmark = pytest.mark.rounding

# At a scale of 1/8 of two maps of 20 x 25 pixels: of several sizes, up to the borders and beyond,
# long and flat, on the last pixels; with samples that are a pixel in front of the first one, and on
# the far border; and what counts for nothing: empty, inverted, beyond the upper or lower border.
ROIS = [
    *([1, 10, 20, 90, 130], [0, 3.3, 4.7, 151.9, 111.2], [0, 0, 0, 200, 160], [1, 40, 50, 41, 51]),
    *([1, -30, -40, 260, 90], [1, 5, 60, 195, 66], [0, 60, 5, 64, 155], [1, 192, 150, 200, 160]),
    *([0, -12, -12, 28, 12], [1, 164, 140, 204, 164], [0, 50, 50, 50, 50], [0, 90, 40, 20, 30]),
    *([1, -400, -300, -200, -100], [0, 40, 200, 120, 300], [0, 900, 900, 950, 999]),
]


DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def make_input(dtype=torch.float64, memory_format=torch.contiguous_format, device="cpu"):
    x = torch.randn(2, 6, 20, 25, dtype=dtype).to(device).contiguous(memory_format=memory_format)
    return x.requires_grad_(), torch.tensor(ROIS, dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 3])
def test_values_and_gradients(sampling_ratio, aligned, memory_format, device):
    """Those of torchvision's operator."""
    x, rois = make_input(memory_format=memory_format, device=device)
    arguments = ((3, 5), 1 / 8, sampling_ratio, aligned)
    found, expected = ParallelROIAlign(*arguments)(x, rois), roi_align(x, rois, *arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weight = torch.randn_like(found)
    (grad,), (expected_grad,) = (torch.autograd.grad(y, x, weight) for y in (found, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-13)
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("device", DEVICES)
def test_whole_bins(device):
    """Bins of exactly 3 and 6 pixels have as many samples in float32, where 1/7 is rounded up."""
    x = torch.randn(1, 6, 60, 60, device=device, requires_grad=True)
    rois = torch.tensor([[0, 40, 40, 208, 208], [0, 40, 0, 376, 168]], dtype=torch.float32)
    arguments, results = ((7, 7), 1 / 8, 0, True), []
    for function in (ParallelROIAlign(*arguments), lambda *x: roi_align(*x, *arguments)):
        pooled = function(x, rois.to(device))
        weight = torch.arange(pooled.numel(), device=device).view_as(pooled) / pooled.numel()
        results.append((pooled, *torch.autograd.grad(pooled, x, weight)))
    # Sums of up to 49 numbers that are not larger than 5; another sample changes them by 0.01.
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_default_type():
    """The default type of floating point numbers does not matter."""
    x, rois = make_input(torch.float32)
    pooler = ParallelROIAlign((3, 5), 1 / 8, 2)
    expected = pooler(x, rois)
    torch.set_default_dtype(torch.float64)
    try:
        found = pooler(x, rois)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found.equal(expected)


def test_number_of_taps():
    """Bins that are empty or beyond the borders have none."""
    rois = torch.tensor(ROIS[:1] + ROIS[10:])
    bins = module._make_taps(rois, (20, 25), (3, 5), 1 / 8, 0, True).bin
    assert bins.unique().tolist() == list(range(3 * 5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows(memory_format, monkeypatch):
    """Sums of rows that are contiguous in memory, of a single image, too; others are slow."""
    x, rois = make_input(memory_format=memory_format)
    weights, embedding_bag = [], torch.nn.functional.embedding_bag

    def noting(index, weight, *args, **kwargs):
        weights.append(weight)
        return embedding_bag(index, weight, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", noting)
    ParallelROIAlign((7, 7), 1 / 8, 0)(x[:1], rois[1:2]).sum().backward()
    assert [len(weight) for weight in weights] == [20 * 25, 7 * 7]
    assert all(weight.is_contiguous() for weight in weights)


def test_nothing_to_pool():
    """No RoIs, with and without gradients, and such that count for nothing, of either kind."""
    x, rois = make_input()
    pooler = ParallelROIAlign((7, 5), 1 / 8, 0)
    for features in (x, x.detach()):
        pooled = pooler(features, rois[:0])
        assert pooled.shape == (0, 6, 7, 5)
        features.requires_grad and pooled.sum().backward()
    assert x.grad.abs().sum() == 0
    assert pooler(x, rois[-5:-3]).abs().sum() == pooler(x, rois[-3:]).abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Sums are float32, of features that are rounded already; the result has their type."""
    x, rois = make_input(dtype, torch.channels_last)
    rois = rois.float()
    pooler = ParallelROIAlign((7, 7), 1 / 8, 0)
    with torch.autocast("cpu", dtype=dtype):
        pooled = pooler(x, rois)
    torch.testing.assert_close(pooled, pooler(x.float(), rois).to(dtype), rtol=0, atol=0)


def test_parts(monkeypatch):
    """Without gradients, RoIs are pooled in parts, to the same bits."""
    x, rois = make_input(torch.float32)
    pooler, lengths = ParallelROIAlign((7, 7), 1 / 8, 0), []
    expected = pooler(x, rois)
    make_taps = module._make_taps
    monkeypatch.setattr(
        module, "_make_taps", lambda r, *args: lengths.append(len(r)) or make_taps(r, *args)
    )
    monkeypatch.setattr(module, "_MAX_ROIS", 7)  # 7, 7 and 1
    with torch.no_grad():
        assert torch.equal(pooler(x, rois), expected)
    assert lengths == [7, 7, 1]
    lengths.clear()
    assert torch.equal(pooler(x, rois), expected)
    assert lengths == [len(rois)]


def test_number_of_threads():
    """The same bits, values and gradients."""
    x, rois = make_input(torch.float32, torch.channels_last)
    rois = torch.cat([rois + i for i in range(40)])
    rois[:, 0] = torch.arange(len(rois)) % 2
    results, num_threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            pooled = ParallelROIAlign((7, 7), 1 / 8, 0)(x, rois)
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), x)))
    finally:
        torch.set_num_threads(num_threads)
    for pooled, grad in results[1:]:
        assert torch.equal(pooled, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_no_other_gradients():
    """RoIs have none, as in torchvision's operator; a second derivative is refused."""
    x, rois = make_input()
    rois.requires_grad_()
    pooler = ParallelROIAlign((7, 7), 1 / 8, 0)
    assert not pooler(x.detach(), rois).requires_grad
    pooled = pooler(x, rois)
    weight = torch.ones_like(pooled, requires_grad=True)
    (grad,) = torch.autograd.grad(pooled, x, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    pooler(x, rois).sum().backward()
    assert rois.grad is None


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_trace(sampling_ratio, monkeypatch):
    """
    For features of any size and any number of RoIs; torchvision's operator in compiled graphs, for
    gradients, and for ONNX, which has its own.
    """
    x, rois = (value.detach() for value in make_input(torch.float32))
    pooler = ParallelROIAlign((7, 5), 1 / 8, sampling_ratio)
    traced = torch.jit.trace(pooler, (x, rois))
    for features in (x, x[:, :3, 4:, :11]):
        for some in (rois, rois[3:7] / 2, rois[:0]):
            assert torch.equal(traced(features, some), pooler(features, some))
    torch._dynamo.reset()
    graphs = []
    torch.compile(pooler, backend=lambda graph, _: graphs.append(graph.code) or graph)(x, rois)
    assert ["torchvision.roi_align" in code for code in graphs] == [True]
    scripted, differentiable = torch.jit.script(pooler), (x.clone().requires_grad_(), rois)
    for other in (scripted, torch.jit.trace(pooler, differentiable, check_trace=False)):
        assert "torchvision::roi_align" in str(other.inlined_graph)
        torch.testing.assert_close(other(x, rois[3:7]), pooler(x, rois[3:7]), rtol=0, atol=1e-5)
    assert "torchvision" not in str(traced.inlined_graph)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "torchvision::roi_align" in str(torch.jit.trace(pooler, (x, rois)).inlined_graph)


def test_pooler():
    """In a pyramid, in place; and with a single number as the size."""
    pooler = ROIPooler((7, 7), (1 / 4, 1 / 8), sampling_ratio=0, pooler_type="ROIAlignV2")
    features = [torch.randn(1, 6, 40, 50), torch.randn(1, 6, 20, 25)]
    boxes = [Boxes(torch.tensor(ROIS)[:8, 1:])]
    expected = pooler(features, boxes)
    ParallelROIAlign.replace_in(pooler)
    assert {type(x) for x in pooler.level_poolers} == {ParallelROIAlign}
    torch.testing.assert_close(pooler(features, boxes), expected, rtol=0, atol=1e-5)
    x, rois = make_input()
    assert ParallelROIAlign(7, 1 / 8, 0)(x, rois).equal(ParallelROIAlign((7, 7), 1 / 8, 0)(x, rois))
