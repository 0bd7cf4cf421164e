# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks whose last convolution adds its result to the shortcut, on CPUs."""

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.modeling.backbone.resnet import BottleneckBlock

from .folded_conv import FoldedConv2d
from .replacement import Replacement, has_hooks, is_captured, is_ordinary

__all__ = ["FusedBottleneck", "FusedStage"]

_DTYPES = (torch.float32, torch.bfloat16)  # that oneDNN has on CPUs, the latter not on all


class FusedBottleneck(Replacement, BottleneckBlock):
    """
    :class:`BottleneckBlock` whose last convolution adds its result to the shortcut, in place, which
    saves a pass over the features and the memory for them. The operation is that of the graphs
    which ``torch.compile`` makes. (It could apply ReLU, too, but would turn NaN into 0.)

    On x86 CPUs, in float32 and bfloat16, where the norm can be folded (see :class:`FoldedConv2d`),
    channels are last in memory, and no gradients are computed. Elsewhere, with hooks on the last
    convolution or the shortcut's, and in traces, scripts and compiled graphs, it is the parent.
    """

    def forward(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            overwrite: whether the result may take the memory of ``x``.
        """
        if not self._can_fuse(x):
            return super().forward(x)
        out = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        if self.shortcut is not None:
            result = self.shortcut(x)
        else:
            result = x.to(_type_of_results(x), copy=not overwrite)
        return F.relu_(_add_convolution(result, self.conv3, out))

    def _can_fuse(self, x: torch.Tensor) -> bool:
        if not is_ordinary(x):
            return False
        if not (_has_onednn() and _type_of_results(x) in _types()):
            return False
        if not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *self.parameters())
        ):
            return False
        return all(_is_known(conv) for conv in (self.conv3, self.shortcut) if conv is not None)


def _has_onednn() -> bool:
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return is_x86 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _types() -> tuple:
    return _DTYPES if torch.ops.mkldnn._is_mkldnn_bf16_supported() else _DTYPES[:1]


def _type_of_results(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_known(conv: nn.Module) -> bool:
    is_folded = isinstance(conv, FoldedConv2d) and conv.can_fold()
    return is_folded and conv.activation is None and not has_hooks(conv)


def _add_convolution(result: torch.Tensor, conv: FoldedConv2d, x: torch.Tensor) -> torch.Tensor:
    """Add the folded convolution of ``x`` to ``result``, in place."""
    folded = (tensor.to(x.dtype) for tensor in conv.fold())
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    add = torch.ops.mkldnn._convolution_pointwise_.binary
    return add(result, x, *folded, *geometry, "add", None, None, [], None)


class FusedStage(Replacement, nn.Sequential):
    """
    Bottlenecks each of which, but for the first, overwrites the result of the one before, unless
    somebody may have kept it: through hooks, or by replacing a block or its ``forward``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (N, C, H, W), which is not overwritten. Returns: the last one's result."""
        if is_captured() or not all(map(_is_unchanged, self)):
            return super().forward(x)
        for i, block in enumerate(self):
            x = block(x, overwrite=i > 0)
        return x

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Sequences of bottlenecks only."""
        return super().can_replace(module) and {*map(type, module)} == {FusedBottleneck}


def _is_unchanged(block: nn.Module) -> bool:
    return type(block) is FusedBottleneck and not any(map(has_hooks, block.modules()))
