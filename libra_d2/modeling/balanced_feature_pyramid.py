# SPDX-License-Identifier: Apache-2.0
"""
Balanced feature pyramid: the feature level balance of Libra R-CNN (paper Section 3.2).

Shape shorthand in this module:

    N: number of images in the batch
    C: number of channels, the same at every pyramid level
    L: number of pyramid levels, ordered from high to low resolution
    Hl, Wl: height and width of the feature map of level l
    P: number of positions, H * W, of the level at which the features are refined
"""

from typing import Any, List, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.layers import Conv2d
from detectron2.utils.registry import Registry

from ..errors import ArgumentError, check_choice
from .replacement import is_ordinary

__all__ = ["REFINEMENT_REGISTRY", "BalancedFeaturePyramid", "NonLocalBlock"]

REFINEMENT_REGISTRY = Registry("LIBRA_REFINEMENT")
REFINEMENT_REGISTRY.__doc__ = """
Refinements of the averaged features, by ``MODEL.LIBRA.BFP.REFINE_TYPE``: functions of the number of
channels C that return a module, which maps (N, C, H, W) to the same shape.
"""


def max_in_windows(x: torch.Tensor, height: int, width: int, num_halvings: int) -> torch.Tensor:
    """
    ``F.adaptive_max_pool2d(x, (height, width))``, which can be exported for any size, and whose
    gradient is deterministic on GPUs where PyTorch is asked for it: position i of n is the maximum
    over the positions from ``floor(i * N / n)`` to ``ceil((i + 1) * N / n)``, exclusive, of N.

    Args:
        x: (N, C, H, W).
        height, width: of the result, in pixels.
        num_halvings: for tracing only, which needs an upper bound of the window: H and W are at
            most ``2 ** num_halvings`` times ``height`` and ``width``.
    """
    if torch.jit.is_tracing():
        rows = _max_along(x, 2, height, num_halvings)
        return _max_along(rows, 3, width, num_halvings)
    if x.shape[2] % height == 0 and x.shape[3] % width == 0:
        return _max_pool(x, [x.shape[2] // height, x.shape[3] // width])
    if x.is_cuda:
        return _gather_max(x, height, width)
    return F.adaptive_max_pool2d(x, [height, width])


class _MaxPool(torch.autograd.Function):
    """
    ``F.max_pool2d`` that does not keep its input. The gradient needs only its size and memory
    format, and the largest level would add 5% to the memory of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, window: List[int]) -> torch.Tensor:
        result, pixel = F.max_pool2d(x, window, return_indices=True)
        ctx.save_for_backward(pixel.int())
        ctx.window, ctx.size, ctx.format = window, x.shape, _format(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[torch.Tensor, None]:
        (pixel,) = ctx.saved_tensors
        unread = torch.empty(
            ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.format
        )
        geometry = (ctx.window, ctx.window, (0, 0), (1, 1), False)
        pooling_backward = torch.ops.aten.max_pool2d_with_indices_backward
        return pooling_backward(grad, unread, *geometry, pixel.long()), None


def _max_pool(x: torch.Tensor, window: List[int]) -> torch.Tensor:
    if torch.jit.is_scripting():
        return F.max_pool2d(x, window)
    else:  # noqa: RET505 (see _is_autocast_enabled)
        has_gradient = torch.is_grad_enabled() and x.requires_grad
        is_own = has_gradient and is_ordinary(x)
        return _MaxPool.apply(x, window) if is_own else F.max_pool2d(x, window)


def _gather_max(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # The pooling's own gradient has no deterministic form on GPUs, that of `gather` has.
    _, pixel = F.adaptive_max_pool2d(x.detach(), [height, width], return_indices=True)
    return x.flatten(2).gather(2, pixel.flatten(2)).view_as(pixel)


def _max_along(x: torch.Tensor, dim: int, size: int, num_halvings: int) -> torch.Tensor:
    length = x.shape[dim]
    position = torch.arange(size, device=x.device)
    start = position * length // size
    last = ((position + 1) * length - 1) // size
    result = x.index_select(dim, start)
    for i in range(1, int(2**num_halvings) + 1):
        result = torch.maximum(result, x.index_select(dim, torch.minimum(start + i, last)))
    return result


def _resize(x: torch.Tensor, size: List[int], num_halvings: int) -> torch.Tensor:
    """
    Resize from one level to another as mmdetection: max pooling if there are halvings, repetition
    of values if their number is negative.
    """
    if num_halvings > 0:
        return max_in_windows(x, size[0], size[1], num_halvings)
    # Autocast repeats values in float32 on GPUs.
    return x if num_halvings == 0 else F.interpolate(x, size=size, mode="nearest").to(x.dtype)


def _like(feature: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """On CPUs, ``x`` in the memory format of ``feature``: sums of two formats take much longer."""
    if torch.jit.is_scripting():
        return x
    else:  # noqa: RET505 (see _is_autocast_enabled)
        if not is_ordinary(feature):
            return x
        return x.contiguous(memory_format=_format(feature))


def _format(x: torch.Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


class NonLocalBlock(nn.Module):
    """
    Embedded Gaussian non-local block (arXiv 1711.07971), the refinement of the paper.

    Each position receives the average of ``g`` over all positions, weighted by the softmax of the
    dot products of ``theta`` at the position with ``phi`` at all. As in mmdetection the dot
    product is not scaled by 1 / sqrt(C), and there is neither a bottleneck nor a normalization.
    """

    def __init__(self, channels: int):
        """Args: channels: C, number of input and output channels."""
        super().__init__()
        self.theta = Conv2d(channels, channels, kernel_size=1)
        self.phi = Conv2d(channels, channels, kernel_size=1)
        self.g = Conv2d(channels, channels, kernel_size=1)
        self.conv_out = Conv2d(channels, channels, kernel_size=1)
        for layer in (self.theta, self.phi, self.g):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        # The initial block is the identity, so that it can be added to a trained model.
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args: x: (N, C, H, W). Returns: (N, C, H, W), ``x`` plus the attended features, computed in
        float32 even under autocast, as unscaled dot products exceed half precision's range.
        """
        if not _is_autocast_enabled(x):
            return self._attend(x)
        return self._attend_in_float32(x)

    @torch.jit.unused
    def _attend_in_float32(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._attend(x.float())

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        # With channels last, neither the 1x1 convolutions nor the fused attention kernels need
        # copies. The kernels' memory is linear in P.
        pixels = x.contiguous(memory_format=torch.channels_last)
        attended = F.scaled_dot_product_attention(
            _rows(self.theta(pixels)), _rows(self.phi(pixels)), _rows(self.g(pixels)), scale=1.0
        )
        return x + self.conv_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, 1, P, C): one row for each of the P = H * W positions, of one head."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


def _is_autocast_enabled(x: torch.Tensor) -> bool:
    """Whether operations on ``x`` run in mixed precision; False in TorchScript."""
    if torch.jit.is_scripting():
        return False
    else:  # noqa: RET505 (without it the compiler would not skip the next line)
        return torch.is_autocast_enabled(x.device.type)


@REFINEMENT_REGISTRY.register()
def conv(channels: int) -> nn.Module:
    """3x3 convolution and ReLU."""
    layer = Conv2d(channels, channels, kernel_size=3, padding=1, activation=nn.ReLU())
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@REFINEMENT_REGISTRY.register()
def none(channels: int) -> nn.Module:
    """The average as it is."""
    return nn.Identity()


@REFINEMENT_REGISTRY.register()
def non_local(channels: int) -> nn.Module:
    """See :class:`NonLocalBlock`."""
    return NonLocalBlock(channels)


class BalancedFeaturePyramid(nn.Module):
    """
    Strengthen every level of a feature pyramid with the same, balanced semantic features: resize
    all levels to one size, average them (Equation 4), refine the result, and add it back to each.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        refine_level: int = 2,
        refine_type: str = "non_local",
    ):
        """
        Args:
            channels: C, number of channels of every level.
            num_levels: L, at least 1.
            refine_level: index, in [0, L), of the level whose size the others are resized to.
                2 is P4 of a pyramid P2..P6.
            refine_type: "non_local" (see :class:`NonLocalBlock`), "conv" (3x3 convolution and
                ReLU), "none", or another name in :data:`REFINEMENT_REGISTRY`.

        Raises:
            ArgumentError: if an argument is out of range.
        """
        super().__init__()
        if not 0 <= refine_level < num_levels:
            rule = f"the pyramid has {num_levels} levels, use a value from 0 to {num_levels - 1}"
            raise ArgumentError("refine_level", refine_level, rule)
        check_choice("refine_type", refine_type, [name for name, _ in REFINEMENT_REGISTRY])
        self.num_levels = num_levels
        self.refine_level = refine_level
        self.refine = REFINEMENT_REGISTRY.get(refine_type)(channels)

    def forward(self, features: List[torch.Tensor]) -> List[torch.Tensor]:
        """
        Args:
            features: L tensors (N, C, Hl, Wl) from high to low resolution, of any size.

        Returns:
            L tensors of the shapes of ``features``.
        """
        assert len(features) == self.num_levels, f"{len(features)} levels, not {self.num_levels}"
        balanced = features[self.refine_level]
        size, dtype = balanced.shape[-2:], balanced.dtype
        if _is_autocast_enabled(balanced):
            balanced = balanced.float()  # the sum of all levels might overflow
        for level, feature in enumerate(features):
            if level != self.refine_level:
                balanced = balanced + _resize(feature, size, self.refine_level - level)
        balanced = self.refine(balanced / self.num_levels).to(dtype)

        outputs = []
        for level, feature in enumerate(features):
            semantic = _like(feature, balanced)
            resized = _resize(semantic, feature.shape[-2:], level - self.refine_level)
            # In place where that is the same: the largest level takes most of the memory.
            is_own = level != self.refine_level and feature.dtype == dtype
            outputs.append(resized.add_(feature) if is_own else feature + resized)
        return outputs
