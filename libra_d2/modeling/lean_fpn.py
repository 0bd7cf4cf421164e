# SPDX-License-Identifier: Apache-2.0
"""A feature pyramid network that keeps no feature map longer than it needs it."""

from typing import Dict, List, Optional

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.layers import Conv2d
from detectron2.modeling import FPN

from .folded_conv import FoldedConv2d
from .replacement import Replacement, has_hooks, is_captured, is_ordinary

__all__ = ["LeanFPN"]


class LeanFPN(Replacement, FPN):
    """
    :class:`FPN` that lets go of each feature map after its last use, and on CPUs adds features to
    those of the next level in place: the same numbers, with less memory where no gradients are
    computed.

    The variables of the parent's ``forward`` hold all feature maps of the backbone and two
    intermediate results of the largest level until it returns. No hook can reach them, so this
    class has a ``forward`` of its own. In traces, scripts and compiled graphs, it is the parent.
    """

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Args: x: (N, 3, H, W). Returns: see :class:`FPN`."""
        if is_captured():
            return super().forward(x)
        features = dict(self.bottom_up(x))
        top_block = self.top_block
        of_top_block = None if top_block is None else features.get(top_block.in_feature)
        levels: List[torch.Tensor] = []
        merged = None
        for name, lateral_conv, output_conv in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs
        ):
            merged = self._merge(lateral_conv(features.pop(name)), merged, lateral_conv)
            levels.insert(0, output_conv(merged))
        if top_block is not None:
            if of_top_block is None:
                of_top_block = levels[self._out_features.index(top_block.in_feature)]
            levels.extend(top_block(of_top_block))
        assert len(levels) == len(self._out_features)
        return dict(zip(self._out_features, levels))

    def _merge(
        self, lateral: torch.Tensor, coarser: Optional[torch.Tensor], lateral_conv: nn.Module
    ) -> torch.Tensor:
        """
        Args:
            lateral: (N, C, H, W), the result of ``lateral_conv``. On CPUs it is overwritten where
                no gradients are computed and no hook has seen it.
            coarser: (N, C, H / 2, W / 2), None at the last level.
        """
        if coarser is None:
            return lateral
        if lateral.dtype == coarser.dtype and _is_unseen(lateral, lateral_conv):
            height, width = coarser.shape[2:]
            blocks = lateral.unflatten(3, (width, 2)).unflatten(2, (height, 2))
            blocks.add_(coarser[:, :, :, None, :, None])
            merged = lateral
        else:
            merged = F.interpolate(coarser, scale_factor=2.0, mode="nearest").add_(lateral)
        return merged.div_(2) if self._fuse_type == "avg" else merged


def _is_unseen(x: torch.Tensor, conv: nn.Module) -> bool:
    is_known = type(conv) in (nn.Conv2d, Conv2d, FoldedConv2d)
    is_own = is_known and not any(map(has_hooks, conv.modules()))
    return is_own and is_ordinary(x) and not torch.is_grad_enabled()
