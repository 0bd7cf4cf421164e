# SPDX-License-Identifier: Apache-2.0
"""ImageNet weights published by the authors of ConvNeXt, renamed to timm's names."""

import re
from typing import Dict

import torch

__all__ = ["from_convnext"]

# Names of github.com/facebookresearch/ConvNeXt and of timm's convnext.py, applied in this order.
_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
)


def from_convnext(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return the weights of the network without its classifier, under timm's names."""
    converted = {}
    for key, value in state.items():
        if key.startswith(("norm.", "head.")):
            continue
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        converted[key] = value
    return converted
