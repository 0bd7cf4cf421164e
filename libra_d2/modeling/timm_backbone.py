# SPDX-License-Identifier: Apache-2.0
from typing import Dict, Sequence

import torch

from detectron2.modeling import Backbone

from ..errors import ArgumentError, one_line

__all__ = ["TimmBackbone"]


class TimmBackbone(Backbone):
    """
    A network of the package timm (``pip install timm``) as the bottom-up network of a pyramid. It
    has timm's parameter names, without the classifier: append ``?matching_heuristics=True`` to the
    name of a checkpoint with timm's weights.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_chans: int = 3,
        **kwargs,
    ):
        """
        Args:
            name: a timm model with features at several strides, such as "convnext_tiny", possibly
                with the tag of pretrained weights, such as "convnext_tiny.fb_in1k".
            out_features: the levels to return, "res2" to "res5" for strides of 4 to 32.
            in_chans: number of image channels.
            kwargs: other arguments of the network, such as ``drop_path_rate``.

        Raises:
            ArgumentError: if timm is missing or has no such network, or it lacks one of the levels.
        """
        super().__init__()
        try:
            import timm
        except ImportError as e:
            rule = "the package timm is missing; `pip install timm`"
            raise ArgumentError("name", name, rule) from e
        if not timm.is_model(name):
            similar = timm.list_models(f"*{name[:5]}*")[:5]
            raise ArgumentError("name", name, f"use a model of timm, such as {similar}")
        # "getter" keeps timm's parameter names.
        kwargs.update(features_only=True, feature_cls="getter", in_chans=in_chans)
        try:
            self.net = timm.create_model(name, **kwargs)
        except RuntimeError as e:  # there is no such tag
            raise ArgumentError("name", name, one_line(e)) from e
        info = self.net.feature_info
        strides = {f"res{stride.bit_length() - 1}": stride for stride in info.reduction()}
        missing = [level for level in out_features if level not in strides]
        if missing:
            raise ArgumentError("out_features", missing, f"{name} has the levels {list(strides)}")
        self._out_features = list(out_features)
        self._out_feature_strides = strides
        self._out_feature_channels: Dict[str, int] = dict(zip(strides, info.channels()))
        self._size_divisibility = max(strides.values())

    @property
    def size_divisibility(self) -> int:
        """See :class:`Backbone`."""
        return self._size_divisibility

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Args: x: (N, in_chans, H, W). Returns: (N, C, H / stride, W / stride) by level."""
        features = dict(zip(self._out_feature_strides, self.net(x)))
        return {name: features[name] for name in self._out_features}
