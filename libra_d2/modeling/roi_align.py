# SPDX-License-Identifier: Apache-2.0
"""
RoIAlign on all CPU cores, and its gradient on GPUs. torchvision's operator runs on one core, and
copies features that have their channels last. On GPUs, its gradient adds each feature of each
sample of a bin to four pixels, by atomic additions in any order.

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


# Where the gradient is this module's.
_DEVICES = ("cpu", "cuda")
# Without gradients. The taps of a RoI take up to 1.5 MB. Parts take less memory, and more time.
_MAX_ROIS = 128


class _Taps(NamedTuple):
    """The pixels that count in each bin, in the order of the bins."""

    pixel: torch.Tensor  # (T,) index into N * H * W
    weight: torch.Tensor  # (T,)
    bin: torch.Tensor  # (T,) index into R * P * P
    start: torch.Tensor  # (R * P * P,) index of the first tap of each bin


class _Axis(NamedTuple):
    """The bins along one axis, in pixels of the feature map."""

    bin_start: torch.Tensor  # (R, P)
    spacing: torch.Tensor  # (R, 1) of the samples in a bin
    num_samples: torch.Tensor  # (R, 1)
    first_pixel: torch.Tensor  # (R, P) the first that can count in each bin
    num_pixels: torch.Tensor  # (R, P) from there on


def _place_bins(
    start: torch.Tensor, extent: torch.Tensor, num_bins: int, sampling_ratio: int, length: int
) -> _Axis:
    """
    Args:
        start, extent: (R,) where RoIs begin and how long they are, in pixels of the feature map.
        num_bins: P.
        sampling_ratio: see :class:`ROIAlign`.
        length: number of pixels of the feature map.
    """
    # GPUs multiply by the inverse of a number, which can be rounded up to another sample.
    bin_size = (extent / torch.full_like(extent, num_bins))[:, None]
    num = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    spacing = bin_size / num
    bin_start = start[:, None] + bin_size * torch.arange(num_bins, device=start.device)
    ends = torch.stack([bin_start + 0.5 * spacing, bin_start + (num - 0.5) * spacing])
    lowest, highest = ends.amin(dim=0), ends.amax(dim=0)  # inverted RoIs begin with the last one
    first_pixel = lowest.clamp(0, length - 1).long()
    last_pixel = (highest.clamp(0, length - 1).long() + 1).clamp(max=length - 1)
    counts = (num > 0) & (highest >= -1) & (lowest <= length)
    num_pixels = torch.where(counts, last_pixel - first_pixel + 1, 0)
    return _Axis(bin_start, spacing, num, first_pixel, num_pixels)


def _weigh(axis: _Axis, max_pixels: int, sampling_ratio: int, length: int) -> torch.Tensor:
    """
    Bilinear weights are products of one for each axis; those along one of them.

    Args:
        max_pixels: L.
        sampling_ratio, length: those of :func:`_place_bins`.

    Returns:
        (R, P, L) weights of the pixels from ``axis.first_pixel`` on.
    """
    pixel = torch.arange(max_pixels, device=axis.first_pixel.device)
    pixel = axis.first_pixel[..., None] + pixel
    num, spacing = axis.num_samples[..., None, None], axis.spacing[..., None, None]
    bin_start, pixel = axis.bin_start[..., None, None], pixel[..., None]
    if sampling_ratio > 0:
        first_sample, max_samples = torch.zeros_like(bin_start), sampling_ratio
    else:
        # Unless there is only one, samples are more than half a pixel apart, so that at most four
        # are within a pixel. The others allow for rounding.
        first_sample, max_samples = ((pixel - 1 - bin_start) / spacing - 0.5).floor(), 6
        first_sample = first_sample.clamp(min=0)
    sample = first_sample + torch.arange(max_samples, device=pixel.device)
    position = bin_start + (sample + 0.5) * spacing  # (R, P, L, samples)
    valid = (sample < num) & (position >= -1) & (position <= length)
    weight = 1 - (position.clamp(0, length - 1) - pixel).abs()
    return torch.where(valid, weight.clamp(min=0) / num, 0).sum(dim=3)


def _expand(counts: torch.Tensor, total: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        counts: (n,).
        total: their sum.

    Returns:
        (total,) each index i as often as ``counts[i]`` says, and (n,) where each begins in it.
    """
    index = torch.arange(len(counts), device=counts.device)
    return index.repeat_interleave(counts, output_size=total), counts.cumsum(0) - counts


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
    along_y = _place_bins(y1, h, rows, sampling_ratio, height)
    along_x = _place_bins(x1, w, columns, sampling_ratio, width)
    shape = (len(rois), rows, columns)
    num_y = along_y.num_pixels[:, :, None].expand(shape).flatten()
    num_x = along_x.num_pixels[:, None, :].expand(shape).flatten()
    num = num_y * num_x
    # All that the shapes of what follows depend on, for which the host waits once.
    numbers = torch.stack([num_y.amax(), num_x.amax(), num_y.sum(), num.sum()])
    max_y, max_x, num_strips, num_taps = torch.jit.annotate(List[int], numbers.cpu().tolist())
    weight_y = _weigh(along_y, max_y, sampling_ratio, height)
    weight_x = _weigh(along_x, max_x, sampling_ratio, width)

    first_row = rois[:, 0].long()[:, None] * height + along_y.first_pixel
    first_pixel = (first_row[:, :, None] * width + along_x.first_pixel[:, None, :]).flatten()
    # A strip is what a bin has in one row of pixels. Both its pixels and their weights follow each
    # other in memory as its taps do: the index of a tap plus a number of the strip gives either.
    bin_of_strip, start_of_bin = _expand(num_y, num_strips)
    y = torch.arange(num_strips, device=rois.device) - start_of_bin[bin_of_strip]
    strip, start_of_strip = _expand(num_x[bin_of_strip], num_taps)
    tap = torch.arange(num_taps, device=rois.device)
    roi_and_row = bin_of_strip // columns
    roi_and_column = bin_of_strip // (rows * columns) * columns + bin_of_strip % columns
    weight = weight_y.flatten(0, 1)[roi_and_row, y][strip]
    weight = weight * weight_x.flatten()[tap + (roi_and_column * max_x - start_of_strip)[strip]]
    pixel = tap + (first_pixel[bin_of_strip] + y * width - start_of_strip)[strip]
    return _Taps(pixel, weight, bin_of_strip[strip], num.cumsum(0) - num)


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
        ctx.save_for_backward(rois)
        ctx.shape, ctx.is_contiguous = x.shape, x.is_contiguous()
        ctx.geometry = (output_size, spatial_scale, sampling_ratio, aligned)
        if x.device.type == "cpu":
            return _pool(x, rois, len(rois), *ctx.geometry)
        return torch.ops.torchvision.roi_align(
            *(x, rois, spatial_scale, *output_size, sampling_ratio, aligned)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Any, ...]:
        (rois,) = ctx.saved_tensors
        num_images, channels, height, width = ctx.shape
        taps = _make_taps(rois, (height, width), *ctx.geometry)
        pixel, order = taps.pixel.int().sort(stable=True)
        pixels = torch.arange(num_images * height * width, dtype=torch.int32, device=pixel.device)
        sums = F.embedding_bag(
            *(taps.bin[order], _pixels(grad), torch.searchsorted(pixel, pixels)),
            mode="sum",
            per_sample_weights=taps.weight[order],
        )
        grad_x = sums.view(num_images, height, width, channels).permute(0, 3, 1, 2)
        if ctx.is_contiguous:  # the gradients of other uses are, too
            grad_x = grad_x.contiguous()
        return grad_x, None, None, None, None, None


class ParallelROIAlign(Replacement, ROIAlign):
    """
    :class:`ROIAlign` that uses all CPU cores, in both directions, and takes features with the
    channels last as they are. On GPUs, its gradient takes a fraction of the time, and is always
    summed in the same order. The numbers are the same but for the order of sums. Traces without
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
        device = input.device.type
        needs_grad = torch.is_grad_enabled() and input.requires_grad
        is_own = device in _DEVICES if needs_grad else device == "cpu"
        # ONNX has its own operator.
        if not is_own or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
            return super().forward(input, rois)
        if needs_grad and (len(rois) == 0 or torch.jit.is_tracing()):
            return super().forward(input, rois)
        geometry = (_pair(self.output_size), self.spatial_scale, self.sampling_ratio, self.aligned)
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        x, rois = input.to(dtype), rois.detach().to(dtype)
        if needs_grad:
            return _ROIAlignFunction.apply(x, rois, *geometry).to(input.dtype)
        return _pool(x, rois, _MAX_ROIS, *geometry).to(input.dtype)
