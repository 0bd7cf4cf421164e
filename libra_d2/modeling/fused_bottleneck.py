# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks whose convolutions add the shortcut and apply ReLU, on CPUs."""

from typing import Optional

import torch
from torch import nn

from detectron2.modeling.backbone.resnet import BottleneckBlock

from .folded_conv import FoldedConv2d
from .replacement import Replacement, has_hooks, is_captured, is_ordinary

__all__ = ["FusedBottleneck", "FusedStage"]

_DTYPES = (torch.float32, torch.bfloat16)  # that oneDNN has on CPUs, the latter not on all


def _relu_of(
    conv: FoldedConv2d, x: torch.Tensor, shortcut: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """
    The ReLU of a folded convolution, to which ``shortcut`` is added: it is overwritten by the
    result. These operations are those of the graphs that ``torch.compile`` makes for CPUs.
    """
    folded = [tensor.to(x.dtype) for tensor in conv.fold()]
    arguments = (x, *folded, conv.padding, conv.stride, conv.dilation, conv.groups)
    if shortcut is None:
        return torch.ops.mkldnn._convolution_pointwise.default(*arguments, "relu", [], None)
    convolve = torch.ops.mkldnn._convolution_pointwise_.binary
    return convolve(shortcut, *arguments, "add", None, "relu", [], None)


class FusedBottleneck(Replacement, BottleneckBlock):
    """
    :class:`BottleneckBlock` whose shortcut is added, and whose ReLUs are applied, while oneDNN
    writes the result of a convolution: each takes a pass over the features otherwise. On CPUs, in
    float32 and bfloat16, where norms can be folded (see :class:`FoldedConv2d`), channels are last
    in memory, and no gradients are computed. Elsewhere, with hooks on one of its convolutions, and
    in traces, scripts and compiled graphs, it is the parent.
    """

    def forward(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            overwrite: whether the result may take the memory of ``x``.
        """
        if not self._can_fuse(x):
            return super().forward(x)
        own = x.to(_type_of_results(x))
        x, overwrite = own, overwrite or own is not x
        out = _relu_of(self.conv2, _relu_of(self.conv1, x))
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x if overwrite else x.clone(memory_format=torch.channels_last)
        return _relu_of(self.conv3, out, shortcut)

    def _can_fuse(self, x: torch.Tensor) -> bool:
        if not is_ordinary(x) or not torch.backends.mkldnn.is_available():
            return False
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if _type_of_results(x) not in (_DTYPES if has_bfloat16 else _DTYPES[:1]):
            return False
        if not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *self.parameters())
        ):
            return False
        convs = (self.conv1, self.conv2, self.conv3, self.shortcut)
        return all(_is_known(conv) for conv in convs if conv is not None)


def _type_of_results(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_known(conv: nn.Module) -> bool:
    is_folded = isinstance(conv, FoldedConv2d) and conv.can_fold()
    return is_folded and conv.activation is None and not has_hooks(conv)


class FusedStage(Replacement, nn.Sequential):
    """Bottlenecks each of which, but for the first, overwrites the result of the one before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (N, C, H, W), which is not overwritten. Returns: the last one's result."""
        if is_captured():
            return super().forward(x)
        before = None
        for block in self:
            # A hook may have kept what the block before has returned.
            is_own = before is not None and not has_hooks(before) and not has_hooks(block)
            x, before = block(x, overwrite=is_own), block
        return x

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Sequences of bottlenecks only."""
        return super().can_replace(module) and {*map(type, module)} == {FusedBottleneck}
