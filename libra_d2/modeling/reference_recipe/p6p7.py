# SPDX-License-Identifier: Apache-2.0
from typing import List

import torch

from detectron2.modeling.backbone.fpn import LastLevelP6P7

__all__ = ["LinearLastLevelP6P7"]


class LinearLastLevelP6P7(LastLevelP6P7):
    """:class:`LastLevelP6P7` without ReLU between P6 and P7, as in mmdetection."""

    def forward(self, c5: torch.Tensor) -> List[torch.Tensor]:
        """Args: c5: (N, C, H, W). Returns: P6 and P7, of half and a quarter of that size."""
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]
