# SPDX-License-Identifier: Apache-2.0
"""Makes a built model fast, Detectron2's own models too, without changing what it computes."""

from typing import Tuple

import torch
from torch import nn

from .folded_conv import fold_norms
from .roi_align import parallelize_roi_align

__all__ = ["accelerate"]


def _channels_last(self, input: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:
    """Forward pre-hook; its signature and annotations are those that torch.jit.script asks for."""
    return (input[0].contiguous(memory_format=torch.channels_last),)


def accelerate(
    model: nn.Module,
    *,
    channels_last: bool = True,
    fold_norm: bool = True,
    parallel_roi_align: bool = True,
    compile_backbone: bool = False,
    backend: str = "inductor",
) -> None:
    """
    Let ``model`` compute the same numbers, but for rounding, in less time. It is modified in place;
    its parameters and checkpoint keys stay.

    Args:
        model: a detector of Detectron2 or of this project, with a ``backbone``.
        channels_last: whether weights and features have their channels last in memory.
        fold_norm: see :class:`FoldedConv2d`.
        parallel_roi_align: see :class:`ParallelROIAlign`.
        compile_backbone: whether the backbone is compiled by ``torch.compile``, during the first
            iterations, for images of any size.
        backend: that of ``torch.compile``.
    """
    if fold_norm:
        fold_norms(model)
    if parallel_roi_align:
        parallelize_roi_align(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        model.backbone.register_forward_pre_hook(_channels_last)
    if compile_backbone:
        model.backbone.compile(dynamic=True, backend=backend)
