# SPDX-License-Identifier: Apache-2.0
"""
RoIAlign on all CPU cores. torchvision's operator runs on one of them, and copies features that have
their channels last.

RoIAlign is linear: the value of a bin is a weighted sum of the features of some pixels. With the
channels last, the features of a pixel are a row, and ``F.embedding_bag`` sums weighted rows in
parallel over the bins. Its gradient is the transposed sum, in parallel over the pixels. The order
within each sum does not depend on the number of threads.

Shape shorthand in this module:

    N, C, H, W: images, channels, height and width of the feature map
    R: number of RoIs
    P: number of bins along one side of a RoI
    L: the largest number of pixels that a bin covers along one side
    T: number of pairs of a bin and a pixel that counts in it
"""

from typing import Any, List, NamedTuple, Tuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from detectron2.layers import ROIAlign

from .replacement import Replacement

__all__ = ["ParallelROIAlign"]


# The taps of a RoI take up to 1 MB. Gradients need those of all RoIs together.
_MAX_ROIS = 128


class _Taps(NamedTuple):
    """The pixels that count in each bin, in the order of the bins."""

    pixel: torch.Tensor  # (T,) index into N * H * W
    weight: torch.Tensor  # (T,)
    bin: torch.Tensor  # (T,) index into R * P * P
    start: torch.Tensor  # (R * P * P,) index of the first tap of each bin


def _taps_along(
    start: torch.Tensor, extent: torch.Tensor, num_bins: int, sampling_ratio: int, length: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Bilinear weights are products of one for each axis; those along one of them.

    Args:
        start, extent: (R,) where RoIs begin and how long they are, in pixels of the feature map.
        num_bins: P.
        sampling_ratio: see :class:`ROIAlign`.
        length: number of pixels of the feature map.

    Returns:
        first pixel (R, P) that counts in each bin, number of pixels (R, P) from there on, and their
        weights (R, P, L).
    """
    bin_size = (extent / num_bins)[:, None, None]
    num_samples = (
        torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    )
    max_samples = max(int(num_samples.amax()), 1)
    sample = torch.arange(max_samples, dtype=start.dtype, device=start.device)
    bin_ = torch.arange(num_bins, dtype=start.dtype, device=start.device)
    bin_start = start[:, None] + bin_ * bin_size[..., 0]
    position = bin_start[..., None] + (sample + 0.5) * (bin_size / num_samples)  # (R, P, samples)
    valid = (sample < num_samples) & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    low = position.long()
    first = torch.where(valid, low, length).amin(dim=2)
    last = torch.where(valid, low + 1, 0).amax(dim=2).clamp(max=length - 1)
    num_pixels = (last - first + 1).clamp(min=0)

    share = valid / num_samples.clamp(min=1)
    fraction = position - low
    # One more than L: a sample on the last pixel gives nothing to the one behind it.
    length_of_bin = max(int(num_pixels.amax()), 1)
    weights = start.new_zeros((first.shape[0], num_bins, length_of_bin + 1))
    index = (low - first[..., None]).clamp(0, length_of_bin - 1)
    weights.scatter_add_(2, index, share * (1 - fraction))
    weights.scatter_add_(2, index + 1, share * fraction)
    return first, num_pixels, weights


def _expand(counts: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        counts: (n,).

    Returns:
        (counts.sum(),) each index i as often as ``counts[i]`` says, and a counter of each.
    """
    index = torch.repeat_interleave(counts)
    counter = torch.arange(len(index), device=counts.device)
    return index, counter - (counts.cumsum(0) - counts)[index]


def _make_taps(
    rois: torch.Tensor,
    size: Tuple[int, int],
    output_size: Tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> _Taps:
    """
    Args:
        rois: (R, 5) index of the image and absolute XYXY box, R > 0.
        size: H, W.
        output_size, spatial_scale, sampling_ratio, aligned: see :class:`ROIAlign`.
    """
    height, width = size
    rows, columns = output_size
    boxes = rois[:, 1:] * spatial_scale - 0.5 * int(aligned)
    x1, y1, w, h = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    if not aligned:
        w, h = w.clamp(min=1), h.clamp(min=1)
    first_y, num_y, weight_y = _taps_along(y1, h, rows, sampling_ratio, height)
    first_x, num_x, weight_x = _taps_along(x1, w, columns, sampling_ratio, width)

    shape = (len(rois), rows, columns)
    first_row = rois[:, 0].long()[:, None] * height + first_y
    first = (first_row[:, :, None] * width + first_x[:, None, :]).flatten()
    num_y, num_x = num_y[:, :, None].expand(shape), num_x[:, None, :].expand(shape)
    num = (num_y * num_x).flatten()
    # A strip is what a bin has in one row of pixels.
    bin_of_strip, y = _expand(torch.where(num > 0, num_y.flatten(), 0))
    strip, x = _expand(num_x.flatten()[bin_of_strip])
    bin_ = bin_of_strip[strip]
    roi_and_row = bin_of_strip // columns
    roi_and_column = bin_of_strip // (rows * columns) * columns + bin_of_strip % columns
    weight_of_strip = weight_y.flatten(0, 1)[roi_and_row, y]
    weight = weight_of_strip[strip] * weight_x.flatten(0, 1)[roi_and_column[strip], x]
    pixel = (first[bin_of_strip] + y * width)[strip] + x
    return _Taps(pixel, weight, bin_, num.cumsum(0) - num)


def _sum_taps(x: torch.Tensor, taps: _Taps, output_size: Tuple[int, int]) -> torch.Tensor:
    """(N, C, H, W) -> (R, C, *output_size)."""
    bins = F.embedding_bag(
        taps.pixel, _pixels(x), taps.start, mode="sum", per_sample_weights=taps.weight
    )
    return bins.view(-1, output_size[0], output_size[1], x.shape[1]).permute(0, 3, 1, 2)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N * H * W, C), without a copy if the channels are last in memory."""
    # Rows of a single image would otherwise be a view, whose sums take twenty times as long.
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


@torch.jit.script_if_tracing
def _pool(
    x: torch.Tensor,
    rois: torch.Tensor,
    max_rois: int,
    output_size: Tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """
    RoIAlign without gradients, of at most ``max_rois`` RoIs at a time. The other arguments are
    those of :func:`_make_taps`.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    size, parts = (x.shape[2], x.shape[3]), torch.jit.annotate(List[torch.Tensor], [])
    for part in rois.split(max_rois):
        if len(part) > 0:
            taps = _make_taps(part, size, output_size, spatial_scale, sampling_ratio, aligned)
            parts.append(_sum_taps(x, taps, output_size))
    if len(parts) == 0:
        return x.new_zeros((0, x.shape[1], output_size[0], output_size[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _ROIAlignFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rois: torch.Tensor,
        output_size: Tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> torch.Tensor:
        size = x.shape[2:]
        taps = _make_taps(rois, size, output_size, spatial_scale, sampling_ratio, aligned)
        ctx.shape = x.shape
        ctx.save_for_backward(taps.pixel, taps.weight, taps.bin)
        return _sum_taps(x.detach(), taps, output_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Any, ...]:
        pixel, weight, bin_ = ctx.saved_tensors
        num_images, channels, height, width = ctx.shape
        pixel, order = pixel.sort(stable=True)
        num = pixel.bincount(minlength=num_images * height * width)
        pixels = F.embedding_bag(
            *(bin_[order], _pixels(grad.detach()), num.cumsum(0) - num),
            mode="sum",
            per_sample_weights=weight[order],
        )
        grad_x = pixels.view(num_images, height, width, channels).permute(0, 3, 1, 2)
        return grad_x, None, None, None, None, None


class ParallelROIAlign(Replacement, ROIAlign):
    """
    :class:`ROIAlign` that uses all CPU cores, in both directions, and takes features with the
    channels last as they are. The numbers are the same but for the order of sums. Traces without
    gradients on a CPU compute the same. On other devices, and in ONNX files, scripts, traces with
    gradients and compiled graphs, it is the parent.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: (N, C, H, W). Half precision is summed in float32.
            rois: (R, 5) index of the image and absolute XYXY box.

        Returns:
            (R, C, *output_size), of the type of ``input``.
        """
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input, rois)
        if torch.onnx.is_in_onnx_export():  # it has its own operator
            return super().forward(input, rois)
        needs_grad = torch.is_grad_enabled() and input.requires_grad
        if needs_grad and (len(rois) == 0 or torch.jit.is_tracing()):
            return super().forward(input, rois)
        geometry = (_pair(self.output_size), self.spatial_scale, self.sampling_ratio, self.aligned)
        with torch.autocast("cpu", enabled=False):
            dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
            x, rois = input.to(dtype), rois.detach().to(dtype)
            if needs_grad:
                return _ROIAlignFunction.apply(x, rois, *geometry).to(input.dtype)
            return _pool(x, rois, _MAX_ROIS, *geometry).to(input.dtype)
