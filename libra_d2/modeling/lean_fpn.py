# SPDX-License-Identifier: Apache-2.0
"""A feature pyramid network that keeps no feature map longer than it needs it."""

from typing import Dict, List, Optional

import torch
from torch.nn import functional as F

from detectron2.modeling import FPN

from .replacement import Replacement, is_captured

__all__ = ["LeanFPN"]


class LeanFPN(Replacement, FPN):
    """
    :class:`FPN` that lets go of each feature map after its last use: the same operations, with less
    memory where no gradients are computed.

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
            merged = self._merge(lateral_conv(features.pop(name)), merged)
            levels.insert(0, output_conv(merged))
        if top_block is not None:
            if of_top_block is None:
                of_top_block = levels[self._out_features.index(top_block.in_feature)]
            levels.extend(top_block(of_top_block))
        assert len(levels) == len(self._out_features)
        return dict(zip(self._out_features, levels))

    def _merge(self, lateral: torch.Tensor, coarser: Optional[torch.Tensor]) -> torch.Tensor:
        """Args: lateral: (N, C, H, W). coarser: (N, C, H / 2, W / 2), None at the last."""
        if coarser is None:
            return lateral
        merged = F.interpolate(coarser, scale_factor=2.0, mode="nearest").add_(lateral)
        return merged.div_(2) if self._fuse_type == "avg" else merged
