# SPDX-License-Identifier: Apache-2.0
"""
3x3 convolutions by Winograd's algorithm (arXiv 1509.09308) on CPUs.

For each pixel and each pair of an input and an output channel, a 3x3 convolution takes nine
multiplications, and Winograd's algorithm with tiles of 6 x 6 pixels less than two. PyTorch contains
NNPACK, which implements it, but prefers oneDNN. NNPACK uses AVX2, oneDNN AVX-512, too, which is
twice as fast on most processors that have it. The gradient of the weights is this project's own.
"""

from functools import cache, partial
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detectron2.layers import Conv2d

from .folded_conv import FoldedConv2d
from .replacement import Replacement, has_hooks, is_ordinary
from .winograd_gradient import weight_gradient

__all__ = ["WinogradConv2d", "can_gain", "is_available"]

_DTYPE = torch.float32  # NNPACK has no other
# With fewer channels, pixels or numbers, transforming weights and features takes longer than it
# saves.
_MIN_CHANNELS = 128
_MIN_CHANNELS_OF_GRADIENT = 64
_MIN_PIXELS = 512
_MIN_NUMBERS = 2**18
# For batches, NNPACK chooses Fourier transforms, which are slower for images of at least that many
# pixels, and faster for RoIs than one call for each. Its buffer grows with the pixels of a batch.
_MIN_PIXELS_ALONE = 2048
_MAX_PIXELS_OF_BATCH = 65536
# The buffer takes 256 bytes for each channel of the input and of the output in each tile of 6 x 6
# pixels. NNPACK wants channels first; where they are last, they are copied anyway, in strips.
_MAX_PIXELS_OF_STRIP = 20000
_TILE = 6


@cache
def is_available() -> bool:
    """
    Whether this CPU gains: it has AVX2, and AVX-512 either not at all or as AMD's Zen 4, which
    executes an instruction of 512 bits in two steps. Asking initializes NNPACK.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    has_slow_avx512 = capability == "AVX512" and _is_zen4()
    return (capability == "AVX2" or has_slow_avx512) and torch._nnpack_available()


def _is_zen4() -> bool:
    """
    Whether this is the first of AMD's processors (SSE4a) that have AVX-512, if it has AVX-512. Old
    versions of PyTorch do not know.
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()
    is_amd, is_zen5 = has.get("sse4a", False), has.get("avx512_vp2intersect", False)
    return is_amd and not is_zen5


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    pixels = x[0, 0].numel()
    if pixels > _MAX_PIXELS_OF_STRIP and x.is_contiguous(memory_format=torch.channels_last):
        return _convolve_in_strips(x, weight, bias)
    batches = x.split(1 if pixels >= _MIN_PIXELS_ALONE else _MAX_PIXELS_OF_BATCH // pixels)
    results = [torch._nnpack_spatial_convolution(b, weight, bias, (1, 1)) for b in batches]
    return results[0] if len(results) == 1 else torch.cat(results)


def _convolve_in_strips(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
) -> torch.Tensor:
    """
    Convolve strips of rows, each with a row of its neighbors on either side in place of the
    padding. The channels of ``x`` and of the result are last in memory.
    """
    height, width = x.shape[2:]
    num_rows = max(_MAX_PIXELS_OF_STRIP // width // _TILE, 1) * _TILE
    shape = (len(x), len(weight), height, width)
    result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for image, convolved in zip(x.split(1), result.split(1)):
        for top in range(0, height, num_rows):
            start, end = max(top - 1, 0), min(top + num_rows + 1, height)
            strip = torch._nnpack_spatial_convolution(image[:, :, start:end], weight, bias, (1, 1))
            rows = convolved[:, :, top : top + num_rows]
            rows.copy_(strip[:, :, top - start :][:, :, : rows.shape[2]])
    return result


_convolve_directly = partial(torch.conv2d, padding=1)


class _WinogradFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        convolve: Callable,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.convolve = convolve
        return convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        needed = ctx.needs_input_grad[:3]
        with torch.autocast("cpu", enabled=False):  # whatever calls backward()
            return *_gradients(grad, *ctx.saved_tensors, needed, ctx.convolve), None


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    needed: Sequence[bool],
    convolve: Callable,
) -> Tuple[Optional[torch.Tensor], ...]:
    """Those of features, weights and biases, as far as they are ``needed``."""
    return (
        convolve(grad, weight.flip(2, 3).transpose(0, 1)) if needed[0] else None,
        weight_gradient(x, grad) if needed[1] else None,
        grad.sum((0, 2, 3)) if needed[2] else None,
    )


class WinogradConv2d(Replacement, Conv2d):
    """
    3x3 :class:`Conv2d` of stride 1 that uses Winograd's algorithm where that is faster: in float32,
    on CPUs with AVX2 (see :func:`is_available`), for features of at least 2^18 numbers and 512
    pixels. The gradient of the weights uses it for at least 64 channels, the convolution and the
    gradient of its input for at least 128, unless there is a norm. The numbers are the same but for
    rounding errors: those of the gradient of the weights are like the parent's, the others about
    1e-5 of the largest number instead of 1e-6. Without a norm, the channels of the result are last
    in memory only for large images whose channels are. It cannot be differentiated twice, nor in
    forward mode. NNPACK keeps a buffer in each thread that calls it.

    Elsewhere, and in traces, scripts, compiled graphs, functorch's transforms and dispatch modes,
    it is the parent.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (N, C, H, W). Returns: what :class:`Conv2d` does, but for rounding."""
        convolved = self._convolve_faster(x, self.weight, self.bias)
        if convolved is None:
            return super().forward(x)
        if self.norm is not None:
            convolved = self.norm(convolved)
        elif type(self.activation) is nn.ReLU and not has_hooks(self.activation):
            return F.relu_(convolved)  # nobody else has seen it
        return convolved if self.activation is None else self.activation(convolved)

    def _conv_forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
    ) -> torch.Tensor:
        convolved = self._convolve_faster(x, weight, bias)
        return super()._conv_forward(x, weight, bias) if convolved is None else convolved

    def _convolve_faster(
        self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
    ) -> Optional[torch.Tensor]:
        """None where the parent is as fast."""
        convolve = self._find_convolution(x, weight)
        return None if convolve is None else _WinogradFunction.apply(x, weight, bias, convolve)

    def _find_convolution(self, x: torch.Tensor, weight: torch.Tensor) -> Optional[Callable]:
        if not self._suits(x, weight):
            return None
        # Convolutions with norms are those of bottlenecks. Between 1x1 convolutions, which are fast
        # if channels are last in memory, NNPACK's change of the format takes longer than it saves.
        if self.norm is None and min(weight.shape[:2]) >= _MIN_CHANNELS:
            return _convolve
        return _convolve_directly if torch.is_grad_enabled() and weight.requires_grad else None

    def _suits(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        if not is_ordinary(x) or torch.is_autocast_enabled("cpu"):
            return False
        has_type = x.dtype == weight.dtype == _DTYPE
        is_large = x.dim() == 4 and x.numel() >= max(_MIN_NUMBERS, _MIN_PIXELS * x.shape[1])
        return has_type and is_large and can_gain(self) and is_available()

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Convolutions, PyTorch's own and those with folded norms, too, that may gain."""
        return type(module) in (nn.Conv2d, Conv2d, FoldedConv2d) and can_gain(module)

    @classmethod
    def replace(cls, module: nn.Module) -> None:
        """Make ``module`` one of this class."""
        if type(module) is nn.Conv2d:
            module.norm = module.activation = None
        module.__class__ = _FoldedWinogradConv2d if isinstance(module, FoldedConv2d) else cls


class _FoldedWinogradConv2d(FoldedConv2d, WinogradConv2d):
    """A :class:`FoldedConv2d` with the gradients of :class:`WinogradConv2d`."""

    def conv_gradients(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needed: List[bool]
    ) -> Tuple[Optional[torch.Tensor], ...]:
        if self._suits(x, weight):
            return _gradients(grad, x, weight, needed, _convolve_directly)
        return super().conv_gradients(grad, x, weight, needed)


def can_gain(conv: nn.Conv2d, stride: Tuple[int, int] = (1, 1)) -> bool:
    """Whether a convolution is of the kind that is replaced, or would be but for its stride."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return (
        shape == ((3, 3), stride, (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= _MIN_CHANNELS_OF_GRADIENT
    )
